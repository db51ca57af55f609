from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tests.weights.hostile import write_transformers_folder
from whisper_flash_attention.audio import BundledClip
from whisper_flash_attention.devices import resolve_compute_type
from whisper_flash_attention.errors import AudioError, DeviceError, OptionError, WeightsError
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration,
)
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.loading import (
    EngineModel,
    Source,
    check_attention,
    explained,
    load,
)
from whisper_flash_attention.weights import load_processor
from whisper_flash_attention.weights.hub import Hub
from whisper_flash_attention.weights.model_files import read_model

WITHOUT_TRANSFORMERS = """
import sys
from whisper_flash_attention import Transcriber
transcriber = Transcriber.from_pretrained("package:tiny.en", device="cpu")
found = transcriber.transcribe(sys.argv[1], word_timestamps=True, hotwords="maestro")
print(found.text)
print(transcriber.describe())
heavy = {"transformers", "huggingface_hub", "sympy", "torch._dynamo", "torch._inductor", "rich"}
print(sorted(heavy & set(sys.modules)))
"""


def test_a_packaged_model_transcribes_without_transformers(
    tiny_en: str, bundled_recordings: tuple[BundledClip, ...]
) -> None:
    clip = bundled_recordings[4]
    arguments = [sys.executable, "-c", WITHOUT_TRANSFORMERS, str(clip.path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, description, modules = done.stdout.splitlines()
    assert text == clip.transcript
    assert description.startswith("decode engine (PyTorch); attention: encoder sdpa")
    assert modules == "[]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_transformers_folder(tmp_path / "model")
    return tmp_path / "model"


def test_the_engine_has_the_tensors_of_the_model(folder: Path) -> None:
    model, processor = load(str(folder), device="cpu")
    assert isinstance(model, EngineModel) and processor is None
    transcriber = Transcriber(model, processor)
    engine = transcriber.running_engine()
    assert engine is model.engine
    loaded = transcriber.model
    assert isinstance(loaded, WhisperFlashAttentionForConditionalGeneration)
    assert transcriber.running_engine() is not engine  # what is done to the model takes effect
    expected = loaded.state_dict()
    layer = engine.weights.decoder.layers[0]
    prefix = "model.decoder.layers.0"
    for name, tensor in {
        "model.decoder.embed_tokens.weight": engine.weights.decoder.embedding,
        f"{prefix}.encoder_attn.k_proj.weight": layer.cross_attention.k.weight,
        f"{prefix}.final_layer_norm.bias": layer.ffn_norm.bias,
        "model.encoder.conv2.weight": engine.weights.encoder.conv2.weight,
    }.items():
        assert torch.equal(tensor, expected[name]), name
    assert layer.cross_attention.k.bias is None
    assert layer.ffn_norm.eps == loaded.model.decoder.layers[0].final_layer_norm.eps


def test_a_transcriber_of_the_engine_alone_gives_the_segments_of_its_model(
    tiny_en: str, bundled_recordings: tuple[BundledClip, ...]
) -> None:
    transcriber = Transcriber.from_pretrained(tiny_en, device="cpu")
    clip = bundled_recordings[4].path
    [alone] = transcriber.transcribe(clip, word_timestamps=True).segments
    assert transcriber.model.device.type == "cpu"
    [found] = transcriber.transcribe(clip, word_timestamps=True).segments
    assert (found.tokens, found.start, found.end) == (alone.tokens, alone.start, alone.end)
    for word, expected in zip(found.words, alone.words, strict=True):
        assert (word.text, word.start, word.end) == (expected.text, expected.start, expected.end)
        assert word.probability == pytest.approx(expected.probability, abs=1e-4)
    # Packed weights add products in another order.
    assert found.avg_logprob == pytest.approx(alone.avg_logprob, abs=1e-4)


@pytest.mark.parametrize("compute_type", ["float32", "int8", "bfloat16"])
def test_compute_types(folder: Path, compute_type: str) -> None:
    transcriber = Transcriber.from_pretrained(str(folder), device="cpu", compute_type=compute_type)
    assert transcriber.describe().endswith(f"cpu, {compute_type}")
    assert transcriber.runs_on_engine
    plan = transcriber.plan(batch_size=2)
    assert f"{compute_type} on cpu" in str(plan)
    assert transcriber.plan(memory_gb=(plan.total + 1) / 1e9).batch_size == 2
    transcriber.model.set_attn_implementation("eager")
    with pytest.raises(OptionError, match="runs on Transformers' generate"):
        transcriber.plan(batch_size=2)


def test_int8_where_it_cannot_run(folder: Path) -> None:
    with pytest.raises(
        OptionError, match='compute_type="int8" needs the engine, which cannot run this: '
    ):
        load(str(folder), device="cpu", compute_type="int8", attention="sdpa")
    with pytest.raises(OptionError, match="runs on CPUs, and the device is 'cuda': give float16"):
        resolve_compute_type("int8", torch.device("cuda"))


def test_8_bits_of_a_file_are_kept(folder: Path) -> None:
    source = Source.of(
        str(folder), device="cpu", compute_type="auto", attention="auto", quiet=False, hub=Hub()
    )
    found = read_model(str(folder), lambda tensor: tensor)
    assert not isinstance(found, str)
    for is_int8, expected in ((True, "int8"), (False, "float32")):
        assert source.precision_for(replace(found.checkpoint, is_int8=is_int8)) == expected


def test_threads(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        Transcriber.from_pretrained(str(folder), device="cpu", threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    with pytest.raises(OptionError, match="threads is 0: give a whole number, 1 to"):
        Transcriber.from_pretrained(str(folder), device="cpu", threads=0)


def test_autocast_is_for_transformers(folder: Path) -> None:
    transcriber = Transcriber.from_pretrained(str(folder), device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert transcriber.engine == "Transformers generate"
    assert repr(transcriber).startswith("Transcriber('")
    assert "decode engine (PyTorch)" in repr(transcriber)
    assert transcriber.engine == "decode engine (PyTorch)"


def test_a_folder_with_files_of_old_and_new_processors_is_for_the_engine(folder: Path) -> None:
    old, new = folder / "preprocessor_config.json", folder / "processor_config.json"
    description = json.loads(old.read_text())
    for beside in ({"processor_class": "WhisperProcessor"}, {"feature_extractor": description}):
        new.write_text(json.dumps(beside))
        assert isinstance(load(str(folder), device="cpu")[0], EngineModel)
    new.write_text(json.dumps({"feature_extractor": {**description, "dither": 0.1}}))
    found = read_model(str(folder), lambda tensor: tensor)
    assert found == "its features are described by none of its files, or differently by several"


def test_what_needs_transformers_is_logged_with_its_reason(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "whisper_flash_attention")
    model, _ = load(str(folder), device="cpu", attention="sdpa")
    assert not isinstance(model, EngineModel)
    assert caplog.messages == [
        f"{folder} is loaded with Transformers: the attention back-end 'sdpa' was requested by name"
    ]
    (folder / "adapter_config.json").write_text("{}")
    caplog.clear()
    with suppress(WeightsError):  # PEFT refuses an empty configuration, where it is installed
        load(str(folder), device="cpu")
    assert caplog.messages[0].endswith("Transformers: there is an adapter beside it")


def test_heads_of_another_width_are_left_to_transformers(
    tmp_path: Path, small_config: WhisperConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "whisper_flash_attention")
    write_transformers_folder(tmp_path)
    config = WhisperConfig.from_pretrained(tmp_path)
    config.encoder_attention_heads = config.decoder_attention_heads = 2
    config.save_pretrained(tmp_path)
    model, _ = load(str(tmp_path), device="cpu")
    assert not isinstance(model, EngineModel)
    assert caplog.messages[0].endswith("its attention heads have not 64 values")


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


def test_an_unknown_attention_back_end_lists_the_known_ones() -> None:
    for name in ("sdpa_flsh", 1.5, ["auto"], None):
        with pytest.raises(OptionError, match=r"attention is .*: give auto, .*sdpa_flash"):
            check_attention(name)  # type: ignore[arg-type]
    check_attention("auto")
    check_attention("eager")


@pytest.mark.parametrize("source", [["tiny.en"], {}, 5, b"tiny.en", None])
def test_a_source_that_is_neither_text_nor_a_path_is_refused(source: Any) -> None:
    for read in (load, load_processor):
        with pytest.raises(WeightsError, match="neither text nor a path"):
            read(source)


def test_device_and_attention_are_checked_before_anything_is_read() -> None:
    with pytest.raises(OptionError, match="attention is 'nothing': give"):
        load("/there/is/nothing", attention="nothing")
    with pytest.raises((DeviceError, OptionError), match="device"):
        load("/there/is/nothing", device="cuda:99")


def test_dtype_is_another_name_of_compute_type(folder: Path) -> None:
    found = Transcriber.from_pretrained(str(folder), device="cpu", dtype="bfloat16")
    assert "bfloat16" in found.describe()
    with pytest.raises(OptionError, match="give one of them"):
        Transcriber.from_pretrained(str(folder), compute_type="float32", dtype="float32")
