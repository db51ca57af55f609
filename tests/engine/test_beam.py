"""The engine's beam search against Transformers' `_beam_search`, on the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, WhisperForConditionalGeneration
from transformers.generation import GenerationMode

from tests.engine.beam_bench import (
    CLIPS,
    LONGEST,
    PROMPT,
    Bench,
    Broken,
    Flat,
    Reusing,
    Rounded,
    assert_same,
    make_bench,
    request_of,
)
from whisper_flash_attention.engine import beam
from whisper_flash_attention.engine.layout import Layout
from whisper_flash_attention.engine.logits_processors import (
    LogitsProcessors,
    MinLength,
    NoRepeatNgram,
    RepetitionPenalty,
    Suppress,
    SuppressAtBegin,
    Temperature,
)
from whisper_flash_attention.engine.torch_decoder import TorchDecoder
from whisper_flash_attention.errors import NotFinite, OptionError

PENALTIES = (-1.0, 0.0, 0.3, 1.0, 2.0)
# Absorbed cross-attention has a softmax in float32: too coarse to be rounded like stock's.
FORMS = ("projected", "absorbed", "rounded")
STOPPING = (True, False, "never")


@pytest.fixture(scope="module")
def bench(small_model: WhisperForConditionalGeneration) -> Iterator[Bench]:
    bench = make_bench(small_model)
    with pytest.MonkeyPatch.context() as patch:
        # One beam is greedy decoding to Transformers, unless it is told otherwise.
        patch.setattr(
            GenerationConfig, "get_generation_mode", lambda *_: GenerationMode.BEAM_SEARCH
        )
        yield bench


@pytest.mark.parametrize("early_stopping", STOPPING)
@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_lengths_and_stopping(
    bench: Bench, num_beams: int, length_penalty: float, early_stopping: bool | str
) -> None:
    request = request_of(
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos=tuple(bench.likely[:6]),
    )
    assert_same(bench.search(request), bench.expect(request))


def test_drawing_ends_when_stock_ends(bench: Bench) -> None:
    """Beyond its end a search would draw numbers that stock leaves to the next call."""
    request = request_of(
        early_stopping=True,
        eos=tuple(bench.likely[:8]),
        rules=(Temperature(0.2),),
        sample=True,
    )
    torch.manual_seed(9)
    expected = bench.expect(request, clips=1, temperature=0.2)
    after = torch.get_rng_state()
    assert len(expected.scores) < LONGEST - len(PROMPT)
    torch.manual_seed(9)
    assert_same(bench.search(request, clips=1), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_beam_that_can_only_draw_level_is_not_waited_for(bench: Bench) -> None:
    """All tokens are equally likely: the one that ends is no worse than any that runs on."""
    request = request_of(num_beams=1, length_penalty=0.0, eos=())
    hook = bench.stock.proj_out.register_forward_hook(lambda _, __, logits: logits * 0)
    try:
        first = bench.expect(request, clips=1).sequences[0, len(PROMPT)].item()
        request = dataclasses.replace(request, eos=(int(first),))
        expected = bench.expect(request, clips=1)
    finally:
        hook.remove()
    assert len(expected.scores) == 1
    assert_same(bench.search(request, clips=1, decoder=Flat), expected)


def test_a_decoder_may_write_all_its_logits_to_one_place(bench: Bench) -> None:
    request = request_of(eos=())
    assert_same(bench.search(request, decoder=Reusing), bench.search(request))


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Options of `request_of`; ends are places among the likely tokens."""
    num_beams = draw(st.integers(1, 5))
    return {
        "num_beams": num_beams,
        "num_return_sequences": draw(st.integers(1, num_beams)),
        "length_penalty": draw(st.sampled_from(PENALTIES)),
        "early_stopping": draw(st.sampled_from(STOPPING)),
        "eos": draw(st.lists(st.integers(0, 11), max_size=6, unique=True)),
        "max_length": len(PROMPT) + draw(st.integers(1, LONGEST - len(PROMPT))),
        "sample": draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None)
@given(options=requests(), form=st.sampled_from(FORMS), clips=st.integers(1, 3))
def test_any_options(bench: Bench, options: dict[str, Any], form: str, clips: int) -> None:
    """Also where many continuations tie, and where beams are drawn: as often as stock draws."""
    options["eos"] = tuple(bench.likely[place] for place in options["eos"])
    request = request_of(**options)
    torch.manual_seed(9)
    rounded = form == "rounded"
    expected = bench.expect(request, clips=clips, rounded=rounded)
    after = torch.get_rng_state()
    torch.manual_seed(9)
    decoder = Rounded if rounded else TorchDecoder
    absorbed = form == "absorbed"
    assert_same(bench.search(request, clips=clips, decoder=decoder, absorbed=absorbed), expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(
    ("names", "sample"),
    [
        (("penalty", "ngram"), False),
        (("least", "never", "begin"), False),
        (("least", "never", "warm"), True),
    ],
)
def test_rules(bench: Bench, names: tuple[str, ...], sample: bool) -> None:
    likely = bench.likely
    first, *others = likely[:3]
    rules = {
        "penalty": (RepetitionPenalty(1.7), {"repetition_penalty": 1.7}),
        "ngram": (NoRepeatNgram(2), {"no_repeat_ngram_size": 2}),
        "least": (MinLength(len(PROMPT) + 4, (first,)), {"min_length": len(PROMPT) + 4}),
        "never": (Suppress(tuple(others)), {"suppress_tokens": others}),
        "begin": (
            SuppressAtBegin(tuple(likely[3:6]), len(PROMPT)),
            {"begin_suppress_tokens": likely[3:6]},
        ),
        "warm": (Temperature(0.6), {"temperature": 0.6}),
    }
    request = request_of(
        eos=(first,),
        num_return_sequences=2,
        rules=tuple(rules[name][0] for name in names),
        sample=sample,
    )
    options: dict[str, Any] = {}
    for name in names:
        options |= rules[name][1]
    torch.manual_seed(4)
    expected = bench.expect(request, **options)
    torch.manual_seed(4)
    found = bench.search(request)
    assert_same(found, expected)
    torch.manual_seed(4)
    without = bench.search(dataclasses.replace(request, processors=LogitsProcessors()))
    assert not torch.equal(found.sequences, without.sequences)


@pytest.mark.parametrize("prompt", [PROMPT[:1], (298, *range(20, 26))])
@pytest.mark.parametrize("new", [1, 2, 5])
def test_prompts_and_few_tokens(bench: Bench, prompt: tuple[int, ...], new: int) -> None:
    request = request_of(num_return_sequences=3, max_length=len(prompt) + new)
    found = bench.search(request, prompt=prompt)
    assert_same(found, bench.expect(request, prompt=prompt))
    assert found.sequences.shape == (CLIPS * 3, len(prompt) + new)


def test_several_searches_of_a_clip(bench: Bench) -> None:
    """Rows of one clip may be those of several searches, each with beams of its own."""
    request = request_of(num_return_sequences=2, eos=tuple(bench.likely[:2]))
    one, two = bench.search(request), bench.search(request, searches=2)
    assert one.beam_indices is not None and two.beam_indices is not None
    assert one.sequences_scores is not None and two.sequences_scores is not None
    # The rows of a search begin at 3 times its place; behind an end there is -1.
    begins = 3 * torch.arange(CLIPS)[:, None, None, None]
    indices = one.beam_indices.view(CLIPS, 1, 2, -1)
    beams = torch.where(indices < 0, -1, indices - begins)
    for search in (0, 1):
        rows = two.sequences.view(CLIPS, 2, 2, -1)[:, search].flatten(0, 1)
        assert torch.equal(rows, one.sequences)
        scores = two.sequences_scores.view(CLIPS, 2, 2)[:, search].flatten()
        torch.testing.assert_close(scores, one.sequences_scores)
        indices = two.beam_indices.view(CLIPS, 2, 2, -1)[:, search : search + 1]
        moved = torch.where(indices < 0, -1, indices - 2 * begins - 3 * search)
        assert torch.equal(moved, beams)


def test_what_still_ran_at_the_end_is_told(bench: Bench) -> None:
    """`running` holds prompt and tokens of every beam: the cache is recomputed from it."""
    request = request_of(eos=(), max_length=len(PROMPT) + 4)
    found = bench.search(request)
    assert found.running is not None and found.running.shape == (3 * CLIPS, len(PROMPT) + 4)
    assert found.running[:, : len(PROMPT)].tolist() == [list(PROMPT)] * 3 * CLIPS
    stopped = bench.search(request_of(eos=tuple(bench.likely[:8]), early_stopping=True))
    assert stopped.running is not None and stopped.scores is not None
    assert stopped.running.shape[1] == len(PROMPT) + len(stopped.scores) < LONGEST


def test_nothing_is_kept_that_was_not_asked_for(bench: Bench) -> None:
    request = dataclasses.replace(request_of(), want_scores=False, want_logits=False)
    found = bench.search(request)
    assert found.scores is None and found.logits is None
    assert torch.equal(found.sequences, bench.search(request_of()).sequences)


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 10])
def test_rows_that_are_not_whole_searches_are_refused(bench: Bench, rows: int) -> None:
    """3 beams for each of 2 clips: 6 rows, 12, ..."""
    layout = Layout.of(
        bench.weights.decoder, slots=rows, clips=1, positions=8, keys=100, absorbed=False
    )
    decoder = TorchDecoder(bench.weights.decoder, bench.buffers.state(layout))
    prompt = torch.tensor([PROMPT] * rows)
    with pytest.raises(OptionError, match=f"a prompt of {rows} rows for 2 clips: give 3 rows"):
        beam.search(decoder, bench.states[:2], prompt, request_of(max_length=8))


def test_nan_is_refused_and_the_state_no_longer_branches(bench: Bench) -> None:
    states: list[Any] = []

    class Watched(Broken):
        def __init__(self, weights: Any, state: Any) -> None:
            states.append(state)
            super().__init__(weights, state)

    with pytest.raises(NotFinite, match="not finite in row 0"):
        bench.search(request_of(eos=()), decoder=Watched)
    assert not states[0].branching


def test_nan_after_the_end_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU steps are taken beyond the end: what they compute is not looked at."""
    request = request_of(
        eos=tuple(bench.likely[:8]), early_stopping=True, num_return_sequences=3, max_length=30
    )
    expected = bench.search(request)
    steps = len(expected.scores)
    assert steps < 27

    passes: list[int] = []

    class Overrun(TorchDecoder):
        def advance(self, tokens: torch.Tensor) -> torch.Tensor:
            passes.append(len(passes) + 1)
            logits = super().advance(tokens)
            return logits * torch.nan if passes[-1] >= steps else logits

    monkeypatch.setattr(beam, "steps_between_polls", lambda prompt: 100)
    found = bench.search(request, decoder=Overrun)
    assert len(passes) == 30 - len(PROMPT) - 1
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.beam_indices, expected.beam_indices)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    assert torch.equal(found.running, expected.running)
    assert len(found.scores) == len(found.logits) == steps
