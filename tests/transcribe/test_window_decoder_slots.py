"""Windows through slots say what they say in batches, whichever of them must be read again."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.log_mel import log_mel
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.errors import NotFinite
from whisper_flash_attention.hf.eligibility import engine_for
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.window_decoder import (
    DecodingResult,
    Window,
    WindowDecoder,
)


@pytest.fixture(scope="module")
def engine(transcriber: Transcriber) -> Engine:
    found = engine_for(transcriber.model)
    assert isinstance(found, Engine)
    return found


@pytest.fixture(scope="module")
def states(engine: Engine, bundled_recordings) -> torch.Tensor:
    """Of six clips of 1 to 6 s, `[6, S, D]`."""
    samples = load_audio(bundled_recordings[0].path)
    clips = [samples[: seconds * 16_000] for seconds in (5, 1, 6, 2, 3, 4)]
    return engine.encode(log_mel(clips, mel_bins=80, device="cpu", dtype=torch.float32))


def decoder_of(transcriber: Transcriber, engine: Engine, **options: object) -> WindowDecoder:
    tokenizer = transcriber.processor.tokenizer
    return WindowDecoder(engine, transcriber._vocabulary, tokenizer, DecodeOptions(**options))  # type: ignore[arg-type]


def prompts_of(transcriber: Transcriber) -> list[list[int]]:
    """Every other window has a context."""
    words = transcriber._vocabulary
    return [words.prompt("en", "transcribe", [5, 6, 7][: number % 2 * 3]) for number in range(6)]


def in_slots(
    engine: Engine, decoder: WindowDecoder, windows: list[Window], slots: int
) -> list[tuple[Window, DecodingResult]]:
    waiting = iter(windows)
    more = lambda count: list(islice(waiting, count))  # noqa: E731
    return list(decoder.decode_windows(more, slots))


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({"temperature": 0.0}, 1),
        # The second results are the first ones again, for nothing is left to chance.
        ({"temperature": (0.0, 0.0), "logprob_threshold": -0.5}, 4),
        ({"temperature": (0.0, 0.0), "logprob_threshold": 0.0, "no_speech_threshold": None}, 2),
    ],
    ids=["once", "some again", "all again"],
)
def test_results_are_those_of_batches(transcriber, engine, states, options, slots: int) -> None:
    decoder = decoder_of(transcriber, engine, max_new_tokens=16, **options)
    assert decoder.fits_slots
    prompts = prompts_of(transcriber)
    wanted = decoder.decode(states, prompts)
    windows = [Window(*each) for each in zip(states, prompts, range(6), strict=True)]
    found = {window.owner: result for window, result in in_slots(engine, decoder, windows, slots)}
    assert sorted(found) == list(range(6))
    for number, result in enumerate(wanted):
        assert found[number].tokens == result.tokens
        assert found[number].temperature == result.temperature
        assert found[number].avg_logprob == pytest.approx(result.avg_logprob, abs=1e-4)
        assert found[number].no_speech_prob == pytest.approx(result.no_speech_prob, abs=1e-4)
    assert len({len(result.tokens) for result in wanted}) > 2


def test_windows_that_wait_for_results_are_decoded(transcriber, engine, states) -> None:
    """All results are bad, so that the slots are empty whenever the next window is known."""
    decoder = decoder_of(
        transcriber, engine, temperature=(0.0, 0.0), logprob_threshold=0.0, max_new_tokens=4
    )
    prompts = prompts_of(transcriber)
    windows = [Window(*each) for each in zip(states, prompts, range(3), strict=False)]
    ready, found = windows[:1], []

    def more(count: int) -> list[Window]:
        given, ready[:] = ready[:count], ready[count:]
        return given

    for window, _ in decoder.decode_windows(more, 16):
        found.append(window)
        ready += windows[len(found) : len(found) + 1]
    assert found == windows


def test_the_window_that_is_not_finite_is_named(transcriber, engine, states) -> None:
    decoder = decoder_of(transcriber, engine, temperature=0.0)
    prompt = prompts_of(transcriber)[0]
    windows = [Window(states[0], prompt, "one"), Window(states[1] * math.nan, prompt, "two")]
    with pytest.raises(NotFinite, match="not finite in two:"):
        in_slots(engine, decoder, windows, 2)


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, True),
        ({"temperature": 0.4}, False),
        ({"temperature": (0.2, 0.0)}, False),
        ({"max_new_tokens": 50}, True),
        ({"min_new_tokens": 20, "max_new_tokens": 50}, True),
        ({"min_new_tokens": 50, "max_new_tokens": 50}, False),
        ({"without_timestamps": True, "suppress_blank": False}, True),
        ({"beam_size": 2}, False),
        ({"no_repeat_ngram_size": 3}, False),
        ({"repetition_penalty": 1.1}, False),
    ],
)
def test_slots_are_for_greedy_results_of_different_lengths(
    transcriber, engine, options, fits: bool
) -> None:
    assert decoder_of(transcriber, engine, **options).fits_slots == fits
