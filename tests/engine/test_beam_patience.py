"""Beams with patience against the rules of openai-whisper, spelled out on lists."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from tests.engine.beam_bench import CLIPS, LONGEST, PROMPT, Bench, make_bench, request_of


@pytest.fixture(scope="module")
def bench(small_model: WhisperForConditionalGeneration) -> Bench:
    return make_bench(small_model)


def openai_search(
    bench: Bench, clip: int, num_beams: int, patience: float, end: int
) -> tuple[dict[tuple[int, ...], float], int]:
    """`BeamSearchDecoder` of whisper/decoding.py for one clip: results with their sums, steps."""
    most = round(num_beams * patience)
    beams: dict[tuple[int, ...], float] = {PROMPT: 0.0}
    finished: dict[tuple[int, ...], float] = {}
    steps = 0
    while len(next(iter(beams))) < LONGEST and len(finished) < most:
        steps += 1
        rows = torch.tensor([list(each) for each in beams])
        with torch.no_grad():
            features = bench.features[clip : clip + 1].expand(len(rows), -1, -1)
            logits = bench.stock(features, decoder_input_ids=rows).logits[:, -1].float()
        scores: dict[tuple[int, ...], float] = {}
        for (row, total), chances in zip(beams.items(), logits.log_softmax(-1), strict=True):
            best = chances.topk(num_beams + 1)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                scores[(*row, token)] = total + value
        beams, new = {}, {}
        for row in sorted(scores, key=lambda each: -scores[each]):
            if row[-1] == end:
                new[row] = scores[row]
            else:
                beams[row] = scores[row]
            if len(beams) == num_beams:
                break
        for row in sorted(new, key=lambda each: -new[each])[: most - len(finished)]:
            finished[row] = new[row]
    for row in sorted(beams, key=lambda each: -beams[each]):
        if len(finished) >= min(num_beams, most):
            break
        finished[row] = beams[row]
    return finished, steps


@pytest.mark.parametrize("place", [0, 6])
@pytest.mark.parametrize(("num_beams", "patience"), [(3, 1.0), (3, 2.0), (5, 0.5)])
def test_a_search_ends_as_that_of_openai(
    bench: Bench, num_beams: int, patience: float, place: int
) -> None:
    end = bench.likely[place]
    request = request_of(num_beams=num_beams, eos=(end,), length_penalty=0.7, early_stopping=True)
    assert request.beams is not None
    patient = dataclasses.replace(request.beams, patience=patience)
    for clip in range(CLIPS):
        expected, steps = openai_search(bench, clip, num_beams, patience, end)
        best = max(expected, key=lambda row: expected[row] / (len(row) - len(PROMPT)) ** 0.7)
        one = dataclasses.replace(bench, features=None, states=bench.states[clip : clip + 1])
        found = one.search(dataclasses.replace(request, beams=patient), clips=1)
        assert tuple(found.sequences[0].tolist()) == best
        assert found.scores is not None and len(found.scores) == steps


def test_clips_side_by_side_do_not_change_each_other(bench: Bench) -> None:
    request = request_of(num_beams=3, eos=(bench.likely[2],), early_stopping=True)
    assert request.beams is not None
    request = dataclasses.replace(request, beams=dataclasses.replace(request.beams, patience=2.0))
    together = bench.search(request).sequences.tolist()
    for clip in range(CLIPS):
        one = dataclasses.replace(bench, states=bench.states[clip : clip + 1])
        alone = one.search(request, clips=1).sequences[0].tolist()
        assert together[clip][: len(alone)] == alone
