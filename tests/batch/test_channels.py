"""Channels and tracks in an archive: by the run's options, or a row's."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.audio.encoding import write_wave
from tests.batch.fakes import FakeModel, all_rows
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.audio_source import ChannelSources
from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.manifest import read_archive
from whisper_flash_attention.batch.model import RunOptions
from whisper_flash_attention.batch.results import _check_settings
from whisper_flash_attention.batch.rows import failed_row, finished_row
from whisper_flash_attention.batch.run import _settings, run_batch
from whisper_flash_attention.batch.shards import read_shard, write_shard
from whisper_flash_attention.batch.stages import TranscribeStage, decode
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import DecodeOptions, SubtitleOptions, TranscribeOptions
from whisper_flash_attention.transcribe import Segment, Transcription


@pytest.fixture
def stereo(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(-9000, 9000, (2, 16_000)).astype(np.int16)
    write_wave(tmp_path / "stereo.wav", noise, 16_000)
    return tmp_path / "stereo.wav"


@pytest.fixture(scope="module")
def opener() -> Iterator[AudioOpener]:
    with AudioOpener(DecoderPool(1)) as opener:
        yield opener


def test_a_recording_is_decoded_by_its_channel(stereo: Path, opener: AudioOpener) -> None:
    path = str(stereo)
    one, two, each, mixed, none, missing = decode(
        [
            Item("a", path, channel=1),
            Item("b", path, channel=2),
            Item("c", path, channel="each", start=0.25),
            Item("d", path),
            Item("e", path, channel=3),
            Item("f", path, audio_track="deu"),
        ],
        opener,
    )
    for number, found in enumerate((one, two), 1):
        np.testing.assert_array_equal(found.samples, load_audio(stereo, channel=number))
    assert each.samples is not None and each.samples.shape == (2, 12_000) and each.seconds == 0.75
    np.testing.assert_array_equal(each.samples[1], load_audio(stereo, channel=2)[4_000:])
    np.testing.assert_array_equal(mixed.samples, load_audio(stereo))
    for found in (none, missing):
        assert found.failure is not None and found.failure["error_kind"] == "AudioError"


def test_channels_reach_the_transcriber_as_such(stereo: Path, opener: AudioOpener) -> None:
    seen: list[Any] = []

    class Speech:
        languages = ("en",)

        def transcribe_each(
            self, recordings: Any, **_: Any
        ) -> Generator[tuple[int, Transcription]]:
            segment = Segment(0.0, 0.5, "a", channel=2)
            for index, recording in enumerate(recordings):
                seen.append(recording)
                yield index, Transcription("a", "en", (segment,), 1.0)

    class Opener:
        source = "fake"

        def open(self) -> Any:
            return Speech()

    stage = TranscribeStage(Opener(), RunOptions())
    items = [Item("a", str(stereo), channel="each"), Item("b", str(stereo), channel=1)]
    rows = stage.rows(list(decode(items, opener)))
    assert isinstance(seen[0], ChannelSources) and isinstance(seen[1], np.ndarray)
    assert [row["segments"][0]["channel"] for row in rows] == [2, 2]


def test_a_rows_channel_counts_before_the_runs() -> None:
    run_options = RunOptions(TranscribeOptions(channel=2, audio_track="en"))
    assert run_options.resolved(Item("a", "a")).channel == 2
    found = run_options.resolved(Item("a", "a", channel="each", audio_track=3))
    assert (found.channel, found.audio_track) == ("each", 3)
    assert Item.from_json(found.to_json()) == found
    assert run_options.of(Item("a", "a")) == run_options


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_manifest_has_columns_for_them(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    values = [("each", "deu"), (2, 1), ("", ""), ("left", ""), (0, ""), ("mix", -1)]
    rows = [
        {"id": f"{number}", "path": "a.wav", "channel": channel, "audio_track": track}
        for number, (channel, track) in enumerate(values)
    ]
    if suffix == ".csv":
        lines = ["id,path,channel,audio_track"] + [",".join(map(str, r.values())) for r in rows]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    archive = read_archive(str(path))
    found = [(item.channel, item.audio_track) for item in archive.items]
    assert found == [("each", "deu"), (2, 1), (None, None)]
    assert [each.row for each in archive.rejected] == [4, 5, 6]
    assert "give mix, each, or the number of a channel" in archive.rejected[0].reason
    assert archive.unused == ()


def test_settings_of_folders_without_channels_are_as_before() -> None:
    usual = _settings(FakeModel(), RunOptions(), (), SubtitleOptions())
    assert "channel" not in usual and "audio_track" not in usual and usual["task"] == "transcribe"
    run_options = RunOptions(TranscribeOptions(channel="each"))
    assert _settings(FakeModel(), run_options, (), SubtitleOptions()) == {
        **usual,
        "channel": "each",
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"options": TranscribeOptions(channel="each")},
        {"decode": DecodeOptions(prepend_punctuations="(")},
    ],
)
def test_an_option_that_a_folder_does_not_name_had_its_usual_value(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    """A folder of the usual settings, made before the option existed, takes no other value."""
    wanted = _settings(FakeModel(), RunOptions(**changed), (), SubtitleOptions())
    usual = _settings(FakeModel(), RunOptions(), (), SubtitleOptions())
    earlier = {name: value for name, value in usual.items() if name != "prepend_punctuations"}
    write_shard(tmp_path, 0, [failed_row(Item("a", "a"), "AudioError", "x")], "jsonl")
    (tmp_path / "settings.json").write_text(json.dumps(earlier))
    _check_settings(tmp_path, usual)
    with pytest.raises(OptionError, match="holds results of other settings"):
        _check_settings(tmp_path, wanted)


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_labels_are_in_shards_where_they_are_set(tmp_path: Path, output_format: str) -> None:
    segments = (Segment(0.0, 1.0, "a", channel=1), Segment(1.0, 2.0, "b"))
    text = Transcription("a", "en", segments, 2.0).to_dict()
    rows = [finished_row(Item("a", "a"), text, 1.0), failed_row(Item("b", "b"), "AudioError", "x")]
    shard = write_shard(tmp_path, 0, rows, output_format)
    assert read_shard(shard) == rows
    assert ["channel" in segment for segment in rows[0]["segments"]] == [True, False]


def test_a_run_reads_each_channel(stereo: Path, tmp_path: Path) -> None:
    run_options = RunOptions(TranscribeOptions(channel=1))
    summary = run_batch(str(stereo), tmp_path / "out", model=FakeModel(), run_options=run_options)
    assert summary.all_well and len(all_rows(tmp_path / "out")) == 1
    with pytest.raises(OptionError, match="channel"):
        run_batch(str(stereo), tmp_path / "out", model=FakeModel(), run_options=RunOptions())
