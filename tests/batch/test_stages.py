"""What is wrong with one recording costs no other; what is wrong with all is raised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.batch.fakes import FakeModel, FakeSpeech, write_wav
from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.model import RunOptions, shifted
from whisper_flash_attention.batch.rows import failed_row
from whisper_flash_attention.batch.stages import (
    Decoded,
    DeviceLost,
    TranscribeStage,
    Work,
    decode,
    grouped,
    planned,
)
from whisper_flash_attention.errors import DecoderError, MissingPackage, OptionError
from whisper_flash_attention.options import TranscribeOptions
from whisper_flash_attention.transcribe import Segment, Transcription, Word


def decoded_group(*sizes: int, **fields: Any) -> list[Decoded]:
    return [
        Decoded(Item(str(size), f"{size}.wav", **fields), np.zeros(size, np.float32))
        for size in sizes
    ]


@pytest.fixture(scope="module")
def opener() -> Iterator[AudioOpener]:
    with AudioOpener(DecoderPool(1)) as opener:
        yield opener


def test_a_part_is_decoded_from_a_file_and_from_a_url(opener: AudioOpener, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", 16_000)
    items = [Item("a", str(path)), Item("b", f"file://{path}", start=0.25, end=0.75)]
    whole, part = decode(items, opener)
    assert (whole.item, part.item) == tuple(items)
    assert whole.samples is not None
    assert part.samples is not None
    assert whole.seconds == 1.0
    np.testing.assert_array_equal(part.samples, whole.samples[4_000:12_000])


def test_what_cannot_be_decoded_is_a_row(opener: AudioOpener, tmp_path: Path) -> None:
    text = tmp_path / "text.wav"
    text.write_text("no sound")
    good = write_wav(tmp_path / "a.wav")
    for item, kind in (
        (Item("1", str(text)), "AudioError"),
        (Item("2", str(tmp_path / "nowhere.wav")), "AudioError"),
        (Item("3", f"file://{tmp_path}/nowhere.wav"), "FileNotFoundError"),
        (Item("4", str(good), start=10.0), "AudioError"),
        (Item("5", f"file://{text}"), "AudioError"),
    ):
        (decoded,) = decode([item], opener)
        row = decoded.failure
        assert row is not None
        assert row["error_kind"] == kind
        assert item.path in row["error"]
        assert row["id"] == item.id


def test_groups_are_bounded_in_files_and_length() -> None:
    def sizes(files: int, seconds: float) -> list[int]:
        # Four recordings for each window that is decoded at a time.
        work = Work(FakeModel(), RunOptions(batch_size=files), seconds / 3_600)
        return [len(group) for group in grouped(decoded_group(*[16_000] * 7), work)]

    assert sizes(1, 100.0) == [4, 3]
    assert sizes(100, 2.0) == [2, 2, 2, 1]
    assert sizes(100, 2.5) == [3, 3, 1]
    alone = Work(FakeModel()).alone()
    assert [len(group) for group in grouped(decoded_group(1, 2, 3), alone)] == [1, 1, 1]
    assert list(grouped([], alone)) == []


def test_what_is_decoded_together_is_about_a_group() -> None:
    def counts(work: Work, seconds: float | None) -> list[int]:
        items = [Item(str(number), "a.wav", seconds=seconds) for number in range(10)]
        return [len(some) for some in planned(items, work)]

    assert counts(Work(FakeModel(), RunOptions(batch_size=1)), None) == [4, 4, 2]
    assert counts(Work(FakeModel(), group_hours=2.0), 3_600.0) == [2] * 5
    assert counts(Work(FakeModel()).alone(), None) == [1] * 10
    assert list(planned([], Work(FakeModel()))) == []


def test_recordings_with_the_same_options_are_planned_together() -> None:
    items = [Item(str(number), "a.wav", language=("en", "de")[number % 2]) for number in range(8)]
    groups = planned(items, Work(FakeModel(), group_files=4))
    assert [[item.id for item in group] for group in groups] == [list("0246"), list("1357")]


def test_a_small_archive_is_shared_out_among_the_workers() -> None:
    items = [Item(str(number), "a.wav", seconds=36.0) for number in range(100)]  # 1 h
    shared = Work(FakeModel()).shared(items, workers=5)
    assert (shared.group_hours, shared.most_files) == (pytest.approx(0.05), 5)
    shared = Work(FakeModel(), group_hours=0.01, group_files=2).shared(items, workers=5)
    assert (shared.group_hours, shared.most_files) == (0.01, 2)
    unknown = [Item(str(number), "a.wav") for number in range(100)]
    shared = Work(FakeModel(), RunOptions(batch_size=1)).shared(unknown, workers=1)
    assert (shared.group_hours, shared.most_files) == (4.0, 4)


def test_one_that_raises_costs_no_other() -> None:
    stage = TranscribeStage(FakeModel(raises_at=2), RunOptions())
    gone = Item("gone", "/nowhere.wav")
    failed = Decoded(gone, failure=failed_row(gone, "AudioError", "there is no such file"))
    rows = stage.rows([*decoded_group(1, 2), failed, *decoded_group(3)])
    assert [row["id"] for row in rows] == ["1", "2", "gone", "3"]
    assert [row["text"] for row in rows] == ["1 transcribe", None, None, "3 transcribe"]
    assert (rows[1]["error_kind"], rows[1]["error"]) == ("RuntimeError", "this one cannot be heard")
    assert rows[2] == failed.failure


class OneAtATime(FakeSpeech):
    """Gives each recording when it was taken, and counts those in progress."""

    def transcribe_each(self, recordings: Any, **options: Any) -> Any:
        for index, samples in enumerate(recordings):
            yield index, self._one(samples.size, "en", "transcribe", options)


def stage_with(speech: type[FakeSpeech], monkeypatch: pytest.MonkeyPatch) -> TranscribeStage:
    monkeypatch.setattr(FakeModel, "open", lambda model: speech(model))
    return TranscribeStage(FakeModel(raises_at=3), RunOptions())


def test_a_row_comes_when_its_recording_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def arriving() -> Iterator[Decoded]:
        for each in decoded_group(1, 2, 3, 4, 5):
            taken.append(each.item.id)
            yield each

    rows = stage_with(OneAtATime, monkeypatch).stream(arriving())
    found = [(row["id"], row["error_kind"], len(taken)) for row in rows]
    assert [each[:2] for each in found] == [
        *(("1", None), ("2", None), ("3", "RuntimeError"), ("4", None), ("5", None))
    ]
    assert [number for *_, number in found] == [1, 2, 3, 4, 5]


def test_progress_within_recordings_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reporting(FakeSpeech):
        def transcribe_each(self, recordings: Any, **options: Any) -> Any:
            for index, samples in enumerate(recordings):
                options["on_progress"](index, 0.5)
                yield index, self._one(samples.size, "en", "transcribe", options)
                # As a thread does that works on it: its row is already given.
                options["on_progress"](index, 1.0)

    seen: list[tuple[str, float, float]] = []
    stage = stage_with(Reporting, monkeypatch)
    group = decoded_group(8_000, 16_000)
    list(stage.stream(group, on_progress=lambda item, *done: seen.append((item.id, *done))))
    assert seen == [("8000", 0.5, 0.5), ("16000", 0.5, 1.0)]


def test_a_stream_is_bounded_and_ends_where_options_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[list[int]] = []

    class Beside(FakeSpeech):
        def transcribe_each(self, recordings: Any, **options: Any) -> Any:
            begun.append([samples.size for samples in recordings])
            for index, size in enumerate(begun[-1]):
                yield index, Transcription(str(size), "en", (), 1.0)

    stage = stage_with(Beside, monkeypatch)
    group = [*decoded_group(1, 2), *decoded_group(3, language="de"), *decoded_group(4)]
    assert [row["id"] for row in stage.stream(iter(group))] == ["1", "2", "3", "4"]
    assert begun == [[1, 2], [3], [4]]
    begun.clear()
    assert [row["id"] for row in stage.rows(group)] == ["1", "2", "3", "4"]
    assert begun == [[1, 2, 4], [3]]
    begun.clear()
    work = Work(FakeModel(), RunOptions(batch_size=1), group_hours=1 / 60)  # two minutes, at least
    list(stage.stream(decoded_group(*[60 * 16_000] * 5), work))
    assert [len(each) for each in begun] == [2, 2, 1]
    begun.clear()
    list(stage.stream(decoded_group(1, 2, 3), work.alone()))
    assert begun == [[1], [2], [3]]


def test_what_ends_the_recordings_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def arriving() -> Iterator[Decoded]:
        yield from decoded_group(1, 2)
        raise DecoderError("processes cannot be started")

    rows = stage_with(OneAtATime, monkeypatch).stream(arriving())
    assert [next(rows)["id"], next(rows)["id"]] == ["1", "2"]
    with pytest.raises(DecoderError):
        next(rows)


def test_each_is_asked_what_its_row_says() -> None:
    stage = TranscribeStage(FakeModel(), RunOptions(TranscribeOptions("german")))
    group = [
        *decoded_group(1),
        *decoded_group(2, task="translate"),
        *decoded_group(3, language="en", prompt="Ann"),
    ]
    rows = stage.rows(group)
    assert [row["text"] for row in rows] == [
        "1 transcribe",
        "2 translate",
        "3 transcribe after Ann",
    ]
    assert [row["language"] for row in rows] == ["de", "de", "en"]


def test_times_are_those_of_the_whole_recording() -> None:
    text = Transcription(
        "a", "en", (Segment(0.5, 1.0, "a", words=(Word(0.5, 0.75, "a", 1.0),)),), 1.0
    )
    (segment,) = shifted(text, 10.0).segments
    assert (segment.start, segment.end) == (10.5, 11.0)
    assert (segment.words[0].start, segment.words[0].end) == (10.5, 10.75)
    assert shifted(text, 0.0) == text
    (row,) = TranscribeStage(FakeModel(), RunOptions()).rows(decoded_group(16_000, start=10.0))
    assert row["seconds"] == 1.0
    assert row["segments"][0]["start"] == 10.0


def test_time_is_shared_out_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = TranscribeStage(FakeModel(waits=0.02), RunOptions()).rows(decoded_group(1_000, 3_000))
    assert rows[1]["seconds_taken"] == pytest.approx(3 * rows[0]["seconds_taken"], rel=0.1)
    assert rows[0]["seconds_taken"] + rows[1]["seconds_taken"] >= 0.02


def test_what_is_drawn_depends_on_the_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def draw(self: FakeSpeech, recordings: Any, **options: Any) -> Any:
        drawn.append(float(torch.rand(())))
        for index, _ in enumerate(list(recordings)):
            yield index, Transcription("", "en", (), 1.0)

    monkeypatch.setattr(FakeSpeech, "transcribe_each", draw)
    stage = TranscribeStage(FakeModel(), RunOptions())
    torch.manual_seed(0)
    outside = torch.rand(())
    torch.manual_seed(0)
    for group in (decoded_group(1, 2), decoded_group(3), decoded_group(1, 2)):
        stage.rows(group)
    assert drawn[0] == drawn[2] != drawn[1]
    assert torch.rand(()) == outside


def raising(error: Exception, monkeypatch: pytest.MonkeyPatch) -> TranscribeStage:
    def refuse(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(FakeSpeech, "transcribe_each", refuse)
    return TranscribeStage(FakeModel(), RunOptions())


def test_what_would_be_the_same_for_all_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPackage):
        raising(MissingPackage("vad"), monkeypatch).rows(decoded_group(1))
    with pytest.raises(OptionError):
        raising(OptionError("mode"), monkeypatch).rows(decoded_group(1))
    with pytest.raises(DeviceLost):
        raising(torch.AcceleratorError("illegal access"), monkeypatch).rows(decoded_group(1))


def test_an_option_of_one_row_is_an_error_of_that_row(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = raising(OptionError("no German"), monkeypatch).rows(decoded_group(1, language="de"))
    assert row["error_kind"] == "OptionError"


def test_a_model_that_cannot_do_what_is_asked_is_not_begun_with() -> None:
    with pytest.raises(OptionError, match="English-only"):
        TranscribeStage(FakeModel(languages=("en",)), RunOptions(TranscribeOptions("de")))


def test_an_error_after_all_are_done_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class FailsLast(FakeSpeech):
        def transcribe_each(self, recordings: Any, **options: Any) -> Any:
            for index, samples in enumerate(recordings):
                yield index, Transcription(str(samples.size), "en", (), 1.0)
            raise RuntimeError("at the end")

    rows = stage_with(FailsLast, monkeypatch).stream(decoded_group(1, 2))
    assert [next(rows)["id"], next(rows)["id"]] == ["1", "2"]
    with pytest.raises(RuntimeError, match="at the end"):
        next(rows)
