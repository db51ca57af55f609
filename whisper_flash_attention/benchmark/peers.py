"""This package beside others: recordings on disk to text, each system in a process of its own.

A system loads once, for all batch sizes. On a CPU all take turns, a recording each, so that
whatever else the machine does hits all of them; on a GPU, whose memory they would share, one
follows the other, unless turns are chosen, which saves time: all load at once. The clock runs from
the path to the whole text. A call before it warms up, for all with the same recording: the shortest
on a CPU, and the longest on a GPU, since it has all shapes. Words with their times come from
further calls, off the clock, for recordings that have reference alignments.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

from whisper_flash_attention import validation as check
from whisper_flash_attention._version import __version__
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.samples import SAMPLING_RATE
from whisper_flash_attention.benchmark.peer_index import (
    INDEX,
    Origin,
    read_index,
    write_index,
)
from whisper_flash_attention.benchmark.peer_process import Call, PeerFailed, Worker
from whisper_flash_attention.benchmark.peer_systems import (
    OURS,
    SYSTEMS,
    WINDOW,
    PeerCheckpoint,
    Request,
    Setup,
    System,
)
from whisper_flash_attention.benchmark.processes import ProcessFailed, start_workers
from whisper_flash_attention.benchmark.settings import DECODER_POSITIONS, PROMPT_TOKENS
from whisper_flash_attention.benchmark.spoken import (
    Spoken,
    boundary_errors,
    normalised,
    word_errors,
)
from whisper_flash_attention.errors import BenchmarkError, OptionError, WhisperFlashError
from whisper_flash_attention.options import MOST_THREADS, WORD_ALIGNMENTS
from whisper_flash_attention.parity.report import WordErrors

PEERS = "peers"
PATIENCE = 1800.0  # seconds that loading or a call may take, if nothing else is given


@dataclass(frozen=True)
class PeersCase:
    """What is measured.

    Args:
        source: of the checkpoint, as users name it; a size where weights are random.
        systems: names of `SYSTEMS`.
        device, dtype: by name.
        batch_sizes: chunks at a time, in this order, of systems that take more than one. The others
            are measured with the recordings of the smallest.
        threads: on the CPU.
        rounds: timed passes over all recordings.
        in_turns: whether all systems are loaded at the same time and take turns.
        timeout: seconds after which a system that loads or transcribes a recording is ended.
        random_weights: whether to draw the weights.
        new_tokens: forced for every window of 30 s; None leaves the length to the model.
        peers: folder where further packages are installed; what is installed beside this package
            takes precedence.
        word_alignment: what this package's words are timed by.

    Raises:
        OptionError: a system is unknown, a number is out of range, or random weights come without
            a number of tokens, or it without them.
    """

    source: str
    systems: tuple[str, ...]
    device: str
    dtype: str
    batch_sizes: tuple[int, ...]
    threads: int
    rounds: int = 3
    in_turns: bool = True
    timeout: float = PATIENCE
    random_weights: bool = False
    new_tokens: int | None = None
    peers: Path | None = None
    word_alignment: str = WORD_ALIGNMENTS[0]

    def __post_init__(self) -> None:
        for name in self.systems:
            check.one_of("system", name, SYSTEMS)
        check.one_of("word_alignment", self.word_alignment, WORD_ALIGNMENTS)
        for number in self.batch_sizes:
            check.whole_number("batch_size", number, least=1)
        if len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise OptionError("batch_size: give every number once")
        check.whole_number("rounds", self.rounds, least=1)
        check.whole_number("threads", self.threads, least=1, most=MOST_THREADS)
        most = DECODER_POSITIONS - PROMPT_TOKENS
        check.optional(check.whole_number, "new_tokens", self.new_tokens, least=2, most=most)
        check.number("timeout", self.timeout, "seconds above 0", above=0)
        if self.random_weights and self.new_tokens is None:
            raise OptionError("random weights do not end: give a number of new tokens")
        if self.new_tokens is not None and not self.random_weights:
            raise OptionError(
                "new_tokens is for random weights: leave it out, others end by themselves"
            )
        if self.random_weights and self.word_alignment != WORD_ALIGNMENTS[0]:
            raise OptionError(
                f"word_alignment {self.word_alignment} with random weights: their words have no "
                "times to compare; leave one of them out"
            )
        if self.peers is not None and not self.peers.is_dir():
            raise OptionError(f"peers {self.peers}: there is no such folder")

    @property
    def kind(self) -> str:
        """The kind of the device."""
        return self.device.partition(":")[0]

    def sizes_of(self, system: System) -> list[int]:
        """The batch sizes whose recordings a system gets."""
        return list(self.batch_sizes) if system.is_batched else [min(self.batch_sizes)]

    def why_not(self, system: System) -> tuple[str, str] | None:
        """The status and the reason of a system that cannot be measured; None if it can."""
        reason = system.why_not(self.kind, self.dtype, self.new_tokens)
        if reason is None and len(self.batch_sizes) > 1 and not system.can_change:
            reason = "has to be loaded again for another batch size: give one"
        if reason is not None:
            return "skipped", reason
        if not is_installed(system.module, self.peers):
            return "missing", system.install
        return None

    def blank_row(self, system: System, batch_size: int, recordings: int) -> dict[str, Any]:
        """What a row has before anything is measured."""
        row = {
            "setting": PEERS,
            "system": system.name,
            "version": version_of(system.distribution, self.peers),
            "checkpoint": self.source,
            "random_weights": self.random_weights,
            "device": self.kind,
            "dtype": self.dtype,
            "batch_size": batch_size if system.is_batched else 1,
            "threads": self.threads,
            "new_tokens": self.new_tokens,
            "in_turns": self.in_turns,
            "recordings": recordings,
        }
        if system.name.startswith(OURS) and self.word_alignment != WORD_ALIGNMENTS[0]:
            row["word_alignment"] = self.word_alignment
        return row


def is_installed(module: str, peers: Path | None) -> bool:
    """Whether a module can be imported from beside this package or from a further folder."""
    folders = [] if peers is None else [str(peers)]
    return find_spec(module) is not None or PathFinder.find_spec(module, folders) is not None


def version_of(distribution: str, peers: Path | None) -> str | None:
    """The version of a distribution beside this package or in a further folder."""
    if distribution == "whisper-flash-attention":
        return __version__
    folders = [*sys.path, *([] if peers is None else [str(peers)])]
    found = metadata.distributions(name=distribution, path=folders)
    return next((each.version for each in found), None)


@dataclass(eq=False)
class Running:
    """A system that is being measured.

    Attributes:
        system: which.
        worker: its process.
        left: the batch sizes that are to be measured, this one first.
        row: what is known of this one before.
        warm_up_seconds: of the call before the clock.
        calls: of all rounds, by recording.
        largest: of the batch sizes so far.
    """

    system: System
    worker: Worker
    left: list[int]
    row: dict[str, Any] = field(default_factory=dict)
    warm_up_seconds: float = 0.0
    calls: dict[Path, list[Call]] = field(default_factory=dict)
    largest: int = 0

    def summary(self, recordings: Sequence[Spoken], lengths: dict[Path, float]) -> dict[str, Any]:
        """The row of the rounds so far.

        Raises:
            PeerFailed: there are fewer tokens than were forced.
        """
        lengths = {each.path: lengths[each.path] for each in recordings}
        rounds = zip(*(self.calls[each.path] for each in recordings), strict=True)
        seconds = [sum(call.seconds for call in each) for each in rounds]
        last = {each.path: self.calls[each.path][-1] for each in recordings}
        longest = max(lengths, key=lambda path: lengths[path])
        first = [call.first_seconds for call in self.calls[longest]]
        is_random = self.row["random_weights"]
        errors = WordErrors()
        # Text of random weights has none; counting takes the square of a recording's length.
        for each in () if is_random else recordings:
            wrong = word_errors(each, last[each.path].text)
            errors.errors += wrong.errors
            errors.words += wrong.words
        silent = [each for each in recordings if each.is_silent]
        invented = sum(len(normalised(last[each.path].text).split()) for each in silent)
        tokens = [call.tokens for call in last.values()]
        if self.row["new_tokens"] is not None and None not in tokens:
            windows = sum(math.ceil(each / WINDOW) for each in lengths.values())
            # One of a window may be a timestamp.
            least, found = (self.row["new_tokens"] - 1) * windows, sum(each or 0 for each in tokens)
            if found < least:
                raise PeerFailed(f"{least} tokens or more were forced, and {found} came")
        audio_seconds = sum(lengths.values())
        # Peaks are of the process so far.
        is_peak = self.row["batch_size"] >= self.largest
        return self.row | {
            "status": "ok",
            "audio_seconds": audio_seconds,
            "seconds": seconds,
            "realtime_factor": audio_seconds / median(seconds),
            "first_text_seconds": None if None in first else median(each or 0.0 for each in first),
            "peak_memory_gb": max(call.rss_gb for call in last.values()) if is_peak else None,
            "peak_vram_gb": self.worker.memory.gb if is_peak else None,
            "wer": None if is_random else errors.rate,
            "words": errors.words,
            "invented_words": invented if silent else None,
            "word_time_error_ms": None,
            "tokens": None if None in tokens else sum(each or 0 for each in tokens),
            "warm_up_seconds": self.warm_up_seconds,
            "settings": self.worker.settings,
            "files": [
                {
                    "audio": each.path.name,
                    "audio_seconds": lengths[each.path],
                    "is_silent": each.is_silent,
                    "seconds": [call.seconds for call in self.calls[each.path]],
                    "text": None if is_random else last[each.path].text,
                }
                for each in recordings
            ],
        }


def word_times(recordings: Sequence[Spoken], found: Mapping[Path, Call]) -> dict[str, Any]:
    """What a row says of the times of words against the alignments of recordings.

    The mean error is over starts and ends of the words that are in both; a system that finds fewer
    words is not punished for it there.
    """
    errors = {each.path: boundary_errors(each, found[each.path].words) for each in recordings}
    boundaries = [abs(each) for pairs in errors.values() for pair in pairs for each in pair]
    return {
        "word_time_error_ms": 1e3 * fmean(boundaries) if boundaries else None,
        "word_time_median_ms": 1e3 * median(boundaries) if boundaries else None,
        "aligned_words": sum(len(each.words) for each in recordings),
        "aligned_words_found": len(boundaries) // 2,
        "word_times_seconds": sum(found[each.path].seconds for each in recordings),
        "word_time_errors": {
            path.name: [[round(each, 3) for each in pair] for pair in pairs]
            for path, pairs in errors.items()
        },
    }


def measure_peers(
    case: PeersCase,
    recordings: Mapping[int, Sequence[Spoken]],
    folder: Path,
    keep: Callable[[dict[str, Any]], None],
    report: Callable[[str], None],
) -> None:
    """Measure all systems of a case.

    Args:
        recordings: by batch size; those whose language the model does not know are left out.
        folder: where the checkpoint is written in the formats that the systems load.
        keep: takes the row of a system after every round, and of one that cannot be measured.
        report: takes a line about whatever took time besides.

    Raises:
        OptionError: no recording is left.
        BenchmarkError: the checkpoint cannot be read or written.
    """
    systems = [SYSTEMS[name] for name in case.systems]
    chosen = [system for system in systems if case.why_not(system) is None]
    checkpoint = _written(case, chosen, folder)
    report("the checkpoint is there")
    languages = ("en", "none") if not checkpoint.is_multilingual else None
    spoken = {
        size: [each for each in found if languages is None or each.language in languages]
        for size, found in recordings.items()
    }
    if not all(spoken.values()):
        raise OptionError(f"none of the recordings is in a language that {case.source} knows")
    lengths = {
        each.path: each.seconds or load_audio(each.path).size / SAMPLING_RATE
        for found in spoken.values()
        for each in found
    }
    report(f"{len(lengths)} recordings of {sum(lengths.values()):.0f} s")
    for system in systems:
        if reason := case.why_not(system):
            for size in case.sizes_of(system):
                row = case.blank_row(system, size, len(spoken[size]))
                keep(row | {"status": reason[0], "reason": reason[1]})
    groups = [chosen] if case.in_turns else [[each] for each in chosen]
    for group in groups:
        _Group(case, spoken, lengths, keep, report).measure(checkpoint, group)


def _written(case: PeersCase, systems: Sequence[System], folder: Path) -> PeerCheckpoint:
    """The checkpoint in the formats of these systems, written in a process of its own.

    What an earlier run has left in the folder is taken if it is of the same origin, and whole.
    """
    formats = sorted({system.formats[case.dtype] for system in systems})
    origin = Origin.of(case.source, random_weights=case.random_weights)
    folder = folder / origin.folder_name
    found = read_index(folder, origin, formats)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # its files are about to change
    except OSError as error:
        raise BenchmarkError(f"{folder} cannot be written to ({error.strerror})") from error
    try:
        written = start_workers(case.device).call(_write, case, formats, folder, timeout=PATIENCE)
    except ProcessFailed as error:
        raise BenchmarkError(f"{case.source} cannot be written: {error.reason}") from error
    if isinstance(written, str):
        with suppress(OSError):  # it may hold files of an earlier run
            folder.rmdir()
        raise BenchmarkError(written)
    write_index(folder, origin, written)
    return written


def _write(case: PeersCase, formats: Sequence[str], folder: Path) -> PeerCheckpoint | str:
    """Write the checkpoint, or return why that cannot be done."""
    from whisper_flash_attention.benchmark.peer_checkpoints import write_checkpoint

    try:
        return write_checkpoint(
            case.source,
            formats,
            folder,
            is_random=case.random_weights,
            device=case.device,
            peers=case.peers,
        )
    except WhisperFlashError as error:
        return str(error)


@dataclass
class _Group:
    """Systems that are loaded at the same time."""

    case: PeersCase
    spoken: Mapping[int, Sequence[Spoken]]
    lengths: dict[Path, float]
    keep: Callable[[dict[str, Any]], None]
    report: Callable[[str], None]
    running: list[Running] = field(default_factory=list)

    def measure(self, checkpoint: PeerCheckpoint, systems: Sequence[System]) -> None:
        """Load systems, and measure one batch size after the other."""
        case = self.case
        setup = Setup(
            *(checkpoint, case.device, case.dtype, case.batch_sizes[0]),
            *(case.threads, case.new_tokens, case.word_alignment),
        )
        try:
            for system in systems:
                worker = Worker(
                    *(system, setup),
                    alone=not case.in_turns,
                    peers=case.peers,
                    timeout=case.timeout,
                )
                self.running.append(Running(system, worker, case.sizes_of(system)))
            for each in list(self.running):
                with self._failures(each):
                    self.report(f"{each.system.name}: loaded in {each.worker.load():.1f} s")
            for size in case.batch_sizes:
                self._measure(size)
        except BaseException:
            for each in self.running:
                each.worker.stop(at_once=True)
            raise
        for each in self.running:
            each.worker.stop()

    def _measure(self, size: int) -> None:
        """Measure a batch size."""
        spoken = self.spoken[size]
        choose = min if self.case.kind == "cpu" else max
        with_words = [each for each in spoken if not each.is_silent] or spoken
        first = choose(with_words, key=lambda each: self.lengths[each.path])
        # So that no system takes time to detect one where nobody speaks.
        language = None if first.is_silent else first.language

        def request_of(one: Spoken, *, word_times: bool = False) -> Request:
            known = language if one.is_silent else one.language
            return Request(str(one.path), known, size, word_times)

        measured = [each for each in self.running if size in each.left]
        for each in measured:
            each.row = self._blank_row(each, size)
            each.largest = max(each.largest, each.row["batch_size"])
            each.calls = {}
            with self._failures(each):
                each.warm_up_seconds = each.worker.call(request_of(first)).seconds
                self.report(f"{_in_short(each.row)}: warm after {each.warm_up_seconds:.1f} s")
        for _ in range(self.case.rounds):
            for one in spoken:
                for each in self._alive(measured):
                    with self._failures(each):
                        calls = each.calls.setdefault(one.path, [])
                        calls.append(each.worker.call(request_of(one)))
            for each in self._alive(measured):
                with self._failures(each):
                    self.keep(each.summary(spoken, self.lengths))
        for each in self._alive(measured):
            each.left.remove(size)
            # Not before the last size: its row's memory is to be that of the work on the clock.
            if not each.left and each.system.times_words and not self.case.random_weights:
                requests = {one: request_of(one, word_times=True) for one in spoken if one.words}
                with self._failures(each):
                    self._measure_word_times(each, requests, each.summary(spoken, self.lengths))

    def _measure_word_times(
        self, running: Running, requests: Mapping[Spoken, Request], row: dict[str, Any]
    ) -> None:
        """Transcribe recordings with word timestamps, and keep the row again, with their errors."""
        if not requests:
            return
        try:
            # The first call compiles what only words need.
            shortest = min(requests, key=lambda each: self.lengths[each.path])
            running.worker.call(requests[shortest])
            found = {each.path: running.worker.call(requests[each]) for each in requests}
        except PeerFailed as error:
            self.keep(row | {"word_times_failed": str(error)})
            raise
        self.keep(row | word_times(list(requests), found))

    def _alive(self, measured: Sequence[Running]) -> list[Running]:
        return [each for each in measured if each in self.running]

    @contextmanager
    def _failures(self, running: Running) -> Iterator[None]:
        """Keep a failed row for each batch size that is left."""
        try:
            yield
        except PeerFailed as error:
            running.worker.stop()
            self.running.remove(running)
            for size in running.left:
                failed = {"status": "failed", "reason": str(error)}
                self.keep(self._blank_row(running, size) | failed)

    def _blank_row(self, running: Running, size: int) -> dict[str, Any]:
        return self.case.blank_row(running.system, size, len(self.spoken[size]))


def _in_short(row: Mapping[str, Any]) -> str:
    return f"{row['system']}, batch size {row['batch_size']}"


def speed_of_ours(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float | None:
    """How many times as fast ours is in the same mode with the same batch size, where words are.

    Where systems took turns, the median of all rounds' ratios; otherwise the ratio of medians.
    """
    mode = "batched" if SYSTEMS[row["system"]].is_batched else "sequential"
    for ours in rows:
        if ours["system"] != f"{OURS}-{mode}" or ours["batch_size"] != row["batch_size"]:
            continue
        theirs, its = _spoken_seconds(row), _spoken_seconds(ours)
        if not theirs or not its:
            return None
        if row["in_turns"] and ours["in_turns"]:
            return float(median(a / b for a, b in zip(theirs, its, strict=False)))
        return float(median(theirs) / median(its))
    return None


def _spoken_seconds(row: Mapping[str, Any]) -> list[float]:
    """Seconds of each round for the recordings with words, or for all if none has any."""
    files = row.get("files", [])
    spoken = [each for each in files if not each["is_silent"]] or files
    return [sum(each) for each in zip(*(each["seconds"] for each in spoken), strict=True)]
