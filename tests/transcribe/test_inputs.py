from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import av
import pytest

from whisper_flash_attention.audio import BundledClip, load_audio
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.inputs import RECORDING_SUFFIXES, find_inputs


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """A folder of recordings at several depths, with what is not one between them."""
    for name in (
        *("b.mp3", "a.WAV", "notes.txt", "._b.mp3", "2024/b.mp3", "2024/deep/c.opus"),
        *(".hidden/d.mp3", "[odd].mp3", "pictures/e.png"),
    ):
        path = tmp_path / "talks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "talks"


def names(*arguments: str | Path, below: Path) -> list[str]:
    found = find_inputs([str(argument) for argument in arguments])
    return [Path(entry.name).relative_to(below).as_posix() for entry in found]


def places(*arguments: str | Path) -> list[str]:
    return [entry.place.as_posix() for entry in find_inputs([str(path) for path in arguments])]


def test_a_folder_gives_its_recordings_at_any_depth_in_order(talks: Path) -> None:
    expected = ["2024/b.mp3", "2024/deep/c.opus", "[odd].mp3", "a.WAV", "b.mp3"]
    assert names(talks, below=talks) == expected
    assert places(talks) == expected
    assert not any(entry.named for entry in find_inputs([str(talks)]))


def test_a_named_file_is_taken_whatever_it_is_called(talks: Path) -> None:
    assert places(talks / "2024/b.mp3", talks / "notes.txt", "nowhere.dat") == [
        *("b.mp3", "notes.txt", "nowhere.dat"),
    ]
    assert names(talks / "[odd].mp3", below=talks) == ["[odd].mp3"]


def test_a_pattern_takes_what_a_folder_takes(talks: Path) -> None:
    assert places(talks / "*.mp3") == ["[odd].mp3", "b.mp3"]
    assert places(talks / "**" / "*.mp3") == ["2024/b.mp3", "[odd].mp3", "b.mp3"]
    assert places(talks / "20*") == ["2024/b.mp3", "2024/deep/c.opus"]
    assert places(talks / "*" / "deep" / "*") == ["2024/deep/c.opus"]


def test_a_pattern_may_be_relative(talks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(talks)
    assert places("*.mp3") == places("./*.mp3") == ["[odd].mp3", "b.mp3"]
    assert places("../talks/2024/*.mp3") == ["b.mp3"]
    assert places(".") == places(talks)


def test_nothing_is_taken_twice(talks: Path) -> None:
    found = names(talks / "b.mp3", talks, f"{talks}/../talks/b.mp3", below=talks)
    assert found == ["b.mp3", "2024/b.mp3", "2024/deep/c.opus", "[odd].mp3", "a.WAV"]
    assert len(find_inputs(["-", "-"])) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a/x.wav", "b/x.wav"], ["a/x", "b/x"]),
        (["a/x.wav", "b/x.wav", "y.wav"], ["a/x", "b/x", "y"]),
        (["x.wav", "b/x.wav"], ["x", "b/x"]),
        (["d/a/x.wav", "d/b/x.wav", "d/b/x.mp3"], ["a/x", "b/x", "x"]),
        (["a/x.wav", "b/x.mp3"], ["x.wav", "x.mp3"]),
        (["x.wav", "x.mp3", "x.wav.mp3"], ["x.wav", "x.mp3", "x.wav.mp3"]),
        (["X.wav", "x.mp3"], ["X.wav", "x.mp3"]),
        (["X.wav", "x.wav"], ["X", "x"]),
        (["a/t.v1/x.wav", "b/t.v1/x.wav"], ["a/t.v1/x", "b/t.v1/x"]),
    ],
)
def test_recordings_of_one_name_get_names_of_their_own(
    arguments: list[str], expected: list[str]
) -> None:
    found = [(entry.place.parent / entry.stem).as_posix() for entry in find_inputs(arguments)]
    assert found == expected


def test_places_of_several_arguments_are_kept_apart(talks: Path) -> None:
    (talks / "2023").mkdir()
    (talks / "2023" / "b.mp3").touch()
    assert places(talks / "2023", talks / "2024") == ["2023/b.mp3", "2024/b.mp3", "deep/c.opus"]
    (talks / "2023" / "b.mp3").unlink()
    above = talks.parent
    assert places(talks, above / "2024/b.mp3", above / "b.mp3") == [
        *("talks/2024/b.mp3", "2024/deep/c.opus", "[odd].mp3", "a.WAV", "talks/b.mp3"),
        *("2024/b.mp3", "b.mp3"),
    ]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("pictures", "holds no recordings"), ("*.flac", "matches no recordings")],
)
def test_a_place_without_recordings_is_reported(talks: Path, argument: str, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        find_inputs([str(talks / argument)])


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="needs a user who may not read everything"
)
def test_a_folder_that_cannot_be_read_is_reported(talks: Path) -> None:
    (talks / "2024").chmod(0)
    try:
        with pytest.raises(OptionError, match="2024: cannot be read"):
            find_inputs([str(talks)])
    finally:
        (talks / "2024").chmod(0o700)


class Piped(io.TextIOWrapper):
    """Standard input that is not a file: it cannot go back."""

    def __init__(self, content: bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content))
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_standard_input_is_read_and_has_a_name(
    bundled_recordings: tuple[BundledClip, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = bundled_recordings[4].path
    monkeypatch.setattr(sys, "stdin", Piped(clip.read_bytes()))
    [entry] = find_inputs(["-"])
    assert (entry.name, str(entry.place)) == ("stdin", "stdin")
    assert (load_audio(entry.source()) == load_audio(clip)).all()


def test_a_mistake_in_standard_input_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    [entry] = find_inputs(["-"])
    monkeypatch.setattr(sys, "stdin", Piped(b""))
    with pytest.raises(ValueError, match="stdin: the file is empty"):
        load_audio(entry.source())
    monkeypatch.setattr(sys, "stdin", Piped(b"", terminal=True))
    with pytest.raises(OptionError, match="standard input, which is a terminal here"):
        entry.source()


def test_suffixes_are_those_of_formats_that_pyav_reads() -> None:
    known = {".aifc", ".m4b", ".m4v", ".mpeg", ".wmv"}  # other names of formats
    for name in av.formats_available:
        known |= {f".{suffix}" for suffix in (name, *av.ContainerFormat(name).extensions)}
    assert known >= RECORDING_SUFFIXES
