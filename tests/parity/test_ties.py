"""The explanations, against what they claim: perturbed scores, replayed draws, searched beams."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from whisper_flash_attention.parity.cases import MODES
from whisper_flash_attention.parity.compare import BeamTrace, Judge, Tie, deviation, shortfall
from whisper_flash_attention.parity.models import (
    Models,
    ScoreRecorder,
    decode,
    log_probabilities,
    scores_after,
)

GREEDY, TIMESTAMPS, BEAMS, SAMPLED = (
    MODES[name] for name in ("greedy", "timestamps", "beams", "sampled")
)
FIRST = 12  # the first timestamp of a vocabulary of 20


def chosen(scores: torch.Tensor) -> int:
    """What stock's rule for timestamps and then the maximum choose."""
    config = SimpleNamespace(no_timestamps_token_id=FIRST - 1, eos_token_id=FIRST - 2)
    rule = WhisperTimeStampLogitsProcessor(config, begin_index=0)
    # Text before, so that no other rule of the processor forbids anything.
    return int(rule(torch.tensor([[0, 0]]), scores[None].clone()).argmax())


def pushed(scores: torch.Tensor, token: int, size: float) -> torch.Tensor:
    """Scores off by `size` at most, all in favour of `token`."""
    best = scores[token] + size
    if token < FIRST:
        moved = scores - size
    else:
        moved = scores.clone()
        moved[:FIRST] -= size
        moved[FIRST:] = (scores[FIRST:] + size).clamp(max=best).maximum(scores[FIRST:] - size)
    moved[token] = best + 1e-6
    return moved


@pytest.mark.parametrize("seed", range(8))
def test_the_shortfall_is_what_perturbed_scores_need(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(20, generator=generator, dtype=torch.float64)
    scores[FIRST - 1] = -torch.inf
    for token in (0, 5, FIRST, 19):
        need = shortfall(scores, token, FIRST)
        assert (need == 0) == (chosen(scores) == token)
        assert chosen(pushed(scores, token, need / 2 + 1e-5)) == token
        if need > 1e-3:
            assert chosen(pushed(scores, token, need / 2 - 1e-4)) != token


def test_without_timestamps_the_shortfall_is_the_distance_to_the_best() -> None:
    scores = torch.tensor([1.0, 3.5, 2.0, -torch.inf])
    assert [shortfall(scores, token, None) for token in range(4)] == [2.5, 0.0, 1.5, math.inf]


def test_what_is_forbidden_or_not_a_number_is_never_explained() -> None:
    for value in (-torch.inf, torch.nan):
        scores = torch.tensor([value, 1.0])
        assert not Tie(shortfall(scores, 0, None), 1e9, "").explained
    assert not Tie(math.nan, 1e9, "").explained


def test_the_deviation_is_of_distances_among_the_likeliest() -> None:
    truth = torch.arange(40.0)
    scores = truth + 7  # all alike: no order changes
    scores[0] += 100  # unlikely: of no account
    scores[33] += 0.25
    scores[5] = truth[5] = -torch.inf
    assert deviation(scores, truth) == 0.25


def test_replayed_scores_are_those_of_a_forward_pass(
    random_models: Models, random_features: torch.Tensor
) -> None:
    features, watch = random_features[:1], ScoreRecorder()
    [ids] = decode(random_models.stock, features, GREEDY, language=None, processor=watch)
    expected = log_probabilities(random_models.stock, features, watch.prompt, ids)
    for position in (0, 4, len(ids) - 1):
        found, _ = scores_after(
            random_models.stock, features, GREEDY, ids[:position], language=None
        )
        assert int(found.argmax()) == ids[position]
        allowed = found.isfinite()
        difference = (found - expected[position])[allowed]
        assert torch.allclose(difference, difference[0], atol=1e-3)
        assert allowed.sum() < found.numel()
        gap = float(watch.gaps[position])
        best = found.topk(2).values
        assert gap == pytest.approx(float(best[0] - best[1]), abs=1e-4)


def test_replayed_scores_with_timestamps_leave_both_kinds_in(
    random_models: Models, random_features: torch.Tensor
) -> None:
    first = random_models.first_timestamp
    assert first is not None
    prefix = [first, 100, 200]
    scores, _ = scores_after(
        random_models.stock, random_features[:1], TIMESTAMPS, prefix, language=None
    )
    assert scores[: first - 1].isfinite().any()
    assert scores[first + 1 :].isfinite().any()
    assert not scores[first].isfinite()  # it has been said before: the pairs' rule is applied


def test_a_draw_can_be_made_again(random_models: Models, random_features: torch.Tensor) -> None:
    judge = Judge(random_models, 1e-3, seed=3)
    features = random_features[1:2]
    [ids] = decode(random_models.stock, features, SAMPLED, language=None, seed=3)
    greedy = decode(random_models.stock, features, GREEDY, language=None)
    assert [ids] != greedy
    for position in (0, 5, len(ids) - 1):
        token = ids[position]
        same = judge.draw(features, SAMPLED, None, ids[:position], (token, token))
        assert same.gap == 0.0
        other = judge.draw(features, SAMPLED, None, ids[:position], (token, token ^ 1))
        assert other.gap > same.gap


def test_a_beam_that_wins_is_never_missing(
    random_models: Models, random_features: torch.Tensor
) -> None:
    features, watch = random_features[2:3], ScoreRecorder()
    [best] = decode(random_models.stock, features, BEAMS, language=None, processor=watch)
    judge = Judge(random_models, 1e-3)
    tie = judge.beams(features, BEAMS, None, watch.prompt, (best, best))
    assert (tie.gap, tie.what) == (0.0, "score of the sequence")


def test_a_beam_that_is_dropped_is_missed_by_its_log_probability(
    random_models: Models, random_features: torch.Tensor
) -> None:
    features, watch = random_features[2:3], ScoreRecorder()
    [best] = decode(random_models.stock, features, BEAMS, language=None, processor=watch)
    other = [*best[:3], best[3] ^ 1, *best[4:]]
    tie = Judge(random_models, 1e-3).beams(features, BEAMS, None, watch.prompt, (best, other))
    assert tie.what == "our beam, dropped at token 4"
    assert tie.bound == pytest.approx(2e-3)
    assert not tie.explained

    trace = BeamTrace([*other, 0])
    decode(random_models.stock, features, BEAMS, language=None, processor=trace)
    table = log_probabilities(random_models.stock, features, watch.prompt, other[:4])
    total = float(table[range(4), other[:4]].sum())
    worst = trace.missing + total
    # The worst beam is no better than the best, and was better than what was dropped.
    winner = log_probabilities(random_models.stock, features, watch.prompt, best[:4])
    assert total < worst <= float(winner[range(4), best[:4]].sum()) + 1e-3
    assert trace.missing == tie.gap


def test_a_worse_sequence_that_stays_among_the_beams_is_judged_by_its_score(
    random_models: Models, random_features: torch.Tensor
) -> None:
    features, watch = random_features[2:3], ScoreRecorder()
    [best] = decode(random_models.stock, features, BEAMS, language=None, processor=watch)
    table = log_probabilities(random_models.stock, features, watch.prompt, best)
    scores, _ = scores_after(random_models.stock, features, GREEDY, best[:-1], language=None)
    second = int(scores.index_fill(0, torch.tensor(best[-1:]), -torch.inf).argmax())
    other = [*best[:-1], second]
    tie = Judge(random_models, 1e-3).beams(features, BEAMS, None, watch.prompt, (best, other))
    expected = float(table[-1, best[-1]] - table[-1, second])
    if tie.what == "score of the sequence":
        assert tie.gap >= expected - 1e-3
    assert tie.gap > 0
