"""The fields of a request, declared once: what they take, and how they become options.

The form of a request, its description in the OpenAPI document and the table in the documentation
(`tools/option_tables.py`) derive from `FIELDS`. Fields of OpenAI's API come first; every option of
`DecodeOptions`, `SubtitleOptions` and the tracks and channels of a recording follows under its own
name, with the checks of `options.py`. A field that is not known, or that would have no effect, is
refused.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from whisper_flash_attention.errors import OptionError, WhisperFlashError
from whisper_flash_attention.languages import language_code, language_or_auto
from whisper_flash_attention.options import (
    DecodeOptions,
    Option,
    SubtitleOptions,
    TranscribeOptions,
    declared,
    is_optional,
)
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.transcribe.arguments import TranscribeArguments

RESPONSE_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
STREAMED_FORMATS = ("json", "text", "verbose_json")
GRANULARITIES = ("word", "segment")
# What a field means has this many characters at most in a message.
MOST_SHOWN = 80


class RequestError(WhisperFlashError):
    """A request that is refused, as an error of OpenAI's API.

    Args:
        status: of HTTP.
        param: the field that is wrong.
        code: a short name of the error.
        retry_after: seconds after which the same request may be accepted.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, usual)
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid_value(name: str, message: str) -> RequestError:
    """The error of a field whose value is impossible."""
    return RequestError(400, message, param=name, code="invalid_value")


@dataclass(frozen=True, slots=True)
class FormField:
    """A field of the form.

    Args:
        name: without the brackets of a list.
        meaning: for the documentation.
        schema: of its value, in the OpenAPI document.
        parse: converts its value, text or a list of texts; raises `OptionError`.
        is_list: whether it may be repeated, with or without `[]` after its name.
        is_openai: whether OpenAI's API has it.
    """

    name: str
    meaning: str
    schema: Mapping[str, Any]
    parse: Callable[[Any], Any]
    is_list: bool = False
    is_openai: bool = True


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    """A request whose fields are all known and possible.

    Args:
        model: as it was named; None takes the server's first.
        arguments: of `Transcriber.transcribe`.
        response_format: of `RESPONSE_FORMATS`.
        granularities: of `GRANULARITIES`.
        logprobs: whether tokens come with their log-probabilities.
        stream: whether events are sent while the recording is transcribed.
        languages: codes of those among which the language is detected.
        subtitles: layout of srt and vtt.
    """

    model: str | None
    arguments: TranscribeArguments
    response_format: str
    granularities: tuple[str, ...]
    logprobs: bool
    stream: bool
    languages: tuple[str, ...]
    subtitles: SubtitleOptions


def _flag(given: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if given.strip().lower() not in values:
        raise OptionError("give true or false")
    return values[given.strip().lower()]


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(given: str) -> str:
        if given not in names:
            raise OptionError(f"give {', '.join(names[:-1])} or {names[-1]}")
        return given

    return parse


def _each(parse: Callable[[str], Any]) -> Callable[[Sequence[str]], tuple[Any, ...]]:
    return lambda given: tuple(dict.fromkeys(parse(each) for each in given))


def _temperature(given: Sequence[str] | str) -> float | tuple[float, ...] | None:
    """A list as it is; a single 0 is the ladder of temperatures, as OpenAI's API has it."""
    numbers: tuple[float, ...] = _parser(*_option(DecodeOptions, "temperature"))(given)
    if isinstance(given, str) and len(numbers) == 1:
        return numbers[0] or None
    return numbers


def _chunking(given: Any) -> dict[str, Any]:
    """Options of `auto`, or of `server_vad` with its numbers."""
    if given == "auto":
        return {"mode": "batched"}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    if not isinstance(given, Mapping) or given.get("type") != "server_vad":
        raise OptionError('give "auto", or an object with the type "server_vad"')
    names = {
        "threshold": "threshold",
        "silence_duration_ms": "min_silence_duration_ms",
        "prefix_padding_ms": "speech_pad_ms",
    }
    numbers: dict[str, float] = {}
    for name, value in given.items():
        if name == "type":
            continue
        if name not in names:
            raise OptionError(f"server_vad has no {printable(name)!r}; it has {', '.join(names)}")
        try:
            numbers[names[name]] = float(value)
        except (TypeError, ValueError) as error:
            raise OptionError(f"{name} must be a number") from error
    return {"mode": "batched", "vad_parameters": numbers}


def _no_speakers(_: Any) -> None:
    raise OptionError("this server does not distinguish speakers; leave it out")


def _option(group: Any, name: str) -> tuple[Field[Any], Option]:
    return next(pair for pair in declared(group) if pair[0].name == name)


_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}

# The file itself is no field of these.
OPENAI_FIELDS = (
    FormField("model", "Name of a model of this server; left out: its first.", _TEXT, str),
    FormField(
        "language",
        "Spoken language, by code (de) or name (german). Left out or empty: detected.",
        _TEXT,
        lambda given: language_or_auto(given) if given.strip() else None,
    ),
    FormField(
        "languages",
        "Languages among which the spoken one is detected.",
        _TEXTS,
        _each(language_code),
        is_list=True,
    ),
    FormField("prompt", "Context of the first window: `initial_prompt`.", _TEXT, str),
    FormField(
        "keywords",
        "Words to expect: `hotwords`.",
        _TEXTS,
        lambda given: ", ".join(given),
        is_list=True,
    ),
    FormField(
        "temperature",
        "0: greedy, and 0.2 to 1.0 where a result fails a threshold. Above 0: sampled. A list is "
        "tried in its order.",
        {"anyOf": [{"type": "number", "minimum": 0, "maximum": 2}, {"type": "array"}]},
        _temperature,
        is_list=True,
    ),
    FormField(
        "response_format",
        "json, text, srt, verbose_json or vtt. diarized_json is refused: no speakers here.",
        {"type": "string", "enum": list(RESPONSE_FORMATS), "default": "json"},
        _one_of(*RESPONSE_FORMATS),
    ),
    FormField(
        "timestamp_granularities",
        "word, segment or both; needs verbose_json. Left out: segment.",
        {"type": "array", "items": {"type": "string", "enum": list(GRANULARITIES)}},
        _each(_one_of(*GRANULARITIES)),
        is_list=True,
    ),
    FormField(
        "include",
        "logprobs: every text token with its log-probability; needs json, sequential mode.",
        {"type": "array", "items": {"type": "string", "enum": ["logprobs"]}},
        _each(_one_of("logprobs", "logprobs")),
        is_list=True,
    ),
    FormField(
        "chunking_strategy",
        "auto, or an object with the type server_vad and threshold, silence_duration_ms, "
        "prefix_padding_ms: chunks of speech side by side (`mode` batched; needs the extra vad).",
        {"anyOf": [{"type": "string", "enum": ["auto"]}, {"type": "object"}]},
        _chunking,
    ),
    FormField(
        "stream",
        "Send server-sent events as windows are decoded; with json, text or verbose_json.",
        {"type": "boolean", "default": False},
        _flag,
    ),
    FormField(
        "known_speaker_names", "Refused: no speakers here.", _TEXTS, _no_speakers, is_list=True
    ),
    FormField(
        "known_speaker_references", "Refused: no speakers here.", _TEXTS, _no_speakers, is_list=True
    ),
)


def _schema(each: Field[Any], about: Option) -> dict[str, Any]:
    """JSON schema of an option, as far as its kind says."""
    kinds = {"MS": "number", "SECONDS": "number", "NUMBER": "number"}
    kind = "boolean" if about.kind.parse is None else kinds.get(about.kind.metavar, "string")
    kind = "integer" if about.kind.parse is int else kind
    schema: dict[str, Any] = {"type": "string" if about.kind.is_list else kind}
    default = each.default
    if default is not None and default is not MISSING and not isinstance(default, tuple):
        schema["default"] = default
    return schema


def _parser(each: Field[Any], about: Option) -> Callable[[Any], Any]:
    def parse(given: Any) -> Any:
        if isinstance(given, Mapping):
            return about.kind.check(each.name, {name: float(given[name]) for name in given})
        text = given if isinstance(given, str) else ",".join(given)
        if is_optional(each) and text.strip().lower() in ("none", "null"):
            return None
        try:
            value = _flag(text) if about.kind.parse is None else about.kind.parse(text)
        except ValueError as error:
            raise OptionError(f"give {about.kind.expected}") from error
        return about.kind.check(each.name, value)

    return parse


def _own_fields() -> Iterable[FormField]:
    known = {each.name for each in OPENAI_FIELDS} | {"task"}
    for group in (DecodeOptions, TranscribeOptions, SubtitleOptions):
        for each, about in declared(group):
            if each.name not in known:
                yield FormField(
                    each.name,
                    about.help,
                    _schema(each, about),
                    _parser(each, about),
                    is_list=about.kind.is_list,
                    is_openai=False,
                )


FIELDS: Mapping[str, FormField] = {each.name: each for each in (*OPENAI_FIELDS, *_own_fields())}


def parse_fields(items: Iterable[tuple[str, str]], task: str) -> SpeechRequest:
    """Convert the fields of a form, but the file.

    Args:
        items: names and values in their order.
        task: "transcribe" or "translate".

    Raises:
        RequestError: a field is unknown, repeated, impossible or without effect.
    """
    given = {name: _parsed(FIELDS[name], value) for name, value in _collected(items).items()}
    chosen = given.get("response_format", "json")
    stream = bool(given.get("stream", False))
    granularities = given.get("timestamp_granularities", ())
    logprobs = bool(given.get("include", ()))
    if stream and chosen not in STREAMED_FORMATS:
        raise invalid_value(
            "stream", f"{chosen} cannot be streamed: leave stream out, or take json"
        )
    if granularities and chosen != "verbose_json":
        raise invalid_value(
            "timestamp_granularities",
            f"timestamp_granularities needs response_format verbose_json, not {chosen}",
        )
    if logprobs and chosen != "json":
        raise invalid_value("include", f"logprobs come with response_format json, not {chosen}")
    arguments = _arguments(given)
    arguments["task"] = task
    if "word" in granularities or logprobs:
        arguments["word_timestamps"] = True
    if logprobs and (
        arguments.get("mode") == "batched"
        or arguments.get("hallucination_silence_threshold") is not None
    ):
        raise invalid_value(
            "include",
            "logprobs need sequential mode, without hallucination_silence_threshold",
        )
    if stream and arguments.get("channel") == "each":
        raise invalid_value(
            "stream", "channel each cannot be streamed: its text is merged at the end"
        )
    return SpeechRequest(
        model=given.get("model"),
        arguments=TranscribeArguments(**arguments),  # type: ignore[typeddict-item]
        response_format=chosen,
        granularities=granularities,
        logprobs=logprobs,
        stream=stream,
        languages=given.get("languages", ()),
        subtitles=_subtitles(given, chosen, arguments),
    )


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Transcriber.transcribe`, under its names."""
    names = {each.name for each in fields(DecodeOptions)} | {"language", "channel", "audio_track"}
    arguments = {
        name: value
        for name, value in given.items()
        if name in names and not (name in ("temperature", "language") and value is None)
    }
    for name, own in (("prompt", "initial_prompt"), ("keywords", "hotwords")):
        if name in given:
            if own in given:
                raise invalid_value(name, f"{name} and {own} are the same: give one of them")
            arguments[own] = given[name]
    for name, value in given.get("chunking_strategy", {}).items():
        if name in arguments:
            raise invalid_value(
                "chunking_strategy", f"chunking_strategy chooses {name}: leave that out"
            )
        arguments[name] = value
    if "language" in arguments and given.get("languages"):
        raise invalid_value(
            "languages", "give language, or the languages among which it is detected"
        )
    return arguments


def _subtitles(
    given: Mapping[str, Any], chosen: str, arguments: Mapping[str, Any]
) -> SubtitleOptions:
    names = [each.name for each, _ in declared(SubtitleOptions) if each.name in given]
    if names and chosen not in ("srt", "vtt"):
        raise invalid_value(
            names[0], f"{names[0]} is about srt and vtt, and the output is {chosen}"
        )
    if given.get("highlight_words") and not arguments.get("word_timestamps"):
        raise invalid_value("highlight_words", "highlight_words needs word_timestamps")
    try:
        return SubtitleOptions(**{name: given[name] for name in names})
    except OptionError as error:
        raise invalid_value(names[0], str(error)) from error


def _collected(items: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Values by field: text, lists of texts, and objects of `name[key]`."""
    found: dict[str, Any] = {}
    for given, value in items:
        name, key = given, None
        if match := re.fullmatch(r"(\w+)\[(\w*)\]", given):
            name, key = match[1], match[2]
        if name not in FIELDS:
            raise unknown_field(given)
        about = FIELDS[name]
        if key:
            target = found.setdefault(name, {})
            if not isinstance(target, dict) or name not in ("chunking_strategy", "vad_parameters"):
                raise invalid_value(name, f"{name} has no part {printable(key)!r}")
            target[key] = value
        elif about.is_list and (name != "temperature" or key is not None):
            found.setdefault(name, []).append(value)
        elif name in found or key is not None:
            raise invalid_value(name, f"{name} is given twice: give one value")
        else:
            found[name] = value
    return found


def unknown_field(name: str) -> RequestError:
    """The error of a field that no request has, with the nearest that it may have."""
    near = difflib.get_close_matches(name.rstrip("[]"), [*FIELDS, "file"], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "; GET /docs lists those that there are"
    shown = printable(name[:MOST_SHOWN])
    return RequestError(
        400, f"there is no field {shown!r}{hint}", param=shown, code="unknown_parameter"
    )


def _parsed(about: FormField, value: Any) -> Any:
    try:
        return about.parse(value)
    except (OptionError, ValueError) as error:
        reason = str(error)
        if value == "diarized_json":
            reason = "this server does not distinguish speakers; take verbose_json"
        if not reason.startswith(f"{about.name} is "):
            reason = f"{about.name} is {printable(str(value)[:MOST_SHOWN])!r}: {reason}"
        raise invalid_value(about.name, reason) from error


def form_schema() -> dict[str, Any]:
    """JSON schema of the form, for the OpenAPI document."""
    properties: dict[str, Any] = {
        "file": {"type": "string", "format": "binary", "description": "The recording."}
    }
    for each in FIELDS.values():
        name = f"{each.name}[]" if each.schema.get("type") == "array" else each.name
        properties[name] = {**each.schema, "description": each.meaning}
    return {
        "type": "object",
        "properties": properties,
        "required": ["file"],
        "additionalProperties": False,
    }
