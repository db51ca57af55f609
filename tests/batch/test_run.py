"""Whole runs on the engine `local`: what was stopped goes on, and every id is there once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.audio import faulty_decoders
from tests.batch.fakes import FakeModel, all_rows, damage, write_archive, write_wav
from tests.conftest import REPOSITORY
from whisper_flash_attention.audio import BundledClip
from whisper_flash_attention.batch import Cluster, Model, RunOptions, Summary, run_batch
from whisper_flash_attention.batch import run as run_module
from whisper_flash_attention.batch.shards import shards_in
from whisper_flash_attention.batch.sink import Sink
from whisper_flash_attention.errors import BatchError, DecoderError, MissingPackage, OptionError
from whisper_flash_attention.options import DecodeOptions, TranscribeOptions

FEW_AT_A_TIME = RunOptions(batch_size=1)  # four recordings a group


def texts(folder: Path) -> dict[str, str | None]:
    return {name: row["text"] for name, row in sorted(all_rows(folder).items())}


def expected(count: int) -> dict[str, str]:
    return {f"{number:03d}.wav": f"{1_600 + number} transcribe" for number in range(count)}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "archive", 10)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_every_recording_is_there_once(archive: Path, out: Path, output_format: str) -> None:
    if output_format == "parquet":
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    summary = run_batch(archive, out, model=FakeModel(), output_format=output_format)
    assert texts(out) == expected(10)
    assert {shard.path.suffix for shard in shards_in(out)} == {f".{output_format}"}
    assert (summary.items, summary.done, summary.failed, summary.remaining) == (10, 10, 0, 0)
    assert summary.all_well
    audio = sum(1_600 + number for number in range(10)) / 16_000
    assert summary.audio_hours * 3_600 == pytest.approx(audio)
    assert summary.times_real == pytest.approx(audio / summary.run_seconds)
    written = json.loads((out / "summary.json").read_text())
    assert written["done"] == 10
    assert written["times_real"] == summary.times_real


def test_a_second_run_does_only_what_is_new(archive: Path, out: Path) -> None:
    run_batch(archive, out, model=FakeModel(), limit=3)
    first = all_rows(out)
    assert sorted(first) == ["000.wav", "001.wav", "002.wav"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["remaining"] == 7
    write_wav(archive / "new.wav", 5_000)
    summary = run_batch(archive, out, model=FakeModel())
    assert (summary.items, summary.done, summary.run_files) == (11, 11, 8)
    assert texts(out) == expected(10) | {"new.wav": "5000 transcribe"}
    # The longest are done first.
    assert [shard.rows for shard in shards_in(out)] == [3, 8]
    assert run_batch(archive, out, model=FakeModel()).run_files == 0


def test_errors_are_rows_and_are_done_again_when_asked(archive: Path, out: Path) -> None:
    (archive / "text.wav").write_text("no sound")
    shown = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    with shown.file:
        summary = run_batch(
            archive, out, model=FakeModel(raises_at=1_604), run_options=FEW_AT_A_TIME, console=shown
        )
        output = shown.export_text()
    assert (summary.done, summary.failed) == (9, 2)
    assert summary.errors == {"RuntimeError": 1, "AudioError": 1}
    assert not summary.all_well
    assert "error: 004.wav: this one cannot be heard" in output
    rows = all_rows(out)
    assert rows["004.wav"]["error"] == "this one cannot be heard"
    assert rows["text.wav"]["error_kind"] == "AudioError"
    again = run_batch(archive, out, model=FakeModel())
    assert (again.failed, again.run_files) == (2, 0)
    again = run_batch(archive, out, model=FakeModel(), retry_errors=True)
    assert (again.done, again.failed, again.run_files) == (10, 1, 2)
    (archive / "text.wav").unlink()
    assert texts(out) == expected(10) | {"text.wav": None}


def test_a_decoder_that_dies_or_hangs_costs_one_recording(
    archive: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_module, "Work", partial(run_module.Work, decode=faulty_decoders.NAME))
    for name in ("segfault", "killed", "spins", "warns"):
        shutil.copy(archive / "000.wav", archive / f"{name}.wav")
    summary = run_batch(archive, out, model=FakeModel(), decode_timeout=2.0)
    rows = all_rows(out)
    assert (summary.done, summary.errors) == (11, {"AudioError": 3})
    assert "decoder crashed on it (signal 11" in rows["segfault.wav"]["error"]
    assert "decoder was killed on it (signal 9" in rows["killed.wav"]["error"]
    assert "decoder hung on it (no progress for 2 s)" in rows["spins.wav"]["error"]
    assert caplog.messages.count("warns.wav: warned") == 1


def test_decoders_that_cannot_start_end_the_run(
    archive: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "Work", partial(run_module.Work, decode="nowhere:decode"))
    with pytest.raises(DecoderError, match="No module named 'nowhere'"):
        run_batch(archive, out, model=FakeModel())


def test_a_manifest_with_bad_rows_is_done_as_far_as_it_goes(archive: Path, out: Path) -> None:
    manifest = archive / "archive.csv"
    manifest.write_text(
        "id,path,start,task,prompt,mood\na,000.wav,,translate,Ann,x\nb,001.wav,x,,,\n"
    )
    summary = run_batch(manifest, out, model=FakeModel())
    assert texts(out) == {"a": "1600 translate after Ann"}
    assert (summary.items, summary.rejected, summary.all_well) == (1, 1, False)
    assert summary.rejected_rows[0].row == 2
    assert "b" not in all_rows(out)


def test_an_interruption_keeps_what_is_done(
    archive: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Sink.take

    def interrupted(self: Sink, rows: object) -> object:
        found = take(self, rows)  # type: ignore[arg-type]
        if self.tally.done >= 8:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Sink, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_batch(archive, out, model=FakeModel(), run_options=FEW_AT_A_TIME)
    assert len(all_rows(out)) == 8
    assert not (out / "summary.json").exists()
    assert run_batch(archive, out, model=FakeModel()).run_files == 2
    assert texts(out) == expected(10)


def test_killed_and_begun_again(archive: Path, out: Path) -> None:
    program = (
        "from tests.batch.fakes import FakeModel\n"
        "from whisper_flash_attention.batch import run_batch, sink\n"
        "sink.Sink.__init__.__kwdefaults__['shard_seconds'] = 0.0\n"
        f"run_batch({str(archive)!r}, {str(out)!r}, model=FakeModel(waits=0.3),"
        " group_files=1)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
        for _ in range(600):
            if out.is_dir() and shards_in(out):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = all_rows(out, was_killed=True)
    assert 0 < len(before) < 10
    summary = run_batch(archive, out, model=FakeModel())
    assert summary.run_files == 10 - len(before)
    assert texts(out) == expected(10)


def test_a_damaged_shard_is_done_again(archive: Path, out: Path) -> None:
    run_batch(archive, out, model=FakeModel(), limit=4)
    run_batch(archive, out, model=FakeModel())
    aside = damage(out)
    assert run_batch(archive, out, model=FakeModel()).run_files == 4
    assert texts(out) == expected(10)
    assert aside.is_file()


def test_a_limit_on_the_size_of_files_loses_nothing(archive: Path, out: Path) -> None:
    """As a full disk: writing fails in the middle of a shard."""
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")
    run_batch(archive, out, model=FakeModel(), limit=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(BatchError, match=r"File too large.*the same command goes on"):
            run_batch(archive, out, model=FakeModel())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(all_rows(out)) == 4
    assert run_batch(archive, out, model=FakeModel()).run_files == 6
    assert texts(out) == expected(10)


def test_subtitles_are_part_of_what_is_asked(archive: Path, out: Path) -> None:
    run_batch(archive, out, model=FakeModel(), subtitles=("srt",), limit=2)
    assert sorted(path.name for path in (out / "subtitles").iterdir()) == [
        *("000.srt", "001.srt"),
    ]
    with pytest.raises(OptionError, match=r"subtitles \['srt'\], now \[\]"):
        run_batch(archive, out, model=FakeModel())


def test_misuse_is_told_before_any_work(archive: Path, out: Path) -> None:
    for options, message in (
        ({"engine": "slurm"}, "engine is 'slurm': give local or ray"),
        ({"output_format": "xml"}, "output_format is 'xml': give jsonl or parquet"),
        ({"subtitles": ["sub"]}, "subtitles is 'sub': give srt, vtt or ass"),
        ({"limit": 0}, "limit is 0: give"),
        ({"workers": 0}, "workers is 0: give"),
        ({"cluster": Cluster("auto")}, "are for engine 'ray'"),
        ({"group_files": 0}, "group_files is 0: give"),
        ({"group_hours": 0.0}, "group_hours is 0.0: give hours, more than 0"),
        ({"limit": "1"}, "limit is '1': give a whole number"),
        ({"workers": np.zeros(2)}, "workers is array"),
        ({"group_hours": "4"}, "group_hours is '4': give hours"),
        ({"engine": ["local"]}, "engine is .*: give local or ray"),
        ({"output_format": {}}, "output_format is {}: give"),
        ({"subtitles": 1}, "subtitles is 1: give a list"),
        ({"run_options": "fr"}, "run_options is 'fr': give RunOptions"),
        ({"cluster": "auto"}, "cluster is 'auto': give Cluster"),
        ({"decode_timeout": 0.0}, "decode_timeout is 0.0: give seconds, more than 0"),
    ):
        with pytest.raises(OptionError, match=message):
            run_batch(archive, out, model=FakeModel(), **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="results are written to a local folder"):
        run_batch(archive, "s3://bucket/out", model=FakeModel())
    assert not out.exists()


def test_a_cluster_is_checked() -> None:
    for options in ({"address": 1}, {"gpus_per_worker": "1"}, {"gpus_per_worker": np.zeros(2)}):
        with pytest.raises(OptionError, match="give"):
            Cluster(**options)  # type: ignore[arg-type]


def test_a_model_that_is_not_there_ends_the_run(archive: Path, out: Path) -> None:
    run_options = RunOptions(TranscribeOptions("fr"))
    with pytest.raises(OptionError, match='not know language="fr"'):
        run_batch(archive, out, model=FakeModel(), run_options=run_options)
    assert all_rows(out) == {}


def test_ray_that_is_not_installed_is_told(
    archive: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"whisper-flash-attention\[ray\]"):
        run_batch(archive, out, model=FakeModel(), engine="ray")


def test_real_speech_with_real_weights(
    tmp_path: Path, tiny_en: str, bundled_recordings: tuple[BundledClip, ...]
) -> None:
    """Whole, a part, words, and the same as one by one."""
    recording = bundled_recordings[0].path
    manifest = tmp_path / "archive.jsonl"
    rows = [
        {"id": "whole", "path": str(recording)},
        {"id": "part", "path": str(recording), "start": 3.0, "end": 6.5},
        {"id": "missing", "path": "nowhere.wav"},
    ]
    manifest.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run_options = RunOptions(decode=DecodeOptions(word_timestamps=True))
    summary = run_batch(
        manifest, tmp_path / "out", model=Model(tiny_en, "cpu"), run_options=run_options
    )
    assert isinstance(summary, Summary)
    assert (summary.done, summary.errors) == (2, {"AudioError": 1})
    found = all_rows(tmp_path / "out")
    ((_, alone),) = (
        Model(tiny_en, "cpu")
        .open()
        .transcribe_each(
            [str(recording)],
            language=None,
            task="transcribe",
            options=run_options.decode,
            batch_size=16,
        )
    )
    assert found["whole"]["text"] == alone.text
    assert [each["tokens"] for each in found["whole"]["segments"]] == [
        list(segment.tokens) for segment in alone.segments
    ]
    words = [word for segment in found["part"]["segments"] for word in segment["words"]]
    assert words
    assert all(3.0 <= word["start"] <= word["end"] <= 6.5 for word in words)
    assert found["part"]["seconds"] == 3.5
