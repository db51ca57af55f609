"""The engine `ray`: the same stages on any number of machines, by Ray Data.

Groups of recordings are decoded by tasks on the CPUs and transcribed by a pool of actors, each with
a model of its own; Ray Data moves samples between them, holds decoding back while the object store
is full, and starts what died again. Rows come back to the driver, which alone writes. Every group
that is planned is a block of its own, so that what is lost with a worker is a few groups. On GPUs a
worker has several groups at a time, as one stream (`SharedStream`), where `Work.may_mix`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from whisper_flash_attention import errors
from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.rows import Row, failed_row
from whisper_flash_attention.batch.shared_stream import SharedStream
from whisper_flash_attention.batch.stages import (
    GROUPS_EACH,
    Decoded,
    DeviceLost,
    TranscribeStage,
    Work,
    decode,
    grouped,
    planned,
)
from whisper_flash_attention.errors import BatchError, MissingPackage, WhisperFlashError

logger = logging.getLogger(__name__)

# An actor works on one group while the next is on its way to it.
GROUPS_PER_WORKER = 2
# Of a stream on a GPU: a batch whose text is late, one in work, one that is prepared, what ends
# within a batch, and two on their way. Seconds without another, after which the stream ends.
GROUPS_PER_STREAM, PATIENCE = 6, 0.5
# As many tasks may decode for a stream, of a small archive, too.
DECODED_PER_STREAM = 16
CORES_PER_WORKER = 4  # of models without a GPU, where their number is left to us
# How often a group is begun, when workers die that have it. Ray begins a task four times, at least.
MOST_ATTEMPTS = 3
KIND_OF_LOST = "WorkerDied"


@dataclass(frozen=True, slots=True)
class Pool:
    """What is taken of a cluster.

    Args:
        workers: models.
        gpus: of each.
        cpus: of each, as Ray counts them.
        threads: of PyTorch in each, if it has no GPU.
        decode_cpus: of a decoding task.
    """

    workers: int
    gpus: float
    cpus: float
    threads: int
    decode_cpus: float

    @classmethod
    def of(
        cls, nodes: Sequence[Mapping[str, float]], workers: int | None, per_worker: float | None
    ) -> Pool:
        """Share out a cluster.

        Without GPUs models get all cores but one of each machine, of which decoding needs little.

        Args:
            nodes: the machines' resources, "CPU" and "GPU".
            workers: models; None is as many as the GPUs allow, or one per `CORES_PER_WORKER` cores.
            per_worker: GPUs of a model; None is 1 where there are any.

        Raises:
            BatchError: more is requested than there is.
        """
        cores = [node.get("CPU", 0.0) for node in nodes if node.get("CPU", 0.0) > 0]
        gpus = [node.get("GPU", 0.0) for node in nodes]
        if not cores:
            raise BatchError("the Ray cluster has no machine with CPUs")
        each = (1.0 if any(gpus) else 0.0) if per_worker is None else per_worker
        if each:
            most = sum(int(count / each) for count in gpus)
            if most < (workers or 1):
                raise BatchError(
                    f"{workers or 1} workers of {each:g} GPUs were requested, and the cluster's "
                    f"{sum(gpus):g} GPUs have room for {most}"
                )
            return cls(workers or most, each, 1.0, 1, 1.0)
        number = workers or max(1, int(sum(cores)) // CORES_PER_WORKER)
        beside = math.ceil(number / len(cores))  # models on one machine
        left = min(1.0, min(cores) / 2)
        # Room for four decoding tasks, for Ray Data gives them about half of what is left. Not as
        # much for one as a model has, or it would have models decode between two groups.
        return cls(
            *(number, 0.0, (min(cores) - left) / beside, max(1, int(min(cores) / beside))),
            decode_cpus=0.24 * left,
        )


def run_on_ray(
    items: Sequence[Item], work: Work, address: str | None, gpus_per_worker: float | None
) -> Iterator[list[Row]]:
    """Transcribe recordings on a Ray cluster, and give rows as they are done, in any order.

    Groups whose workers died `MOST_ATTEMPTS` times are done once more recording by recording, so
    that only the one that it is due to is lost: it gets a row with an error.

    Args:
        items: the recordings, in the order of work.
        work: what to do with them.
        address: of the cluster; None is the one that this process is connected to, else one that
            is started on this machine for the run.
        gpus_per_worker: of a model; None is 1 where the cluster has GPUs.

    Raises:
        MissingPackage: Ray Data is not installed.
        BatchError: the cluster cannot be reached, lacks what is requested, or all workers die.
        WhisperFlashError: what would be the same for every recording.
    """
    with _connected(address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        pool = Pool.of(nodes, work.workers, gpus_per_worker)
        missing = {item.id: item for item in items}
        for each in (work, work.alone()):
            for rows in _pass(ray, list(missing.values()), each, pool):
                for row in rows:
                    missing.pop(row["id"], None)
                yield rows
            if not missing:
                return
            if len(missing) == len(items) > 1:
                raise BatchError(
                    "every worker died that had a recording, which is not due to one of them: do "
                    "models fit in the memory (--workers, --group-hours)? Ray's log says what "
                    "happened"
                )
            logger.warning("workers died, again and again, that had %d recordings", len(missing))
        yield [
            failed_row(
                item,
                KIND_OF_LOST,
                f"{item.path}: each of {MOST_ATTEMPTS} workers that had it alone died",
            )
            for item in missing.values()
        ]


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that was made here is ended."""
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise MissingPackage(
            "engine 'ray' needs Ray Data: pip install 'whisper-flash-attention[ray]'"
        ) from error
    with _quiet():
        if ray.is_initialized():
            yield ray
            return
        # Of a cluster that is there already it is not ours to say whether it has a dashboard.
        own = {"include_dashboard": False} if address is None else {}
        try:
            ray.init(address=address, logging_level=logging.ERROR, **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BatchError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's log off the screen: what ends a run is raised, and says it, too."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _pass(ray: Any, items: Sequence[Item], work: Work, pool: Pool) -> Iterator[list[Row]]:
    """Run the stages once over recordings; those whose workers died too often are left out."""
    import pyarrow

    mixes = bool(pool.gpus) and work.may_mix
    shared = work.shared(items, pool.workers, DECODED_PER_STREAM if mixes else GROUPS_EACH)
    tables = [
        pyarrow.table({"items": [item.to_json() for item in some]})
        for some in planned(items, shared)
    ]
    if mixes:
        work = work.mixed(GROUPS_PER_STREAM)
    attempts = _attempts(ray)
    threads = None if pool.gpus else pool.threads
    workers = ray.data.ActorPoolStrategy(
        size=min(pool.workers, len(tables)),
        max_tasks_in_flight_per_actor=GROUPS_PER_STREAM if mixes else GROUPS_PER_WORKER,
        max_concurrent_calls_per_actor=GROUPS_PER_STREAM if mixes else 1,
        enable_true_multi_threading=True,
    )
    context = ray.data.DataContext.get_current()
    had_bars, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        done = (
            ray.data.from_arrow(tables)
            .map_batches(
                DecodeTask(work, attempts),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=pool.decode_cpus,
            )
            .map_batches(
                TranscribeActor,
                fn_constructor_args=(work, threads, attempts, PATIENCE if mixes else None),
                batch_size=1,
                batch_format="pyarrow",
                compute=workers,
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
            )
        )
        for table in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            _raise_if_fatal(table.column("fatal").to_pylist())
            yield [json.loads(each) for each in table.column("row").to_pylist()]
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [""]
        raise BatchError(
            f"Ray gave up ({type(error).__name__}: {lines[-1]}); the same command goes on"
        ) from error
    finally:
        context.enable_progress_bars = had_bars
        ray.kill(attempts)


class Attempts:
    """Counts how often each piece of work was begun, while workers come and go."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """How often it was begun, this time included; 0 if it may not be once more."""
        self._begun[what] += 1
        return self._begun[what] if self._begun[what] <= MOST_ATTEMPTS else 0


def _attempts(ray: Any) -> Any:
    """The counter as an actor where the driver is, so that it lives as long."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    counter = ray.remote(Attempts)
    return counter.options(
        num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1
    ).remote()


def _begin(attempts: Any, stage: str, ids: Iterable[str]) -> int:
    import ray

    what = hashlib.sha256(json.dumps([stage, *ids]).encode()).hexdigest()
    return int(ray.get(attempts.begin.remote(what)))


class DecodeTask:
    """Decodes the recordings of a block, and gives a row for each group of them.

    Args:
        work: says how large groups are.
        attempts: the actor that counts how often each block was begun.
    """

    def __init__(self, work: Work, attempts: Any) -> None:
        self._work, self._attempts = work, attempts

    def __call__(self, block: Any) -> Iterator[Any]:
        items = [Item.from_json(line) for line in block.column("items").to_pylist()]
        if not _begin(self._attempts, "decode", (item.id for item in items)):
            yield _packed([])
            return
        opener = _opener(self._work.decode, self._work.decode_timeout)
        with closing(decode(items, opener)) as decoded:
            for group in grouped(decoded, self._work):
                yield _packed(group)


@cache
def _opener(decode: str, timeout: float) -> AudioOpener:
    """One decoder process beside this process of Ray's, kept from block to block.

    What kills it does not take Ray's process and the block along. It ends with Ray's process.
    """
    return AudioOpener(DecoderPool(1, timeout=timeout, decode=decode))


def _packed(group: Sequence[Decoded]) -> Any:
    """A group as a table of one row: what each recording is, and its samples, one after another."""
    import pyarrow

    about = [
        (each.item.to_json(), each.failure, None if each.samples is None else each.samples.size)
        for each in group
    ]
    samples = [each.samples for each in group if each.samples is not None]
    joined = np.concatenate(samples) if samples else np.empty(0, np.float32)
    ends = pyarrow.py_buffer(np.array([0, joined.nbytes], np.int64))
    column = pyarrow.Array.from_buffers(
        pyarrow.large_binary(), 1, [None, ends, pyarrow.py_buffer(joined)]
    )
    return pyarrow.table({"about": [json.dumps(about)], "samples": column})


def _unpacked(block: Any) -> list[Decoded]:
    """The group that `_packed` packed, with samples of its own memory."""
    (about,) = block.column("about").to_pylist()
    joined = np.frombuffer(block.column("samples")[0].as_buffer(), np.float32)
    group = []
    for line, failure, size in json.loads(about):
        samples = None
        if size is not None:
            samples, joined = joined[:size].copy(), joined[size:]  # the store's cannot be written
        group.append(Decoded(Item.from_json(line), samples, failure))
    return group


class TranscribeActor:
    """A worker with a model: groups in, rows out, as JSON.

    What would be the same for every recording is given as a row that says so, for the driver to
    raise: Ray would start the worker again and again.
    """

    def __init__(
        self, work: Work, threads: int | None, attempts: Any, patience: float | None = None
    ) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._stream: SharedStream | WhisperFlashError

        def begin(group: Sequence[Decoded]) -> int:
            return _begin(attempts, "transcribe", (each.item.id for each in group))

        try:
            stage = TranscribeStage(work.opener, work.run_options)
            self._stream = SharedStream(stage, begin, patience)
        except WhisperFlashError as error:
            self._stream = error

    def __call__(self, block: Any) -> Any:
        """By several threads at a time, where there is patience."""
        import pyarrow

        try:
            if isinstance(self._stream, WhisperFlashError):
                raise self._stream
            rows = [json.dumps(row) for row in self._stream.rows(_unpacked(block))]
        except WhisperFlashError as error:
            fatal = json.dumps([type(error).__name__, str(error)])
            return pyarrow.table({"row": ["null"], "fatal": [fatal]})
        except DeviceLost:
            # This process can use the GPU no more; Ray starts another and gives it the groups.
            logger.exception("the GPU failed")
            os._exit(1)
        nothing = pyarrow.nulls(len(rows), pyarrow.string())
        return pyarrow.table({"row": pyarrow.array(rows, pyarrow.string()), "fatal": nothing})


def _raise_if_fatal(column: Sequence[str | None]) -> None:
    for line in filter(None, column):
        name, message = json.loads(line)
        raise getattr(errors, name)(message)
