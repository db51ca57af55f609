"""This package beside others: checkpoints in their formats, recordings, rows, and the command."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration
from typer.testing import CliRunner

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.benchmark import peers
from whisper_flash_attention.benchmark.peer_checkpoints import write_checkpoint, write_ggml
from whisper_flash_attention.benchmark.peer_index import Origin, write_index
from whisper_flash_attention.benchmark.peer_process import Call, DeviceMemory, PeerFailed
from whisper_flash_attention.benchmark.peer_systems import (
    GGML,
    GGML_8_BITS,
    OPENAI,
    SYSTEMS,
    TRANSFORMERS,
    PeerCheckpoint,
    Request,
)
from whisper_flash_attention.benchmark.peers import (
    PeersCase,
    Running,
    is_installed,
    measure_peers,
    speed_of_ours,
    version_of,
)
from whisper_flash_attention.benchmark.random_weights import build_model, random_processor
from whisper_flash_attention.benchmark.settings import ModelSize
from whisper_flash_attention.benchmark.spoken import (
    Spoken,
    bundled_spoken,
    find_spoken,
    join_spoken,
)
from whisper_flash_attention.benchmark.word_alignment import TimedWord
from whisper_flash_attention.cli import app
from whisper_flash_attention.cli.peers import as_table, in_a_line
from whisper_flash_attention.errors import BenchmarkError, OptionError
from whisper_flash_attention.weights import read_checkpoint
from whisper_flash_attention.weights.openai_reader import openai_name


def case(*systems: str, **changes: Any) -> PeersCase:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1}
    return PeersCase("tiny", systems, **({"batch_sizes": (2,)} | options | changes))


def call(seconds: float, text: str = "one too") -> Call:
    return Call(seconds, seconds / 2, text, 3, 0.25)


# --- recordings ----------------------------------------------------------------------------------


def test_a_file_has_the_transcript_of_its_folders_index(tmp_path: Path) -> None:
    path = tmp_path / "one.wav"
    path.touch()
    word = {"word": "Eins", "start": 0.25, "end": 1}
    listed = {"file": "one.wav", "language": "de", "transcript": "Eins.", "words": [word]}
    (tmp_path / "index.json").write_text(json.dumps([listed]))
    expected = Spoken(path, "de", "Eins.", words=(TimedWord("Eins", 0.25, 1.0),))
    assert find_spoken([str(path)], "en") == [expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "index.json is not JSON"),
        (b"[" * 100_000, "index.json is not JSON"),
        (b"\xff", "index.json is not text in UTF-8"),
        (b'{"a": 1}', "index.json is no list: give objects with 'file', 'language'"),
        (b"[3]", "entry 1 of .*index.json is 3: give objects"),
        (b'[{"file": "one.wav"}]', "entry 1 of .*index.json is {.*}: give objects"),
        (b'[{"file": 1, "language": "en"}]', "entry 1 of .*index.json"),
        (b'[{"file": "a", "language": "en", "transcript": 3}]', "entry 1 of .*index.json"),
        (b'[{"file": "a", "language": "en", "words": 3}]', "entry 1 of .*'start' and 'end'"),
        (b'[{"file": "a", "language": "en", "words": [{"word": "a"}]}]', "entry 1 of .*'start'"),
        (
            b'[{"file": "a", "language": "en", "words": [{"word": "a", "start": 2, "end": 1}]}]',
            "entry 1 of .*'start' and 'end'",
        ),
    ],
)
def test_an_index_of_something_else_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(BenchmarkError, match=message):
        find_spoken([str(tmp_path)], "en")


def test_a_transcript_may_be_left_out_of_an_index_and_has_to_be_text(tmp_path: Path) -> None:
    path = tmp_path / "one.wav"
    path.touch()
    path.with_suffix(".txt").write_bytes(b"Gr\xfc\xdfe")
    with pytest.raises(BenchmarkError, match=r"one.txt is not text in UTF-8"):
        find_spoken([str(path)], "de")
    (tmp_path / "index.json").write_text(json.dumps([{"file": "one.wav", "language": "de"}]))
    assert find_spoken([str(path)], "en") == [Spoken(path, "de", None)]


def test_whole_recordings_are_joined_over_and_over(tmp_path: Path) -> None:
    clips = bundled_spoken()
    joined = join_spoken([Spoken(clips[0].path, "en", None), *clips], 60.0, tmp_path)
    seconds = load_audio(joined.path).size / 16_000
    each = [clip.seconds for clip in bundled_recordings()]
    assert joined.language == "en" and 60.0 - max(each) < seconds <= 60.0
    assert joined.transcript is not None
    assert joined.transcript.count(bundled_recordings()[0].transcript) == 3
    timed = [replace(clip, words=(TimedWord("a", 1.0, 2.0),)) for clip in clips[:2]]
    first, second, third = join_spoken(timed, sum(each[:2]) + each[0], tmp_path).words
    assert (first.start, first.end) == (1.0, 2.0)
    assert second.start == pytest.approx(1.0 + each[0])
    assert third.end == pytest.approx(2.0 + each[0] + each[1])
    with pytest.raises(OptionError, match="join 1: no recording"):
        join_spoken(clips, 1.0, tmp_path)
    for seconds in (float("nan"), float("inf"), -1.0):
        with pytest.raises(OptionError, match=r"join is .*: give seconds above 0"):
            join_spoken(clips, seconds, tmp_path)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_a_checkpoint_is_the_same_in_all_formats(tmp_path: Path) -> None:
    formats = (TRANSFORMERS, OPENAI, GGML, GGML_8_BITS)
    found = write_checkpoint("tiny", formats, tmp_path, is_random=True)
    assert set(found.files) == set(formats)
    assert (found.end_of_text, found.is_multilingual) == (50257, True)
    folder = load_file(Path(found.files[TRANSFORMERS]) / "model.safetensors")
    file = torch.load(found.files[OPENAI], weights_only=True)["model_state_dict"]
    assert {openai_name(name) for name in folder} == file.keys()
    for name, tensor in folder.items():
        assert torch.equal(tensor, file[openai_name(name)]), name
    assert read_checkpoint(found.files[OPENAI]) is not None
    whole, quantized = (Path(found.files[name]).read_bytes() for name in (GGML, GGML_8_BITS))
    assert struct.unpack_from("<12i", whole)[1:] == (51865, 1500, 128, 2, 1, 448, 128, 2, 2, 80, 1)
    assert struct.unpack_from("<12i", quantized)[-1] == 2007
    first = file["decoder.token_embedding.weight"].float().numpy()
    name = b"decoder.token_embedding.weight"
    start = quantized.index(name) + len(name)
    assert struct.unpack_from("<5i", quantized, start - len(name) - 20) == (2, 30, 8, 128, 51865)
    block = quantized[start : start + 34]
    scale = np.frombuffer(block[:2], "<f2").astype(np.float32)
    values = np.frombuffer(block[2:], np.int8) * scale
    np.testing.assert_allclose(values, first[0, :32], atol=float(scale[0]))


def test_ids_and_mel_filters_of_whisper_cpps_file(small: ModelSize) -> None:
    processor = random_processor(small)
    file = io.BytesIO()
    model = build_model(WhisperForConditionalGeneration, small, 2)
    write_ggml(file, model, processor, quantize=False)
    data = file.getvalue()
    assert struct.unpack_from("<2i", data, 48) == (80, 201)
    start = 56 + 4 * 80 * 201
    (count,) = struct.unpack_from("<i", data, start)
    (length,) = struct.unpack_from("<i", data, start + 4)
    assert (count, data[start + 8 : start + 8 + length]) == (50257, b"e")


# --- rows ----------------------------------------------------------------------------------------


class FakeWorker:
    """A system that needs no process."""

    settings: ClassVar = {"beam_size": 1}
    fatal: ClassVar[set[str]] = set()
    language: ClassVar[str | None] = "en"

    def __init__(self, system: Any, *arguments: Any, **options: Any) -> None:
        self.name = system.name
        self.memory = DeviceMemory("cpu", alone=True)

    def load(self) -> float:
        if self.name == "openai-whisper":
            raise PeerFailed("ValueError: no model")
        return 0.5

    def call(self, request: Request) -> Call:
        assert request.language == self.language
        if request.word_times:
            if self.name == "stock-chunked":
                raise PeerFailed("died with exit code -11")
            return replace(call(9.0), rss_gb=9.0, words=(TimedWord(" One,", 0.75, 1.0),))
        if self.name == "stock-chunked" and request.path in self.fatal and request.batch_size == 2:
            raise PeerFailed("died with exit code -9")
        return call((2.0 if self.name.startswith("ours") else 4.0) / request.batch_size)

    def stop(self, *, at_once: bool = False) -> None:
        self.ended_at_once = at_once


def running_of(which: PeersCase) -> Running:
    ours = SYSTEMS["ours-batched"]
    worker: Any = FakeWorker(ours)
    return Running(ours, worker, [2], which.blank_row(ours, 2, 1))


def test_rows_have_speed_errors_and_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "Worker", FakeWorker)
    written = PeerCheckpoint({TRANSFORMERS: "", OPENAI: ""}, 50257, is_multilingual=False)
    monkeypatch.setattr(peers, "_written", lambda *arguments: written)
    names = ("ours-batched", "stock-chunked", "openai-whisper", "vllm", "stock-long-form")
    lines: list[str] = []
    monkeypatch.setattr(peers, "is_installed", lambda module, folder: module != "whisper")
    clip, silence = (each.path for each in bundled_recordings()[:2])
    monkeypatch.setattr(FakeWorker, "fatal", {str(silence)})
    recordings = [
        Spoken(clip, "en", "One two."),
        Spoken(silence, "none", None),
        Spoken(tmp_path / "de.wav", "de", "Eins."),
    ]
    rows: dict[tuple[str, int], dict[str, Any]] = {}

    def measure(which: PeersCase, spoken: list[Spoken]) -> None:
        measure_peers(
            *(which, dict.fromkeys(which.batch_sizes, spoken), tmp_path),
            keep=lambda row: rows.update({(row["system"], row["batch_size"]): row}),
            report=lines.append,
        )

    measure(case(*names, rounds=2, batch_sizes=(4, 2)), recordings)
    large, ours = rows["ours-batched", 4], rows["ours-batched", 2]
    seconds = sum(load_audio(path).size for path in (clip, silence)) / 16_000
    assert large["seconds"] == [1.0, 1.0] and ours["seconds"] == [2.0, 2.0]
    assert ours["realtime_factor"] == pytest.approx(seconds / 2)
    assert (ours["wer"], ours["invented_words"], ours["warm_up_seconds"]) == (0.5, 2, 1.0)
    assert (ours["first_text_seconds"], ours["tokens"]) == (0.5, 6)
    # The process has been larger.
    assert (large["peak_memory_gb"], ours["peak_memory_gb"]) == (0.25, None)
    assert [each["text"] for each in ours["files"]] == ["one too"] * 2
    assert lines.count("ours-batched, batch size 4: warm after 0.5 s") == 1
    found = {case: (row["status"], row.get("reason")) for case, row in rows.items()}
    assert found["stock-chunked", 4][0] == found["stock-long-form", 1][0] == "ok"
    assert found["stock-chunked", 2] == ("failed", "died with exit code -9")
    assert found["openai-whisper", 1] == ("missing", "pip install openai-whisper")
    assert found["vllm", 2] == ("skipped", "does not run on cpu")
    assert speed_of_ours(list(rows.values()), rows["stock-long-form", 1]) is None
    assert speed_of_ours(list(rows.values()), rows["stock-chunked", 4]) == 2.0
    assert [each["is_silent"] for each in ours["files"]] == [False, True]
    with pytest.raises(OptionError, match="none of the recordings is in a language"):
        measure(case("ours-batched"), recordings[2:])


def test_a_system_that_fails_has_a_row_for_each_batch_size_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "Worker", FakeWorker)
    monkeypatch.setattr(peers, "is_installed", lambda module, folder: True)
    written = PeerCheckpoint({}, 50257, is_multilingual=True)
    monkeypatch.setattr(peers, "_written", lambda *arguments: written)
    silence = Spoken(bundled_recordings()[0].path, "none", None)
    monkeypatch.setattr(FakeWorker, "fatal", {str(silence.path)})
    monkeypatch.setattr(FakeWorker, "language", None)
    spoken = {size: [silence] for size in (1, 2, 4)}
    rows: list[dict[str, Any]] = []
    which = case("stock-chunked", rounds=1, batch_sizes=tuple(spoken))
    measure_peers(which, spoken, tmp_path, rows.append, print)
    found = [(row["batch_size"], row["status"]) for row in rows]
    assert found == [(1, "ok"), (2, "failed"), (4, "failed")]


def test_words_are_compared_with_alignments_off_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word_calls: list[str] = []

    class Counted(FakeWorker):
        def call(self, request: Request) -> Call:
            if request.word_times and self.name == "ours-batched":
                word_calls.append(Path(request.path).name)
            return super().call(request)

    monkeypatch.setattr(peers, "Worker", Counted)
    monkeypatch.setattr(peers, "is_installed", lambda module, folder: True)
    written = PeerCheckpoint({}, 50257, is_multilingual=True)
    monkeypatch.setattr(peers, "_written", lambda *arguments: written)
    first, second = (each.path for each in bundled_recordings()[:2])
    words = (TimedWord("one", 0.5, 1.0), TimedWord("too", 1.0, 1.5))
    recordings = [Spoken(first, "en", "One too.", words=words), Spoken(second, "en", None)]
    rows: list[dict[str, Any]] = []
    which = case("ours-batched", "stock-chunked", batch_sizes=(1, 4), rounds=1)
    measure_peers(which, dict.fromkeys((1, 4), recordings), tmp_path, rows.append, print)
    last = {(row["system"], row["batch_size"]): row for row in rows}
    ours = last["ours-batched", 4]
    assert ours["word_time_error_ms"] == pytest.approx(1e3 * (0.25 + 0.0) / 2)
    assert (ours["aligned_words"], ours["aligned_words_found"]) == (2, 1)
    assert ours["word_time_errors"] == {first.name: [[0.25, 0.0]]}
    # The calls for words count neither as time nor as memory, and follow all others; the first
    # one warms up.
    assert ours["word_times_seconds"] == 9.0 and word_calls == [first.name] * 2
    assert ours["seconds"] == [1.0] and ours["peak_memory_gb"] == 0.25
    assert last["ours-batched", 1]["word_time_error_ms"] is None
    # A system that cannot give them keeps its other figures.
    stock = last["stock-chunked", 4]
    assert (stock["status"], stock["wer"]) == ("ok", 0.0)
    assert stock["word_times_failed"] == "died with exit code -11"
    assert "word timestamps failed: died" in in_a_line(stock)
    assert "word times 125 ms off" in in_a_line(ours)
    [row] = as_table([ours]).columns[-1].cells
    assert row == "125"


def test_another_alignment_of_words_has_a_row_of_its_own() -> None:
    ours, theirs = SYSTEMS["ours-batched"], SYSTEMS["openai-whisper"]
    usual, other = case("ours-batched"), case("ours-batched", word_alignment="characters")
    assert "word_alignment" not in usual.blank_row(ours, 2, 1)
    assert other.blank_row(ours, 2, 1)["word_alignment"] == "characters"
    assert other.blank_row(theirs, 2, 1) == usual.blank_row(theirs, 2, 1)
    with pytest.raises(OptionError, match="word_alignment is 'letters': give tokens or"):
        case("ours-batched", word_alignment="letters")
    random = {"random_weights": True, "new_tokens": 4, "word_alignment": "characters"}
    with pytest.raises(OptionError, match="word_alignment characters with random weights"):
        case("ours-batched", **random)


def test_words_of_random_weights_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "Worker", FakeWorker)
    written = PeerCheckpoint({}, 50257, is_multilingual=True)
    monkeypatch.setattr(peers, "_written", lambda *arguments: written)
    spoken = Spoken(bundled_recordings()[0].path, "en", None, words=(TimedWord("a", 0, 1),))
    rows: list[dict[str, Any]] = []
    which = case("ours-batched", rounds=1, random_weights=True, new_tokens=2)
    measure_peers(which, {2: [spoken]}, tmp_path, rows.append, print)
    assert [row["word_time_error_ms"] for row in rows] == [None]


def test_what_a_system_cannot_do_is_known_before() -> None:
    reasons = {name: system.why_not("cpu", "int8", 20) for name, system in SYSTEMS.items()}
    assert reasons["ours-batched"] is None and reasons["faster-whisper-sequential"] is None
    assert reasons["stock-chunked"] == reasons["openai-whisper"] == "does not compute in int8"
    assert "number of tokens" in (reasons["whisper.cpp"] or "")
    vllm = SYSTEMS["vllm"]
    several = case("vllm", device="cuda", batch_sizes=(1, 2)).why_not(vllm)
    assert several is not None and "loaded again for another batch size" in several[1]
    for wrong in (
        *({"rounds": 0}, {"random_weights": True}, {"new_tokens": 4}, {"peers": Path("nowhere")}),
        *({"batch_sizes": (0,)}, {"batch_sizes": (2, 2)}, {"timeout": 0.0}, {"threads": 0}),
        *({"random_weights": True, "new_tokens": number} for number in (0, 1, 445)),
    ):
        with pytest.raises(OptionError):
            case("ours-batched", **wrong)
    with pytest.raises(OptionError, match="system is 'theirs': give ours-sequential"):
        case("theirs")


def test_speeds_are_compared_where_words_are() -> None:
    def row(system: str, spoken: list[float], silent: list[float], in_turns: bool) -> Any:
        files = [{"is_silent": False, "seconds": spoken}, {"is_silent": True, "seconds": silent}]
        return {"system": system, "batch_size": 1, "in_turns": in_turns, "files": files}

    for in_turns, expected in ((True, 3.0), (False, 2.0)):
        ours = row("ours-sequential", [1.0, 2.0, 4.0], [1.0, 1.0, 1.0], in_turns)
        theirs = row("openai-whisper", [4.0, 6.0, 2.0], [9.0, 9.0, 9.0], in_turns)
        assert speed_of_ours([ours, theirs], theirs) == expected
    # Rounds that one system lacks are not dropped where no turns were taken.
    fewer = row("openai-whisper", [4.0], [9.0], in_turns=False)
    assert speed_of_ours([ours], fewer) == 2.0


def test_descriptions_of_sounds_are_no_words() -> None:
    path = bundled_recordings()[0].path
    running = running_of(case("ours-batched"))
    running.calls[path] = [call(1.0, " [BLANK_AUDIO] (wind howling) *")]
    found = running.summary([Spoken(path, "none", None)], {path: 10.0})
    assert found["invented_words"] == 0


def test_texts_are_those_of_the_last_round_and_times_of_all() -> None:
    path = bundled_recordings()[0].path
    running = running_of(case("ours-batched"))
    running.calls[path] = [call(1.0, "one"), call(3.0, "one two")]
    found = running.summary([Spoken(path, "en", "One two.")], {path: 10.0})
    assert (found["wer"], found["seconds"], found["realtime_factor"]) == (0.0, [1.0, 3.0], 5.0)


def test_fewer_tokens_than_were_forced_are_no_measurement() -> None:
    path = bundled_recordings()[0].path
    running = running_of(case(random_weights=True, new_tokens=4))
    running.calls[path] = [call(1.0)]
    assert running.summary([Spoken(path, "en", None)], {path: 30.0})["tokens"] == 3
    with pytest.raises(PeerFailed, match="6 tokens or more were forced, and 3 came"):
        running.summary([Spoken(path, "en", None)], {path: 30.5})


def test_packages_are_found_in_a_further_folder(tmp_path: Path) -> None:
    home = tmp_path / "some_peer-1.5.dist-info"
    home.mkdir()
    (home / "METADATA").write_text("Metadata-Version: 2.1\nName: some-peer\nVersion: 1.5\n")
    (tmp_path / "some_peer.py").touch()
    assert is_installed("some_peer", tmp_path) and version_of("some-peer", tmp_path) == "1.5"
    assert not is_installed("some_peer", None) and version_of("some-peer", None) is None
    assert is_installed("torch", tmp_path) and version_of("torch", tmp_path) == torch.__version__


def test_an_interruption_does_not_wait_for_calls_that_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[FakeWorker] = []

    class Interrupted(FakeWorker):
        def load(self) -> float:
            workers.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(peers, "Worker", Interrupted)
    monkeypatch.setattr(peers, "is_installed", lambda module, folder: True)
    written = PeerCheckpoint({}, 50257, is_multilingual=True)
    monkeypatch.setattr(peers, "_written", lambda *arguments: written)
    spoken = {2: [Spoken(bundled_recordings()[0].path, "en", None)]}
    with pytest.raises(KeyboardInterrupt):
        measure_peers(case("stock-chunked"), spoken, tmp_path, print, print)
    assert [each.ended_at_once for each in workers] == [True]


def test_sigterm_leaves_no_temporary_folder(tmp_path: Path) -> None:
    script = """
import time
from whisper_flash_attention.benchmark import peers
from whisper_flash_attention.cli import app

def measure(*arguments):
    print("measuring", flush=True)
    time.sleep(60)

peers.measure_peers = measure
app(["benchmark", "peers", "--device", "cpu", "--system", "ours-batched", "--join", "20"])
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "measuring\n"
        assert [each.name for each in tmp_path.glob("whisper-flash-*/*")] == ["joined-20s.flac"]
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("whisper-flash-*"))


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_the_command_measures_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random words are not compared, which would take hours for a long recording.
    monkeypatch.setattr(peers, "word_errors", None)
    origin = Origin.of("tiny", random_weights=True)
    home = tmp_path / origin.folder_name
    home.mkdir()
    write_index(home, origin, write_checkpoint("tiny", [TRANSFORMERS], home, is_random=True))
    path = tmp_path / "rows.json"
    flags = ["--random-weights", "tiny", "--new-tokens", "8", "--device", "cpu", "--threads", "1"]
    flags += ["--batch-size", "2", "--join", "40", "--batch-size", "1", "--join", "20"]
    flags += ["--rounds", "1", "--checkpoints", str(tmp_path)]
    flags += ["--system", "ours-batched", "--system", "whisper.cpp"]
    arguments = ["benchmark", "peers", *flags, "--commit", "abc", "--output", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    cpp, *found = json.loads(path.read_text())["rows"]
    assert (cpp["system"], cpp["status"]) == ("whisper.cpp", "skipped")
    assert [(row["batch_size"], row["tokens"]) for row in found] == [(2, 2 * 8), (1, 8)]
    ours = found[0]
    assert ours["status"] == "ok" and ours["wer"] is None
    assert ours["environment"]["commit"] == "abc" and ours["settings"]["max_new_tokens"] == 8
    assert "ours-batched" in result.output and "min_new_tokens 8" in result.output


def test_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for flags, message in (
        (["--random-weights", "huge"], "--random-weights is 'huge': give tiny, base"),
        (["--random-weights", "tiny"], "random weights do not end"),
        (["--random-weights", "tiny", "--new-tokens", "445"], "--new-tokens is 445: give a whole"),
        (["--system", "theirs"], "--system is 'theirs': give ours-sequential"),
        (["--threads", "0"], "--threads is 0: give a whole number, 1 to"),
        (["--language", "xx"], "--language is 'xx': Whisper knows"),
        (["--join", "9", "--join", "9"], "join: give one length, or 1"),
        *(
            (["--join", value], f"--join is {float(value)}: give seconds above 0")
            for value in ("nan", "inf", "-1", "0", "1e9")
        ),
        (["--checkpoints", str(file)], f"--checkpoints is '{file}': give a folder"),
        (["--output", str(tmp_path)], "is there and is no file"),
    ):
        result = CliRunner().invoke(app, ["benchmark", "peers", "--device", "cpu", *flags])
        assert result.exit_code == 2 and message in " ".join(result.output.split()), flags
