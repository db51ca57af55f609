"""Requests that are made of options, and what is taken of the engine's results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.transcribe.test_segmentation import WORDS, at
from whisper_flash_attention.engine.logits_processors import (
    NoRepeatNgram,
    Normalise,
    RepetitionPenalty,
    Suppress,
    SuppressAtBegin,
    Timestamps,
)
from whisper_flash_attention.engine.request import DecodeOutput
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.requests import RequestBuilder

LISTED = replace(WORDS, suppressed=(1, 2), at_begin=(220, WORDS.end))
END = WORDS.end


def builder(**options: Any) -> RequestBuilder:
    return RequestBuilder(LISTED, DecodeOptions(**options))


def test_the_defaults_are_openais() -> None:
    request = builder().request(begin=3, length=3, temperature=0.0)
    assert request.processors.steps == (
        Suppress((1, 2)),
        SuppressAtBegin((220, END), 3),
        Timestamps(WORDS.timestamp_begin, 3, END, WORDS.no_timestamps, 50),
    )
    assert request.processors.kernel_processors is not None
    assert request.beams is None and not request.sample and request.want_logprobs
    assert request.max_length == 448
    drawn = builder().request(3, 3, 0.4)
    assert drawn.sample and drawn.temperature == 0.4


def test_options_become_rules() -> None:
    request = builder(
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        suppress_tokens=(-1, 9),
        suppress_blank=False,
        without_timestamps=True,
        max_new_tokens=10,
    ).request(begin=4, length=6, temperature=0.0)
    penalty, ngram, suppress, stamps = request.processors.steps
    assert (penalty, ngram) == (RepetitionPenalty(1.2, 4), NoRepeatNgram(3, 4))
    assert suppress == Suppress((1, 2, 9))
    assert isinstance(stamps, Suppress)
    assert {WORDS.no_timestamps, at(0), at(30)} <= set(stamps.tokens)
    assert request.max_length == 16
    [only, *_] = builder(suppress_tokens=()).request(3, 3, 0.0).processors.steps
    assert only == Suppress((50258, 50361, 50360, 50359, 50358, 50362))


def test_beams_are_for_temperature_0_and_draws_for_others() -> None:
    some = builder(beam_size=4, best_of=3, length_penalty=0.5)
    request = some.request(3, 3, 0.0)
    assert request.beams is not None and request.beams.num_beams == 4
    assert request.beams.length_penalty == 0.5 and request.beams.candidates == 8
    assert request.processors.steps[-1] == Normalise()
    assert (some.width(0.0), some.width(0.2)) == (4, 3)
    assert some.request(3, 3, 0.2).beams is None
    assert builder(beam_size=1).request(3, 3, 0.0).beams is None
    assert builder().width(0.0) == builder().width(1.0) == 1


def rows(*results: list[int]) -> torch.Tensor:
    longest = max(len(result) for result in results) + 1
    padded = [[7, 8, *result, *[END] * (longest - len(result))] for result in results]
    return torch.tensor(padded)


def test_the_likeliest_draw_of_each_window_is_kept() -> None:
    decoded = DecodeOutput(
        rows([1], [2, 2, 2], [3], [4]), sum_logprobs=torch.tensor([-1.0, -1.5, -9.0, -2.0])
    )
    assert builder(best_of=2).best(decoded, windows=2, length=2) == [([2, 2, 2], -1.5), ([4], -2.0)]
    by_sum = builder(best_of=2, length_penalty=0.0)
    assert by_sum.best(decoded, windows=2, length=2) == [([1], -1.0), ([4], -2.0)]
    assert len(builder().best(decoded, windows=4, length=2)) == 4


@pytest.mark.parametrize("penalty", [1.0, 0.6, 0.0])
def test_the_score_of_a_beam_gives_its_log_probability_back(penalty: float) -> None:
    indices = torch.tensor([[0, 1, 0], [2, -1, -1]])
    sums, counts = torch.tensor([-3.0, -0.5]), torch.tensor([3, 1])
    decoded = DecodeOutput(
        rows([1, 2], []), beam_indices=indices, sequences_scores=sums / counts**penalty
    )
    found = builder(beam_size=3, length_penalty=penalty).best(decoded, windows=2, length=2)
    assert [tokens for tokens, _ in found] == [[1, 2], []]
    assert [total for _, total in found] == pytest.approx([-3.0, -0.5])
