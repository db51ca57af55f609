"""Systems that turn recordings into text: what they do with what they are given."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.benchmark.peer_checkpoints import write_checkpoint
from whisper_flash_attention.benchmark.peer_systems import (
    CTRANSLATE2,
    OPENAI,
    SYSTEMS,
    TRANSFORMERS,
    Loaded,
    Request,
    Setup,
    Texts,
    clips_of,
    read_file,
)
from whisper_flash_attention.benchmark.settings import ModelSize
from whisper_flash_attention.benchmark.spoken import bundled_spoken, join_spoken
from whisper_flash_attention.benchmark.word_alignment import TimedWord

needs_faster_whisper = pytest.mark.skipif(
    find_spec("faster_whisper") is None, reason="faster-whisper is not installed"
)
needs_openai_whisper = pytest.mark.skipif(
    find_spec("whisper") is None, reason="openai-whisper is not installed"
)
needs_whisper_cpp = pytest.mark.skipif(
    find_spec("pywhispercpp") is None, reason="pywhispercpp is not installed"
)


def check_words(load: Callable[[Setup], Loaded], setup: Setup) -> None:
    """Check that a system times words where a request wants it, and gives the same text after."""
    clip = bundled_recordings()[0]
    transcribe, _ = load(setup)
    plain, timed, again = Texts(), Texts(), Texts()
    for texts, word_times in ((plain, False), (timed, True), (again, False)):
        transcribe(Request(str(clip.path), "en", word_times=word_times), texts)
    assert not plain.words and not again.words
    assert plain.text == again.text
    said = clip.transcript.lower().split()
    found = [word.text.strip().lower() for word in timed.words]
    assert len(set(said) & set(found)) > len(set(said)) / 2
    starts = [word.start for word in timed.words]
    assert starts == sorted(starts)
    assert all(0 <= word.start <= word.end <= clip.seconds + 0.5 for word in timed.words)


@pytest.mark.parametrize("name", ["ours-sequential", "ours-batched"])
def test_our_words_have_times(tmp_path: Path, tiny_en: str, name: str) -> None:
    written = write_checkpoint(tiny_en, [TRANSFORMERS], tmp_path)
    check_words(SYSTEMS[name].load, Setup(written, "cpu", "float32", 1, 1))


def test_our_words_are_timed_by_what_is_chosen(tmp_path: Path, tiny_en: str) -> None:
    written = write_checkpoint(tiny_en, [TRANSFORMERS], tmp_path)
    found = []
    for alignment in ("tokens", "characters"):
        setup = Setup(written, "cpu", "float32", 1, 1, word_alignment=alignment)
        transcribe, used = SYSTEMS["ours-sequential"].load(setup)
        assert used["word_alignment"] == alignment
        texts = Texts()
        request = Request(str(bundled_recordings()[0].path), "en", word_times=True)
        transcribe(request, texts)
        found.append(texts.words)
    assert [word.text for word in found[0]] == [word.text for word in found[1]]
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["stock-chunked", "stock-long-form"])
def test_words_of_stock_have_times(tmp_path: Path, tiny_en: str, name: str) -> None:
    written = write_checkpoint(tiny_en, [TRANSFORMERS], tmp_path)
    check_words(SYSTEMS[name].load, Setup(written, "cpu", "float32", 1, 1))


@needs_openai_whisper
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_words_of_openai_whisper_have_times(tmp_path: Path, tiny_en: str) -> None:
    written = write_checkpoint(tiny_en, [OPENAI], tmp_path)
    # It knows these itself of a checkpoint that it is given by name.
    named = (1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)
    assert written.alignment_heads == named
    check_words(SYSTEMS["openai-whisper"].load, Setup(written, "cpu", "float32", 1, 1))


@needs_faster_whisper
@pytest.mark.parametrize("name", ["faster-whisper-sequential", "faster-whisper-batched"])
def test_words_of_faster_whisper_have_times(tmp_path: Path, tiny_en: str, name: str) -> None:
    written = write_checkpoint(tiny_en, [CTRANSLATE2], tmp_path)
    check_words(SYSTEMS[name].load, Setup(written, "cpu", "float32", 1, 1))


def test_words_without_times_are_left_out() -> None:
    texts = Texts()
    texts.add_words([(" one", 0.5, 1.0), (" two", 1.0, None), (" three", None, 2.0)])
    assert texts.words == [TimedWord(" one", 0.5, 1.0)]


def test_files_are_read_whole_as_the_transcriber_reads_them() -> None:
    path = bundled_recordings()[0].path
    np.testing.assert_array_equal(read_file(str(path)), load_audio(path))


def test_windows_are_cut_as_faster_whisper_takes_them() -> None:
    found = clips_of(np.zeros(16_000 * 65, np.float32))
    assert [(each["start"], each["end"]) for each in found] == [(0, 30), (30, 60), (60, 65.0)]
    assert clips_of(np.zeros(16_000 * 30, np.float32)) == [{"start": 0, "end": 30}]


@needs_whisper_cpp
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_whisper_cpp_reads_what_is_written_for_it(tmp_path: Path, tiny_en: str, dtype: str) -> None:
    system = SYSTEMS["whisper.cpp"]
    written = write_checkpoint(tiny_en, [system.formats[dtype]], tmp_path)
    transcribe, settings = system.load(Setup(written, "cpu", dtype, 1, 1))
    clip = bundled_recordings()[0]
    texts = Texts()
    transcribe(Request(str(clip.path), "en"), texts)
    assert "Dashwood" in texts.text and "leisure to consider" in texts.text
    assert settings["n_threads"] == 1 and not texts.words
    check_words(system.load, Setup(written, "cpu", dtype, 1, 1))


@needs_faster_whisper
def test_faster_whisper_decodes_to_a_given_number_of_tokens(
    tmp_path: Path, small: ModelSize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CT2_VERBOSE", "-1")
    written = write_checkpoint("tiny", [CTRANSLATE2], tmp_path, is_random=True)
    joined = join_spoken(bundled_spoken(), 70.0, tmp_path)
    for name in ("faster-whisper-sequential", "faster-whisper-batched"):
        setup = Setup(written, "cpu", "float32", 2, 1, new_tokens=9)
        transcribe, used = SYSTEMS[name].load(setup)
        assert used["CT2_VERBOSE"] == "-1"
        texts = Texts()
        transcribe(Request(str(joined.path), "en", 2), texts)
        assert texts.tokens == 3 * 9, name


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["stock-chunked", "stock-long-form"])
def test_stock_does_not_search_with_beams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its pipeline would, with five, where all others decode greedily."""
    written = write_checkpoint("tiny", [TRANSFORMERS], tmp_path, is_random=True)
    transcribe, used = SYSTEMS[name].load(Setup(written, "cpu", "float32", 1, 1, new_tokens=4))
    monkeypatch.setattr(WhisperForConditionalGeneration, "_beam_search", None)
    texts = Texts()
    transcribe(Request(str(bundled_recordings()[0].path), "en"), texts)
    assert (texts.tokens or 0) >= 3 and used["num_beams"] == 1


def test_settings_state_what_a_system_does_by_default(tmp_path: Path, tiny_en: str) -> None:
    written = write_checkpoint(tiny_en, [TRANSFORMERS], tmp_path)
    for name, vad in (("ours-sequential", False), ("ours-batched", True)):
        _, used = SYSTEMS[name].load(Setup(written, "cpu", "float32", 1, 1))
        assert (used["beam_size"], used["vad_filter"], used["temperature"][0]) == (1, vad, 0.0)
        assert used["compression_ratio_threshold"] == 2.4
