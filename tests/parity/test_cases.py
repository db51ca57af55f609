"""Options and modes of a comparison, and the recordings and features that it reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from tests.audio.encoding import write_wave
from tests.parity.checkpoints import write_features
from whisper_flash_attention.errors import MissingPackage, OptionError
from whisper_flash_attention.parity.cases import (
    BOUNDS,
    MODES,
    ParityOptions,
    find_recordings,
    read_features,
    read_recordings,
)


def test_no_modes_mean_all_and_repeated_ones_run_once() -> None:
    assert [mode.name for mode in ParityOptions().chosen_modes()] == list(MODES)
    chosen = ParityOptions(modes=("beams", "greedy", "beams")).chosen_modes()
    assert [mode.name for mode in chosen] == ["beams", "greedy"]


def test_a_tolerance_is_for_every_dtype() -> None:
    assert ParityOptions().bound("float16") == BOUNDS["float16"]
    assert ParityOptions(tolerance=0.0).bound("bfloat16") == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modes": ("fast",)}, "mode is 'fast': give greedy, timestamps"),
        ({"batch_size": 0}, "batch_size is 0: give a whole number"),
        ({"limit": 0}, "limit is 0: give a whole number"),
        ({"tolerance": -1.0}, "tolerance is -1.0: give a gap"),
        ({"tolerance": float("nan")}, "tolerance is nan: give a gap"),
        ({"seed": -1}, "seed is -1: give a whole number"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ParityOptions(**values)


def noise(seconds: float) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(-9000, 9000, (1, int(16_000 * seconds)), dtype=np.int16)


def read(*paths: Path) -> tuple[object, list[str]]:
    reported: list[str] = []
    clips = read_recordings(paths, WhisperFeatureExtractor(), lambda name: None, reported.append)
    return clips, reported


def test_a_folder_gives_its_recordings_and_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("b.WAV", "a.flac", "a.txt", "index.json", "model.bin"):
        (tmp_path / name).touch()
    odd = tmp_path / "model.bin"
    found = find_recordings([tmp_path, odd, tmp_path / "a.flac"])
    assert [path.name for path in found] == ["a.flac", "b.WAV", "model.bin"]


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OptionError, match="holds no recordings"):
        find_recordings([tmp_path])


def test_a_bad_recording_is_reported_in_one_line_and_left_out(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    write_wave(good, noise(1), 16_000)
    bad.write_text("not sound")
    clips, reported = read(bad, good)
    assert [clip.name for clip in clips.clips] == ["good.wav"]
    assert clips.clips[0].features.shape == (80, 3000)
    assert list(clips.skipped) == ["bad.wav"]
    [line] = reported
    assert line.startswith(f"skipped: {bad}: ")


def test_the_transcript_beside_a_recording_is_taken_unless_it_is_longer_than_a_window(
    tmp_path: Path,
) -> None:
    paths = []
    for name, seconds in (("short", 1.0), ("long", 31.0), ("alone", 1.0)):
        paths.append(tmp_path / f"{name}.wav")
        write_wave(paths[-1], noise(seconds), 16_000)
        if name != "alone":
            (tmp_path / f"{name}.txt").write_text(f" said in {name}\n")
    clips, _ = read(*paths)
    assert [clip.transcript for clip in clips.clips] == ["said in short", None, None]


def test_files_of_the_same_name_are_distinguished(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "talk.wav" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        write_wave(path, noise(0.5), 16_000)
    clips, _ = read(*paths)
    assert [clip.name for clip in clips.clips] == [str(path) for path in paths]


def test_without_a_decoder_the_message_has_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackage, match="--features instead of --audio"):
        read(tmp_path / "talk.wav")


def test_features_come_by_name_and_wrong_ones_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "clips.npz"
    good = np.ones((80, 200), np.float16)
    arrays = {
        "good": good,
        "narrow": np.ones((40, 200), np.float32),
        "whole": np.ones((80, 200), np.int64),
        "odd": np.full((80, 200), np.nan, np.float32),
    }
    np.savez(path, **arrays)
    reported: list[str] = []
    clips = read_features(path, (80, 200), reported.append)
    [clip] = clips.clips
    assert clip.name == "good"
    assert clip.features.dtype == np.float32
    assert list(clips.skipped) == ["narrow", "whole", "odd"]
    assert "shape is [40, 200], this model takes [80, 200]" in reported[0]
    assert "dtype is int64" in reported[1]
    assert "not finite" in reported[2]


def test_one_array_of_all_features_is_taken_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "clips.npy"
    np.save(path, np.ones((2, 80, 200), np.float32))
    assert [clip.name for clip in read_features(path, (80, 200), print).clips] == ["0", "1"]


def test_what_is_no_file_of_features_is_refused(tmp_path: Path) -> None:
    text, pickled, cut = (tmp_path / name for name in ("a.npz", "b.npy", "c.npz"))
    text.write_text("nothing")
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    whole = write_features(tmp_path / "whole.npz")
    cut.write_bytes(whole.read_bytes()[:-500])
    for path in (text, pickled, cut, tmp_path / "missing.npz"):
        with pytest.raises(OptionError, match=r"not an \.npz or \.npy file of features"):
            read_features(path, (80, 200), print)
