"""`stream_audio`: blocks and parts of what `load_audio` gives, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.audio.encoding import Samples, encode, write_wave
from whisper_flash_attention.audio import load_audio, stream_audio
from whisper_flash_attention.errors import AudioError, OptionError


@pytest.fixture(scope="module")
def mp3_path(mp3: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "speech.mp3"
    path.write_bytes(mp3)
    return path


@settings(max_examples=25, deadline=None)
@given(block=st.integers(1_000, 200_000), rate=st.sampled_from([8_000, 16_000]))
def test_blocks_of_any_size_join_to_the_whole(mp3_path: Path, block: int, rate: int) -> None:
    blocks = list(stream_audio(mp3_path, sampling_rate=rate, block_seconds=block / rate))
    assert {len(each) for each in blocks[:-1]} <= {block}
    assert 1 <= len(blocks[-1]) <= block
    assert all(each.dtype == np.float32 and each.base is None for each in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), load_audio(mp3_path, rate))


@settings(max_examples=25, deadline=None)
@given(
    start=st.integers(0, 100_000), length=st.integers(1, 150_000), block=st.integers(999, 70_000)
)
def test_a_part_is_that_part_of_the_whole(
    mp3_path: Path, start: int, length: int, block: int
) -> None:
    end = start + length
    seconds = {"start": start / 16_000, "end": end / 16_000, "block_seconds": block / 16_000}
    found = np.concatenate(list(stream_audio(mp3_path, **seconds)))
    np.testing.assert_array_equal(found, load_audio(mp3_path)[start:end])


def test_a_part_does_not_warn_of_damage_after_it(
    tmp_path: Path, mp3: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cut.mp3"
    path.write_bytes(mp3[: len(mp3) * 6 // 10])
    assert sum(map(len, stream_audio(path, end=2.0))) == 32_000
    assert not caplog.records
    with pytest.raises(AudioError, match=r"cut\.mp3: ends after 4\.\d+ s, before 60\.00 s"):
        list(stream_audio(path, start=60.0))


def test_a_stream_that_is_cut_off_warns_once_after_its_last_block(
    tmp_path: Path, mp3: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cut.mp3"
    path.write_bytes(mp3[: len(mp3) * 6 // 10])
    blocks = stream_audio(path, block_seconds=1.0)
    for _ in range(4):
        next(blocks)
    assert not caplog.records
    list(blocks)
    [record] = caplog.records
    assert "of the 7.1 s that it announces could be decoded" in record.getMessage()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_rate": 0}, "sampling_rate is 0: give 2000 to"),
        ({"sampling_rate": "16000"}, "sampling_rate is '16000': give 2000 to"),
        ({"start": [1.0]}, "start is .*: give seconds"),
        ({"block_seconds": np.zeros(2)}, "block_seconds is array.*: give seconds"),
        ({"channel": True}, "channel is True: give a whole number"),
        ({"most_seconds": "1"}, "most_seconds is '1': give seconds"),
        ({"block_seconds": 0.0}, "block_seconds is 0.0, less than one sample"),
        ({"block_seconds": float("nan")}, "block_seconds is nan: give seconds"),
        ({"start": -1.0}, "start is -1.0: give seconds, 0 to"),
        ({"end": float("inf")}, "end is inf: give seconds"),
        ({"start": 2.0, "end": 2.0}, "end must be after start, but is 2.0 s, and start 2.0 s"),
    ],
)
def test_options_of_a_stream_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        stream_audio("there is no such file", **options)


def test_a_stream_that_is_left_early_closes_its_file(mp3_path: Path) -> None:
    with mp3_path.open("rb") as file:
        blocks = stream_audio(file, block_seconds=1.0)
        next(blocks)
        blocks.close()  # type: ignore[attr-defined]
        assert not file.closed  # a caller's file is the caller's
    blocks = stream_audio(mp3_path, block_seconds=1.0)
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    opened = [os.readlink(f"/proc/self/fd/{each}") for each in open_files()]
    assert str(mp3_path) not in opened


def open_files() -> list[str]:
    if not sys.platform.startswith("linux"):
        pytest.skip("open files can be listed on Linux alone")
    return [
        each for each in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{each}")
    ]


def test_memory_of_a_stream_stays_at_some_blocks(tmp_path: Path, speech: Samples) -> None:
    write_wave(tmp_path / "long.wav", np.tile(speech, 20)[None], 16_000)
    next(stream_audio(tmp_path / "long.wav"))  # imports, too, take memory
    tracemalloc.start()
    for block in stream_audio(tmp_path / "long.wav", block_seconds=5.0):
        size = max(block.nbytes, 5 * 16_000 * 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * size


@pytest.mark.slow
def test_three_hours_take_no_more_memory_than_three_minutes(
    tmp_path: Path, speech: Samples
) -> None:
    short = encode(tmp_path / "s.mp3", np.tile(speech, 25), codec="mp3", rate=16_000, layout="mono")
    (tmp_path / "long.mp3").write_bytes(short.read_bytes() * 61)
    seconds, megabytes = resident_after(tmp_path / "long.mp3")
    assert seconds > 3 * 3600
    assert megabytes < resident_after(short)[1] + 20


def resident_after(path: Path) -> tuple[float, float]:
    """Seconds of a recording and the most resident MB of a process that only streams it."""
    code = (
        "import resource, sys; from whisper_flash_attention.audio import stream_audio\n"
        "total = sum(map(len, stream_audio(sys.argv[1])))\n"
        "print(total / 16_000, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
    )
    seconds, megabytes = map(float, run.stdout.split())
    return seconds, megabytes
