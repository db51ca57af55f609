"""Load on a server: its cases, its forms, its figures, and a run against a live one."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.benchmark.serve import (
    BenchmarkedServer,
    Load,
    ServerBenchmark,
    body_of,
    clips,
    encoded,
    load_row,
    percentiles,
    running,
)
from whisper_flash_attention.benchmark.serve_clients import _spoken_at
from whisper_flash_attention.cli import app
from whisper_flash_attention.errors import BenchmarkError, OptionError


@pytest.mark.parametrize("container", ["flac", "wav"])
def test_recordings_have_the_length_that_was_requested(container: str) -> None:
    for seconds in (0.5, 40.0):
        first, second, *_ = clips(seconds)
        assert load_audio(io.BytesIO(encoded(first, container))).size == 16_000 * seconds
        assert (first != second).any()


def test_a_form_asks_for_about_as_many_tokens() -> None:
    body = body_of(b"sound", 25)
    assert b'name="min_new_tokens"\r\n\r\n24\r\n' in body
    assert b'name="max_new_tokens"\r\n\r\n25\r\n' in body
    assert b'name="temperature[]"\r\n\r\n0.0\r\n' in body
    assert b"max_new_tokens" not in body_of(b"sound", None)


@pytest.mark.parametrize("wrong", [{"clients": 0}, {"seconds": -1.0}, {"rate": 0.0}])
def test_impossible_loads(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="give more than 0"):
        Load(**wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"container is .mp3.: give (flac or wav|wav or flac)"):
        Load(container="mp3")


def test_throughput_counts_while_all_clients_are_busy() -> None:
    """Two clients, four requests each of a second; the first two and the last two do not count."""
    times = [(float(start), start + 1.0) for start in range(4) for _ in range(2)]
    row = load_row(Load(clients=2), times, ["500: no"])
    assert (row.requests, row.seconds, row.requests_per_second) == (4, 2.0, 2.0)
    assert (row.failures, row.reason, row.p50) == (1, "500: no", 1.0)
    # At a fixed rate all of them do.
    assert load_row(Load(clients=2, rate=2.0), times, []).requests == 8
    with pytest.raises(BenchmarkError, match="no request succeeded: 500: no"):
        load_row(Load(), [], ["500: no"])


def test_percentiles_of_hardly_any_number() -> None:
    assert percentiles([2.0]) == [2.0] * 99
    assert math.isnan(percentiles([])[49])


def test_sound_was_spoken_before_its_chunk_was_sent() -> None:
    assert _spoken_at(0.15, [10.1, 10.2, 10.3]) == pytest.approx(10.15)


def test_the_command_takes_a_model_and_refuses_what_cannot_be_measured() -> None:
    result = CliRunner().invoke(app, ["benchmark", "serve", "--help"], env={"COLUMNS": "200"})
    assert "--model" in result.output and "--random-weights" in result.output
    result = CliRunner().invoke(app, ["benchmark", "serve", "--clients", "0"])
    assert result.exit_code == 2 and "clients is 0" in result.output


def test_an_output_that_cannot_be_written_is_told_before_a_server_starts(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is there and is no file"),
        (tmp_path / "nowhere" / "rows.json", "there is no folder"),
    ):
        result = CliRunner().invoke(app, ["benchmark", "serve", "--output", str(path)])
        assert result.exit_code == 2 and message in " ".join(result.output.split())


@pytest.mark.slow
def test_a_server_is_started_measured_and_stopped(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    server = BenchmarkedServer("tiny", "cpu", "float32", is_random=True, new_tokens=4)
    load = Load(clients=2, requests=6, clip_seconds=2.0)
    with running(server) as url:
        measured = ServerBenchmark(server, url, tmp_path)
        row = measured.measure_load(load)
        alone = measured.measure_alone(load)
        batch = measured.measure_batch(load)
        streams = measured.measure_streams(1, 1)
    assert (row["measure"], row["failures"]) == ("load", 0)
    assert 0 < row["p50"] <= row["p95"] <= row["p99"]
    assert alone["over_python"] == alone["p50"] - alone["python_p50"]
    assert batch["clip_seconds"] == 30.0 and batch["share_of_memory"] > 0
    assert (streams["utterances"], streams["failures"]) == (1, 0)
    assert 0 < streams["final_text_p50"] <= streams["final_text_p95"]
    with pytest.raises(ConnectionRefusedError):
        measured.measure_load(load)
