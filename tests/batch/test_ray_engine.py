"""The engine `ray` on a real cluster of this machine: the same rows, whoever was killed when."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.audio import faulty_decoders
from tests.batch.fakes import FakeModel, all_rows, damage, write_archive
from tests.conftest import REPOSITORY
from whisper_flash_attention.batch import Cluster, RunOptions, ray_engine, run_batch
from whisper_flash_attention.batch import run as run_module
from whisper_flash_attention.batch.ray_engine import Pool
from whisper_flash_attention.batch.shards import shards_in
from whisper_flash_attention.batch.sink import Sink
from whisper_flash_attention.batch.stages import Work
from whisper_flash_attention.errors import BatchError, OptionError
from whisper_flash_attention.options import DecodeOptions, TranscribeOptions

# Ray warns of its own plans, and leaves files to be closed with the process.
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FEW_AT_A_TIME = RunOptions(batch_size=1)  # four recordings a group
COUNT = 10
ENGLISH, GERMAN = FakeModel(languages=("en",)), RunOptions(TranscribeOptions("de"))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two cores, for all tests: it takes seconds to start."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: the extra ray brings it")
    with pytest.MonkeyPatch.context() as patch:
        # Workers import the fakes by their module's name.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), *sys.path]))
        # Ray takes our word that there is a GPU, for the fakes that run as on one.
        quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
        ray.init(num_cpus=2, num_gpus=1, **quiet)
        yield ray
        ray.shutdown()
        gc.collect()  # what Ray left open is told of here, and not in another test


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "archive", COUNT)


def texts(folder: Path) -> dict[str, str | None]:
    return {name: row["text"] for name, row in sorted(all_rows(folder).items())}


def expected() -> dict[str, str | None]:
    return {f"{number:03d}.wav": f"{1_600 + number} transcribe" for number in range(COUNT)}


def run(archive: Path, out: Path, model: FakeModel, **options: Any) -> Any:
    """With one decoding task at a time, of which every one is a process that takes seconds."""
    wanted = {"engine": "ray", "workers": 1, "run_options": FEW_AT_A_TIME} | options
    if wanted["engine"] == "ray":
        wanted.setdefault("cluster", Cluster(gpus_per_worker=0))

    def shared_out(*arguments: Any) -> Pool:
        return replace(Pool.of(*arguments), decode_cpus=0.9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_engine, "Pool", SimpleNamespace(of=shared_out))
        return run_batch(archive, out, model=model, **wanted)


def same_but_for_time(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: row | {"seconds_taken": None} for name, row in sorted(rows.items())}


def test_rows_equal_those_of_local_with_recordings_that_fail_and_decoders_that_die(
    ray: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that dies costs its recording alone: nothing is begun again."""
    monkeypatch.setattr(run_module, "Work", partial(run_module.Work, decode=faulty_decoders.NAME))
    monkeypatch.setattr(ray_engine, "MOST_ATTEMPTS", 1)
    (archive / "text.wav").write_text("no sound")
    for name in ("segfault", "killed"):
        shutil.copy(archive / "000.wav", archive / f"{name}.wav")
    model = FakeModel(raises_at=1_604)
    summary = run(archive, tmp_path / "ray", model, workers=2)
    run_batch(archive, tmp_path / "local", model=model, run_options=FEW_AT_A_TIME)
    rows = all_rows(tmp_path / "ray")
    assert same_but_for_time(rows) == same_but_for_time(all_rows(tmp_path / "local"))
    assert (summary.done, summary.failed) == (COUNT - 1, 4)
    assert summary.errors == {"RuntimeError": 1, "AudioError": 3}
    assert "decoder crashed on it (signal 11" in rows["segfault.wav"]["error"]
    assert "decoder was killed on it (signal 9" in rows["killed.wav"]["error"]


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(ray: Any, archive: Path, tmp_path: Path) -> None:
    model = FakeModel(dies_at=1_604, dies_once=tmp_path / "died")
    summary = run(archive, tmp_path / "out", model)
    assert (tmp_path / "died").exists()
    assert texts(tmp_path / "out") == expected()
    assert (summary.done, summary.failed) == (COUNT, 0)


@pytest.mark.slow
def test_a_recording_that_kills_every_worker_costs_no_other(
    ray: Any, archive: Path, tmp_path: Path
) -> None:
    summary = run(archive, tmp_path / "out", FakeModel(dies_at=1_604))
    assert texts(tmp_path / "out") == expected() | {"004.wav": None}
    assert summary.errors == {"WorkerDied": 1}


@pytest.mark.slow
def test_it_costs_no_other_of_its_stream(ray: Any, archive: Path, tmp_path: Path) -> None:
    """On a GPU, six groups are in flight; without retries that have the worker to themselves all
    would be given up."""
    options = RunOptions(decode=DecodeOptions(temperature=0.0), batch_size=1)
    for number in range(6, COUNT):
        (archive / f"{number:03d}.wav").unlink()
    gpu = Cluster(gpus_per_worker=1)
    model = FakeModel(dies_at=1_604, waits=0.2)
    summary = run(archive, tmp_path / "out", model, run_options=options, cluster=gpu)
    assert summary.errors == {"WorkerDied": 1}
    assert [name for name, text in texts(tmp_path / "out").items() if text is None] == ["004.wav"]


@pytest.mark.slow
def test_workers_that_all_die_end_the_run(ray: Any, archive: Path, tmp_path: Path) -> None:
    for number in range(2, COUNT):
        (archive / f"{number:03d}.wav").unlink()
    shutil.copy(archive / "000.wav", archive / "001.wav")
    with pytest.raises(BatchError, match="every worker died"):
        run(archive, tmp_path / "out", FakeModel(dies_at=1_600))
    assert all_rows(tmp_path / "out") == {}


@pytest.mark.slow
def test_a_driver_that_is_killed_and_a_shard_that_is_damaged(
    ray: Any, archive: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    program = (
        "from tests.batch.fakes import FakeModel\n"
        "from whisper_flash_attention.batch import Cluster, RunOptions, run_batch, sink\n"
        "sink.Sink.__init__.__kwdefaults__['shard_seconds'] = 0.0\n"
        f"run_batch({str(archive)!r}, {str(out)!r}, model=FakeModel(waits=0.5), engine='ray',"
        f" workers=1, cluster=Cluster({address!r}), run_options=RunOptions(batch_size=1))"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while process.poll() is None and not (out.is_dir() and len(shards_in(out)) >= 2):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = all_rows(out, was_killed=True)
    assert 0 < len(before) < COUNT
    aside = damage(out)
    summary = run(archive, out, FakeModel())
    assert aside.is_file()
    assert texts(out) == expected()
    assert summary.run_files == COUNT - len(before) + int(aside.name.split("-")[2])


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_full_disk_loses_nothing(
    request: pytest.FixtureRequest,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
) -> None:
    """The same sink writes what either engine gives."""
    if engine == "ray":
        request.getfixturevalue("ray")
    out = tmp_path / "out"
    sync, synced = os.fsync, []

    def fill(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 6:  # the settings, two shards; for each the file and the folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        patch.setitem(Sink.__init__.__kwdefaults__, "shard_seconds", 0.0)
        with pytest.raises(BatchError, match=r"No space left.*the same command goes on"):
            run(archive, out, FakeModel(), engine=engine)
    before = texts(out)
    assert 0 < len(before) < COUNT
    # An engine goes on with what the other began.
    assert run(archive, out, FakeModel(), engine="local").run_files == COUNT - len(before)
    assert texts(out) == expected()


@pytest.mark.slow
def test_what_would_be_the_same_for_all_is_raised(ray: Any, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="English-only"):
        run(archive, tmp_path / "out", ENGLISH, run_options=GERMAN)


def test_a_worker_gives_the_driver_what_would_be_the_same_for_all() -> None:
    pytest.importorskip("pyarrow", reason="blocks are of pyarrow, which Ray Data brings")
    worker = ray_engine.TranscribeActor(Work(ENGLISH, GERMAN), None, attempts=None)
    block = worker(ray_engine._packed([]))
    with pytest.raises(OptionError, match="English-only"):
        ray_engine._raise_if_fatal(block.column("fatal").to_pylist())


def test_a_cluster_is_shared_out() -> None:
    two = [{"CPU": 2.0}]
    for workers in (None, 1, 2, 5):
        pool = Pool.of(two, workers, None)
        assert pool.workers == (workers or 1)
        assert pool.gpus == 0
        # All models and four decoding tasks have room, and are not taken for one another.
        assert pool.cpus * pool.workers + 4 * pool.decode_cpus <= 2
        assert pool.cpus != pool.decode_cpus
    nodes = [{"CPU": 16.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 0.0}, {}]
    assert Pool.of(nodes, None, None) == Pool(12, 1.0, 1.0, 1, 1.0)
    assert Pool.of(nodes, None, 0.5).workers == 24
    assert Pool.of(nodes, 3, 2.0).workers == 3
    assert Pool.of(nodes, None, 0.0).workers == 8
    with pytest.raises(BatchError, match=r"13 workers of 1 GPUs.*room for 12"):
        Pool.of(nodes, 13, None)
    with pytest.raises(BatchError, match="no machine with CPUs"):
        Pool.of([{"CPU": 0.0}], None, None)
