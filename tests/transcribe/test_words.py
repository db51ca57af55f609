"""Words of real speech, against those that openai-whisper gave (`openai_words.py`)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.transcribe.openai_words import EXPECTED, bundled_samples, further_samples
from whisper_flash_attention.audio.log_mel import FRAMES, frame_levels, log_mel, log_mel_whole
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import Segment, Transcriber
from whisper_flash_attention.transcribe.spelled_text import SpelledText
from whisper_flash_attention.transcribe.words import (
    SpokenWindow,
    WindowWords,
    WordAligner,
    alignment_heads,
)

Recordings = dict[str, npt.NDArray[np.float32]]
Features = Callable[[npt.NDArray[np.float32], dict[str, Any]], torch.Tensor]
# Of a start or an end, in seconds; both sides round to 0.01.
TOLERANCE = 0.1


def aligner_of(transcriber: Transcriber) -> WordAligner:
    engine, heads = Engine.of(transcriber.model), transcriber._alignment_heads
    return WordAligner(engine, transcriber._vocabulary, heads, transcriber._splitter)


@pytest.fixture(scope="module")
def aligner(transcriber: Transcriber) -> WordAligner:
    return aligner_of(transcriber)


@pytest.fixture(scope="module")
def recordings() -> Recordings:
    return bundled_samples()


def expected_rows(checkpoint: str, place: str) -> list[dict[str, Any]]:
    found = json.loads(EXPECTED.read_text(encoding="utf-8"))
    assert found["made_by"].startswith("openai-whisper 2025")
    return [
        row for row in found["rows"] if (row["checkpoint"], row["place"]) == (checkpoint, place)
    ]


def window_features(samples: npt.NDArray[np.float32], row: dict[str, Any]) -> torch.Tensor:
    """As openai-whisper has them: a slice of the recording's own, zeros after it."""
    whole = log_mel_whole(samples, device="cpu")[..., row["seek"] :][..., : row["frames"]]
    return torch.nn.functional.pad(whole, (0, FRAMES - whole.shape[-1]))


def spoken_window(transcriber: Transcriber, features: torch.Tensor, row: Any) -> SpokenWindow:
    engine = Engine.of(transcriber.model)
    end = transcriber.processor.tokenizer.eos_token_id
    decode = transcriber.processor.tokenizer.decode
    return SpokenWindow(
        states=engine.encode(features.to(transcriber.model.device))[0],
        segments=tuple(
            Segment(start, end_time, decode([t for t in tokens if t < end]), tuple(tokens))
            for start, end_time, tokens in row["given"]
        ),
        start=row["seek"] / 100,
        frames=row["frames"],
        seconds=row["seconds"],
        language=row["language"],
        last_speech=row["last_speech"],
    )


def silent_features(samples: npt.NDArray[np.float32], row: dict[str, Any]) -> torch.Tensor:
    """As Transformers has them for short recordings: silence after the window."""
    samples = samples[row["seek"] * 160 :][: row["frames"] * 160]
    return log_mel(samples, device="cpu")


def compared(found: WindowWords, row: dict[str, Any]) -> Iterable[tuple[float, float, float]]:
    """Differences of starts, ends and probabilities, word by word; the words must be the same."""
    for segment, (_, _, words) in zip(found.segments, row["expected"], strict=True):
        assert [word.text for word in segment.words] == [text for text, *_ in words]
        for ours, (_, start, end, likely) in zip(segment.words, words, strict=True):
            yield (
                abs(ours.start - start),
                abs(ours.end - min(end, row["seconds"])),
                abs(ours.probability - likely),
            )


def differences(
    transcriber: Transcriber,
    rows: list[dict[str, Any]],
    recordings: Recordings,
    features: Features = window_features,
) -> npt.NDArray[np.float64]:
    """[words, 3], of all rows, aligned three windows at a time."""
    aligner = aligner_of(transcriber)
    found: list[tuple[float, float, float]] = []
    for first in range(0, len(rows), 3):
        some = rows[first : first + 3]
        windows = [
            spoken_window(transcriber, features(recordings[row["recording"]], row), row)
            for row in some
        ]
        for row, words in zip(some, aligner.add_words(windows), strict=True):
            found += compared(words, row)
    return np.array(found)


def share_within(found: npt.NDArray[np.float64], seconds: float) -> float:
    """The share of words whose start and end both differ by no more."""
    return float((found[:, :2] < seconds + 0.005).all(axis=1).mean())


def assert_agree(found: npt.NDArray[np.float64], words: int) -> None:
    """From the same features all is the same, but for near-ties of paths."""
    assert len(found) >= words
    assert share_within(found, TOLERANCE) >= 0.99
    assert share_within(found, 0.0) >= 0.95
    assert np.quantile(found[:, 2], 0.95) < 0.005


def test_words_of_bundled_recordings_are_openais(
    transcriber: Transcriber, recordings: Recordings
) -> None:
    assert_agree(differences(transcriber, expected_rows("tiny.en", "bundled"), recordings), 200)


@pytest.mark.slow
def test_silence_after_a_window_moves_few_words(
    transcriber: Transcriber, recordings: Recordings
) -> None:
    rows = expected_rows("tiny.en", "bundled")
    found = differences(transcriber, rows, recordings, silent_features)
    assert len(found) >= 200
    assert share_within(found, TOLERANCE) >= 0.95


def test_segments_begin_and_end_as_openais(
    transcriber: Transcriber, aligner: WordAligner, recordings: Recordings
) -> None:
    for row in expected_rows("tiny.en", "bundled")[:3]:
        features = window_features(recordings[row["recording"]], row)
        [found] = aligner.add_words([spoken_window(transcriber, features, row)])
        for segment, (start, end, _) in zip(found.segments, row["expected"], strict=True):
            assert segment.start == pytest.approx(start, abs=0.025)
            assert segment.end == pytest.approx(min(end, row["seconds"]), abs=0.025)


@pytest.mark.slow
def test_words_of_a_multilingual_model_are_openais(
    multilingual: Transcriber, recordings: Recordings
) -> None:
    assert_agree(differences(multilingual, expected_rows("base", "bundled"), recordings), 200)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["tiny.en", "base"])
def test_words_of_further_recordings_and_languages_are_openais(
    checkpoint: str, request: pytest.FixtureRequest, shared_audio: Path
) -> None:
    names = {"tiny.en": "transcriber", "base": "multilingual"}
    recordings = further_samples(shared_audio)
    by_language: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in expected_rows(checkpoint, "further"):
        by_language[row["language"]].append(row)
    assert len(by_language) == (1 if checkpoint == "tiny.en" else 5)
    model = request.getfixturevalue(names[checkpoint])
    for rows in by_language.values():
        assert_agree(differences(model, rows, recordings), 5)


def heard_window(
    transcriber: Transcriber, samples: npt.NDArray[np.float32], **options: Any
) -> SpokenWindow:
    """A recording of up to 30 s as `Transcriber` pads it, with silence."""
    transcription = transcriber.transcribe(samples, **options)
    states = Engine.of(transcriber.model).encode(log_mel(samples, device="cpu"))
    return SpokenWindow(
        states=states[0],
        segments=transcription.segments,
        start=0.0,
        frames=min(FRAMES, samples.size // 160),
        seconds=transcription.seconds,
        language=transcription.language,
    )


@pytest.fixture(scope="module")
def speech_window(transcriber: Transcriber, recordings: Recordings) -> SpokenWindow:
    samples = recordings["all"]
    return heard_window(transcriber, samples[: samples.size // 2])


def spelled(text: str) -> str:
    return "".join(text.split())


def test_words_are_in_order_within_their_segment_and_spell_it(
    aligner: WordAligner, speech_window: SpokenWindow
) -> None:
    [found] = aligner.add_words([speech_window])
    times = [0.0]
    for before, segment in zip(speech_window.segments, found.segments, strict=True):
        assert replace(segment, start=0, end=1, words=()) == replace(before, start=0, end=1)
        assert spelled("".join(word.text for word in segment.words)) == spelled(segment.text)
        assert "".join(word.text for word in segment.words).strip() == segment.text
        for word in segment.words:
            assert segment.start <= word.start < word.end <= segment.end
            assert 0 < word.probability <= 1
            times += [word.start, word.end]
    assert times == sorted(times)
    assert times[-1] <= speech_window.seconds
    assert found.last_word_end == found.last_speech == times[-1]
    # The clips are read without long pauses: words fill most of their time.
    spoken = sum(word.end - word.start for each in found.segments for word in each.words)
    assert spoken > 0.8 * speech_window.seconds


def test_late_words_move_earlier_and_the_next_window_stays_where_it_is(
    aligner: WordAligner, speech_window: SpokenWindow, recordings: Recordings
) -> None:
    samples = recordings["all"]
    features = log_mel(samples[: samples.size // 2], device="cpu")
    with_levels = replace(speech_window, levels=frame_levels(features)[0])
    [plain], [found] = aligner.add_words([speech_window]), aligner.add_words([with_levels])
    assert (found.last_word_end, found.last_speech) == (plain.last_word_end, plain.last_speech)
    pairs = [
        (ours, theirs)
        for one, other in zip(found.segments, plain.segments, strict=True)
        for ours, theirs in zip(one.words, other.words, strict=True)
    ]
    shift = np.median([ours.start - theirs.start for ours, theirs in pairs])
    assert -0.081 < shift < -0.03
    times = [time for ours, _ in pairs for time in (ours.start, ours.end)]
    assert times == sorted(times)
    assert times[-1] <= found.last_word_end
    for segment in found.segments:
        assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)


def test_windows_do_not_mind_their_neighbours(
    aligner: WordAligner, speech_window: SpokenWindow
) -> None:
    half = replace(speech_window, segments=speech_window.segments[:1], last_speech=0.0)
    silent = replace(speech_window, segments=(), last_speech=3.5)
    wordless = replace(speech_window, segments=(Segment(1.0, 2.0, "", (50257, 50363)),))
    alone = [aligner.add_words([each])[0] for each in (speech_window, half)]
    together = aligner.add_words([silent, half, wordless, speech_window])
    for one, other in zip(alone, (together[3], together[1]), strict=True):
        assert one.last_speech == other.last_speech
        for ours, theirs in zip(one.segments, other.segments, strict=True):
            assert [word.text for word in ours.words] == [word.text for word in theirs.words]
            differ = [
                max(abs(a.start - b.start), abs(a.end - b.end))
                for a, b in zip(ours.words, theirs.words, strict=True)
            ]
            assert np.mean(np.array(differ) < 0.03) > 0.95
    assert together[0] == WindowWords((), None, 3.5)
    assert together[2] == WindowWords(wordless.segments, None, 2.0)
    assert aligner.add_words([]) == []


def test_a_later_window_is_in_the_recordings_time(
    aligner: WordAligner, speech_window: SpokenWindow
) -> None:
    [first] = aligner.add_words([speech_window])
    later = replace(
        speech_window,
        segments=tuple(
            replace(each, start=each.start + 60, end=each.end + 60)
            for each in speech_window.segments
        ),
        start=60.0,
        seconds=speech_window.seconds + 60,
        last_speech=60.0,
    )
    [found] = aligner.add_words([later])
    for one, other in zip(first.segments, found.segments, strict=True):
        for ours, theirs in zip(one.words, other.words, strict=True):
            assert theirs.start == pytest.approx(ours.start + 60, abs=0.011)
            assert theirs.end == pytest.approx(ours.end + 60, abs=0.011)


def test_no_word_reaches_beyond_the_recording(
    aligner: WordAligner, speech_window: SpokenWindow
) -> None:
    [found] = aligner.add_words([replace(speech_window, seconds=20.0)])
    words = [word for segment in found.segments for word in segment.words]
    assert max(word.end for word in words) == 20.0
    assert found.last_word_end == found.last_speech == 20.0


@pytest.mark.parametrize("frames", [0, 1, 7, 40])
def test_a_snippet_has_all_words(
    aligner: WordAligner, speech_window: SpokenWindow, frames: int
) -> None:
    seconds = max(frames, 1) / 100
    short = replace(
        speech_window,
        segments=tuple(replace(each, start=0.0, end=seconds) for each in speech_window.segments),
        frames=frames,
        seconds=seconds,
    )
    [found] = aligner.add_words([short])
    words = [word for segment in found.segments for word in segment.words]
    assert spelled("".join(word.text for word in words)) == spelled(
        "".join(segment.text for segment in speech_window.segments)
    )
    assert all(word.end <= seconds for word in words)


def test_a_text_that_fills_the_models_positions_is_aligned_as_far_as_there_is_room(
    aligner: WordAligner, speech_window: SpokenWindow
) -> None:
    tokens = tuple(t for segment in speech_window.segments for t in segment.tokens if t < 50256)
    endless = replace(speech_window, segments=(Segment(0.0, 20.0, "...", (tokens * 9)[:447]),))
    [found] = aligner.add_words([endless])
    assert len(found.segments[0].words) > 200


def test_a_translation_is_split_as_english(
    multilingual: Transcriber, recordings: Recordings
) -> None:
    [row] = [r for r in expected_rows("base", "bundled") if r["recording"] == "austen_0880"]
    features = window_features(recordings["austen_0880"], row)
    window = replace(spoken_window(multilingual, features, row), language="ja", task="translate")
    aligner = aligner_of(multilingual)
    [found] = aligner.add_words([window])
    words = [word.text for segment in found.segments for word in segment.words]
    assert words == [text for _, _, transcription in row["expected"] for text, *_ in transcription]


def test_heads_default_to_the_last_half_of_the_layers(transcriber: Transcriber) -> None:
    named = transcriber.model.generation_config.alignment_heads
    assert alignment_heads(named, layers=4, heads=6) == tuple(map(tuple, named))
    default = alignment_heads(None, layers=4, heads=6)
    assert default == tuple((i, j) for i in (2, 3) for j in range(6))
    parts = (transcriber._vocabulary, None, transcriber._splitter)
    assert WordAligner(Engine.of(transcriber.model), *parts)._heads == default
    with pytest.raises(OptionError, match=r"alignment heads \[\(4, 0\)\]: the model has"):
        WordAligner(Engine.of(transcriber.model), parts[0], [[4, 0]], parts[2])


def test_a_model_with_hooks_is_refused(transcriber: Transcriber) -> None:
    layer = transcriber.model.model.decoder.layers[0]
    handle = layer.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(OptionError, match="word_timestamps True needs the decode engine"):
            transcriber.transcribe(np.sin(np.arange(16_000.0)), word_timestamps=True)
    finally:
        handle.remove()


def test_an_unknown_language_is_refused(
    multilingual: Transcriber, speech_window: SpokenWindow
) -> None:
    aligner = aligner_of(multilingual)
    window = replace(speech_window, language="xx", segments=(Segment(0.0, 1.0, "a", (64,)),))
    with pytest.raises(OptionError, match="cannot align words of language 'xx'"):
        aligner.add_words([window])


def by_characters(transcriber: Transcriber) -> WordAligner:
    options = DecodeOptions(word_timestamps=True, word_alignment="characters")
    parts = (transcriber._vocabulary, transcriber._alignment_heads, transcriber._splitter)
    return WordAligner(Engine.of(transcriber.model), *parts, options)


@pytest.fixture(scope="module")
def level_window(speech_window: SpokenWindow, recordings: Recordings) -> SpokenWindow:
    samples = recordings["all"]
    features = log_mel(samples[: samples.size // 2], device="cpu")
    return replace(speech_window, levels=frame_levels(features)[0])


def times_of(found: WindowWords) -> list[float]:
    words = [word for segment in found.segments for word in segment.words]
    return [time for word in words for time in (word.start, word.end)]


def test_characters_change_times_and_nothing_else(
    transcriber: Transcriber, aligner: WordAligner, level_window: SpokenWindow
) -> None:
    [plain] = aligner.add_words([level_window])
    exact = by_characters(transcriber)
    [found] = exact.add_words([level_window])
    assert (found.last_word_end, found.last_speech) == (plain.last_word_end, plain.last_speech)
    assert found.token_probabilities == plain.token_probabilities
    for one, other in zip(found.segments, plain.segments, strict=True):
        assert (one.text, one.tokens) == (other.text, other.tokens)
        assert [(w.text, w.probability) for w in one.words] == [
            (w.text, w.probability) for w in other.words
        ]
        assert (one.start, one.end) == (one.words[0].start, one.words[-1].end)
    times, before = times_of(found), times_of(plain)
    assert times == sorted(times) and times[-1] <= level_window.seconds
    differ = np.abs(np.array(times) - before)
    assert 0.01 < np.median(differ) < 0.1 and differ.max() < 1
    # Without levels all is OpenAI's.
    bare = replace(level_window, levels=None)
    [alone, beside] = exact.add_words([level_window, bare])
    assert times_of(alone) == times
    assert times_of(beside) == times_of(aligner.add_words([bare])[0])


def test_neither_neighbours_nor_parts_move_many_words(
    transcriber: Transcriber, level_window: SpokenWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = by_characters(transcriber)
    half = replace(level_window, segments=level_window.segments[:1], frames=1234)
    alone = [times_of(exact.add_words([each])[0]) for each in (level_window, half)]
    together = [times_of(each) for each in exact.add_words([level_window, half])]
    whole = SpelledText.parts
    monkeypatch.setattr(SpelledText, "parts", lambda self, room: whole(self, 100))
    [in_parts] = exact.add_words([level_window])
    for one, other in zip(alone, together, strict=True):
        assert np.mean(np.abs(np.array(one) - other) < 0.03) > 0.95
    # What a part begins with lacks the text before it.
    differ = np.abs(np.array(alone[0]) - times_of(in_parts))
    assert differ.max() > 0 and np.mean(differ) < 0.05


def test_no_word_begins_before_those_of_the_window_before(
    transcriber: Transcriber, level_window: SpokenWindow
) -> None:
    exact = by_characters(transcriber)
    tokens = tuple(t for segment in level_window.segments for t in segment.tokens if t < 50256)
    endless = replace(level_window, segments=(Segment(0.0, 20.0, "...", (tokens * 9)[:440]),))
    for window in (level_window, endless):
        [free], [bound] = (
            exact.add_words([each]) for each in (window, replace(window, words_end=3.0))
        )
        assert times_of(free)[0] < 3.0
        assert times_of(bound) == [max(time, 3.0) for time in times_of(free)]
        assert bound.segments[0].start == 3.0


def test_a_pause_is_in_no_word(transcriber: Transcriber, recordings: Recordings) -> None:
    """Tokens let a word swallow the pause before it; characters do not."""
    clip = recordings["austen_0880"]
    rest = np.zeros(int(2.5 * 16_000), np.float32)
    samples = np.concatenate([clip, rest, clip])
    found = transcriber.transcribe(samples, word_timestamps=True, word_alignment="characters")
    words = [word for segment in found.segments for word in segment.words]
    half = len(words) // 2
    assert [word.text.strip() for word in words[:half]] == [w.text.strip() for w in words[half:]]
    shift = (clip.size + rest.size) / 16_000
    differ = [b.start - a.start - shift for a, b in zip(words[:half], words[half:], strict=True)]
    assert np.abs(differ).max() < 0.2 and np.abs(differ).mean() < 0.05
    assert words[half - 1].end < clip.size / 16_000 + 0.2


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_characters_leave_the_text_of_a_recording(
    transcriber: Transcriber, recordings: Recordings, mode: str
) -> None:
    samples = recordings["all"][: 45 * 16_000]
    options: dict[str, Any] = {"mode": mode, "vad_filter": False, "word_timestamps": True}
    plain = transcriber.transcribe(samples, **options)
    found = transcriber.transcribe(samples, **options, word_alignment="characters")
    assert found.text == plain.text
    words = [word for segment in found.segments for word in segment.words]
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times) and times[-1] <= found.seconds


def test_a_text_of_too_many_characters_is_timed_by_tokens(
    transcriber: Transcriber, aligner: WordAligner, level_window: SpokenWindow
) -> None:
    tokens = tuple(t for segment in level_window.segments for t in segment.tokens if t < 50256)
    endless = replace(level_window, segments=(Segment(0.0, 20.0, "...", (tokens * 9)[:440]),))
    [found] = by_characters(transcriber).add_words([endless])
    assert found == aligner.add_words([endless])[0]
    # What does not fit beside a prompt is aligned in parts.
    long = replace(level_window, segments=(Segment(0.0, 20.0, "...", (tokens * 9)[:130]),))
    [parts], [plain] = (each.add_words([long]) for each in (by_characters(transcriber), aligner))
    assert len("".join(word.text for word in parts.segments[0].words)) > 448
    assert times_of(parts) != times_of(plain)


def test_characters_need_word_timestamps(transcriber: Transcriber) -> None:
    with pytest.raises(OptionError, match="word_alignment characters without word timestamps"):
        transcriber.transcribe(np.zeros(16_000), word_alignment="characters")
    with pytest.raises(OptionError, match="word_alignment is 'letters': give tokens or characters"):
        transcriber.transcribe(np.zeros(16_000), word_timestamps=True, word_alignment="letters")


@pytest.mark.gpu
def test_half_precision_on_a_gpu_gives_openais_words(tiny_en: str, recordings: Recordings) -> None:
    on_gpu = Transcriber.from_pretrained(tiny_en, device="cuda")
    assert on_gpu.model.dtype is torch.float16
    found = differences(on_gpu, expected_rows("tiny.en", "bundled"), recordings)
    assert share_within(found, TOLERANCE) >= 0.95


@pytest.mark.gpu
def test_characters_on_a_gpu_are_where_those_on_a_cpu_are(
    tiny_en: str, transcriber: Transcriber, recordings: Recordings
) -> None:
    on_gpu = Transcriber.from_pretrained(tiny_en, device="cuda")
    samples = recordings["all"][: 25 * 16_000]
    options: dict[str, Any] = {"word_timestamps": True, "word_alignment": "characters"}
    one, other = (
        [word for segment in each.transcribe(samples, **options).segments for word in segment.words]
        for each in (on_gpu, transcriber)
    )
    assert [word.text for word in one] == [word.text for word in other]
    differ = [
        abs(a - b)
        for x, y in zip(one, other, strict=True)
        for a, b in ((x.start, y.start), (x.end, y.end))
    ]
    assert np.mean(np.array(differ) < 0.03) > 0.95
