"""Keyword arguments of `Transcriber`, checked: the options of each recording, and the batch size.

The batch size is the number of windows that are decoded side by side. "auto" means few on a CPU,
where a larger batch saves little and costs memory, and on a GPU as many as half of its free memory
holds, up to what keeps it busy. In sequential mode each window belongs to another recording, which
is open meanwhile.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.option_kinds import checked_prompt
from whisper_flash_attention.options import (
    DECODE_ALIASES,
    DecodeOptions,
    TranscribeOptions,
    VadOptions,
    changed,
)

if TYPE_CHECKING:
    from whisper_flash_attention.engine.engine import Engine
    from whisper_flash_attention.engine.memory_plan import PlanRequest

# One for all recordings, or one for each.
Texts = str | None | Sequence[str | None]
# Text, or ids of text tokens.
Prompt = str | Sequence[int] | None

DEFAULT_BATCH_SIZE = 16
# Decoding memory grows with the number of windows; larger batches gain nothing on any device.
MOST_WINDOWS = 10_000


class TranscribeArguments(TypedDict, total=False):
    """Keyword arguments of the methods of `Transcriber`, all optional.

    The first seven may be given once for all recordings of a call, or as a list or tuple with one
    value per recording.

    Args:
        language: name or code of the language spoken; None detects it in the first 30 s.
        task: "transcribe", or "translate" into English.
        channel, audio_track: as in `TranscribeOptions`.
        initial_prompt, hotwords, prefix: as in `DecodeOptions`; None takes the value there. A list
            of whole numbers is one prompt, as ids of tokens.
        options: how windows are decoded; None is OpenAI's sequential algorithm with its
            thresholds and temperatures.
        batch_size: windows at a time, at most; 1 to 10,000.

    The others are fields of `DecodeOptions`, which override those of `options`.
    """

    language: Texts
    task: str | Sequence[str]
    channel: int | str | Sequence[int | str]
    audio_track: int | str | Sequence[int | str | None] | None
    initial_prompt: Prompt | Sequence[Prompt]
    hotwords: Texts
    prefix: Texts
    options: DecodeOptions | None
    batch_size: int
    mode: str
    temperature: float | Iterable[float] | str
    compression_ratio_threshold: float | None
    logprob_threshold: float | None
    log_prob_threshold: float | None
    no_speech_threshold: float | None
    check_speech: bool
    beam_size: int | None
    best_of: int | None
    patience: float | None
    length_penalty: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    suppress_tokens: Iterable[int] | str | None
    suppress_blank: bool
    min_new_tokens: int | None
    max_new_tokens: int | None
    without_timestamps: bool
    max_initial_timestamp: float | None
    condition_on_previous_text: bool
    carry_initial_prompt: bool
    clip_timestamps: Iterable[float] | str
    word_timestamps: bool
    word_alignment: str
    prepend_punctuations: str
    append_punctuations: str
    vad_filter: bool | None
    vad_parameters: VadOptions | Mapping[str, float] | None
    multilingual: bool
    hallucination_silence_threshold: float | None


Method = TypeVar("Method", bound=Callable[..., Any])


def shows_options(method: Method) -> Method:
    """Have the signature of a method list `TranscribeArguments`, with their defaults.

    `help()` and notebooks show it; editors know the arguments by their type.
    """
    usual = RecordingOptions(), DecodeOptions()
    own = inspect.signature(method)
    named = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
    for name, annotation in TranscribeArguments.__annotations__.items():
        if name in DECODE_ALIASES:
            continue
        default: Any = DEFAULT_BATCH_SIZE if name == "batch_size" else None
        for options in usual[::-1]:
            default = getattr(options, name, default)
        kind = inspect.Parameter.KEYWORD_ONLY
        shown = getattr(annotation, "__forward_arg__", annotation)
        named.append(inspect.Parameter(name, kind, default=default, annotation=shown))
    method.__signature__ = own.replace(parameters=named)  # type: ignore[attr-defined]
    return method


TEXTS = ("initial_prompt", "hotwords", "prefix")
PER_RECORDING = ("language", "task", "channel", "audio_track", *TEXTS)


@dataclass(frozen=True, slots=True)
class RecordingOptions(TranscribeOptions):
    """Options of one recording: what is read of it, its language and task, and its prompts.

    Args:
        initial_prompt: given to the first window as its context.
        hotwords: given to every window, before its context.
        prefix: text that the result of the first window begins with.
        candidates: codes of the languages among which it is detected; empty for all.
    """

    initial_prompt: str | tuple[int, ...] | None = None
    hotwords: str | None = None
    prefix: str | None = None
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CallOptions:
    """Options of one call.

    Args:
        decode: how all recordings are decoded.
        batch_size: windows that are decoded side by side, at most.
        recordings: options of every recording, in order.
    """

    decode: DecodeOptions
    batch_size: int
    recordings: tuple[RecordingOptions, ...]

    @classmethod
    def of(cls, arguments: TranscribeArguments, count: int, languages: Collection[str]) -> Self:
        """Options of a call.

        Args:
            arguments: keyword arguments as they were given.
            count: number of recordings.
            languages: codes of the languages that the model knows.

        Raises:
            OptionError: an option is unknown or out of range, the number of values is not that of
                recordings, or the model does not know the language or task.
        """
        given: dict[str, Any] = dict(arguments)
        columns = {name: _column(name, given.pop(name, None), count) for name in PER_RECORDING}
        batch_size = given.pop("batch_size", DEFAULT_BATCH_SIZE)
        batch_size = check.whole_number("batch_size", batch_size, least=1, most=MOST_WINDOWS)
        options = given.pop("options", None)
        decode = changed(DecodeOptions() if options is None else options, given)
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        recordings = tuple(_recording_options(row, decode, languages) for row in rows)
        return cls(decode, batch_size, recordings)


def _column(name: str, value: Any, count: int) -> Sequence[Any]:
    """One value per recording."""
    is_tokens = name == "initial_prompt" and not isinstance(value, str | None)
    if is_tokens and all(isinstance(each, Integral) for each in check.values(name, value, "text")):
        return [list(value)] * count
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise OptionError(f"{name} has {len(value)} values for {count} recordings: give one each")
    return value


def _recording_options(
    row: dict[str, Any], decode: DecodeOptions, languages: Collection[str]
) -> RecordingOptions:
    options = RecordingOptions(
        language=row["language"],
        task="transcribe" if row["task"] is None else row["task"],
        channel="mix" if row["channel"] is None else row["channel"],
        audio_track=row["audio_track"],
        **{name: _text(name, row, decode) for name in TEXTS},
    )
    options.check_model(languages)
    if decode.multilingual:
        _check_multilingual(options, languages)
    return options


def _check_multilingual(options: RecordingOptions, languages: Collection[str]) -> None:
    if set(languages) == {"en"}:
        raise OptionError(
            "multilingual=True needs a multilingual model, and this one is English-only; take one "
            "without '.en' in its name"
        )
    if options.language is not None:
        raise OptionError(
            f'multilingual=True detects the language in every window, but language="'
            f'{options.language}" is given: give one of the two'
        )


def _text(name: str, row: dict[str, Any], decode: DecodeOptions) -> Any:
    if row[name] is None:
        return getattr(decode, name)
    return checked_prompt(row[name]) if name == "initial_prompt" else check.text(name, row[name])


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
    expected = f"a whole number, 1 to {MOST_WINDOWS}, or auto"
    # Longer ones are out of range; `int` has a limit of digits, too.
    given = int(text) if re.fullmatch(r"\s*[0-9]{1,9}\s*", text) else text
    return check.whole_number("batch_size", given, least=1, most=MOST_WINDOWS, expected=expected)


def automatic_batch_size(engine: Engine | None, mode: str, beams: int = 1) -> int:
    """Number of windows that fit beside a model on its device.

    Args:
        engine: that runs it; None where Transformers does.
        mode: "sequential" or "batched".
        beams: per window.
    """
    if engine is None or engine.weights.device.type != "cuda":
        return ON_CPU
    import torch

    from whisper_flash_attention.engine.memory_plan import largest_plan, weight_bytes

    weights, request = engine.weights, windows_request(engine, beams)
    free, _ = torch.cuda.mem_get_info(weights.device)
    budget = weight_bytes(weights, request) + int(SHARE_OF_FREE * free)
    try:
        plan = largest_plan(weights, request, budget)
    except OptionError:  # hardly any memory is left
        return ON_CPU
    return min(plan.batch_size, MOST_ON_GPU[mode])


def windows_request(engine: Engine, beams: int) -> PlanRequest:
    """Windows of the longest texts, to be planned.

    Raises `OptionError` if `beams`, the number per window, is below 1.
    """
    from whisper_flash_attention.engine.memory_plan import PlanRequest

    weights = engine.weights
    return PlanRequest(
        max_new_tokens=weights.decoder.positions.shape[0] - PROMPT_TOKENS,
        prompt_tokens=PROMPT_TOKENS,
        num_beams=beams,
        cross_attention="auto",
        device=weights.device,
        dtype=weights.dtype,
    )
