from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import WhisperConfig, WhisperForConditionalGeneration

from whisper_flash_attention.errors import AudioError, DeviceError, OptionError, WeightsError
from whisper_flash_attention.transcribe.loading import check_attention, explained, load
from whisper_flash_attention.weights import load_processor


def test_a_model_that_the_hub_cannot_give_is_one_line_with_a_remedy() -> None:
    with pytest.raises(WeightsError) as caught:
        load("nobody/nothing")
    message = str(caught.value)
    assert message.startswith("cannot load model 'nobody/nothing': ")
    assert "package:tiny.en" in message
    assert "\n" not in message


def test_a_model_that_the_hub_does_not_know_is_called_so() -> None:
    unknown = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # needs no response
    with (
        pytest.raises(WeightsError, match="'me/mine': the Hub has no such model, or it is private"),
        explained("me/mine"),
    ):
        raise OSError("me/mine is not a local folder\nand more lines") from unknown


def test_errors_that_are_clear_already_pass_unchanged() -> None:
    clear = AudioError("talk.mp3: there is no such file")
    with pytest.raises(AudioError) as caught, explained("tiny.en"):
        raise clear
    assert caught.value is clear


def test_a_damaged_transformers_folder_is_a_weights_error(
    tmp_path: Path, small_config: WhisperConfig
) -> None:
    WhisperForConditionalGeneration(small_config).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"model\.safetensors: a header of .* truncated"):
        load(str(tmp_path))


def test_an_unknown_attention_back_end_gets_the_nearest_names() -> None:
    with pytest.raises(OptionError, match=r"'sdpa_flsh'; did you mean sdpa_flash.*possible: "):
        check_attention("sdpa_flsh")
    for name in (1.5, ["auto"], None):
        with pytest.raises(OptionError, match=r"attention is .*; possible: "):
            check_attention(name)  # type: ignore[arg-type]
    check_attention("auto")
    check_attention("eager")


@pytest.mark.parametrize("source", [["tiny.en"], {}, 5, b"tiny.en", None])
def test_a_source_that_is_neither_text_nor_a_path_is_refused(source: Any) -> None:
    for read in (load, load_processor):
        with pytest.raises(WeightsError, match="neither text nor a path"):
            read(source)


def test_device_and_attention_are_checked_before_anything_is_read() -> None:
    with pytest.raises(OptionError, match="unknown attention back-end"):
        load("/there/is/nothing", attention="nothing")
    with pytest.raises((DeviceError, OptionError), match="device"):
        load("/there/is/nothing", device="cuda:99")
