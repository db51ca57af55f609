"""One stream of recordings on a worker, for groups that arrive one by one.

Whoever brings a group waits for its rows. Windows of several groups share batches, and the device
goes on where a group ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread

from whisper_flash_attention.batch.rows import Row
from whisper_flash_attention.batch.stages import Decoded, TranscribeStage


class SharedStream:
    """Transcribes the groups of several threads in a thread of its own.

    Args:
        stage: of the worker.
        begin: called when a group is taken; returns how often it was, or 0 if it may not be again.
            What was taken before, by a worker that died, has the stage to itself, so that it takes
            no other group along.
        patience: seconds without another group after which the stream ends, for only then is
            transcribed what fills no batch; None has every group to itself.
    """

    def __init__(
        self,
        stage: TranscribeStage,
        begin: Callable[[Sequence[Decoded]], int],
        patience: float | None,
    ) -> None:
        self._stage, self._begin, self._patience = stage, begin, patience
        self._groups: SimpleQueue[Sequence[Decoded]] = SimpleQueue()
        self._next: tuple[Sequence[Decoded], int] | None = None  # and how often it was begun
        self._rows: dict[str, Future[Row | None]] = {}  # that are waited for
        self._error: BaseException | None = None
        Thread(target=self._run, name="whisper-flash-shared-stream", daemon=True).start()

    def rows(self, group: Sequence[Decoded]) -> list[Row]:
        """Transcribe a group; one row for each recording, in its order, or none if it may not.

        Raises:
            as `TranscribeStage.stream`, in all calls that wait, and in later ones.
        """
        # Of a group that is there already, both calls wait for the same rows.
        found = [self._rows.setdefault(each.item.id, Future()) for each in group]
        self._groups.put(group)
        if self._error is not None:
            raise self._error
        return [row for each in found if (row := each.result()) is not None]

    def _run(self) -> None:
        try:
            while self._fetch(None):
                stage, is_alone = self._stage, self._patience is None or self._was_begun
                rows = stage.rows(self._take()) if is_alone else stage.stream(self._recordings())
                for row in rows:
                    self._give(row["id"], row)
        except BaseException as error:  # raised by those that wait
            self._error = error
            while self._rows:
                self._rows.popitem()[1].set_exception(error)

    def _recordings(self) -> Iterator[Decoded]:
        """Those of groups as they come, until none does, or one that must be alone."""
        while True:
            yield from self._stage.in_order(self._take())
            if not self._fetch(self._patience) or self._was_begun:
                return

    def _fetch(self, patience: float | None) -> bool:
        """Whether there is a group that is to be taken."""
        while self._next is None:
            try:
                group = self._groups.get(timeout=patience)
            except Empty:
                return False
            if times := self._begin(group):
                self._next = group, times
            else:
                for each in group:
                    self._give(each.item.id, None)
        return True

    @property
    def _was_begun(self) -> bool:
        """Whether the next group was begun before."""
        return self._next is not None and self._next[1] > 1

    def _take(self) -> Sequence[Decoded]:
        assert self._next is not None
        (group, _), self._next = self._next, None
        return group

    def _give(self, name: str, row: Row | None) -> None:
        if (waiting := self._rows.pop(name, None)) is not None:
            waiting.set_result(row)
