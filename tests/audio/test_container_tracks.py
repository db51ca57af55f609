"""Audio tracks: what there are, and which one is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.audio.encoding import mux_tracks, write_wave
from whisper_flash_attention.audio import AudioTrack, audio_tracks, load_audio, stream_audio
from whisper_flash_attention.audio.audio_source import chosen_track
from whisper_flash_attention.audio.container import language_key
from whisper_flash_attention.errors import AudioError, OptionError


@pytest.fixture(scope="module", params=["film.mkv", "film.mp4"])
def film(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tracks of 1, 2 and 3 s: English, German and one without a language."""
    path = tmp_path_factory.mktemp("tracks") / request.param
    seconds = np.random.default_rng(0).integers(-9000, 9000, 48_000).astype(np.int16)
    tracks = [(seconds[:16_000], 0.0, "eng"), (seconds[:32_000], 0.0, "ger")]
    return mux_tracks(path, [*tracks, (seconds, 0.0, "und")])


def test_tracks_are_listed(film: Path) -> None:
    tracks = audio_tracks(film)
    assert [track.number for track in tracks] == [1, 2, 3]
    assert [track.language for track in tracks] == ["eng", "ger", None]
    assert {(track.codec, track.channels, track.layout) for track in tracks} == {("aac", 1, "mono")}
    assert {track.rate for track in tracks} == {16_000}
    for track, seconds in zip(tracks, (1, 2, 3), strict=True):
        assert track.seconds == pytest.approx(seconds, abs=0.2)
    assert str(tracks[1]).startswith("2: aac, ger, 1 channel (mono), 16000 Hz, 2.")


@pytest.mark.parametrize(
    ("track", "seconds"),
    [
        (1, 1),
        (2, 2),
        (3, 3),
        ("en", 1),
        ("eng", 1),
        ("EN-us", 1),
        ("de", 2),
        ("deu", 2),
        ("ger", 2),
    ],
)
def test_a_track_is_chosen_by_number_or_language(
    film: Path, caplog: pytest.LogCaptureFixture, track: int | str, seconds: int
) -> None:
    samples = load_audio(film, track=track)
    assert samples.size / 16_000 == pytest.approx(seconds, abs=0.2)
    np.testing.assert_array_equal(
        np.concatenate(list(stream_audio(film, track=track, block_seconds=0.5))), samples
    )
    assert chosen_track(film, track).seconds == pytest.approx(seconds, abs=0.2)
    assert not caplog.records  # that another track is longer is no loss


@pytest.mark.parametrize("track", [4, 99, "fr", "und", "xyz"])
def test_a_track_that_is_not_there_is_an_error_that_lists_what_is(
    film: Path, track: int | str
) -> None:
    with pytest.raises(AudioError) as caught:
        load_audio(film, track=track)
    head, found = str(caught.value).split("; its audio tracks are ")
    assert head.startswith(f"{film}: there is no audio track ")
    assert found == "; ".join(str(each) for each in audio_tracks(film))


@pytest.mark.parametrize("track", [0, -1, True, 1.5, "", " "])
def test_what_is_no_track_is_refused_at_once(track: int | str) -> None:
    with pytest.raises(OptionError, match="track is"):
        stream_audio("there is no such file", track=track)


def test_the_default_mark_decides_between_tracks_of_one_language(tmp_path: Path) -> None:
    import av

    path = tmp_path / "two.mka"
    with av.open(path, "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in range(2)]
        for stream, mark in zip(streams, (0, 1), strict=True):
            stream.metadata["language"] = "eng"
            stream.disposition = av.stream.Disposition(mark)
        for stream, size in zip(streams, (8_000, 16_000), strict=True):
            frame = av.AudioFrame.from_ndarray(np.ones((1, size), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 16_000, 0
            container.mux(stream.encode(frame))
    assert [track.default for track in audio_tracks(path)] == [False, True]
    assert load_audio(path, track="en").size == 16_000
    assert load_audio(path).size == 16_000


def test_titles_are_printable_and_need_not_be_utf_8(tmp_path: Path) -> None:
    track = AudioTrack(1, "aac", "eng", "Kommentar", 2, "stereo", 48_000, 61.0, True)
    assert str(track) == "1: aac, eng, 'Kommentar', 2 channels (stereo), 48000 Hz, 61.0 s, default"
    unknown = AudioTrack(1, "aac", None, None, 1, "mono", 8_000, None, False)
    assert str(unknown) == "1: aac, no language, 1 channel (mono), 8000 Hz"
    write_wave(tmp_path / "a.wav", np.ones((1, 1600), np.int16), 16_000)
    data = (tmp_path / "a.wav").read_bytes()
    name = b"INFOINAM\x06\0\0\0caf\xe9\x1b\0"
    body = data[8:] + b"LIST" + len(name).to_bytes(4, "little") + name
    found = b"RIFF" + len(body).to_bytes(4, "little") + body
    assert load_audio(found).size == 1600
    assert audio_tracks(found)[0].codec == "pcm_s16le"


def test_languages_are_the_same_in_two_and_in_three_letters() -> None:
    assert language_key("fr") == language_key("fra") == language_key("fre") == language_key("fr-CA")
    assert language_key("zh") == language_key("zho") == language_key("chi")
    assert language_key("xx") == "xx"


def test_every_language_of_whisper_has_a_code() -> None:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    unknown = {code for code in LANGUAGES if len(code) == 2 and len(language_key(code)) != 3}
    assert not unknown
