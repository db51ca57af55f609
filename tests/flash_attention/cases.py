"""One table of attention calls for every back-end, the oracle's answers and the tolerances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

from whisper_flash_attention.flash_attention import attend

HEAD_DIM = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (queries, keys): square, one token against a cache, a short prompt or a chunk against more keys.
LENGTHS = (
    *((1, 1), (7, 7), (447, 447), (1500, 1500)),
    *((1, 7), (1, 447), (1, 1500)),
    *((7, 447), (7, 1500), (447, 1500)),
)
HEADS = (6, 8, 12, 16, 20)
BATCHES = (1, 3)


@dataclass(frozen=True)
class Tolerance:
    """Largest error allowed, as a share of the largest number of the oracle's answer (or of 1)."""

    forward: float
    gradient: float


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 5e-5),
    torch.float16: Tolerance(2e-3, 5e-3),
    torch.bfloat16: Tolerance(1.6e-2, 4e-2),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    q_len: int
    kv_len: int
    heads: int
    batch: int
    causal: bool
    padded: bool

    def __str__(self) -> str:
        flags = "-causal" * self.causal + "-padded" * self.padded
        return f"{self.q_len}x{self.kv_len}-heads{self.heads}-batch{self.batch}{flags}"

    @property
    def scores(self) -> int:
        """How many scores: a measure of its cost."""
        return self.batch * self.heads * self.q_len * self.kv_len

    def parts(self) -> tuple[object, ...]:
        return ((self.q_len, self.kv_len), self.heads, self.batch, self.causal, self.padded)


ALL_CASES = tuple(
    Case(*lengths, heads, batch, causal, padded)
    for lengths, heads, batch, causal, padded in product(
        LENGTHS, HEADS, BATCHES, (False, True), (False, True)
    )
)


def covering(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Few of `cases`, cheap ones first, in which every pair of their properties still meets."""
    wanted = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while wanted:
        best = max(cases, key=lambda case: (len(wanted & set(_pairs(case))), -case.scores))
        chosen.append(best)
        wanted -= set(_pairs(best))
    return tuple(chosen)


def _pairs(case: Case) -> Iterator[tuple[object, ...]]:
    return combinations(enumerate(case.parts()), 2)


# What a CPU does in seconds, with a whole encoder among it.
FEW_CASES = (
    *covering(tuple(case for case in ALL_CASES if case.scores < 5_000_000)),
    Case(1500, 1500, 6, 1, causal=False, padded=True),
)
# What fits in a small machine's memory beside its float64 oracle; the rest runs on GPUs.
FITTING_CASES = tuple(case for case in ALL_CASES if case.scores < 20_000_000)
# What a GPU does in seconds: every pair.
MORE_CASES = covering(ALL_CASES)


@dataclass
class Call:
    """The tensors of a case. q, k, v are leaves; `upstream` is the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    upstream: Tensor

    def run(self, backend: str, **options: object) -> Tensor:
        return attend(
            *(self.q, self.k, self.v),
            causal=self.causal,
            mask=self.mask,
            backend=backend,
            **options,
        )

    def run_with_gradients(self, backend: str) -> dict[str, Tensor]:
        """Output and the gradients of q, k and v."""
        out = self.run(backend)
        gradients = torch.autograd.grad(out, (self.q, self.k, self.v), self.upstream)
        return dict(zip(("out", "q", "k", "v"), (out.detach(), *gradients), strict=True))

    def exact(self) -> Call:
        """The same numbers in float64."""
        q, k, v = (leaf.detach().double().requires_grad_() for leaf in (self.q, self.k, self.v))
        mask = self.mask
        if mask is not None and mask.dtype is not torch.bool:
            mask = mask.double()
        return Call(q, k, v, mask, self.causal, self.upstream.double())


def make_call(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Call:
    """Random tensors; a padded case hides the first keys of some rows, as left padding does."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(length: int) -> Tensor:
        shape = (case.batch, length, case.heads, HEAD_DIM)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, k, v, upstream = (random(n) for n in (case.q_len, case.kv_len, case.kv_len, case.q_len))
    mask = None
    if case.padded:
        hidden = torch.arange(case.batch) * 2 + case.kv_len // 3
        mask = (torch.arange(case.kv_len) >= hidden[:, None]).to(device)[:, None, None]
    return Call(*(tensor.requires_grad_() for tensor in (q, k, v)), mask, case.causal, upstream)


def worst_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest wanted number, or of 1 if that is smaller."""
    difference = (found.double() - wanted.double()).abs().max().item()
    return float(difference) / max(1.0, wanted.abs().max().item())


def assert_agrees(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Output and gradients within the tolerance of `dtype`, and in `dtype`."""
    for name, tensor in found.items():
        tolerance = TOLERANCES[dtype]
        limit = tolerance.forward if name == "out" else tolerance.gradient
        assert tensor.dtype is dtype
        assert tensor.isfinite().all(), f"{name} is not finite"
        error = worst_error(tensor, wanted[name])
        assert error <= limit, f"{name} is off by {error:.1e}, more than {limit:.1e}"
