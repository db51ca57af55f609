"""What a source is, and the errors for what it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration,
)
from whisper_flash_attention.weights import hub_id, read_checkpoint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny.en", "openai/whisper-tiny.en"),
        ("base", "openai/whisper-base"),
        ("medium", "openai/whisper-medium"),
        ("large-v1", "openai/whisper-large"),
        ("large-v2", "openai/whisper-large-v2"),
        ("large-v3", "openai/whisper-large-v3"),
        ("large", "openai/whisper-large-v3"),
        ("turbo", "openai/whisper-large-v3-turbo"),
        ("large-v3-turbo", "openai/whisper-large-v3-turbo"),
        ("large-v1", "openai/whisper-large"),
        ("distil-small.en", "distil-whisper/distil-small.en"),
        ("distil-large-v3.5", "distil-whisper/distil-large-v3.5"),
        ("someone/whisper-tiny", "someone/whisper-tiny"),
    ],
)
def test_short_names_are_openais(name: str, expected: str) -> None:
    assert hub_id(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("large-v4", r"large-v4: did you mean large-v3\?"),
        ("Tiny.en", r"did you mean tiny.en\?"),
        ("turbo-v3", "did you mean"),
        ("xyzzy", "xyzzy: there is no such model or folder. Short names are tiny.en"),
    ],
)
def test_a_misspelt_short_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        hub_id(name)


@pytest.mark.parametrize("source", ["openai/whisper-tiny.en", "tiny.en", "someone/my-model"])
def test_hub_ids_are_left_to_transformers(source: str) -> None:
    assert read_checkpoint(source) is None


@pytest.mark.parametrize(
    "weights",
    ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"],
)
def test_transformers_folders_are_left_to_transformers(weights: str, tmp_path: Path) -> None:
    for name in ("config.json", weights):
        (tmp_path / name).touch()
    assert read_checkpoint(tmp_path) is None
    assert read_checkpoint(str(tmp_path)) is None


@pytest.mark.parametrize(
    "source", ["./missing", "/missing/model", "~/missing", "missing.pt", "models/missing.pt"]
)
def test_a_missing_path_is_named(source: str) -> None:
    with pytest.raises(WeightsError, match=r"missing.*: does not exist; expected a Transf"):
        read_checkpoint(source)


def test_a_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(WeightsError, match="openai/whisper-tiny: does not exist"):
        read_checkpoint(Path("openai/whisper-tiny"))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "a folder with nothing"),
        (["config.json"], r"a folder with config\.json"),
        (["model.safetensors"], r"a folder with model\.safetensors"),
        (list("gfedcba"), r"a folder with a, b, c, d, e, \.\.\."),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_folder_of_no_known_layout_says_what_it_holds(
    names: list[str], found: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=f"{found}; expected a Transformers folder"):
        read_checkpoint(tmp_path)


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(WeightsError, match=r"model\.gguf: a file of unknown kind; expected"):
        read_checkpoint(path)


def test_a_device_is_neither_file_nor_folder() -> None:
    with pytest.raises(WeightsError, match="/dev/null: neither a file nor a folder"):
        read_checkpoint("/dev/null")


@pytest.mark.parametrize("source", ["~nobody-of-that-name/model", "/" + 500 * "a"])
def test_a_path_that_cannot_be_is_refused(source: str) -> None:
    with pytest.raises(WeightsError, match="cannot be looked at"):
        read_checkpoint(source)


@pytest.mark.parametrize(
    "source",
    ["", " ", "a\0b", "/tmp/a\0b.pt", "\ud800", "a/\udfff", "/" + 5000 * "a", 5000 * "a/b"],
    ids=ascii,
)
def test_a_name_of_nothing_is_one_short_printable_line(source: str) -> None:
    with pytest.raises(WeightsError, match="neither a path nor a Hub id") as caught:
        read_checkpoint(source)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("source", ["a\nb", "a\x1b[31mb", "\udcff"], ids=ascii)
def test_a_hub_id_with_control_characters_does_not_exist(source: str) -> None:
    with pytest.raises(WeightsError, match="does not exist") as caught:
        read_checkpoint(source)
    assert str(caught.value).isprintable()


def test_a_folder_that_may_not_be_searched_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", refuse)  # root may search every folder
    with pytest.raises(WeightsError, match=r"cannot be looked at .*Permission denied"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "config.json", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    if name != "config.json":
        (tmp_path / "config.json").write_text("{}")
    source = path if name == "model.pt" else tmp_path
    with pytest.raises(WeightsError, match=rf"{name}: (is a|neither a file)|a folder with"):
        WhisperFlashAttentionForConditionalGeneration.from_pretrained(source)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=f"{tmp_path}/empty: a folder with nothing"):
        read_checkpoint("~/empty")
