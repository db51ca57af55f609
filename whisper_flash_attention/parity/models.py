"""The models of a comparison (stock with eager attention, ours, float32 stock), and their calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers import WhisperForConditionalGeneration as StockWhisper

from whisper_flash_attention.devices import resolve_device, resolve_dtype
from whisper_flash_attention.errors import OptionError, WeightsError
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration as OurWhisper,
)
from whisper_flash_attention.parity.cases import Mode, ParityOptions
from whisper_flash_attention.transcribe.loading import check_attention, explained
from whisper_flash_attention.weights import hub_id, load_processor, read_checkpoint


@dataclass
class Models:
    """The same weights several times.

    Attributes:
        stock: Transformers' own class with eager attention, in the dtype that is compared.
        ours: our class, same device and dtype.
        float32: stock in float32, where the dtype is another; else None.
        processor: feature extractor and tokenizer; None where there are none and none are needed.
    """

    stock: Any
    ours: Any
    float32: Any | None
    processor: Any | None

    def by_name(self) -> dict[str, Any]:
        """Ours, stock, and float32 where there is one."""
        models = {"ours": self.ours, "stock": self.stock, "float32": self.float32}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def dtype_name(self) -> str:
        """ "float32", "float16" or "bfloat16"."""
        return str(self.stock.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """The device of all of them."""
        device: torch.device = self.stock.device
        return device

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(mel bins, frames) of the features of one window."""
        config = self.stock.config
        return int(config.num_mel_bins), 2 * int(config.max_source_positions)

    @property
    def longest(self) -> int:
        """Maximum number of ids, the prompt included."""
        limit = getattr(self.stock.generation_config, "max_length", None)
        positions = int(self.stock.config.max_target_positions)
        return positions if limit is None else min(positions, int(limit))

    @property
    def language_ids(self) -> dict[str, int]:
        """Token ids by language code; empty for a model without languages."""
        config = self.stock.generation_config
        if not getattr(config, "is_multilingual", False):
            return {}
        known = getattr(config, "lang_to_id", None) or {}
        return {token.strip("<|>"): number for token, number in known.items()}

    @property
    def first_timestamp(self) -> int | None:
        """Id of the first timestamp token; None where the generation config lacks it."""
        before = getattr(self.stock.generation_config, "no_timestamps_token_id", None)
        return None if before is None else int(before) + 1

    def check(self, options: ParityOptions) -> None:
        """Raise `OptionError` if these models cannot decode in a requested mode."""
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
        source: as of `WhisperFlashAttentionForConditionalGeneration.from_pretrained`, or one of
            OpenAI's short names.
        device, dtype: as of `devices.resolve_device` and `resolve_dtype`.
        attention: back-end of our model.
        needs_extractor: whether there are recordings. Features from a file need no processor;
            without one, there is no text.

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
        stock = load_stock(checkpoint, precision)
        is_half = precision != torch.float32
        float32 = load_stock(checkpoint, torch.float32) if is_half else None
    models = Models(stock, ours, float32, processor)
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


def load_stock(checkpoint: str, dtype: torch.dtype, attention: str = "eager") -> Any:
    """Load a checkpoint of any format into Transformers' own class."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    read = read_checkpoint(checkpoint)
    if read is None:
        return StockWhisper.from_pretrained(checkpoint, **options)
    model: Any = StockWhisper.from_pretrained(
        None, config=read.config, state_dict=read.state_dict, **options
    )
    model.generation_config = read.generation_config
    return model


Ids = list[int]


@dataclass
class ScoreRecorder(LogitsProcessor):
    """Records the reference's scores without changing them.

    Attributes:
        prompt: ids that every row starts with `[n]`.
        gaps: for every step, the distance between the two best scores of each row `[rows]`.
        is_sound: whether no score was NaN or plus infinity; minus infinity forbids a token.
    """

    prompt: Ids = field(default_factory=list)
    gaps: list[torch.Tensor] = field(default_factory=list)
    is_sound: bool = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.prompt:
            self.prompt = input_ids[0].tolist()
        best = scores.float().topk(2, dim=-1).values
        self.gaps.append((best[:, 0] - best[:, 1]).cpu())
        self.is_sound = self.is_sound and not bool((scores.isnan() | scores.isposinf()).any())
        return scores


@dataclass
class ForcedPrefix(LogitsProcessor):
    """Forces the tokens of `prefix`, and changes nothing afterwards.

    Attributes:
        prefix: ids after the prompt.
        random_state: of PyTorch's CPU generator at the first step that is not forced.
    """

    prefix: Sequence[int]
    steps: int = 0
    random_state: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step, self.steps = self.steps, self.steps + 1
        if step >= len(self.prefix):
            if self.random_state is None:
                self.random_state = torch.get_rng_state()
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.prefix[step]] = 0.0
        return forced


def decode(
    model: Any,
    features: torch.Tensor,
    mode: Mode,
    *,
    language: str | None,
    seed: int = 0,
    processor: LogitsProcessor | None = None,
) -> list[Ids]:
    """Call `generate`.

    Args:
        model: stock Whisper or ours.
        features: log-mel features `[B, mel bins, frames]` on the model's device, any dtype.
        mode: of decoding.
        language: code of the language; None for a model without languages.
        seed: of PyTorch's generators, set for every call.
        processor: added after all others.

    Returns:
        For each row, the ids that `generate` returned, without padding and end of text.
    """
    torch.manual_seed(seed)
    rows = model.generate(
        features.to(model.dtype), **generate_options(mode, language), **_added(processor)
    )
    ends = set(_as_list(model.generation_config.eos_token_id))
    ends |= set(_as_list(model.generation_config.pad_token_id))
    return [_stripped(row, ends) for row in rows.tolist()]


def generate_options(mode: Mode, language: str | None) -> dict[str, Any]:
    """Keyword arguments of `generate` for a mode and a language."""
    spoken = {} if language is None else {"language": language, "task": "transcribe"}
    return {**mode.options, **spoken}


def scores_after(
    model: Any,
    features: torch.Tensor,
    mode: Mode,
    prefix: Sequence[int],
    *,
    language: str | None,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Force `prefix` on a stock model, and return its scores for the next token.

    All logits processors of `generate` have been applied except one step: timestamps that together
    are likelier than any text forbid text. `compare.shortfall` accounts for that one.

    Args:
        model, mode, language, seed: as in `decode`; the mode must not search with beams.
        features: `[1, mel bins, frames]`.
        prefix: ids after the prompt.

    Returns:
        Scores `[vocabulary]` in float32 on the CPU, minus infinity for tokens that are forbidden,
        and the state of PyTorch's CPU generator with which the next token is drawn.
    """
    config = copy.deepcopy(model.generation_config)
    config._detect_timestamp_from_logprob = False
    forced = ForcedPrefix(prefix)
    torch.manual_seed(seed)
    outputs = model.generate(
        features.to(model.dtype),
        generation_config=config,
        max_new_tokens=len(prefix) + 1,
        return_dict_in_generate=True,
        output_scores=True,
        **generate_options(mode, language),
        **_added(forced),
    )
    assert forced.random_state is not None
    return outputs.scores[len(prefix)][0].float().cpu(), forced.random_state


def log_probabilities(
    model: Any, features: torch.Tensor, prompt: Sequence[int], ids: Sequence[int]
) -> torch.Tensor:
    """Log-probabilities `[len(ids), vocabulary]`, float32, of what follows each prefix of `ids`.

    Args:
        model: stock Whisper or ours.
        features: `[1, mel bins, frames]`.
        prompt, ids: the decoder's input; the last id is only predicted.
    """
    fed = torch.tensor([[*prompt, *ids][: len(prompt) + len(ids) - 1]], device=model.device)
    with torch.no_grad():
        logits = model(features.to(model.dtype), decoder_input_ids=fed, use_cache=False).logits
    found: torch.Tensor = logits[0, len(prompt) - 1 :].float().log_softmax(-1)
    return found


def _added(processor: LogitsProcessor | None) -> dict[str, Any]:
    return {} if processor is None else {"logits_processor": LogitsProcessorList([processor])}


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


def _stripped(row: Ids, ends: set[int]) -> Ids:
    length = len(row)
    while length and row[length - 1] in ends:
        length -= 1
    return row[:length]
