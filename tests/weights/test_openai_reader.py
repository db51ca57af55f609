"""OpenAI's `.pt` files: equal logits after conversion, and no code from a file ever runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from tests.weights.writers import logits, small_whisper, to_openai
from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights import Checkpoint, read_checkpoint
from whisper_flash_attention.weights.openai_reader import read_openai


def read(folder: Path, content: object) -> Checkpoint:
    path = folder / "model.pt"
    torch.save(content, path)
    checkpoint = read_checkpoint(str(path))
    assert checkpoint is not None
    return checkpoint


def test_logits_are_equal_after_conversion(
    model: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    checkpoint = read(tmp_path, to_openai(model))
    assert (checkpoint.source, checkpoint.format) == (str(tmp_path / "model.pt"), "openai")
    converted = WhisperForConditionalGeneration(checkpoint.config)
    converted.load_state_dict(checkpoint.state_dict)  # strict: none missing, none unexpected
    assert torch.equal(logits(converted), logits(model))


def test_half_precision_stays_half_and_mixed_becomes_float32(
    smallest: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    content: Any = to_openai(smallest)
    state = content["model_state_dict"]
    halves = {name: tensor.half() for name, tensor in state.items()}
    found = read(tmp_path, content | {"model_state_dict": halves}).state_dict
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    mixed = halves | {"encoder.conv1.bias": state["encoder.conv1.bias"]}
    found = read(tmp_path, content | {"model_state_dict": mixed}).state_dict
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_the_checkpoint_outlives_its_file(
    smallest: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    checkpoint = read(tmp_path, to_openai(smallest))
    path = tmp_path / "model.pt"
    path.write_bytes(bytes(path.stat().st_size))
    found = checkpoint.state_dict["model.encoder.conv1.weight"]
    assert torch.equal(found, smallest.state_dict()["model.encoder.conv1.weight"])


@pytest.mark.parametrize(
    ("dimensions", "heads"),
    [
        (
            {"encoder_layers": 4, "decoder_layers": 4},
            [[2, 2], [3, 0], [3, 2], [3, 3], [3, 4], [3, 5]],
        ),
        ({"encoder_layers": 4, "decoder_layers": 3}, None),
    ],
    ids=["as tiny", "as no checkpoint of OpenAI's"],
)
def test_alignment_heads_are_there_where_the_dimensions_tell(
    dimensions: dict[str, int],
    heads: list[list[int]] | None,
    tmp_path: Path,
) -> None:
    made = small_whisper(
        d_model=12, encoder_attention_heads=6, decoder_attention_heads=6, **dimensions
    )
    found = read(tmp_path, to_openai(made)).generation_config
    assert getattr(found, "alignment_heads", None) == heads


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def attacks(witness: Path) -> dict[str, object]:
    """Objects whose unpickling would leave the witness behind."""
    return {
        "os.system": Runs(os.system, f"touch {witness}"),
        "eval": Runs(eval, f"__import__('pathlib').Path({str(witness)!r}).touch()"),
        "Path.touch": Runs(Path.touch, witness),
    }


ATTACKS = list(attacks(Path()))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["alone", "in the dims", "in the state"])
@pytest.mark.parametrize("container", ["archive", "bare pickle"])
def test_code_in_a_pickle_does_not_run(
    attack: str,
    place: str,
    container: str,
    smallest: WhisperForConditionalGeneration,
    tmp_path: Path,
) -> None:
    witness, path = tmp_path / "witness", tmp_path / "model.pt"
    evil = attacks(witness)[attack]
    content: Any = to_openai(smallest)
    if place == "in the dims":
        content["dims"]["n_mels"] = evil
    elif place == "in the state":
        content["model_state_dict"]["encoder.conv1.bias"] = evil
    else:
        content = evil
    if container == "archive":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match=r"model\.pt"):
        read_checkpoint(path)
    assert not witness.exists()


def test_the_attacks_would_run_in_a_reader_that_trusts(tmp_path: Path) -> None:
    for name in ATTACKS:
        witness = tmp_path / name
        torch.save(attacks(witness)[name], tmp_path / "model.pt")
        torch.load(tmp_path / "model.pt", weights_only=False)
        assert witness.exists(), name


def changed(content: Any, **changes: object) -> Any:
    return {**content, "dims": {**content["dims"], **changes}}


def without(content: Any, name: str) -> Any:
    state = {key: value for key, value in content["model_state_dict"].items() if key != name}
    return {**content, "model_state_dict": state}


def holding(content: Any, name: object, value: object) -> Any:
    return {**content, "model_state_dict": {**content["model_state_dict"], name: value}}


BIAS = "encoder.conv1.bias"
WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "a tensor": (lambda c: torch.zeros(2), "a dict with 'dims' and .* found a tensor"),
    "a state alone": (lambda c: c["model_state_dict"], r"found dict \['decoder.blocks.0"),
    "no dims": (lambda c: {"model_state_dict": {}}, r"found dict \['model_state_dict'\]"),
    "dims that are no dict": (lambda c: c | {"dims": 3}, "'dims' or 'model_state_dict' is not a d"),
    "a dimension missing": (lambda c: c | {"dims": {}}, "dims without a whole number for n_mels,"),
    "a fraction": (lambda c: changed(c, n_vocab=1.5), "dims without a whole number for n_vocab"),
    "a truth": (lambda c: changed(c, n_text_head=True), "without a whole number for n_text_head"),
    "no heads": (lambda c: changed(c, n_text_head=0), "decoder_attention_heads is 0"),
    "absurd layers": (lambda c: changed(c, n_text_layer=10**12), "n_text_layer is 1000000000000 f"),
    "an absurd width": (
        lambda c: changed(c, n_audio_state=2**62, n_text_state=2**62),
        "d_model is 4611686018427387904, expected a positive number up to 16384",
    ),
    "two widths": (lambda c: changed(c, n_text_state=8), "n_audio_state 4 and n_text_state 8 diff"),
    "another vocabulary": (lambda c: changed(c, n_vocab=50257), "a vocabulary of 50257 tokens"),
    "one layer more": (lambda c: changed(c, n_audio_layer=2), "missing: encoder.blocks.1.attn_ln"),
    "a tensor missing": (lambda c: without(c, BIAS), f"1 missing: {BIAS}"),
    "a tensor too many": (
        lambda c: holding(c, "decoder.mask", torch.zeros(2, 2)),
        "1 unexpected: decoder.mask",
    ),
    "a tensor of another shape": (
        lambda c: holding(c, BIAS, torch.zeros(5)),
        rf"{BIAS} is \[5\] instead of \[4\]",
    ),
    "no tensor": (
        lambda c: holding(c, BIAS, [1, 2]),
        f"{BIAS} in model_state_dict is list, expected a tensor",
    ),
    "a number for a name": (
        lambda c: holding(c, 5, torch.zeros(2)),
        "5 in model_state_dict is a tensor, exp",
    ),
    "whole numbers": (
        lambda c: holding(c, BIAS, torch.zeros(4, dtype=torch.int64)),
        f"tensor {BIAS} is not a contiguous float16, bfloat16 or float32 one",
    ),
    "a sparse tensor": (
        lambda c: holding(c, BIAS, torch.zeros(4).to_sparse()),
        r"names torch\._utils\._rebuild_sparse_tensor",
    ),
    "a tensor that repeats one number": (
        lambda c: holding(c, BIAS, torch.zeros(1).expand(10**9)),
        f"tensor {BIAS} is not a contiguous",
    ),
    "tensors that share their memory": (
        lambda c: c | {"model_state_dict": dict.fromkeys("abcd", torch.zeros(10**5))},
        "its tensors claim 1600000 bytes, more than the file has",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_refused(
    name: str, smallest: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    change, message = WRONG[name]
    with pytest.raises(WeightsError, match=message) as caught:
        read(tmp_path, change(to_openai(smallest)))
    assert str(caught.value).startswith(str(tmp_path / "model.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, or not an archive of torch.save"),
        (b"RIFF" + bytes(100), "truncated, or not an archive of torch.save"),
    ],
    ids=["empty", "something else"],
)
def test_what_is_no_archive_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_openai(path)


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(f"archive/{name.replace('_', '.')}", data)
    return path


def test_archives_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="an archive, but not one of"):
        read_openai(archive(tmp_path / "a.pt", word_document=b"abc"))
    with pytest.raises(WeightsError, match="an archive, but not one of"):
        read_openai(archive(tmp_path / "b.pt", data_pkl=b"N.", constants_pkl=b"N."))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "a.pt", zipfile.ZIP_DEFLATED, data_pkl=bytes(1 << 20))
    with pytest.raises(WeightsError, match="has compressed entries"):
        read_openai(bomb)


@pytest.fixture(scope="module")
def whole(
    smallest: WhisperForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An intact file, whose folder may hold broken copies of it."""
    path = tmp_path_factory.mktemp("openai") / "whole.pt"
    torch.save(to_openai(smallest), path)
    return path


def read_or_refuse(path: Path) -> None:
    """Nothing but a checkpoint or a `WeightsError` may come of it."""
    try:
        read_openai(path)
    except WeightsError as error:
        assert str(path) in str(error)


def test_every_truncation_is_refused(whole: Path) -> None:
    content, path = whole.read_bytes(), whole.with_name("broken.pt")
    for length in [*range(0, len(content), 9973), *range(len(content) - 60, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError):
            read_openai(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bytes_give_weights_or_a_clear_error(whole: Path, data: st.DataObject) -> None:
    broken = bytearray(whole.read_bytes())
    # The pickle is at the beginning, the directory of the archive at the end.
    places = st.integers(0, 6000) | st.integers(len(broken) - 6000, len(broken) - 1)
    flips = data.draw(st.dictionaries(places, st.integers(1, 255), min_size=1, max_size=4))
    for place, mask in flips.items():
        broken[place] ^= mask
    path = whole.with_name("broken.pt")
    path.write_bytes(broken)
    read_or_refuse(path)


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 5000), noise=st.binary(max_size=60))
def test_a_noisy_pickle_gives_weights_or_a_clear_error(
    whole: Path, start: int, noise: bytes
) -> None:
    path = whole.with_name("noisy.pt")
    with zipfile.ZipFile(whole) as intact, zipfile.ZipFile(path, "w") as noisy:
        for entry in intact.infolist():
            data = intact.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = data[:start] + noise + data[start + len(noise) :]
            noisy.writestr(entry.filename, data)
    read_or_refuse(path)
