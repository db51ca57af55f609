"""The systems that are compared: how to build each, how to run it, and why it cannot run here.

To add one, write a `System` and name it in `named` or in `SYSTEMS`. All do the same work: greedy
decoding of exactly `new_tokens` tokens for every clip, from log-mel features on the host to token
ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from whisper_flash_attention import validation as check
from whisper_flash_attention.benchmark.settings import ModelSize

if TYPE_CHECKING:
    import torch

FLASH = "flash"


@dataclass(frozen=True)
class Loaded:
    """A system that is ready to be timed.

    `generate(features, new_tokens)` takes float features [B, mel bins, 3000] on the host, in the
    model's dtype, and returns ids [B, new_tokens] without the prompt, on any device.
    `attention` names the attention in use for every kind of attention call.
    """

    generate: Callable[[torch.Tensor, int], torch.Tensor]
    attention: dict[str, str]


@dataclass(frozen=True)
class System:
    """One way to run Whisper.

    Args:
        name: on the command line and in the results.
        summary: what it is, in half a line.
        attention: of Transformers, or with `is_ours` a back-end of this package.
        is_ours: the code of this package decides its speed.
        generate_options: further arguments of `generate`.
    """

    name: str
    summary: str
    attention: str
    is_ours: bool = False
    generate_options: dict[str, Any] = field(default_factory=dict)

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why it cannot run on this device in this dtype; None if it can."""
        from whisper_flash_attention.flash_attention import survey

        for row in survey(device, dtype) if self.is_ours else ():
            if reasons := row.reasons.get(self.attention):
                return f"{self.attention} cannot run {row.case}: {'; '.join(reasons)}"
        return None

    def load(
        self,
        size: ModelSize,
        decoder_layers: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Loaded:
        """Build the model with the benchmark's random weights on the device."""
        from transformers import WhisperForConditionalGeneration as Stock

        from whisper_flash_attention.benchmark.random_weights import build_model
        from whisper_flash_attention.modeling_whisper_flash_attention import (
            WhisperFlashAttentionForConditionalGeneration as Ours,
        )

        kind = Ours if self.is_ours else Stock
        model = build_model(kind, size, decoder_layers, device=device, dtype=dtype)
        model.set_attn_implementation(self.attention)
        attention = {"all": self.attention}
        if self.is_ours and self.attention == "auto":
            attention = engine_attention(model, size, batch_size)
        return Loaded(greedy(model, self.generate_options), attention)


def engine_attention(model: Any, size: ModelSize, batch_size: int) -> dict[str, str]:
    """What attends in this package's engine, encoder and decoder, for batches of this size."""
    from whisper_flash_attention.engine.layout import backend_name, has_encoder_kernels
    from whisper_flash_attention.flash_attention import survey

    head_dim = size.d_model // size.heads
    rows = survey(model.device, model.dtype, heads=size.heads, head_dim=head_dim, batch=batch_size)
    encoder = next(row for row in rows if row.case.startswith("encoder"))
    kernels = backend_name(model.device)
    form = model.plan(batch_size=batch_size, max_new_tokens=1).cross_attention
    fused = has_encoder_kernels(model.device, model.dtype)
    return {
        encoder.case: kernels if fused else encoder.picked,
        "decoder self-attention": kernels,
        "cross-attention": f"{kernels}, {form}",
    }


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("orig", "stock Transformers, eager attention", "eager"),
        System("sdpa", "stock Transformers as it comes: PyTorch's SDPA", "sdpa"),
        System(
            "static",
            "stock Transformers, SDPA, static cache (compiled on a GPU: a long first call)",
            "sdpa",
            generate_options={"cache_implementation": "static"},
        ),
        System(FLASH, "this package, best attention back-end for every call", "auto", is_ours=True),
    )
}


def named(name: str) -> System:
    """The system of this name; `flash:<back-end>` is this package with that back-end.

    Raises:
        OptionError: there is no such system.
    """
    every = SYSTEMS | {system.name: system for system in backend_systems().values()}
    return every[check.one_of("system", name, every)]


def backend_systems() -> dict[str, System]:
    """`flash:<back-end>` for every attention back-end, by the back-end's name."""
    from whisper_flash_attention.flash_attention import backend_names

    return {
        name: System(
            f"{FLASH}:{name}", f"this package, attention by {name} alone", name, is_ours=True
        )
        for name in backend_names()
        if name != "auto"
    }


def greedy(model: Any, options: dict[str, Any]) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """`Loaded.generate` for a model with Transformers' `generate`."""

    def generate(features: torch.Tensor, new_tokens: int) -> torch.Tensor:
        ids: torch.Tensor = model.generate(
            features.to(model.device, non_blocking=True),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )
        return ids

    return generate
