"""Words with their times: reference alignments, and the errors of boundaries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from whisper_flash_attention.benchmark.peer_process import Call
from whisper_flash_attention.benchmark.peers import word_times
from whisper_flash_attention.benchmark.spoken import Spoken, boundary_errors, find_spoken
from whisper_flash_attention.benchmark.word_alignment import TimedWord, read_alignment
from whisper_flash_attention.errors import BenchmarkError

SHE_HAD = (TimedWord("she", 0.5, 1.25), TimedWord("had", 1.25, 2.0))


@pytest.mark.parametrize(
    "lines", ["8000 20000 she\n20000 32000 had\n\n", "0.5 1.25  she\n1.25 2  had \n"]
)
def test_alignments_are_in_samples_or_in_seconds(tmp_path: Path, lines: str) -> None:
    recording = tmp_path / "a.wav"
    recording.touch()
    assert read_alignment(recording) == ()
    recording.with_suffix(".wrd").write_text(lines)
    assert read_alignment(recording) == SHE_HAD
    assert find_spoken([str(recording)], "en") == [Spoken(recording, "en", None, words=SHE_HAD)]


@pytest.mark.parametrize("line", ["1 2", "one two she", "2 1 she", "nan 1 she", "-1 1 she"])
def test_a_line_of_something_else_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.wrd"
    path.write_text(f"0 1 we\n{line}\n")
    with pytest.raises(BenchmarkError, match=rf"line 2 of .*a.wrd is '{line}': give a start"):
        read_alignment(tmp_path / "a.wav")
    path.write_bytes(b"0 1 Gr\xfc\xdfe\n")
    with pytest.raises(BenchmarkError, match=r"a.wrd is not text in UTF-8"):
        read_alignment(tmp_path / "a.wav")


def test_gentle_gives_words_that_it_found(tmp_path: Path) -> None:
    words = [
        {"word": "She", "case": "success", "start": 0.5, "end": 1.25},
        {"word": "had", "case": "not-found-in-audio"},
    ]
    (tmp_path / "b.json").write_text(json.dumps({"transcript": "She had", "words": words}))
    assert read_alignment(tmp_path / "b.mp3") == (TimedWord("She", 0.5, 1.25),)


def test_a_word_that_gentle_found_has_its_times(tmp_path: Path) -> None:
    words = [{"word": "She", "case": "success", "start": 0.5}]
    (tmp_path / "b.json").write_text(json.dumps({"words": words}))
    with pytest.raises(BenchmarkError, match=r"b.json has a word that was found and has no start"):
        read_alignment(tmp_path / "b.mp3")


@pytest.mark.parametrize(
    "content",
    [
        *(b"{", b"\xff", b"3", b"[" * 100_000, b'{"text": "She had", "segments": []}'),
        *(b'{"words": 3}', b'{"words": [{"word": "she", "start": 0, "end": 1}]}'),
    ],
)
def test_a_json_file_of_another_kind_is_no_alignment(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.json").write_bytes(content)
    assert read_alignment(tmp_path / "b.mp3") == ()


def test_errors_are_those_of_words_that_both_have() -> None:
    reference = (*SHE_HAD, TimedWord("your", 2.0, 2.5))
    spoken = Spoken(Path("a.wav"), "en", None, words=reference)
    found = [
        *(TimedWord(" She", 0.4, 1.25), TimedWord(" has", 1.25, 2.0)),
        TimedWord(" your,", 2.1, 2.7),
    ]
    pairs: list[Any] = [(-0.1, 0.0), (0.1, 0.2)]
    assert [pytest.approx(pair) for pair in boundary_errors(spoken, found)] == pairs
    other = Spoken(Path("b.wav"), "en", None, words=SHE_HAD)
    call = Call(1.5, None, "", None, 0.1, tuple(found))
    nothing = replace(call, words=())
    row = word_times([spoken, other], {spoken.path: call, other.path: nothing})
    assert row["word_time_error_ms"] == pytest.approx(100)
    assert (row["aligned_words"], row["aligned_words_found"]) == (5, 2)
    assert row["word_times_seconds"] == 3.0
    assert row["word_time_median_ms"] == pytest.approx(100)
    assert row["word_time_errors"] == {"a.wav": [[-0.1, 0.0], [0.1, 0.2]], "b.wav": []}
    assert word_times([other], {other.path: nothing})["word_time_error_ms"] is None
