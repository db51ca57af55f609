"""The key/value cache in a `generate` output, computed when someone looks at it.

The engine's buffers serve the next call, and copying every layer's keys and values out of them
would cost more memory than the decode itself. Hardly anyone reads the cache of Whisper's
output, so it is recomputed on demand: one pass of the model over the tokens gives the same cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import EncoderDecoderCache

from whisper_flash_attention.hf.compat import CACHE
from whisper_flash_attention.hf.kv_cache import new_cache

_PARTS = ("self_attention_cache", "cross_attention_cache", "is_updated")


class RecomputedCache(EncoderDecoderCache):
    """An `EncoderDecoderCache` whose content is computed at the first look.

    It holds what stock's holds after `generate`: every token but the last. It is computed from the
    model's weights as they are at that time. Copies and pickles hold the content.

    Args:
        compute: makes the cache whose content this one takes over; called at most once.
    """

    def __init__(self, compute: Callable[[], EncoderDecoderCache]) -> None:
        self._compute: Callable[[], EncoderDecoderCache] | None = compute

    def __getattr__(self, name: str) -> Any:
        # Reached for attributes that are not set, which the parts are not before the first look.
        compute = self.__dict__.get("_compute")
        if name not in _PARTS or compute is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        computed = compute()
        for part in _PARTS:
            setattr(self, part, getattr(computed, part))
        self._compute = None
        return self.__dict__[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return EncoderDecoderCache, (self.self_attention_cache, self.cross_attention_cache)

    def row(self, index: int) -> RecomputedCache:
        """The cache of one row of the batch, on the CPU: what stock keeps of each segment."""
        return RecomputedCache(lambda: self._row(index))

    def _row(self, index: int) -> EncoderDecoderCache:
        past_layers: list[Any] = self.self_attention_cache.layers
        cross_layers: list[Any] = self.cross_attention_cache.layers
        rows = [
            tuple(
                part[index][None].cpu()
                for part in (past.keys, past.values, cross.keys, cross.values)
            )
            for past, cross in zip(past_layers, cross_layers, strict=True)
        ]
        return EncoderDecoderCache(rows)


def recomputed_cache(model: Any, states: torch.Tensor, sequences: torch.Tensor) -> RecomputedCache:
    """The cache that decoding leaves behind.

    Args:
        model: a `WhisperForConditionalGeneration`.
        states: the encoder's output `[clips, S, D]`.
        sequences: all tokens `[B, L]`, int64; row r belongs to clip `r // (B // clips)`.
    """

    @torch.no_grad()
    def compute() -> EncoderDecoderCache:
        cache = new_cache()
        repeats = sequences.shape[0] // states.shape[0]
        model.model.decoder(
            input_ids=sequences[:, :-1],
            encoder_hidden_states=states.repeat_interleave(repeats, dim=0),
            use_cache=True,
            **{CACHE: cache},
        )
        return cache

    return RecomputedCache(compute)
