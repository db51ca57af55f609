"""What a launch of `cross_attention` must fit."""

from __future__ import annotations

import torch
from torch import Tensor

from whisper_flash_attention.errors import UnsupportedAttention


def check_rows(
    rows: int, clips: int, rows_per_clip: int, tokens_per_slot: int, finished: Tensor | None
) -> None:
    """Raise `UnsupportedAttention` unless rows are those of whole clips, and of whole slots."""
    if rows != clips * rows_per_clip or rows_per_clip % tokens_per_slot:
        raise UnsupportedAttention(
            f"{clips} clips of {rows_per_clip} rows each, slots of {tokens_per_slot} tokens, "
            f"were asked for; q has {rows} rows"
        )
    if finished is not None and finished.shape != (rows // tokens_per_slot,):
        raise UnsupportedAttention(
            f"finished must be [{rows // tokens_per_slot}], one per slot; "
            f"found {list(finished.shape)}"
        )


def check_splits(
    splits: int,
    tiles: int,
    needed: tuple[int, int],
    partials: Tensor | None,
    counters: Tensor | None,
) -> None:
    """Raise `UnsupportedAttention` unless there are so many tiles, and room for what splits leave.

    Args:
        needed: elements of `partials` and of `counters`.
    """
    if not 1 <= splits <= tiles:
        raise UnsupportedAttention(
            f"splits must be 1 to {tiles}, a tile of keys each; got {splits}"
        )
    for name, tensor, size, dtype in (
        ("partials", partials, needed[0], torch.float32),
        ("counters", counters, needed[1], torch.int32),
    ):
        if size == 0:
            continue
        if tensor is None or tensor.numel() < size or tensor.dtype is not dtype:
            found = "none" if tensor is None else f"{tensor.numel()} of {tensor.dtype}"
            raise UnsupportedAttention(
                f"{name} must hold {size} elements of {dtype} for {splits} splits; found {found}"
            )
        if not tensor.is_contiguous():
            raise UnsupportedAttention(f"{name} must be contiguous")
