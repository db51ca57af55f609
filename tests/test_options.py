from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_flash_attention.devices import resolve_device, resolve_dtype
from whisper_flash_attention.errors import DeviceError, OptionError
from whisper_flash_attention.languages import language_code
from whisper_flash_attention.options import (
    PRESETS,
    DecodeOptions,
    TranscribeOptions,
    VadOptions,
    changed,
    preset,
    vad_options,
)


@pytest.mark.parametrize(
    ("given_as", "code"),
    [("de", "de"), ("German", "de"), (" GERMAN ", "de"), ("castilian", "es"), ("Haitian", "ht")],
)
def test_a_language_is_known_by_name_code_and_other_names(given_as: str, code: str) -> None:
    assert language_code(given_as) == code
    assert TranscribeOptions(language=given_as).language == code


@pytest.mark.parametrize(
    ("misspelt", "nearest"), [("germn", "german"), ("Englsh", "english"), ("spanisch", "spanish")]
)
def test_an_unknown_language_gets_the_nearest_names(misspelt: str, nearest: str) -> None:
    with pytest.raises(OptionError, match=f"language is '{misspelt}': did you mean.*{nearest}"):
        TranscribeOptions(language=misspelt)


@settings(deadline=None)  # the first call imports Transformers
@given(st.text())
def test_every_other_language_is_an_option_error_or_a_code(language: str) -> None:
    try:
        code = language_code(language)
    except OptionError:
        return
    assert language_code(code) == code


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match="task is 'summarise': give transcribe or trans"):
        TranscribeOptions(task="summarise")


def test_options_cannot_be_changed_after_they_were_checked() -> None:
    options = TranscribeOptions()
    for field in fields(options):
        with pytest.raises(AttributeError):
            setattr(options, field.name, "de")


def test_a_model_does_only_the_languages_and_tasks_it_knows() -> None:
    TranscribeOptions().check_model(("en",))
    TranscribeOptions(language="english").check_model(("en",))
    TranscribeOptions(language="de", task="translate").check_model(("en", "de"))
    with pytest.raises(OptionError, match='language="de" needs a multilingual model'):
        TranscribeOptions(language="de").check_model(("en",))
    with pytest.raises(OptionError, match='task="translate" needs a multilingual model'):
        TranscribeOptions(task="translate").check_model(("en",))
    with pytest.raises(OptionError, match='not know language="yue"; it knows de, en'):
        TranscribeOptions(language="cantonese").check_model(("en", "de"))


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "cpu:0"])
def test_an_unknown_device_lists_the_known_ones(name: str) -> None:
    with pytest.raises(OptionError, match=r"device is .*: give auto, cpu, cuda, cuda:N .* or mps"):
        resolve_device(name)


def test_auto_is_the_gpu_where_there_is_one_and_the_cpu_elsewhere() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_without_a_gpu_cuda_is_an_error_that_says_what_to_do(name: str) -> None:
    with pytest.raises(DeviceError, match=f'device="{name}" was requested, but .*use .cpu'):
        resolve_device(name)


@pytest.mark.gpu
def test_a_gpu_is_chosen_by_its_number_and_a_missing_one_names_those_there() -> None:
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(DeviceError, match=r'"cuda:99" was requested; found: cuda:0 \('):
        resolve_device("cuda:99")


def test_the_dtype_follows_the_device_unless_it_is_named() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is torch.float16
    assert resolve_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(OptionError, match="dtype is 'fp16': give auto, float32"):
        resolve_dtype("fp16", torch.device("cpu"))


def test_what_is_given_counts_instead_of_the_presets() -> None:
    assert preset("balanced") == DecodeOptions()
    assert preset("accurate") == DecodeOptions(beam_size=5, best_of=5)
    assert preset("fast", temperature=None) == PRESETS["fast"]
    found = preset("fast", mode="sequential", temperature=(0.0, 0.5), word_timestamps=True)
    assert (found.mode, found.temperatures) == ("sequential", (0.0, 0.5))
    assert found.word_timestamps


def test_only_what_makes_sense() -> None:
    with pytest.raises(OptionError, match="preset is 'best': give fast, balanced"):
        preset("best")
    with pytest.raises(OptionError, match="mode is 'parallel': give"):
        preset("fast", mode="parallel")


def test_parameters_of_the_detector_are_checked() -> None:
    options = DecodeOptions(vad_filter=True, vad_parameters={"threshold": 0.4, "speech_pad_ms": 50})
    assert options.vad_parameters == VadOptions(threshold=0.4, speech_pad_ms=50)
    assert options.uses_vad and DecodeOptions(mode="batched").uses_vad
    assert not DecodeOptions().uses_vad
    assert not DecodeOptions(mode="batched", vad_filter=False).uses_vad
    for wrong, message in (
        ({"treshold": 0.4}, "no VAD parameter 'treshold'; possible: threshold, neg_threshold"),
        ({"threshold": 1.5}, "VAD threshold is 1.5: give a probability"),
        ({"threshold": float("nan")}, "VAD threshold is nan"),
        ({"neg_threshold": 0.7}, "above threshold 0.5"),
        ({"speech_pad_ms": -1}, "VAD speech_pad_ms is -1: give milliseconds"),
        ({"speech_pad_ms": 10**5000}, "VAD speech_pad_ms is a int: give milliseconds"),
        ({"max_speech_duration_s": "5"}, "VAD max_speech_duration_s is '5': give seconds"),
        ({10**5000: 1}, "no VAD parameter a int; possible"),
        (10**5000, "vad_parameters is a int: give VadOptions"),
        ({"min_silence_duration_ms": "1"}, "give milliseconds, 0 to"),
        ({"max_speech_duration_s": 0.1}, "give seconds, 1 or more"),
        (7, "vad_parameters is 7: give VadOptions"),
    ):
        with pytest.raises(OptionError, match=message):
            DecodeOptions(vad_filter=True, vad_parameters=wrong)  # type: ignore[arg-type]
    for without in ({}, {"mode": "batched", "vad_filter": False}):
        with pytest.raises(OptionError, match="vad_parameters without a voice activity detector"):
            DecodeOptions(vad_parameters=VadOptions(), **without)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ({"log_prob_threshold": -0.5}, "logprob_threshold", -0.5),
        ({"temperature": "0,0.2"}, "temperature", (0.0, 0.2)),
        ({"temperature": np.float32(0.5)}, "temperature", 0.5),
        ({"temperature": np.linspace(0, 1, 3)}, "temperature", (0.0, 0.5, 1.0)),
        ({"clip_timestamps": "0,5"}, "clip_timestamps", (0.0, 5.0)),
        ({"suppress_tokens": "-1,7"}, "suppress_tokens", (-1, 7)),
        ({"suppress_tokens": None}, "suppress_tokens", ()),
        ({"initial_prompt": [11, 12]}, "initial_prompt", (11, 12)),
        ({"initial_prompt": np.array([11, 12])}, "initial_prompt", (11, 12)),
        ({"beam_size": 5, "patience": np.float64(1.5)}, "patience", 1.5),
    ],
)
def test_values_are_taken_as_other_tools_take_them(
    given: dict[str, object], name: str, expected: object
) -> None:
    assert getattr(changed(DecodeOptions(), given), name) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "foo"}, "temperature is 'foo': give numbers"),
        ({"clip_timestamps": "5,x"}, "clip_timestamps is '5,x': give seconds"),
        ({"clip_timestamps": "5,1"}, "clip_timestamps is"),
        ({"initial_prompt": 7}, "initial_prompt is 7: give text, or ids"),
        ({"initial_prompt": [1.5]}, "initial_prompt is 1.5: give text, or ids"),
        ({"patience": 2.0}, "patience is for beams"),
        ({"patience": 0, "beam_size": 5}, "patience is 0: give a number above 0"),
        ({"fp16": False}, "fp16 is no option of transcribing: give `dtype` to"),
        ({"verbose": True}, "verbose is no option of transcribing: take the segments from"),
        ({"logprob_threshold": 1, "log_prob_threshold": 1}, "are one option"),
        ({"beamsize": 5}, "there is no option 'beamsize'; did you mean beam_size"),
    ],
)
def test_what_cannot_be_taken_is_an_option_error(given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        changed(DecodeOptions(), given)


def test_parameters_of_another_tools_detector_are_taken() -> None:
    @dataclass
    class VadOptionsOfAnother:
        threshold: float = 0.5
        max_speech_duration_s: float = float("inf")
        speech_pad_ms: int = 400

    other = VadOptionsOfAnother(threshold=0.3)
    assert vad_options(other) == VadOptions(threshold=0.3)
    assert vad_options({"max_speech_duration_s": float("inf")}) == VadOptions()
