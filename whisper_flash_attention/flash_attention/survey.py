"""Which back-end would run each kind of attention of an encoder-decoder model, and why not others.

Nothing is run: for `doctor`, for footers, for people who wonder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from whisper_flash_attention.flash_attention.base import AttentionProblem
from whisper_flash_attention.flash_attention.dispatch import explain, pick

# (case, queries, keys, causal): thirty seconds of audio are 1500 positions.
CASES = (
    ("encoder self-attention", 1500, 1500, False),
    ("decoder self-attention, prompt", 4, 4, True),
    ("decoder self-attention, one token", 1, 64, True),
    ("cross-attention, one token", 1, 1500, False),
)


@dataclass(frozen=True, slots=True)
class SurveyRow:
    """One kind of attention: what "auto" picks, and each back-end's reasons (empty = it can)."""

    case: str
    picked: str
    reasons: dict[str, list[str]]


def survey(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    heads: int = 6,
    head_dim: int = 64,
    batch: int = 1,
) -> tuple[SurveyRow, ...]:
    """What would run on `device` in `dtype`, for inference, one row per kind of attention."""
    device = torch.device(device)
    rows = []
    for case, q_len, kv_len, causal in CASES:
        problem = AttentionProblem(
            device_type=device.type,
            device_index=_index(device),
            dtype=dtype,
            batch=batch,
            heads=heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=head_dim,
            causal=causal and q_len > 1,
        )
        rows.append(SurveyRow(case, pick(problem).name, explain(problem)))
    return tuple(rows)


def _index(device: torch.device) -> int:
    if device.type == "cuda" and ":" not in str(device) and torch.cuda.is_available():
        return torch.cuda.current_device()
    return device.index or 0
