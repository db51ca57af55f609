"""Any number of recordings side by side, each given as soon as it is done."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from time import sleep
from typing import Any

import numpy as np
import pytest

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.errors import AudioError, NotFinite
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import batched
from whisper_flash_attention.transcribe.batched import BatchedReader
from whisper_flash_attention.transcribe.window_decoder import WindowDecoder

ONCE = DecodeOptions(temperature=0.0)
BATCHED = DecodeOptions(mode="batched", temperature=0.0)


@pytest.fixture(scope="module")
def snippets(bundled_recordings) -> list[np.ndarray]:
    """3 s of speech, nothing, 33 s of digital silence after 3 s of speech, 2 s of speech."""
    samples = load_audio(bundled_recordings[0].path)
    silence = np.zeros(33 * 16_000, np.float32)
    long = np.concatenate([samples[48_000:96_000], silence])
    return [samples[:48_000], silence[:16_000], long, samples[16_000:48_000]]


@pytest.mark.parametrize("options", [ONCE, BATCHED], ids=["sequential", "batched"])
def test_all_are_given_once_with_their_own_words(transcriber, snippets, options) -> None:
    shares: dict[int, list[float]] = {}
    found = dict(
        transcriber.transcribe_each(
            iter(snippets),
            options=options,
            batch_size=2,
            on_progress=lambda index, share: shares.setdefault(index, []).append(share),
        )
    )
    assert sorted(found) == [0, 1, 2, 3] == sorted(shares)
    assert [found[index].seconds for index in range(4)] == [3.0, 1.0, 36.0, 2.0]
    assert "Dashwood" in found[0].text and found[1].text == "" and found[3].text
    assert found[0].text == transcriber.transcribe(snippets[0], options=options).text
    assert all(each[0] == 0 and each == sorted(each) and each[-1] == 1 for each in shares.values())


def test_silent_windows_in_a_row_end_a_recording_once(transcriber, snippets) -> None:
    """They are skipped while another recording is decoded, and delivered later."""
    long = np.concatenate([snippets[3], np.zeros(95 * 16_000, np.float32)])
    shares: list[float] = []
    found = list(
        transcriber.transcribe_each(
            [long, snippets[0], snippets[3]],
            options=ONCE,
            batch_size=2,
            on_progress=lambda index, share: shares.append(share) if index == 0 else None,
        )
    )
    assert sorted(index for index, _ in found) == [0, 1, 2]
    assert dict(found)[0].text == transcriber.transcribe(snippets[3], options=ONCE).text
    assert shares == sorted(set(shares)) and len(shares) >= 4


@pytest.fixture
def threaded(monkeypatch) -> None:
    """Batches are prefetched by a thread, one ahead, as for a GPU."""

    def prefetched(batches: Iterator[Any], clips_of: Any, device: Any) -> Generator[Any]:
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                yield batch, clips_of(batch)

    monkeypatch.setattr(batched, "prefetch", prefetched)


@pytest.mark.usefixtures("threaded")
def test_a_thread_may_take_them(transcriber, snippets) -> None:
    threads = set()
    found = dict(
        transcriber.transcribe_each(
            iter(snippets),
            options=BATCHED,
            batch_size=4,
            on_progress=lambda index, share: threads.add(get_ident()),
        )
    )
    assert sorted(found) == [0, 1, 2, 3] and threads - {get_ident()}
    assert "Dashwood" in found[0].text and found[1].text == "" and found[3].text


@pytest.mark.usefixtures("threaded")
@pytest.mark.parametrize("in_slots", [False, True])
def test_after_an_error_no_thread_takes_more(
    transcriber, snippets, monkeypatch, in_slots: bool
) -> None:
    taken = []

    def recordings() -> Iterator[np.ndarray]:
        for number in range(9):
            taken.append(number)
            sleep(0.1 * (number > 0))  # while the first is decoded
            yield snippets[3]

    def fail(*arguments: object, **options: object) -> None:
        raise NotFinite("not finite")

    monkeypatch.setattr(WindowDecoder, "fits_slots", in_slots)
    monkeypatch.setattr(BatchedReader, "_encode", fail)
    waiting = recordings()
    with pytest.raises(NotFinite):
        list(transcriber.transcribe_each(waiting, options=BATCHED, batch_size=1))
    before = len(taken)
    next(waiting)  # nobody else is in it
    assert len(taken) == before + 1 < 9


def test_recordings_are_taken_as_there_is_room_and_let_go(transcriber, snippets) -> None:
    taken: list[weakref.ref[AudioSource]] = []

    def recordings() -> Iterator[AudioSource]:
        for _ in range(4):
            audio = AudioSource(snippets[3].copy())
            # What is held is the samples; the object around them has no room for a reference.
            taken.append(weakref.ref(audio.samples))
            yield audio
            del audio

    each = transcriber.transcribe_each(recordings(), options=ONCE, batch_size=2)
    next(each)
    assert len(taken) == 2
    assert len(list(each)) == 3
    gc.collect()
    assert [reference() for reference in taken] == [None] * 4


def test_a_model_that_the_engine_does_not_run_gives_them_in_order(without_engine, snippets) -> None:
    found = list(without_engine.transcribe_each(snippets[:1] * 2, options=ONCE))
    assert [index for index, _ in found] == [0, 1]
    assert "Dashwood" in found[1][1].text


def test_samples_that_are_no_sound_end_it(transcriber, snippets) -> None:
    bad = np.full(16_000, np.nan, np.float32)
    with pytest.raises(AudioError, match="not finite"):
        list(transcriber.transcribe_each([snippets[3], bad], options=ONCE, batch_size=1))
