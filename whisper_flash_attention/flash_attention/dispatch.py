"""Which back-end runs which call: the registry, the order of preference, `attend`, `survey`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whisper_flash_attention.errors import OptionError, UnsupportedAttention
from whisper_flash_attention.flash_attention.backends import (
    FlashAttn,
    Reference,
    SdpaCudnn,
    SdpaEfficient,
    SdpaFlash,
    Xformers,
)
from whisper_flash_attention.flash_attention.problem import (
    AttentionInputs,
    AttentionProblem,
    Backend,
    MaskKind,
)

AUTO = "auto"

BACKENDS: tuple[Backend, ...] = (
    Reference(),
    SdpaFlash(),
    SdpaCudnn(),
    SdpaEfficient(),
    Xformers(),
    FlashAttn(),
)

# Fewer keys are likely those of a growing cache.
FEW_KEYS = 512
# From this number of one-token queries (batch x heads) on, a GPU takes longer than the host's call.
MANY_QUERIES = 1024


def backend_names() -> tuple[str, ...]:
    """Values of `backend`: "auto" and every back-end."""
    return (AUTO, *(backend.name for backend in BACKENDS))


def preference(problem: AttentionProblem) -> tuple[str, ...]:
    """The order in which "auto" tries the back-ends. The one place to change it.

    - Many keys with work for the whole GPU: cuDNN is the fastest on Hopper.
    - Else the call takes longer than the arithmetic, and PyTorch's memory-efficient kernel has the
      cheapest call. It supports every mask, and unlike cuDNN it needs no plan for each length of a
      growing cache. xFormers runs the same kernel with more Python around it.

    `docs/decisions/0002-automatic-attention.md` has the measurements.
    """
    is_one_token = problem.q_len == 1
    is_large = not is_one_token or problem.batch * problem.heads >= MANY_QUERIES
    if problem.kv_len >= FEW_KEYS and is_large and problem.mask is MaskKind.NONE:
        gpu = ("sdpa_cudnn", "flash_attn", "sdpa_flash", "sdpa_efficient", "xformers")
    else:
        gpu = ("sdpa_efficient", "sdpa_flash", "flash_attn", "xformers", "sdpa_cudnn")
    return (*gpu, "reference")


def choose(problem: AttentionProblem, name: str, backends: Sequence[Backend]) -> Backend:
    """The back-end of `backends` called `name`, or with "auto" the first that can by `preference`.

    Raises:
        OptionError: no back-end is called `name`.
        UnsupportedAttention: the back-end cannot run `problem`; nothing else is tried.
    """
    by_name = {backend.name: backend for backend in backends}
    if name == AUTO:
        candidates = [by_name[preferred] for preferred in preference(problem)]
    elif name in by_name:
        candidates = [by_name[name]]
    else:
        raise OptionError(_unknown(name, (AUTO, *by_name)))
    for backend in candidates:
        if not backend.why_not(problem):
            return backend
    raise UnsupportedAttention(_refusal(problem, name, explain(problem, backends)))


def explain(
    problem: AttentionProblem, backends: Sequence[Backend] = BACKENDS
) -> dict[str, list[str]]:
    """For every back-end by name, why it cannot run `problem`; empty where it can."""
    return {backend.name: backend.why_not(problem) for backend in backends}


@lru_cache(maxsize=8192)
def pick(problem: AttentionProblem, backend: str = AUTO) -> Backend:
    """The back-end that will run `problem`; cached, since every attention call needs it.

    PyTorch's settings count as they are when a problem is first met: call `pick.cache_clear()`
    after switching deterministic algorithms or one of PyTorch's kernels on or off.

    Raises:
        OptionError: `backend` is not one of `backend_names()`.
        UnsupportedAttention: the back-end requested by name cannot run `problem`. The message
            has shape, dtype, device and the reasons of every back-end.
    """
    return choose(problem, backend, BACKENDS)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = AUTO,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, differentiable in q, k and v.

    Args:
        q: queries [B, Lq, H, D].
        k, v: keys and values [B, Lk, H, D].
        causal: query i sees the keys j <= i + Lk - Lq (aligned bottom-right).
        mask: broadcastable to [B, H, Lq, Lk]; bool (True = may attend) or added to the scores.
            It applies together with `causal`. A query that may attend to nothing gets zeros.
        scale: factor of the scores; 1 / sqrt(D) if None.
        dropout: share of the attention weights dropped, in [0, 1).
        backend: one of `backend_names()`. A back-end requested by name never falls back.

    Returns:
        [B, Lq, H, D] in the dtype of q.

    Raises:
        ValueError: the inputs do not fit together.
        OptionError: `backend` is unknown.
        UnsupportedAttention: the requested back-end cannot run these inputs.
    """
    inputs = AttentionInputs(q, k, v, causal, mask, scale, dropout)
    return pick(inputs.problem, backend).run(inputs)


def _unknown(name: str, names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"there is no attention back-end {name!r}; there are {', '.join(names)}.{hint}"


def _refusal(problem: AttentionProblem, name: str, reasons: dict[str, list[str]]) -> str:
    others = [
        f"{other} {'can' if not against else 'cannot: ' + '; '.join(against)}"
        for other, against in reasons.items()
        if other != name
    ]
    return (
        f"attention back-end {name} cannot run {problem}: {'; '.join(reasons[name])}. "
        f"The others: {' | '.join(others)}."
    )


# (case, queries, keys, causal): thirty seconds of audio are 1500 positions.
CASES = (
    ("encoder self-attention", 1500, 1500, False),
    ("decoder self-attention, prompt", 4, 4, True),
    ("decoder self-attention, one token", 1, 64, True),
    ("cross-attention, one token", 1, 1500, False),
)


@dataclass(frozen=True, slots=True)
class SurveyRow:
    """One kind of attention: the choice of "auto", and each back-end's reasons (empty = it can)."""

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
    """What runs on `device` in `dtype`, for inference: one row per kind of attention."""
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
