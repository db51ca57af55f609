"""Keyword arguments of `Transcriber`, checked: the options of each recording, and the batch size.

The batch size is the number of windows that are decoded side by side. "auto" means few on a CPU,
where a larger batch saves little and costs memory, and on a GPU as many as half of its free memory
holds, up to what keeps it busy. In sequential mode each window belongs to another recording, which
is open meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from whisper_flash_attention import validation as check
from whisper_flash_attention.config import DecodeOptions, TranscribeOptions, VadOptions, changed
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.prompts import PromptFields

# One for all recordings, or one for each.
Texts = str | None | Sequence[str | None]

DEFAULT_BATCH_SIZE = 16
# Decoding memory grows with the number of windows; larger batches gain nothing on any device.
MOST_WINDOWS = 10_000


class Asked(TypedDict, total=False):
    """The keyword arguments of `Transcriber`'s methods; every one may be left out.

    The first seven may be given once for all recordings of a call, or as a list or tuple with one
    for each of them.

    Args:
        language: name or code of the language spoken; None detects it in the first 30 s.
        task: "transcribe", or "translate" into English.
        channel, audio_track: what is read of a recording, as in `TranscribeOptions`.
        initial_prompt, hotwords, prefix: as in `DecodeOptions`; None leaves what that says.
        options: how windows are decoded; None is OpenAI's sequential algorithm with its
            thresholds and temperatures.
        batch_size: windows at a time, at most; 1 to 10,000.

    The others are fields of `DecodeOptions`, and count instead of what `options` says.
    """

    language: Texts
    task: str | Sequence[str]
    channel: int | str | Sequence[int | str]
    audio_track: int | str | Sequence[int | str | None] | None
    initial_prompt: Texts
    hotwords: Texts
    prefix: Texts
    options: DecodeOptions | None
    batch_size: int
    mode: str
    temperature: float | tuple[float, ...]
    compression_ratio_threshold: float | None
    logprob_threshold: float | None
    no_speech_threshold: float | None
    beam_size: int | None
    best_of: int | None
    length_penalty: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    suppress_tokens: Iterable[int]
    suppress_blank: bool
    min_new_tokens: int | None
    max_new_tokens: int | None
    without_timestamps: bool
    max_initial_timestamp: float | None
    condition_on_previous_text: bool
    carry_initial_prompt: bool
    clip_timestamps: Iterable[float]
    word_timestamps: bool
    vad_filter: bool | None
    vad_parameters: VadOptions | Mapping[str, float] | None
    multilingual: bool
    hallucination_silence_threshold: float | None


HINTS = ("initial_prompt", "hotwords", "prefix")
PER_RECORDING = ("language", "task", "channel", "audio_track", *HINTS)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for one recording."""

    options: TranscribeOptions
    prompt_fields: PromptFields


@dataclass(frozen=True, slots=True)
class Order:
    """What a call is asked for.

    Args:
        decode: how all recordings are decoded.
        batch_size: windows at a time, at most.
        wishes: of every recording.
    """

    decode: DecodeOptions
    batch_size: int
    wishes: tuple[Wish, ...]

    @classmethod
    def of(cls, asked: Asked, count: int, languages: Collection[str]) -> Order:
        """The order for so many recordings and a model of these languages (codes).

        Raises:
            OptionError: an option is unknown or makes no sense, there are more or fewer values
                than recordings, or the model does not know the language or task.
        """
        given: dict[str, Any] = dict(asked)
        columns = {name: _column(name, given.pop(name, None), count) for name in PER_RECORDING}
        batch_size = given.pop("batch_size", DEFAULT_BATCH_SIZE)
        batch_size = check.whole_number("batch_size", batch_size, least=1, most=MOST_WINDOWS)
        options = given.pop("options", None)
        decode = changed(DecodeOptions() if options is None else options, given)
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        return cls(decode, batch_size, tuple(_wish(row, decode, languages) for row in rows))


def _column(name: str, value: Any, count: int) -> Sequence[Any]:
    """A value per recording."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise OptionError(f"{name} has {len(value)} values for {count} recordings: give one each")
    return value


def _wish(row: dict[str, Any], decode: DecodeOptions, languages: Collection[str]) -> Wish:
    options = TranscribeOptions(
        language=row["language"],
        task="transcribe" if row["task"] is None else row["task"],
        channel="mix" if row["channel"] is None else row["channel"],
        audio_track=row["audio_track"],
    )
    options.check_model(languages)
    if decode.multilingual:
        _check_multilingual(options, languages)
    return Wish(options, PromptFields(**{name: _hint(name, row, decode) for name in HINTS}))


def _check_multilingual(options: TranscribeOptions, languages: Collection[str]) -> None:
    if set(languages) == {"en"}:
        raise OptionError(
            "multilingual needs a multilingual model, and this one is English-only; take one "
            "without '.en' in its name"
        )
    if options.language is not None:
        raise OptionError(
            f"multilingual detects the language in every window, but language "
            f"{options.language!r} is given: give one of the two"
        )


def _hint(name: str, row: dict[str, Any], decode: DecodeOptions) -> str | None:
    common: str | None = getattr(decode, name)
    return common if row[name] is None else check.text(name, row[name])


ON_CPU = 4
MOST_ON_GPU = {"sequential": 32, "batched": 128}
PROMPT_TOKENS = 4
# Of memory that is free once the model is loaded.
SHARE_OF_FREE = 0.5


def parse_batch_size(text: str) -> int | None:
    """A number of windows, 1 or more; None for "auto".

    Raises:
        OptionError: it is neither.
    """
    if text.strip().lower() == "auto":
        return None
    if not text.strip().isdecimal() or int(text) < 1:
        raise OptionError(f"batch size is {text!r}: give a whole number, 1 or more, or auto")
    return int(text)


def automatic_batch_size(model: Any, mode: str, beams: int = 1) -> int:
    """Windows at a time for a model where it is now.

    Args:
        model: whose device, and whose `plan` if it has one, tell how many fit.
        mode: "sequential" or "batched".
        beams: per window.
    """
    if model.device.type != "cuda" or not hasattr(model, "plan"):
        return ON_CPU
    import torch

    held = sum(each.nbytes for each in model.parameters())
    free, _ = torch.cuda.mem_get_info(model.device)
    budget = (held + SHARE_OF_FREE * free) / 1e9
    try:
        plan = model.plan(
            memory_gb=budget,
            max_new_tokens=model.config.max_target_positions - PROMPT_TOKENS,
            prompt_tokens=PROMPT_TOKENS,
            num_beams=beams,
        )
    except OptionError:  # adapters or hooks, or hardly any memory is left
        return ON_CPU
    return int(max(1, min(plan.batch_size, MOST_ON_GPU[mode])))
