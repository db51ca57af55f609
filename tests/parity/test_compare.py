"""The comparison on random models: statuses, failures, and why differences are explained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from tests.parity.checkpoints import FRAMES
from whisper_flash_attention.errors import DeviceError, UnsupportedAttention
from whisper_flash_attention.parity.cases import MODES, Clip, ParityOptions, read_features
from whisper_flash_attention.parity.compare import (
    BeamTrace,
    Judge,
    Outcome,
    Tie,
    compare,
    deviation,
    first_difference,
    shortfall,
)
from whisper_flash_attention.parity.models import (
    Models,
    ScoreRecorder,
    decode,
    load_models,
    log_probabilities,
    scores_after,
)


@pytest.fixture(scope="module")
def clips(feature_file: Path) -> list[Clip]:
    return read_features(feature_file, (80, FRAMES), print).clips


def run(models: Models, clips: list[Clip], *modes: str, **options: object) -> Outcome:
    console = Console(stderr=True, quiet=True)
    return compare(models, clips, ParityOptions(modes, **options), console)


def statuses(outcome: Outcome) -> set[str]:
    return {row.status for row in outcome.rows}


@contextmanager
def changed(parameter: torch.nn.Parameter) -> Iterator[None]:
    """Put a parameter back afterwards; the models are shared by all tests."""
    before = parameter.detach().clone()
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def test_nothing_wrong_is_identical_in_every_mode(random_models: Models, clips: list[Clip]) -> None:
    outcome = run(random_models, clips)
    assert len(outcome.rows) == len(MODES) * len(clips)
    assert statuses(outcome) == {"identical"}
    assert outcome.is_good
    assert 0 < max(outcome.logit_errors.values()) < 1e-3
    texts = {tuple(row.reference) for row in outcome.rows}
    assert len(texts) > len(clips)  # recordings and modes differ, so that mistakes would show
    assert all(row.smallest_gap is not None for row in outcome.rows if row.mode == "greedy")


def test_the_batch_size_changes_nothing(random_models: Models, clips: list[Clip]) -> None:
    one, all_at_once = (
        [row.reference for row in run(random_models, clips, "greedy", batch_size=size).rows]
        for size in (1, 8)
    )
    assert one == all_at_once


@pytest.mark.parametrize("mode", MODES)
def test_a_broken_model_is_unexplained(random_models: Models, clips: list[Clip], mode: str) -> None:
    weight = random_models.ours.model.decoder.layers[1].encoder_attn.v_proj.weight
    with changed(weight), torch.no_grad():
        weight.mul_(-1.0)
        outcome = run(random_models, clips, mode)
    assert not outcome.is_good
    assert "unexplained" in statuses(outcome)
    [row, *_] = [row for row in outcome.rows if row.status == "unexplained"]
    assert row.tie is not None and row.tie.gap > row.tie.bound
    assert row.position == first_difference(row.reference, row.ours)


def test_two_equal_tokens_are_a_tie(random_models: Models, clips: list[Clip]) -> None:
    """Two tokens with the same embedding score the same; ours is made to choose the other one."""
    [row, *_] = run(random_models, clips, "greedy").rows
    token = row.reference[2]
    assert token not in row.reference[:2]
    other = token + 1
    stock = random_models.stock.model.decoder.embed_tokens.weight
    ours = random_models.ours.model.decoder.embed_tokens.weight
    with changed(stock), changed(ours), torch.no_grad():
        stock[other] = stock[token] * (1 - 1e-6)
        ours[other] = ours[token] * (1 + 1e-6)
        outcome = run(random_models, clips, "greedy")
        strict = run(random_models, clips, "greedy", tolerance=0.0)
    first = outcome.rows[0]
    assert first.status == "explained"
    assert first.position == 2
    assert first.tokens == (token, other)
    assert first.tie is not None and 0 < first.tie.gap < 1e-3
    assert strict.rows[0].status == "unexplained"


def test_logits_that_are_not_numbers_fail(random_models: Models, clips: list[Clip]) -> None:
    for model, name in ((random_models.ours, "ours"), (random_models.stock, "reference")):
        bias = model.model.decoder.layer_norm.bias
        with changed(bias), torch.no_grad():
            bias[0] = torch.nan
            outcome = run(random_models, clips[:1], "greedy", "sampled")
        assert [row.status for row in outcome.rows] == ["failed", "failed"]
        assert name in str(outcome.rows[0].failure)
        assert "NaN" in str(outcome.rows[0].failure)
        assert " raised " in str(outcome.rows[1].failure)


def test_a_forward_pass_that_gives_no_numbers_fails_though_the_ids_are_the_same(
    random_models: Models, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = random_models.stock
    monkeypatch.setattr(
        type(random_models.ours), "generate", lambda self, *a, **o: stock.generate(*a, **o)
    )
    bias = random_models.ours.model.decoder.layer_norm.bias
    with changed(bias), torch.no_grad():
        bias[0] = torch.inf
        [row] = run(random_models, clips[:1], "greedy").rows
    assert row.reference == row.ours
    assert (row.status, row.failure) == ("failed", "logits of ours are NaN or infinite")


def test_a_mode_that_raises_fails_and_the_others_go_on(
    random_models: Models, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = type(random_models.ours).generate

    def broken(self: object, *args: object, **options: object) -> object:
        if options["num_beams"] > 1:
            raise IndexError("no such beam")
        return generate(self, *args, **options)

    monkeypatch.setattr(type(random_models.ours), "generate", broken)
    outcome = run(random_models, clips, "beams", "greedy")
    assert [row.status for row in outcome.rows] == ["failed"] * 3 + ["identical"] * 3
    assert outcome.rows[0].failure == "ours raised IndexError: no such beam"


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (torch.OutOfMemoryError("too much"), DeviceError, "smaller --batch-size"),
        (UnsupportedAttention("cannot"), UnsupportedAttention, "cannot"),
    ],
)
def test_what_a_user_must_decide_is_raised(
    random_models: Models,
    clips: list[Clip],
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    expected: type[Exception],
    message: str,
) -> None:
    def broken(self: object, *args: object, **options: object) -> object:
        raise raised

    monkeypatch.setattr(type(random_models.ours), "generate", broken)
    with pytest.raises(expected, match=message):
        run(random_models, clips, "greedy")


def test_a_missing_prompt_fails(
    random_models: Models, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = type(random_models.ours).generate

    def broken(self: object, *args: object, **options: object) -> torch.Tensor:
        return generate(self, *args, **options)[:, 1:]

    monkeypatch.setattr(type(random_models.ours), "generate", broken)
    [row] = run(random_models, clips[:1], "timestamps").rows
    assert row.status == "failed"
    assert "prompt" in str(row.failure)


def test_tf32_is_off_meanwhile_and_back_afterwards(
    random_models: Models, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, seen = type(random_models.ours).generate, []

    def recorded(self: object, *args: object, **options: object) -> object:
        seen.append(torch.backends.cudnn.allow_tf32)
        return generate(self, *args, **options)

    monkeypatch.setattr(type(random_models.ours), "generate", recorded)
    before = torch.backends.cudnn.allow_tf32
    run(random_models, clips[:1], "greedy")
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_half_precision_is_judged_by_float32(english_folder: Path, clips: list[Clip]) -> None:
    models = load_models(
        str(english_folder),
        device="cpu",
        dtype="bfloat16",
        attention="auto",
        needs_extractor=False,
    )
    assert models.float32 is not None and models.float32.dtype == torch.float32
    outcome = run(models, clips)
    assert outcome.not_comparable == {"sampled": "draws are the same in float32 on a CPU only"}
    assert "unexplained" not in {row.status for row in outcome.rows if row.mode != "beams"}
    assert all(row.float32 for row in outcome.rows)
    assert any(row.float32 != row.reference for row in outcome.rows)
    with torch.no_grad():
        models.ours.model.decoder.layers[1].encoder_attn.v_proj.weight.mul_(-1.0)
    assert not run(models, clips, "greedy").is_good


def test_languages_are_detected_by_both_and_taken_from_stock(
    multilingual_folder: Path, clips: list[Clip]
) -> None:
    models = load_models(
        str(multilingual_folder),
        device="cpu",
        dtype="float32",
        attention="auto",
        needs_extractor=False,
    )
    outcome = run(models, clips, "timestamps", "greedy")
    assert statuses(outcome) == {"identical"}
    assert [row.mode for row in outcome.rows[:3]] == ["language"] * 3
    assert set(outcome.languages.values()) <= set(models.language_ids)
    given = run(models, clips, "greedy", language="de")
    assert set(given.languages.values()) == {"de"}
    assert {row.mode for row in given.rows} == {"greedy"}
    with torch.no_grad():
        models.ours.model.decoder.layers[1].encoder_attn.v_proj.weight.mul_(-3.0)
    wrong = [row for row in run(models, clips, "greedy").rows if row.mode == "language"]
    assert "unexplained" in {row.status for row in wrong}


@pytest.mark.parametrize(
    ("first", "second", "position"),
    [([], [], None), ([1], [1], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([1, 2], [], 0)],
)
def test_the_first_difference(first: list[int], second: list[int], position: int | None) -> None:
    assert first_difference(first, second) == position


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
    features, recorder = random_features[:1], ScoreRecorder()
    [ids] = decode(random_models.stock, features, GREEDY, language=None, processor=recorder)
    expected = log_probabilities(random_models.stock, features, recorder.prompt, ids)
    for position in (0, 4, len(ids) - 1):
        found, _ = scores_after(
            random_models.stock, features, GREEDY, ids[:position], language=None
        )
        assert int(found.argmax()) == ids[position]
        allowed = found.isfinite()
        difference = (found - expected[position])[allowed]
        assert torch.allclose(difference, difference[0], atol=1e-3)
        assert allowed.sum() < found.numel()
        gap = float(recorder.gaps[position])
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
    assert not scores[first].isfinite()  # it was generated before: the pairs' rule is applied


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
    features, recorder = random_features[2:3], ScoreRecorder()
    [best] = decode(random_models.stock, features, BEAMS, language=None, processor=recorder)
    judge = Judge(random_models, 1e-3)
    tie = judge.beams(features, BEAMS, None, recorder.prompt, (best, best))
    assert (tie.gap, tie.what) == (0.0, "score of the sequence")


def test_a_beam_that_is_dropped_is_missed_by_its_log_probability(
    random_models: Models, random_features: torch.Tensor
) -> None:
    features, recorder = random_features[2:3], ScoreRecorder()
    [best] = decode(random_models.stock, features, BEAMS, language=None, processor=recorder)
    other = [*best[:3], best[3] ^ 1, *best[4:]]
    tie = Judge(random_models, 1e-3).beams(features, BEAMS, None, recorder.prompt, (best, other))
    assert tie.what == "our beam, dropped at token 4"
    assert tie.bound == pytest.approx(2e-3)
    assert not tie.explained

    trace = BeamTrace([*other, 0])
    decode(random_models.stock, features, BEAMS, language=None, processor=trace)
    table = log_probabilities(random_models.stock, features, recorder.prompt, other[:4])
    total = float(table[range(4), other[:4]].sum())
    worst = trace.missing + total
    # The worst beam is no better than the best, and was better than what was dropped.
    winner = log_probabilities(random_models.stock, features, recorder.prompt, best[:4])
    assert total < worst <= float(winner[range(4), best[:4]].sum()) + 1e-3
    assert trace.missing == tie.gap


def test_a_worse_sequence_that_stays_among_the_beams_is_judged_by_its_score(
    random_models: Models, random_features: torch.Tensor
) -> None:
    features, recorder = random_features[2:3], ScoreRecorder()
    [best] = decode(random_models.stock, features, BEAMS, language=None, processor=recorder)
    table = log_probabilities(random_models.stock, features, recorder.prompt, best)
    scores, _ = scores_after(random_models.stock, features, GREEDY, best[:-1], language=None)
    second = int(scores.index_fill(0, torch.tensor(best[-1:]), -torch.inf).argmax())
    other = [*best[:-1], second]
    tie = Judge(random_models, 1e-3).beams(features, BEAMS, None, recorder.prompt, (best, other))
    expected = float(table[-1, best[-1]] - table[-1, second])
    if tie.what == "score of the sequence":
        assert tie.gap >= expected - 1e-3
    assert tie.gap > 0
