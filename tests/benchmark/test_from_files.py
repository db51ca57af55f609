"""The benchmark from files to written text, on a model of two layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from typer.testing import CliRunner

from whisper_flash_attention.audio import audio_tracks, load_audio
from whisper_flash_attention.batch import ray_engine
from whisper_flash_attention.benchmark.features import bundled_clips
from whisper_flash_attention.benchmark.from_files import (
    CONTAINERS,
    FilesBenchmark,
    FilesCase,
    MeasuredModel,
    lengths_of,
    write_recordings,
)
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, ModelSize
from whisper_flash_attention.benchmark.throughput import ThroughputCase
from whisper_flash_attention.cli import app
from whisper_flash_attention.errors import BenchmarkError, OptionError

QUICK = ("--from", "files", "--device", "cpu", "--new-tokens", "3", "--repeats", "1")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_SIZES, "tiny", ModelSize(128, 2, 1, 2, 128))


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["benchmark", "throughput", *QUICK, *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_rows_have_the_entry_the_container_and_shares(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    wanted = ("--recordings", "2", "--length", "31", "--container", "wav", "--output", path)
    code, text = invoke(*wanted, "--threads", "1", "--mode", "batched", "--mode", "sequential")
    assert code == 0, text
    decode, *rows = json.loads(path.read_text())["rows"]
    assert set(decode) == {"setting", "container", "threads", "realtime_factor", "environment"}
    assert (decode["setting"], decode["threads"]) == ("decode", 1)
    entries = ["memory", "transcribe", "transcribe_each", "command", "batch-local"]
    modes = ["batched"] * 5 + ["sequential"] * 5
    assert [(row["mode"], row["entry"]) for row in rows] == list(
        zip(modes, entries * 2, strict=True)
    )
    for row in rows:
        assert set(row) == {
            *("setting", "checkpoint", "entry", "mode", "container", "workers", "batch_size"),
            *("recordings", "audio_seconds", "windows", "seconds", "realtime_factor", "shares"),
            "environment",
        }
        assert (row["setting"], row["recordings"], row["audio_seconds"]) == ("files", 2, 62.0)
        assert row["windows"] == 4
        assert row["realtime_factor"] == pytest.approx(62.0 / row["seconds"])
        assert list(row["shares"]) == [
            *("decode", "copy", "features", "encoder", "decoder", "text", "waiting")
        ]


def test_the_detector_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    wanted = ("--recordings", "2", "--length", "31", "--container", "wav", "--output", path)
    code, text = invoke(*wanted, "--entry", "transcribe", "--entry", "batch-local", "--vad")
    assert code == 0, text
    rows = json.loads(path.read_text())["rows"]
    assert [(row["entry"], row["vad"]) for row in rows] == [
        ("transcribe", True),
        ("batch-local", True),
    ]
    assert all(row["shares"]["detector"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--entry", "cloud"), "--entry is 'cloud': give memory"),
        (("--mode", "both"), "--mode is 'both': give "),
        (("--container", "xyz"), "--container is 'xyz': give wav"),
        (("--length", "long"), "--length is 'long': give seconds"),
        (("--recordings", "0"), "recordings"),
        (("--threads", "0"), "--threads is 0: give a whole number, 1"),
        (("--from", "tape"), "--from is 'tape': give memory or files"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    code, text = invoke(*arguments)
    assert code == 2
    assert text.startswith("error: ") and message in text


def test_nothing_decoded_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = ThroughputCase("tiny", "flash", 2, 3, False, 1, "cpu", "float32")
    case = FilesCase(work, "transcribe", "batched", "wav", vad=True)
    paths, seconds = write_recordings(tmp_path, "wav", [2.0], np.zeros(32_000, np.float32))
    model = MeasuredModel(work, cast("Any", None), {"batched"})
    benchmark = FilesBenchmark(model, tmp_path, paths, seconds)
    monkeypatch.setattr(benchmark, "_transcribe", lambda case: 0.1)
    with pytest.raises(BenchmarkError, match="no window was decoded: the detector finds no speech"):
        benchmark.measure(case)


@pytest.mark.parametrize("container", CONTAINERS)
def test_files_have_their_lengths_rates_and_channels(tmp_path: Path, container: str) -> None:
    lengths = [2.0, 1.0, 2.0]
    speech = bundled_clips(1)[0][0]
    paths, seconds = write_recordings(tmp_path, container, lengths, speech)
    assert seconds == 5.0 and len(set(paths)) == 3
    for path, length in zip(paths, lengths, strict=True):
        (track,) = audio_tracks(path)
        _, rate, layout = CONTAINERS[container]
        assert (track.rate, track.channels) == (rate, 1 + (layout == "stereo"))
        assert load_audio(path).size == pytest.approx(length * 16_000, abs=3_000)


def test_lengths_are_equal_or_spread_evenly() -> None:
    assert lengths_of("300", 3) == [300.0] * 3
    spread = lengths_of("1-15", 2_000)
    assert (min(spread), max(spread), len(spread)) == (1.0, 15.0, 2_000)
    assert sum(spread) / 2_000 == pytest.approx(8.0, abs=0.1)
    for text in ("0", "5-1", "1-2-3", "nan"):
        with pytest.raises(OptionError, match="length"):
            lengths_of(text, 2)


def test_what_ray_decoded_before_its_first_rows_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of batches of two windows three, which are six recordings of 30 s."""
    paths = [tmp_path / f"{number:02}.wav" for number in range(12)]
    for path in paths:
        path.write_bytes(bytes(100))
    work = ThroughputCase("tiny", "flash", 2, 3, False, 1, "cpu", "float32")
    case = FilesCase(work, "batch-ray", "batched", "wav")

    def measured(*groups: int) -> tuple[int, float, float]:
        rows = [[{"error": None}] * size for size in groups]
        monkeypatch.setattr(ray_engine, "run_on_ray", lambda *_: iter(rows))
        benchmark = FilesBenchmark(cast("Any", None), tmp_path, paths, 360.0)
        return benchmark._batch_ray(case)

    assert measured(2, 4, 6)[:2] == (4, 120.0)
    for groups in ((12,), (6, 6)):
        with pytest.raises(OptionError, match="more recordings"):
            measured(*groups)
