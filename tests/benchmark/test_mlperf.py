"""MLPerf's Offline scenario: samples, the load generator's runs and logs, and the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from whisper_flash_attention._version import __version__
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.benchmark.mlperf import (
    OfflineSystem,
    Response,
    decode,
    encode,
    english_normaliser,
    run_offline,
    sample_library,
    word_error_rate,
)
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, ModelSize
from whisper_flash_attention.benchmark.spoken import (
    PAUSE_SAMPLES,
    Sample,
    Spoken,
    read_manifest,
    repack,
)
from whisper_flash_attention.cli import app
from whisper_flash_attention.errors import BenchmarkError

SECOND = 16_000
SMALL = ModelSize(128, 2, 1, 2, 128)
needs_load_generator = pytest.mark.skipif(
    find_spec("mlperf_loadgen") is None, reason="mlcommons-loadgen is not installed"
)


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["benchmark", "mlperf", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_consecutive_recordings_of_one_source_are_joined_up_to_30_s() -> None:
    seconds = {"a-1": 12, "a-2": 12, "a-3": 5.25, "a-4": 10, "b-1": 3, "b-2": 31, "b-3": 26.5}

    def load(path: Path) -> np.ndarray[Any, Any]:
        return np.full(round(seconds[path.stem] * SECOND), 0.5, np.float32)

    utterances = [Spoken(Path(f"{name}.flac"), "en", name) for name in seconds]
    found = repack(utterances, load)
    # 12 + 0.5 + 12 + 0.5 + 5.25 s are too long; so is 3 + 0.5 + 26.5 s not.
    assert [(sample.transcript, sample.seconds) for sample in found] == [
        ("a-1 a-2", 24.5),
        ("a-3 a-4", 15.75),
        ("b-1 b-3", 30.0),
    ]
    pause = found[0].samples[12 * SECOND : 12 * SECOND + PAUSE_SAMPLES]
    assert not pause.any() and found[0].samples[12 * SECOND - 1] == 0.5
    with pytest.raises(BenchmarkError, match="no recording of the manifest is at most 30 s"):
        repack(utterances[5:6], load)


def test_without_a_manifest_the_packaged_recordings_make_many_samples() -> None:
    clips = bundled_recordings()
    found = sample_library(None)
    assert len(found) >= 16
    # Each has all recordings, and no other sample has them in its order.
    assert len({sample.transcript for sample in found}) == len(found)
    assert len({sample.samples.tobytes() for sample in found}) == len(found)
    words = sorted(" ".join(clip.transcript for clip in clips).split())
    assert all(sorted(sample.transcript.split()) == words for sample in found)
    assert max(sample.seconds for sample in found) <= 30
    firsts = [
        clip for clip in clips if any(s.transcript.startswith(clip.transcript) for s in found)
    ]
    assert firsts == list(clips)


def test_manifests_are_lists_or_lines_with_a_path_and_a_transcript(tmp_path: Path) -> None:
    rows = [
        {"file": "a.wav", "transcript": "one"},
        {"audio_filepath": "b.wav", "text": "two", "duration": 2.0},
        {"files": [{"fname": "c.wav", "speed": 1}], "transcript": "three"},
    ]
    path = tmp_path / "manifest.json"
    for text in (json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        path.write_text(text)
        assert read_manifest(path) == [
            Spoken(tmp_path / f"{name}.wav", "en", words)
            for name, words in (("a", "one"), ("b", "two"), ("c", "three"))
        ]
    assert [each.path.suffix for each in read_manifest(None)] == [".wav"] * 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[1", "cannot be read"),
        ("[1]", "entry 1 .* lacks a path or a transcript"),
        ('{"file": "a.wav", "transcript": "a"}\n{"file": "b.wav"}', "entry 2 .* lacks a path"),
        ('[{"files": [], "text": "a"}]', "entry 1 .* lacks a path"),
    ],
)
def test_a_manifest_that_is_none_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        read_manifest(path)


def test_responses_are_logged_as_the_reference_logs_them(tmp_path: Path) -> None:
    data = encode(" It's £5, “Ünder” 20%! ")
    assert data.typecode == "q" and data.itemsize == 8
    assert decode(data.tobytes().hex()) == "it's £5 nder 20%"
    samples = [Sample(np.zeros(1, np.float32), text) for text in ("MISTER SMITH WON'T", "two")]
    log = tmp_path / "log.json"
    rows = [
        {"qsl_idx": 1, "data": encode("Three.").tobytes().hex()},
        {"qsl_idx": 0, "data": encode("Mr. Smith will not").tobytes().hex()},
    ]
    log.write_text(json.dumps(rows))
    normalise, _ = english_normaliser(None)
    assert word_error_rate(samples, log, normalise) == 1 / 5


@needs_load_generator
def test_a_run_with_real_weights_has_logs_a_rate_and_a_word_error_rate(tmp_path: Path) -> None:
    clips = bundled_recordings()[:2]
    manifest = tmp_path / "manifest.json"
    rows = [{"file": str(clip.path), "transcript": clip.transcript} for clip in clips]
    manifest.write_text(json.dumps(rows))
    settings = ("--model", "package:tiny.en", "--device", "cpu", "--seconds", "0.1")
    code, text = invoke(manifest, *settings, "--target-qps", "1", "--output", tmp_path)
    assert code == 0, text
    assert "samples/s" in text and "word error rate" in text and "not an MLPerf result" in text
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["setting"] == "mlperf-offline" and row["official"] is False
    assert row["library_samples"] == row["samples"] == 1 and row["target_qps"] == 1
    assert row["library_seconds"] == pytest.approx(
        sum(clip.seconds for clip in clips) + 0.5, abs=0.1
    )
    assert row["tokens_per_sample"] > 10 and row["wer"] < 0.1
    rate = row["samples_per_second"]
    assert row["realtime_factor"] == pytest.approx(rate * row["library_seconds"])
    assert row["environment"]["torch"] and row["version"] == __version__
    assert row["accuracy"] is row["performance"] is True
    summary = (tmp_path / "performance" / "mlperf_log_summary.txt").read_text()
    assert "Scenario : Offline" in summary
    [logged] = json.loads((tmp_path / "accuracy" / "mlperf_log_accuracy.json").read_text())
    assert "dashwood" in decode(logged["data"])


@needs_load_generator
def test_random_weights_give_every_sample_as_many_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_SIZES, "tiny", SMALL)
    settings = ("--random-weights", "tiny", "--new-tokens", "7", "--device", "cpu")
    code, text = invoke(*settings, "--seconds", "0.2", "--batch-size", "2", "--output", tmp_path)
    assert code == 0, text
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["samples"] >= 1 and row["tokens"] == 7 * row["samples"]
    assert row["checkpoint"] == "tiny" and row["target_qps"] > 0
    assert row["library_samples"] == len(sample_library(None))
    assert row["version"] == __version__
    # None is measured, although the command was not told so.
    assert row["accuracy"] is False and row["performance"] is True
    assert "wer" not in row and not (tmp_path / "accuracy").exists()


@needs_load_generator
def test_what_the_transcriber_raises_ends_the_run(tmp_path: Path) -> None:
    class Broken(OfflineSystem):
        def transcribe(
            self, indices: Sequence[int], report: Callable[[int, Response], None]
        ) -> None:
            report(1, Response("one", 1))
            raise BenchmarkError("broken")

    samples = [Sample(np.zeros(1, np.float32), "one")] * 3
    system = Broken(None, samples, 1)  # type: ignore[arg-type]
    with pytest.raises(BenchmarkError, match="broken"):
        run_offline(system, accuracy=True, rate=1, least_seconds=0.1, folder=tmp_path)


def test_without_the_load_generator_one_line_tells_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    code, text = invoke("--device", "cpu", "--output", tmp_path)
    assert code == 2
    assert text.startswith("error: ") and "pip install mlcommons-loadgen" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "-1"), "--batch-size is -1"),
        (("--seconds", "0"), "--seconds is 0"),
        (("--target-qps", "nan"), "--target-qps is nan"),
        (("--no-accuracy", "--no-performance"), "nothing to measure"),
        (("--random-weights", "tiny", "--no-performance"), "random weights have no accuracy"),
    ],
)
def test_misuse_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    code, text = invoke("--device", "cpu", *arguments)
    assert code == 2
    assert text.startswith("error: ") and message in text
