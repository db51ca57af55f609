"""This package beside others: recordings on disk to text, each system in a process of its own.

A system loads once. On a CPU all take turns, a recording each, so that whatever else the machine
does hits all of them; on a GPU, whose memory they would share, one follows the other. The clock
runs from the path to the whole text. Calls before it warm up, on a GPU with the longest recording,
for whose batches kernels are compiled.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from whisper_flash_attention import validation as check
from whisper_flash_attention._version import __version__
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.samples import SAMPLING_RATE
from whisper_flash_attention.benchmark.peer_systems import (
    GB,
    OURS,
    SYSTEMS,
    WINDOW,
    Call,
    PeerCheckpoint,
    Setup,
    System,
    serve_calls,
)
from whisper_flash_attention.benchmark.processes import start_workers
from whisper_flash_attention.benchmark.spoken import Spoken, normalised, word_errors
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.parity.report import WordErrors

PEERS = "peers"
INDEX = "checkpoint.json"  # what a folder has of a checkpoint
PATIENCE = 1800.0  # seconds that loading or a call may take
POLL = 0.05  # seconds between two readings of a GPU's memory


@dataclass(frozen=True)
class PeersCase:
    """What is measured.

    Args:
        source: of the checkpoint, as users name it; a size where weights are random.
        systems: names of `SYSTEMS`.
        device, dtype: by name.
        batch_size: chunks at a time, of systems that take more than one.
        threads: on the CPU.
        rounds: timed passes over all recordings.
        in_turns: whether all systems are loaded at the same time and take turns.
        random_weights: whether to draw the weights.
        new_tokens: forced for every window of 30 s; None leaves the length to the model.
        peers: folder where further packages are installed; what is installed beside this package
            takes precedence.

    Raises:
        OptionError: a system is unknown, or random weights come without a number of tokens.
    """

    source: str
    systems: tuple[str, ...]
    device: str
    dtype: str
    batch_size: int
    threads: int
    rounds: int = 3
    in_turns: bool = True
    random_weights: bool = False
    new_tokens: int | None = None
    peers: Path | None = None

    def __post_init__(self) -> None:
        for name in self.systems:
            check.one_of("system", name, SYSTEMS)
        for name, number in (("batch_size", self.batch_size), ("rounds", self.rounds)):
            check.whole_number(name, number, least=1)
        if self.random_weights and self.new_tokens is None:
            raise OptionError("random weights do not end: give a number of new tokens")
        if self.peers is not None and not self.peers.is_dir():
            raise OptionError(f"peers {self.peers}: there is no such folder")

    @property
    def kind(self) -> str:
        """The kind of the device."""
        return self.device.partition(":")[0]

    def why_not(self, system: System) -> tuple[str, str] | None:
        """The status and the reason of a system that cannot be measured; None if it can."""
        reason = system.why_not(self.kind, self.dtype, self.new_tokens)
        if reason is not None:
            return "skipped", reason
        if not is_installed(system.module, self.peers):
            return "missing", system.install
        return None

    def blank_row(self, system: System, recordings: int) -> dict[str, Any]:
        """What a row has before anything is measured."""
        return {
            "setting": PEERS,
            "system": system.name,
            "version": version_of(system.distribution, self.peers),
            "checkpoint": self.source,
            "random_weights": self.random_weights,
            "device": self.kind,
            "dtype": self.dtype,
            "batch_size": self.batch_size if system.is_batched else 1,
            "threads": self.threads,
            "new_tokens": self.new_tokens,
            "in_turns": self.in_turns,
            "recordings": recordings,
        }


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


class PeerFailed(Exception):
    """A system raised or died; the message says why."""


class Worker:
    """A system in its process.

    Raises:
        PeerFailed: it cannot be loaded.
    """

    def __init__(self, system: System, setup: Setup, peers: Path | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.memory = DeviceMemory(setup.device)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve_calls,
            args=(theirs, system.name, setup, None if peers is None else str(peers)),
            daemon=False,  # systems start processes
        )
        self._process.start()
        theirs.close()
        self.settings, self.load_seconds = self._receive()

    def call(self, spoken: Spoken) -> Call:
        """Transcribe a recording.

        Raises:
            PeerFailed: the system raised or died.
        """
        self._connection.send((str(spoken.path), None if spoken.is_silent else spoken.language))
        found: Call = self._receive()
        return found

    def _receive(self) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not self._connection.poll(POLL):
            self.memory.read()
            if time.monotonic() > deadline:
                self._process.kill()
                raise PeerFailed(f"took longer than {PATIENCE:g} s")
        try:
            found = self._connection.recv()
        except EOFError:
            self._process.join()
            raise PeerFailed(f"died with exit code {self._process.exitcode}") from None
        if isinstance(found, str):
            self.stop()
            raise PeerFailed(found)
        return found

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            with suppress(BrokenPipeError):
                self._connection.send(None)
            self._process.join(10)
            if self._process.is_alive():
                self._process.kill()
        self._process.join()


class DeviceMemory:
    """Peak of a GPU's memory beyond what was in use at first; `gb` is None where NVML is not."""

    def __init__(self, device: str) -> None:
        self.gb: float | None = None
        self._used: Callable[[], int] | None = None
        if device.startswith("cuda"):
            self._used = _device_reader(device)
        self._before = self._used() if self._used else 0

    def read(self) -> None:
        """Take the memory that is in use now into account."""
        if self._used is not None:
            self.gb = max(self.gb or 0.0, (self._used() - self._before) / GB)


def _device_reader(device: str) -> Callable[[], int] | None:
    """Reads the bytes in use on a GPU; None without NVML."""
    import torch

    try:
        import pynvml
    except ImportError:
        return None
    identity = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}")
    except pynvml.NVMLError:
        return None
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


@dataclass
class Running:
    """A system that is being measured.

    Attributes:
        row: what is known before.
        worker: its process.
        calls: of all rounds, by recording.
    """

    row: dict[str, Any]
    worker: Worker
    calls: dict[Path, list[Call]] = field(default_factory=dict)

    def summary(self, recordings: Sequence[Spoken], lengths: dict[Path, float]) -> dict[str, Any]:
        """The row of the rounds so far.

        Raises:
            PeerFailed: there are fewer tokens than were forced.
        """
        rounds = zip(*(self.calls[each.path] for each in recordings), strict=True)
        seconds = [sum(call.seconds for call in each) for each in rounds]
        last = {each.path: self.calls[each.path][-1] for each in recordings}
        longest = max(lengths, key=lambda path: lengths[path])
        first = [call.first_seconds for call in self.calls[longest]]
        errors = WordErrors()
        for each in recordings:
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
        is_random = self.row["random_weights"]
        return self.row | {
            "status": "ok",
            "audio_seconds": audio_seconds,
            "seconds": seconds,
            "realtime_factor": audio_seconds / median(seconds),
            "first_text_seconds": None if None in first else median(each or 0.0 for each in first),
            "peak_memory_gb": max(call.rss_gb for call in last.values()),
            "peak_vram_gb": self.worker.memory.gb if not self.row["in_turns"] else None,
            "wer": None if is_random else errors.rate,
            "words": 0 if is_random else errors.words,
            "invented_words": invented if silent else None,
            "tokens": None if None in tokens else sum(each or 0 for each in tokens),
            "load_seconds": self.worker.load_seconds,
            "settings": self.worker.settings,
            "files": [
                {
                    "audio": each.path.name,
                    "audio_seconds": lengths[each.path],
                    "seconds": [call.seconds for call in self.calls[each.path]],
                    "text": None if is_random else last[each.path].text,
                }
                for each in recordings
            ],
        }


def measure_peers(
    case: PeersCase,
    recordings: Sequence[Spoken],
    folder: Path,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Measure all systems of a case.

    Args:
        recordings: those whose language the model does not know are left out.
        folder: where the checkpoint is written in the formats that the systems load.
        keep: takes the row of a system after every round, and of one that cannot be measured.

    Raises:
        OptionError: no recording is left.
        ProcessFailed: the checkpoint cannot be read or written.
    """
    systems = [SYSTEMS[name] for name in case.systems]
    chosen = [system for system in systems if case.why_not(system) is None]
    checkpoint = _written(case, chosen, folder)
    languages = ("en", "none") if not checkpoint.is_multilingual else None
    spoken = [each for each in recordings if languages is None or each.language in languages]
    if not spoken:
        raise OptionError(f"none of the recordings is in a language that {case.source} knows")
    lengths = {each.path: load_audio(each.path).size / SAMPLING_RATE for each in spoken}
    for system in systems:
        if reason := case.why_not(system):
            status = {"status": reason[0], "reason": reason[1]}
            keep(case.blank_row(system, len(spoken)) | status)
    groups = [chosen] if case.in_turns else [[each] for each in chosen]
    for group in groups:
        _measure_group(case, checkpoint, group, spoken, lengths, keep)


def _written(case: PeersCase, systems: Sequence[System], folder: Path) -> PeerCheckpoint:
    """The checkpoint in the formats of these systems, written in a process of its own.

    What an earlier run has left in the folder is taken if it has all of them.
    """
    formats = sorted({system.formats[case.dtype] for system in systems})
    folder = folder / case.source.replace(":", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / INDEX
    if index.is_file():
        found = PeerCheckpoint(**json.loads(index.read_text("utf-8")))
        if set(formats) <= found.files.keys():
            return found
    written = start_workers(case.device).call(_write, case, formats, folder, timeout=PATIENCE)
    index.write_text(json.dumps(asdict(written)), encoding="utf-8")
    return written


def _write(case: PeersCase, formats: Sequence[str], folder: Path) -> PeerCheckpoint:
    from whisper_flash_attention.benchmark.peer_checkpoints import write_checkpoint

    return write_checkpoint(
        case.source,
        formats,
        folder,
        is_random=case.random_weights,
        device=case.device,
        peers=case.peers,
    )


def _measure_group(
    case: PeersCase,
    checkpoint: PeerCheckpoint,
    systems: Sequence[System],
    spoken: Sequence[Spoken],
    lengths: dict[Path, float],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Measure systems that are loaded at the same time."""
    setup = Setup(
        checkpoint, case.device, case.dtype, case.batch_size, case.threads, case.new_tokens
    )
    warm = max if case.kind != "cpu" else min
    with_words = [each for each in spoken if not each.is_silent] or spoken
    first = warm(with_words, key=lambda each: lengths[each.path])
    running: list[Running] = []

    @contextmanager
    def failures(row: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except PeerFailed as error:
            keep(row | {"status": "failed", "reason": str(error)})
            for each in [each for each in running if each.row is row]:
                each.worker.stop()
                running.remove(each)

    try:
        for system in systems:
            row = case.blank_row(system, len(spoken))
            with failures(row):
                running.append(Running(row, Worker(system, setup, case.peers)))
                running[-1].worker.call(first)
        for _ in range(case.rounds):
            for each in spoken:
                for one in list(running):
                    with failures(one.row):
                        one.calls.setdefault(each.path, []).append(one.worker.call(each))
            for one in list(running):
                with failures(one.row):
                    keep(one.summary(spoken, lengths))
    finally:
        for one in running:
            one.worker.stop()


def speed_of_ours(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float | None:
    """How many times as fast ours is in the same mode, by the median of all rounds' ratios."""
    mode = "batched" if SYSTEMS[row["system"]].is_batched else "sequential"
    for ours in rows:
        if ours["system"] == f"{OURS}-{mode}" and ours.get("seconds") and row.get("seconds"):
            pairs = zip(row["seconds"], ours["seconds"], strict=False)
            return float(median(theirs / its for theirs, its in pairs))
    return None
