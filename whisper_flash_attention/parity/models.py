"""The models of a comparison: stock with eager attention, ours, and the float32 yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration as StockWhisper

from whisper_flash_attention.config import resolve_device, resolve_dtype
from whisper_flash_attention.errors import OptionError, WeightsError
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration as OurWhisper,
)
from whisper_flash_attention.parity.settings import ParityOptions
from whisper_flash_attention.transcribe.loading import check_attention, explained
from whisper_flash_attention.weights import hub_id, load_processor, read_checkpoint


@dataclass
class Models:
    """The same weights several times.

    Attributes:
        stock: Transformers' own class with eager attention, in the dtype that is compared.
        ours: our class, same device and dtype.
        yardstick: stock in float32, where the dtype is another; else None.
        processor: feature extractor and tokenizer; None where there are none and none are needed.
    """

    stock: Any
    ours: Any
    yardstick: Any | None
    processor: Any | None

    def by_name(self) -> dict[str, Any]:
        """Ours, stock, and float32 where there is one."""
        models = {"ours": self.ours, "stock": self.stock, "float32": self.yardstick}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def dtype_name(self) -> str:
        """ "float32", "float16" or "bfloat16"."""
        return str(self.stock.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        device: torch.device = self.stock.device
        return device

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(mel bins, frames) of the features of one window."""
        config = self.stock.config
        return int(config.num_mel_bins), 2 * int(config.max_source_positions)

    @property
    def longest(self) -> int:
        """Most ids that a text can have, the prompt included."""
        limit = getattr(self.stock.generation_config, "max_length", None)
        positions = int(self.stock.config.max_target_positions)
        return positions if limit is None else min(positions, int(limit))

    @property
    def language_ids(self) -> dict[str, int]:
        """Token ids by language code; empty for a model that has no languages, or tells none."""
        config = self.stock.generation_config
        if not getattr(config, "is_multilingual", False):
            return {}
        known = getattr(config, "lang_to_id", None) or {}
        return {token.strip("<|>"): number for token, number in known.items()}

    @property
    def first_timestamp(self) -> int | None:
        """Id of the first timestamp token; None where the generation config does not tell it."""
        before = getattr(self.stock.generation_config, "no_timestamps_token_id", None)
        return None if before is None else int(before) + 1

    def check(self, options: ParityOptions) -> None:
        """Raise `OptionError` if these models cannot decode in a mode that is asked for."""
        names = [mode.name for mode in options.chosen_modes() if mode.has_timestamps]
        if names and self.first_timestamp is None:
            raise OptionError(
                f"mode {names[0]!r} needs a generation config with no_timestamps_token_id, which "
                "this checkpoint lacks; leave the mode out with --mode"
            )


def load_models(
    source: str, *, device: str, dtype: str, attention: str, needs_extractor: bool
) -> Models:
    """Load one checkpoint two or three times.

    Args:
        source: all that `WhisperFlashAttentionForConditionalGeneration.from_pretrained` takes, and
            OpenAI's short names.
        device, dtype: as `config.resolve_device` and `resolve_dtype` take them.
        attention: back-end of our model.
        needs_extractor: whether there are recordings to make features of. Features that come from
            a file need no processor; without one, there is no text.

    Raises:
        WeightsError: the checkpoint, or the processor that is needed, cannot be read.
        DeviceError, OptionError: no such device, or an unknown device, dtype or back-end.
    """
    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    check_attention(attention)
    checkpoint = hub_id(source)
    with explained(source):
        processor = _processor(checkpoint, needs_extractor)
        ours: Any = OurWhisper.from_pretrained(
            checkpoint, attn_implementation=attention, dtype=precision
        )
        stock = _load_stock(checkpoint, precision)
        is_half = precision != torch.float32
        yardstick = _load_stock(checkpoint, torch.float32) if is_half else None
    models = Models(stock, ours, yardstick, processor)
    for model in models.by_name().values():
        model.to(target).eval()
    return models


def _processor(checkpoint: str, is_needed: bool) -> Any | None:
    try:
        return load_processor(checkpoint)
    except WeightsError:
        if is_needed:
            raise
        return None


def _load_stock(checkpoint: str, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    read = read_checkpoint(checkpoint)
    if read is None:
        return StockWhisper.from_pretrained(checkpoint, **options)
    model: Any = StockWhisper.from_pretrained(
        None, config=read.config, state_dict=read.state_dict, **options
    )
    model.generation_config = read.generation_config
    return model
