"""Windows of many short recordings share batches, in a few shapes; and warming up."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import batched, loading
from whisper_flash_attention.transcribe.batched import padded_rows


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Clips of every call of an encoder that gives zeros."""
    counts: list[int] = []

    def encode(self: Engine, features: torch.Tensor) -> torch.Tensor:
        counts.append(len(features))
        return features.new_zeros(len(features), *self.weights.encoder.positions.shape)

    monkeypatch.setattr(Engine, "encode", encode)
    yield counts


@pytest.fixture(scope="module")
def clips(bundled_recordings) -> list[np.ndarray]:
    """Speech of 1 to 5 s."""
    speech = load_audio(bundled_recordings[0].path)
    return [speech[: 16_000 * (1 + number % 5)] for number in range(10)]


def options(mode: str, least: int) -> DecodeOptions:
    return DecodeOptions(
        mode=mode,
        vad_filter=False,
        temperature=0.0,
        no_speech_threshold=None,
        min_new_tokens=least,
        max_new_tokens=3,
    )


@pytest.mark.parametrize(
    ("mode", "least", "wanted"),
    [
        ("batched", 3, [4, 4, 2]),
        ("sequential", 3, [4, 4, 2]),
        # Slots are filled in groups, which do not wait for a whole batch.
        ("batched", 0, [1] * 10),
    ],
)
@pytest.mark.parametrize("given", ["list", "each"])
def test_short_recordings_fill_batches(
    transcriber, clips, encoded, mode: str, least: int, wanted: list[int], given: str
) -> None:
    arguments = {"options": options(mode, least), "batch_size": 4}
    if given == "list":
        found = transcriber.transcribe(clips, **arguments)
    else:
        found = list(transcriber.transcribe_each(iter(clips), **arguments))
    assert len(found) == len(clips)
    assert encoded == wanted


def test_sequential_slots_are_filled_with_new_recordings(transcriber, clips, encoded) -> None:
    found = transcriber.transcribe(clips, options=options("sequential", 0), batch_size=4)
    assert len(found) == sum(encoded) == len(clips)
    assert encoded[0] == 4


def test_where_shapes_cost_time_there_are_few(transcriber, clips, encoded, monkeypatch) -> None:
    plain = transcriber.transcribe(clips, options=options("batched", 3), batch_size=4)
    monkeypatch.setattr(batched, "PADDED_DEVICES", ("cpu",))
    for count in (1, 3, 6):
        encoded.clear()
        found = transcriber.transcribe(clips[:count], options=options("batched", 3), batch_size=4)
        assert set(encoded) <= {4, 2, 1} and 0 <= sum(encoded) - count < 4
        assert [each.text for each in found] == [each.text for each in plain[:count]]


def test_rows_are_padded_to_halves_of_a_batch() -> None:
    assert [padded_rows(count, 12) for count in (1, 2, 3, 4, 6, 7, 12)] == [1, 2, 3, 6, 6, 12, 12]
    assert padded_rows(1, 1) == 1


def test_warming_up_meets_all_shapes_of_a_batch_size(transcriber, encoded, monkeypatch) -> None:
    monkeypatch.setattr(batched, "PADDED_DEVICES", ("cpu",))
    transcriber.warm_up(options=options("batched", 3), batch_size=3)
    assert set(encoded) == {3, 2, 1}


def test_the_first_use_says_once_that_kernels_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setattr(loading, "_folder", lambda: folder)
    loading.announce_compilation("cpu")
    assert not caplog.records
    loading.announce_compilation("cuda")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(folder) in record.getMessage()
    (folder / "kernel").mkdir(parents=True)
    loading.announce_compilation("cuda")
    assert len(caplog.records) == 1
