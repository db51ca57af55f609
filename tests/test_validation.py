"""Option values of any kind: plain Python values within their range, or an `OptionError`."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_flash_attention.devices import resolve_device, resolve_dtype
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.option_kinds import parse_audio_track, parse_channel
from whisper_flash_attention.options import (
    DecodeOptions,
    TranscribeOptions,
    VadOptions,
    changed,
    preset,
)
from whisper_flash_attention.transcribe.arguments import CallOptions
from whisper_flash_attention.validation import shown

SURROGATE = "caf\udce9"
NAN, INF = math.nan, math.inf
THRESHOLDS = (
    *("temperature", "compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"),
    *("length_penalty", "repetition_penalty", "max_initial_timestamp"),
    "hallucination_silence_threshold",
)
COUNTS = ("beam_size", "best_of", "no_repeat_ngram_size", "min_new_tokens", "max_new_tokens")


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("has no repr")


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize(
    "value",
    [NAN, INF, -INF, np.float32(NAN), True, "0.5x", b"0", [], object(), Decimal(1), 10**400, 1j],
    ids=lambda value: "object" if type(value) is object else shown(value),
)
def test_a_number_is_finite_and_of_a_type_of_numbers(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name):
        DecodeOptions(**{name: value, "word_timestamps": True})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(
    "value", [True, 1.0, "1", NAN, -1, 10**9, 10**5000, [1], np.float64(2)], ids=shown
)
def test_a_count_is_a_whole_number_within_its_bounds(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name):
        DecodeOptions(**{name: value})


@pytest.mark.parametrize("name", ["beam_size", "best_of"])
def test_the_bound_of_beams_and_draws_is_stated(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is 1000000000: give a whole number, 1 to 100"):
        DecodeOptions(**{name: 10**9})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["initial_prompt", "hotwords", "prefix"])
@pytest.mark.parametrize("value", [SURROGATE, 5, b"text", ["a"], NAN])
def test_prompts_are_text_of_whole_characters(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name):
        DecodeOptions(**{name: value})
    if not isinstance(value, list):  # several values are those of several recordings
        with pytest.raises(OptionError, match=name):
            CallOptions.of({name: value}, 1, ("en",))  # type: ignore[misc]


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    options = DecodeOptions(
        temperature=np.array([0.0, 0.5], np.float32),  # type: ignore[arg-type]
        compression_ratio_threshold=np.float32(2.5),  # type: ignore[arg-type]
        logprob_threshold=Fraction(-1, 2),  # type: ignore[arg-type]
        beam_size=np.int64(5),  # type: ignore[arg-type]
        word_timestamps=np.bool_(True),  # type: ignore[arg-type]
        suppress_tokens=np.array([1, 2]),  # type: ignore[arg-type]
        clip_timestamps=[np.float16(1), 2],  # type: ignore[arg-type]
    )
    assert options == DecodeOptions(
        temperature=(0.0, 0.5),
        compression_ratio_threshold=2.5,
        logprob_threshold=-0.5,
        beam_size=5,
        word_timestamps=True,
        suppress_tokens=(1, 2),
        clip_timestamps=(1.0, 2.0),
    )
    assert type(options.beam_size) is int
    assert type(options.compression_ratio_threshold) is float
    assert type(options.word_timestamps) is bool
    assert DecodeOptions(temperature=np.float32(0)).temperatures == (0.0,)  # type: ignore[arg-type]
    assert CallOptions.of({"batch_size": np.int64(4)}, 1, ("en",)).batch_size == 4  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "arguments",
    [
        *({"batch_size": each} for each in (0, 2.0, True, "4", NAN, 10**9)),
        *({"options": each} for each in ("fast", {}, 5, DecodeOptions)),
        *({"language": each} for each in (5, b"en", SURROGATE, NAN)),
        *({"task": each} for each in (5, "", np.zeros(2))),
        *({"channel": each} for each in (0, -1, "left", 1.5, True, NAN)),
        *({"audio_track": each} for each in (0, -1, "", 1.5, True, SURROGATE)),
        *({name: itertools.count()} for name in ("suppress_tokens", "clip_timestamps")),
        *({name: "1,x"} for name in ("suppress_tokens", "clip_timestamps")),
        *({name: np.zeros(())} for name in ("suppress_tokens", "clip_timestamps", "temperature")),
        *({name: Unprintable()} for name in ("mode", "beam_size", "prefix", "temperature")),
        *({"word_timestamps": each} for each in (1, "yes", None, torch.zeros(2))),
        {"suppress_tokens": [10**30]},
        {"length_penalty": None},
    ],
    ids=lambda arguments: (
        f"{next(iter(arguments))}-{type(next(iter(arguments.values()))).__name__}"
    ),
)
def test_nothing_else_is_raised_for_odd_values_of_a_call(arguments: Any) -> None:
    with pytest.raises(OptionError, match=next(iter(arguments))):
        CallOptions.of(arguments, 1, ("en",))


def test_nor_for_odd_presets_devices_and_dtypes() -> None:
    for call in (
        lambda: preset(["fast"]),  # type: ignore[arg-type]
        lambda: changed("fast", {}),  # type: ignore[arg-type]
        lambda: resolve_device(0),  # type: ignore[arg-type]
        lambda: resolve_device("cuda:" + "9" * 30),
        lambda: resolve_dtype(torch.float16, torch.device("cpu")),  # type: ignore[arg-type]
    ):
        with pytest.raises(OptionError):
            call()


def test_channels_and_tracks_of_a_command_line() -> None:
    assert [parse_channel(each) for each in ("mix", " Each ", "2")] == ["mix", "each", 2]
    assert [parse_audio_track(each) for each in ("2", "deu")] == [2, "deu"]
    for wrong in ("0", "-1", "left", "", "1.5"):
        with pytest.raises(OptionError, match=r"channel is .*: give mix, each, or the number"):
            parse_channel(wrong)
    for wrong in ("0", "-1", " "):
        with pytest.raises(OptionError, match=r"audio_track is .*: give the number of a track"):
            parse_audio_track(wrong)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 12),
    st.floats(),
    st.floats(-2, 3),
    st.decimals(),
    st.fractions(),
    st.complex_numbers(),
    st.text(),
    st.text(st.characters(codec=None), max_size=4),
    st.binary(max_size=4),
    st.sampled_from([np.float32(1), np.int64(2), np.bool_(True), np.zeros(()), np.zeros(3)]),
    st.sampled_from([object(), torch.zeros(()), torch.ones(2), {}, Unprintable(), 10**5000]),
    st.lists(st.one_of(st.integers(-2, 3), st.floats(), st.text(max_size=2)), max_size=3),
    st.sampled_from(["mix", "each", "sequential", "batched", "transcribe"]),
)


@settings(max_examples=400, deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional={field.name: ANYTHING for field in fields(DecodeOptions)}
    ).map(lambda given: dict(list(given.items())[:6]))
)
def test_any_values_are_options_or_an_option_error(values: dict[str, Any]) -> None:
    try:
        options = DecodeOptions(**values)
    except OptionError as error:
        assert len(str(error)) < 500
        return
    assert DecodeOptions(**{each.name: getattr(options, each.name) for each in fields(options)})
    assert hash(options) is not None
    assert all(0 <= each <= 2 for each in options.temperatures)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional={each.name: ANYTHING for each in fields(VadOptions)}))
def test_any_parameters_are_those_of_the_detector_or_an_option_error(
    values: dict[str, Any],
) -> None:
    try:
        options = VadOptions(**values)
    except OptionError as error:
        assert len(str(error)) < 500
        return
    assert 0 < options.threshold <= 1
    assert hash(options) is not None


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional={f.name: ANYTHING for f in fields(TranscribeOptions)}))
def test_any_values_are_options_for_a_recording_or_an_option_error(values: dict[str, Any]) -> None:
    try:
        options = TranscribeOptions(**values)
    except OptionError:
        return
    assert options.channel in ("mix", "each") or options.channel >= 1  # type: ignore[operator]
