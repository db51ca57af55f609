"""The key/value caches that Transformers' own decode loop fills when it runs our model.

Stock Whisper grows its self-attention cache with `torch.cat`: every step allocates a buffer of the
new length and copies the whole past into it, for every layer. Here buffers grow by buckets, a step
writes one column in place, and the layer returns a view of the valid part. The cross-attention
cache keeps the projected encoder states without a copy.

Both are drop-in layers of Transformers' `DynamicCache`, so beam search, cropping and the splitting
of batches work as with the stock cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from whisper_flash_attention.hf.compat import CACHE, Cache, DynamicLayer

# Buffers grow by this number of positions; Whisper's 448 positions are seven buckets.
BUCKET = 64


def bucket_of(length: int) -> int:
    """The capacity, in positions, that a cache of `length` positions gets."""
    return -(-length // BUCKET) * BUCKET


class BucketedLayer(DynamicLayer):
    """Self-attention keys and values `[B, H, T, D]`, as views of buffers that grow by buckets.

    With gradients enabled, buffers cannot be written in place; the layer concatenates as stock's.
    """

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, H, L, D]` and return all keys and values so far, `[B, H, T + L, D]`."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        total = past + key_states.shape[-2]
        if not self._buffers_hold(total):
            self._grow(key_states, past, total)
        assert self._buffers is not None
        keys, values = self._buffers
        # `narrow` instead of slices: slicing takes as long as the copies themselves.
        keys.narrow(2, past, total - past).copy_(key_states)
        values.narrow(2, past, total - past).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, total), values.narrow(2, 0, total)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search, buffers and all, so that the next step still fits."""
        length = self.get_seq_length()
        if length == 0:
            return
        if not self._buffers_hold(length):
            super().reorder_cache(beam_idx)
            return
        assert self._buffers is not None
        index = beam_idx.to(self._buffers[0].device)
        keys, values = (buffer.index_select(0, index) for buffer in self._buffers)
        self._buffers = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def reset(self) -> None:
        """Forget everything, buffers included."""
        # Transformers before 5.23 only zeroes them, which keeps the past's length.
        self._buffers = self.keys = self.values = None
        self.is_initialized = False

    def _buffers_hold(self, total: int) -> bool:
        """Whether the valid keys are still a view of our buffers and `total` positions fit.

        Transformers' own code may have replaced `keys` and `values` (selected rows, cropped,
        offloaded): a crop leaves the view in place, anything else needs one copy.
        """
        if self._buffers is None or self.keys is None or self.values is None:
            return False
        keys, values = self._buffers
        in_place = (
            self.keys.data_ptr() == keys.data_ptr() and self.values.data_ptr() == values.data_ptr()
        )
        return in_place and self.keys.shape[0] == keys.shape[0] and total <= keys.shape[-2]

    def _grow(self, like: torch.Tensor, past: int, total: int) -> None:
        batch, heads, _, width = like.shape
        shape = (batch, heads, bucket_of(total), width)
        # Zeros, not empty: kernels multiply masked keys by zero, and NaN would remain NaN.
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        if past:
            assert self.keys is not None and self.values is not None
            keys[:, :, :past].copy_(self.keys)
            values[:, :, :past].copy_(self.values)
        self._buffers = keys, values


class StoredOnceLayer(DynamicLayer):
    """Cross-attention keys and values, stored without a copy."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep `[B, H, S, D]` without a copy; a second call appends, as the stock layer does."""
        if self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _cache_of(layer: type[DynamicLayer]) -> DynamicCache:
    cache = DynamicCache()
    Cache.__init__(cache, layer_class_to_replicate=layer)
    return cache


def new_cache() -> EncoderDecoderCache:
    """An empty cache for one `generate` call."""
    return EncoderDecoderCache(_cache_of(BucketedLayer), _cache_of(StoredOnceLayer))


_PARTS = ("self_attention_cache", "cross_attention_cache", "is_updated")


class RecomputedCache(EncoderDecoderCache):
    """An `EncoderDecoderCache` whose content is computed at the first access.

    It holds what stock's holds after `generate`: every token but the last. The model's weights at
    the time of access are used. Copies and pickles hold the content.

    Args:
        compute: returns the cache with the content; called at most once.
    """

    def __init__(self, compute: Callable[[], EncoderDecoderCache]) -> None:
        self._compute: Callable[[], EncoderDecoderCache] | None = compute

    def __getattr__(self, name: str) -> Any:
        # Called for attributes that are not set; the parts are not before the first access.
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
        """The cache of one row of the batch, on the CPU, as stock keeps it in each segment."""
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
    """The cache that stock's decoding of these sequences would return.

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
