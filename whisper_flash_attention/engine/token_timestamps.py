"""Where each token of many windows begins, and how likely it is: `align` and `warp` put together.

On an NVIDIA GPU by kernels, all windows at once, and nobody waits for the device until the answer
is asked for; elsewhere window by window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from whisper_flash_attention.engine import decode_plan
from whisper_flash_attention.engine.alignment import (
    Said,
    check_finite,
    listen,
    listen_together,
    positions_with_audio,
)
from whisper_flash_attention.engine.dtw import start_positions, token_costs
from whisper_flash_attention.engine.transfer import to_device, to_host
from whisper_flash_attention.engine.weights import DecoderWeights


@dataclass(frozen=True)
class TokenTimes:
    """Of one window's tokens from the first that was asked for to the end.

    Args:
        starts: int64 [N], ascending: the encoder's position at which each begins.
        probabilities: float32 [N - 1]: of each but the end, among the text tokens.
    """

    starts: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]


def token_times(
    weights: DecoderWeights,
    rows: Sequence[Said],
    heads: Sequence[tuple[int, int]],
    *,
    first: int,
    text_tokens: int,
) -> Callable[[], list[TokenTimes]]:
    """Have the device begin, and return the function that waits for its answer.

    Args:
        weights, rows, heads, text_tokens: as for `align.listen`.
        first: how many tokens of each row are its prompt's.

    Raises:
        OptionError: as `align.listen`.
        NotFinite: the model computed NaN or infinity; here or from the function.
    """
    device = weights.embedding.device
    if not rows or not decode_plan.has_kernels(device):
        found = _one_by_one(weights, rows, heads, first, text_tokens)
        return lambda: found
    # Launches go to the current device: make it the weights'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _by_kernels(weights, rows, heads, first, text_tokens)


def _one_by_one(
    weights: DecoderWeights,
    rows: Sequence[Said],
    heads: Sequence[tuple[int, int]],
    first: int,
    text_tokens: int,
) -> list[TokenTimes]:
    costs, likely = [], []
    for row, heard in zip(rows, listen(weights, rows, heads, text_tokens=text_tokens), strict=True):
        end = len(row.tokens) - 1
        # A token is where the decoder looks from the token before it.
        costs.append(token_costs(heard.attention, first - 1, end).cpu().numpy())
        likely.append(heard.probabilities[first:end].cpu().numpy())
    return [TokenTimes(*each) for each in zip(start_positions(costs), likely, strict=True)]


def _by_kernels(
    weights: DecoderWeights,
    rows: Sequence[Said],
    heads: Sequence[tuple[int, int]],
    first: int,
    text_tokens: int,
) -> Callable[[], list[TokenTimes]]:
    from whisper_flash_attention.kernels import dtw as kernels

    device = weights.embedding.device
    counts = [len(row.tokens) for row in rows]
    audio = [positions_with_audio(row) for row in rows]
    lengths, seen = to_device(np.array([counts, audio], np.int32), device)
    longest, width, before = max(counts), max(audio), first - 1
    costs = torch.empty((len(rows), longest - first, width), device=device)
    likely = torch.zeros((len(rows), longest), device=device)
    finite, done = [], 0
    for part in listen_together(weights, rows, heads, text_tokens=text_tokens):
        some = slice(done, done + len(part.rows))
        done = some.stop
        batch, count, _, positions = part.attention.shape
        moments = torch.empty((2, batch, count, positions), device=device)
        kernels.token_costs(part.attention, lengths[some], seen[some], before, moments, costs[some])
        likely[some, : part.probabilities.shape[1]] = part.probabilities
        finite.append(part.is_finite)
    size = 1 << (costs.shape[1] - 1).bit_length()
    choices = torch.empty(
        (len(rows), costs.shape[1] + width, size), dtype=torch.int8, device=device
    )
    starts = torch.zeros((len(rows), costs.shape[1]), dtype=torch.int32, device=device)
    kernels.token_starts(costs, lengths, seen, before, choices, starts)
    arrived = to_host(starts, likely, torch.stack(finite).all())

    def finish() -> list[TokenTimes]:
        starts, likely, is_finite = arrived()
        check_finite(is_finite)
        begins, chances = starts.numpy().astype(np.int64), likely.numpy()
        return [
            TokenTimes(begins[row, : count - first], chances[row, first : count - 1])
            for row, count in enumerate(counts)
        ]

    return finish
