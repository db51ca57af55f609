"""The benchmark of whole transcriptions, on a model of two layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from whisper_flash_attention.benchmark.random_weights import (
    random_processor,
    special_tokens,
    talking_config,
)
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, ModelSize
from whisper_flash_attention.benchmark.throughput import (
    ThroughputCase,
    random_transcriber,
    speech,
)
from whisper_flash_attention.cli import app

SMALL = ModelSize(128, 2, 1, 2, 128)
QUICK = ("--device", "cpu", "--new-tokens", "5", "--repeats", "2", "--minutes", "1.5")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_SIZES, "tiny", SMALL)


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["benchmark", "throughput", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_rows_tell_how_much_faster_than_real_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a GPU machine may lack.
    for name in ("av", "silero_vad", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "rows.json"
    code, text = invoke(*QUICK, "--word-timestamps", "--system", "flash", "--output", path)
    assert code == 0, text
    code, text = invoke(*QUICK, "--system", "sdpa", "--batch-size", "3", "--output", path)
    assert code == 0, text
    rows = json.loads(path.read_text())["rows"]
    kinds = [(row["system"], row["batch_size"], row["word_timestamps"]) for row in rows]
    assert kinds == [("flash", 2, False), ("flash", 2, True), ("sdpa", 3, False)]
    for row in rows:
        assert row["setting"] == "throughput" and row["status"] == "ok"
        assert row["tokens_checked"] == 2 * 3 * 5
        assert row["audio_seconds"] == 90
        assert row["realtime_factor"] == pytest.approx(90 / row["seconds_total"])
        assert (row["words"] > 0) == row["word_timestamps"]
    assert list(rows[0]["parts"])[1:] == ["log-mel", "encoder", "decoder", "text and segments"]
    # The same case again takes its row's place.
    code, text = invoke(*QUICK, "--repeats", "1", "--minutes", "0.5", "--output", path)
    again = json.loads(path.read_text())["rows"]
    assert [row["word_timestamps"] for row in again] == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "huge"), "--checkpoint is 'huge': give tiny, base"),
        (("--system", "orig"), "--system is 'orig': give flash or sdpa"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--new-tokens", "500"), "--new-tokens is 500: give a whole number, 2 to 444"),
        *((("--minutes", value), f"--minutes is {value}") for value in ("0.2", "nan", "inf")),
        (("--minutes", "1e300"), "--minutes is 1e+300"),
        *(
            ((flag, value), f"{flag} is about files: add --from files")
            for flag, value in (
                ("--entry", "memory"),
                ("--threads", "1"),
                ("--mode", "batched"),
                ("--recordings", "2"),
                ("--length", "5"),
                ("--workers", "1"),
            )
        ),
        (("--vad",), "--vad is about files: add --from files"),
        (("--output", "nowhere/rows.json"), "there is no folder nowhere"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    code, text = invoke(*QUICK, *arguments)
    assert code == 2
    assert text.startswith("error: ") and message in text


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("[]")
    code, text = invoke(*QUICK, "--output", path)
    assert code == 2 and "holds no rows" in text
    assert path.read_text() == "[]"


@pytest.mark.parametrize("name", ["tiny", "large-v3"])
def test_random_models_get_a_processor_with_their_ids(name: str) -> None:
    size = ModelSize(128, 2, 1, 2, 128, vocabulary=MODEL_SIZES[name].vocabulary)
    tokenizer, tokens = random_processor(size).tokenizer, special_tokens(size)
    assert len(tokenizer) == size.vocabulary
    config = talking_config(size, 2)
    for text, number in (
        ("<|endoftext|>", config.eos_token_id),
        ("<|startoftranscript|>", config.decoder_start_token_id),
        ("<|transcribe|>", tokens.transcribe),
        ("<|nospeech|>", tokens.no_speech),
        ("<|notimestamps|>", config.no_timestamps_token_id),
        ("<|0.00|>", tokens.first_timestamp),
    ):
        assert tokenizer.convert_tokens_to_ids(text) == number
    assert tokenizer.decode([100, 200]).strip()


@pytest.mark.parametrize(
    ("device", "checkpoint", "dtype"),
    [
        ("cpu", "tiny", "float32"),
        pytest.param("cuda", "base", "float16", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("words", [False, True])
def test_every_window_has_the_requested_tokens(device, checkpoint, dtype, words) -> None:
    case = ThroughputCase(checkpoint, "flash", 2, 7, words, 1, device, dtype)
    samples, _ = speech([], 3)
    assert samples.shape == (90 * 16_000,) and np.ptp(samples[-16_000 * 5 :]) > 0
    transcriber = random_transcriber(case)
    for _ in range(2):
        found = transcriber.transcribe(
            np.split(samples, 3), language="en", options=case.options, batch_size=case.batch_size
        )
        assert len(found) == 3
        for each in found:
            [segment] = each.segments
            assert 0 <= segment.start <= segment.end <= 30
            assert len(segment.tokens) == 7
            assert bool(segment.words) == words
            times = [time for word in segment.words for time in (word.start, word.end)]
            assert times == sorted(times)
