"""Groups of several threads are one stream of recordings, and each gets its own rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from queue import SimpleQueue
from typing import Any

import pytest

from tests.batch.fakes import FakeModel, FakeSpeech
from tests.batch.test_stages import decoded_group
from whisper_flash_attention.batch.model import RunOptions
from whisper_flash_attention.batch.rows import Row
from whisper_flash_attention.batch.shared_stream import SharedStream
from whisper_flash_attention.batch.stages import Decoded, TranscribeStage
from whisper_flash_attention.errors import MissingPackage

BATCH = 3
SOON = 0.05


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Recordings that are transcribed together; a thread is a batch ahead, text a batch late."""
    begun: list[list[int]] = []

    def transcribe_each(self: FakeSpeech, recordings: Any, **options: Any) -> Any:
        numbered = enumerate(recordings)
        late: list[Any] = []
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(lambda: list(islice(numbered, BATCH)))
            while batch := coming.result():
                coming = thread.submit(lambda: list(islice(numbered, BATCH)))
                begun.append([samples.size for _, samples in batch])
                yield from late
                late = [
                    (index, self._one(samples.size, "en", "transcribe", options))
                    for index, samples in batch
                ]
            yield from late

    monkeypatch.setattr(FakeSpeech, "transcribe_each", transcribe_each)
    return begun


class Callers:
    """Threads that bring groups to a stream, one after the other."""

    def __init__(self, patience: float | None, raises_at: int | None = None) -> None:
        self.attempts: dict[str, int] = {}  # of the first recordings of groups; others have 1
        self._taken: SimpleQueue[str] = SimpleQueue()
        stage = TranscribeStage(FakeModel(raises_at=raises_at), RunOptions())
        self.stream = SharedStream(stage, self._begin, patience)
        self._threads = ThreadPoolExecutor(8)

    def _begin(self, group: Sequence[Decoded]) -> int:
        self._taken.put(group[0].item.id)
        return self.attempts.get(group[0].item.id, 1)

    def bring(self, *sizes: int) -> Future[list[Row]]:
        return self._threads.submit(self.stream.rows, decoded_group(*sizes))

    def wait_until_taken(self, size: int) -> None:
        assert self._taken.get(timeout=10) == str(size)


def texts(rows: Future[list[Row]]) -> list[str | None]:
    return [row["text"] for row in rows.result(timeout=10)]


def expected(*sizes: int) -> list[str]:
    return [f"{size} transcribe" for size in sizes]


def test_groups_that_come_late_share_batches(batches: list[list[int]]) -> None:
    callers = Callers(patience=0.5)
    groups = (1, 2), (3, 4), (5, 6, 7), (8,)
    found = []
    for group in groups:
        found.append(callers.bring(*group))
        callers.wait_until_taken(group[0])
    assert [texts(each) for each in found] == [expected(*group) for group in groups]
    assert batches == [[1, 2, 3], [4, 5, 6], [7, 8]]  # the last once no other has come


def test_one_that_raises_costs_neither_its_group_nor_others(batches: list[list[int]]) -> None:
    callers = Callers(patience=SOON, raises_at=3)
    found = [callers.bring(*group) for group in ((1, 2), (3, 4), (5,))]
    assert [texts(each) for each in found] == [
        expected(1, 2),
        [None, "4 transcribe"],
        expected(5),
    ]


def test_rows_come_while_the_stream_goes_on(batches: list[list[int]]) -> None:
    callers = Callers(patience=10.0)
    found = [callers.bring(*group) for group in ((1, 2, 3), (4, 5, 6))]
    done, late = wait(found, timeout=5, return_when=FIRST_COMPLETED)
    assert (len(done), len(late)) == (1, 1)
    callers.stream._patience = 0.0
    assert texts(callers.bring(10)) == expected(10)
    assert [len(each.result(timeout=5)) for each in found] == [3, 3]


def test_what_was_begun_before_is_alone_and_is_begun_no_more_in_the_end(
    batches: list[list[int]],
) -> None:
    callers = Callers(patience=SOON)
    callers.attempts = {"3": 2, "4": 0}
    found = [callers.bring(*group) for group in ((3,), (1, 2), (4, 5), (6,))]
    assert [texts(each) for each in found] == [expected(3), expected(1, 2), [], expected(6)]
    assert [3] in batches


def test_a_group_that_is_there_twice_gives_its_rows_to_both(batches: list[list[int]]) -> None:
    callers = Callers(patience=SOON)
    found = [callers.bring(1, 2) for _ in range(3)]
    assert [texts(each) for each in found] == [expected(1, 2)] * 3


def test_without_patience_every_group_is_alone(batches: list[list[int]]) -> None:
    callers = Callers(patience=None)
    found = [callers.bring(size) for size in (1, 2, 3)]
    assert [texts(each) for each in found] == [expected(size) for size in (1, 2, 3)]
    assert sorted(batches) == [[1], [2], [3]]


def test_what_is_the_same_for_all_is_raised_by_all_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: FakeSpeech, recordings: Any, **options: Any) -> Iterator[Any]:
        assert len(list(recordings)) == 3
        raise MissingPackage("vad")
        yield

    monkeypatch.setattr(FakeSpeech, "transcribe_each", refuse)
    callers = Callers(patience=0.5)
    found = [callers.bring(1, 2), callers.bring(3)]
    for each in found:
        with pytest.raises(MissingPackage, match="vad"):
            each.result(timeout=10)
    with pytest.raises(MissingPackage, match="vad"):
        callers.stream.rows(decoded_group(4))
