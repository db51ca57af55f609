"""Time stamps, and the silence that they ask for."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.audio.encoding import Samples, mux_late
from whisper_flash_attention.audio import load_audio, stream_audio
from whisper_flash_attention.audio.decode import (
    LONGEST_GAP,
    MOST_SILENCE,
    MOST_UNANNOUNCED_SILENCE,
    TOLERANCE,
    Timeline,
)

CASES = Path(__file__).resolve().parents[1] / "data" / "cases"
LENGTH = 0.02  # seconds of the frames here


def place(
    times: list[float | None], *, origin: float | None = 0.0, announced: float | None = None
) -> tuple[list[float], Timeline[int]]:
    """Place a frame at each time; return where each begins."""
    timeline: Timeline[int] = Timeline(origin, announced)
    frames = ((number, time, LENGTH) for number, time in enumerate(times))
    begins, end = [], 0.0
    for count, (number, gap) in enumerate(timeline.place(frames)):
        assert number == count  # none is lost, none is moved before another
        begins.append(end + gap)
        end = begins[-1] + LENGTH
    assert len(begins) == len(times)
    assert timeline.position == pytest.approx(end)
    return begins, timeline


def run(start: float, count: int = 50) -> list[float | None]:
    return [start + LENGTH * number for number in range(count)]


def test_frames_in_a_row_have_no_gaps() -> None:
    begins, timeline = place(run(0))
    assert begins == pytest.approx(run(0))
    assert (timeline.silence, timeline.wrong) == (0, 0)


@pytest.mark.parametrize("origin", [0.0, 1.4, -0.02])
def test_a_late_start_and_a_gap_are_silence(origin: float) -> None:
    times = [*run(origin + 3.94), *run(origin + 25.0)]
    begins, timeline = place(times, origin=origin)
    assert begins == pytest.approx([*run(3.94), *run(25.0)])
    assert timeline.lead == pytest.approx(3.94)
    assert timeline.wrong == 0


def test_without_a_known_beginning_the_first_frame_is_it() -> None:
    begins, _ = place([None, None, *run(100.0)], origin=None)
    assert begins == pytest.approx(run(0, 52))


@given(st.lists(st.floats(-0.07, 0.07), min_size=100, max_size=100))
def test_jitter_moves_nothing(jitter: list[float]) -> None:
    times = [time + each for time, each in zip(run(0, 100), jitter, strict=True)]  # type: ignore[operator]
    begins, timeline = place(times, origin=0.0)  # type: ignore[arg-type]
    assert begins == pytest.approx(run(0, 100))
    assert timeline.wrong == 0


def test_many_small_gaps_do_not_add_up() -> None:
    times: list[float | None] = []
    for number in range(100):
        times += run(number * 0.5, 20)  # 0.4 s of sound and 0.1 s of nothing
    begins, _ = place(times)
    late = [time - begin for time, begin in zip(times, begins, strict=True)]  # type: ignore[operator]
    assert min(late) > -1e-6 and max(late) <= TOLERANCE + 1e-6


@pytest.mark.parametrize("wrong", [5e8, 1e4, -7.0, -1e9, 12.0])
def test_a_single_wrong_time_stamp_moves_nothing(wrong: float) -> None:
    times = run(0)
    times[20] = wrong
    begins, timeline = place(times)
    assert begins == pytest.approx(run(0))
    assert timeline.wrong == 1


@pytest.mark.parametrize("jump", [LONGEST_GAP + 10, 1e9, MOST_UNANNOUNCED_SILENCE + 10])
def test_a_jump_that_cannot_be_true_is_damage_and_no_silence(jump: float) -> None:
    begins, timeline = place([*run(0), *run(1 + jump), *run(2)])
    assert begins == pytest.approx(run(0, 150))
    assert timeline.wrong == 1


def test_a_long_gap_is_true_if_the_container_is_that_long() -> None:
    begins, timeline = place([*run(0), *run(3000.0)], announced=3001.0)
    assert begins[50] == pytest.approx(3000.0)
    assert timeline.wrong == 0


def test_a_clock_that_starts_again_goes_on_where_the_sound_is() -> None:
    begins, timeline = place([*run(0, 200), *run(0, 200), *run(24.0)])
    assert begins[:400] == pytest.approx(run(0, 400))
    assert begins[400] == pytest.approx(28.0)
    assert timeline.wrong == 0


@given(st.lists(st.one_of(st.none(), st.floats(-1e12, 1e12)), max_size=60))
def test_silence_is_bounded_whatever_time_stamps_say(times: list[float | None]) -> None:
    _, timeline = place(times, announced=1e12)
    assert 0 <= timeline.silence <= MOST_SILENCE


def quiet_until(samples: npt.NDArray[np.float32]) -> float:
    """Seconds before the first sample that is not zero."""
    return float(np.flatnonzero(samples)[0]) / 16_000


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_a_track_that_begins_late_has_the_times_of_a_player(
    tmp_path: Path, speech: Samples, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = CASES / name
    if not path.is_file():
        path = mux_late(tmp_path / name, speech, 3.936)
    options = {"track": 2} if path.parent == tmp_path else {}
    samples = load_audio(path, **options)  # type: ignore[arg-type]
    own_silence = 0.1 if path.parent == CASES else 0.0
    assert quiet_until(samples) == pytest.approx(3.936 + own_silence, abs=0.05)
    assert not caplog.records
    for start in (1.0, 3.9, 5.0):
        part = np.concatenate(list(stream_audio(path, start=start, end=6.0, **options)))  # type: ignore[arg-type]
        np.testing.assert_array_equal(part, samples[round(start * 16_000) : 96_000])


def test_a_gap_is_silence(caplog: pytest.LogCaptureFixture) -> None:
    samples = load_audio(CASES / "gap.webm")
    assert samples.size / 16_000 == pytest.approx(31.0, abs=0.05)
    loud = np.flatnonzero(np.abs(samples) > 0.0)
    gaps = np.diff(loud) / 16_000
    assert gaps.max() == pytest.approx(20.0, abs=0.1)
    assert not caplog.records


def test_lost_packets_do_not_shorten_a_recording(caplog: pytest.LogCaptureFixture) -> None:
    samples = load_audio(CASES / "lost_packets.ts")
    assert samples.size / 16_000 == pytest.approx(11.05, abs=0.2)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "packets are damaged" in record.getMessage()


def test_all_is_the_same_from_memory() -> None:
    data = (CASES / "late.mp4").read_bytes()
    np.testing.assert_array_equal(load_audio(io.BytesIO(data)), load_audio(CASES / "late.mp4"))
