"""What the decoder attends to while it says given tokens: as eager stock Whisper does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from tests.modeling.conftest import Pair, load_pair, read_wave
from whisper_flash_attention.engine.alignment import Alignment, AlignmentInput, align_batches
from whisper_flash_attention.engine.weights import DecoderWeights, collect_weights
from whisper_flash_attention.errors import NotFinite, OptionError

HEADS = ((1, 0), (2, 0), (2, 5), (3, 4))
END = 50256
PROMPT = (50257, 50362)


@dataclass(frozen=True)
class Spoken:
    """Recordings as a real model hears them."""

    pair: Pair
    weights: DecoderWeights
    rows: list[AlignmentInput]


@pytest.fixture(scope="module")
def spoken(tiny_en: str, bundled_recordings) -> Spoken:
    pair = load_pair(tiny_en)
    weights = collect_weights(pair.stock)
    recordings = bundled_recordings[1:4]
    clips = [read_wave(str(recording.path)) for recording in recordings]
    features = pair.features(*clips)["input_features"]
    with torch.no_grad():
        states = pair.stock.get_encoder()(features).last_hidden_state
    texts = [
        pair.processor.tokenizer(recording.transcript, add_special_tokens=False).input_ids
        for recording in recordings
    ]
    rows = [
        AlignmentInput(state, (*PROMPT, *text, END), len(clip) // 160)
        for state, text, clip in zip(states, texts, clips, strict=True)
    ]
    return Spoken(pair, weights.decoder, rows)


def align(*arguments: Any, **options: Any) -> Iterator[Alignment]:
    for batch in align_batches(*arguments, **options):
        yield from batch.alignments()


def stock_says(
    model: WhisperForConditionalGeneration, row: AlignmentInput, text_tokens: int
) -> Alignment:
    """The same of stock's modules, alone, with its full vectors of attention."""
    tokens = torch.tensor([row.tokens])
    with torch.no_grad():
        found = model(
            decoder_input_ids=tokens,
            encoder_outputs=(row.states[None],),
            output_attentions=True,
        )
    attention = torch.stack([found.cross_attentions[layer][0, head] for layer, head in HEADS])
    seen = attention[..., : row.frames // 2]
    likely = found.logits[0, :-1, :text_tokens].softmax(dim=-1)
    following = tokens[0, 1:]
    is_text = following < text_tokens
    probabilities = torch.zeros(len(row.tokens))
    places = torch.arange(len(following))[is_text]
    probabilities[1:][is_text] = likely[places, following[is_text]]
    return Alignment(seen / seen.sum(dim=-1, keepdim=True), probabilities)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("text_tokens", [END, 51864])
def test_attention_and_probabilities_are_stocks(spoken: Spoken, text_tokens: int) -> None:
    alignments = list(align(spoken.weights, spoken.rows, HEADS, text_tokens=text_tokens))
    assert len(alignments) == len(spoken.rows)
    for row, found in zip(spoken.rows, alignments, strict=True):
        expected = stock_says(spoken.pair.stock, row, text_tokens)
        assert_close(found.attention, expected.attention)
        assert_close(found.probabilities, expected.probabilities)
        assert found.probabilities[2:-1].mean() > 0.2


def test_a_window_full_of_audio_is_looked_at_whole(spoken: Spoken) -> None:
    row = replace(spoken.rows[0], frames=3000)
    [found] = align(spoken.weights, [row], HEADS, text_tokens=END)
    assert found.attention.shape[-1] == 1500
    assert_close(found.attention, stock_says(spoken.pair.stock, row, END).attention)


def test_parts_and_order_of_rows_change_nothing(spoken: Spoken) -> None:
    together = list(align(spoken.weights, spoken.rows, HEADS, text_tokens=END))
    parts = list(align(spoken.weights, spoken.rows[::-1], HEADS, text_tokens=END, budget_bytes=1))
    for one, other in zip(together, parts[::-1], strict=True):
        assert_close(one.attention, other.attention, 1e-5)
        assert_close(one.probabilities, other.probabilities, 1e-5)


def test_heads_come_in_the_order_asked_for(spoken: Spoken) -> None:
    [one] = align(spoken.weights, spoken.rows[:1], HEADS, text_tokens=END)
    [other] = align(spoken.weights, spoken.rows[:1], HEADS[::-1], text_tokens=END)
    assert torch.equal(one.attention, other.attention.flip(0))


def test_half_precision_is_near(spoken: Spoken) -> None:
    halved = collect_weights(load_halved(spoken.pair.stock)).decoder
    rows = [replace(row, states=row.states.bfloat16()) for row in spoken.rows]
    for row, found in zip(spoken.rows, align(halved, rows, HEADS, text_tokens=END), strict=True):
        expected = stock_says(spoken.pair.stock, row, END)
        assert found.attention.dtype is found.probabilities.dtype is torch.float32
        assert_close(found.attention, expected.attention, 0.15)
        assert_close(found.attention.sum(dim=-1), torch.ones(found.attention.shape[:2]), 1e-5)


def load_halved(model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    with torch.device("meta"):
        halved = WhisperForConditionalGeneration(model.config)
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    halved.load_state_dict(state, assign=True)
    return halved.eval()


@pytest.mark.parametrize("frames", [0, 1, 2, 3])
def test_a_snippet_has_one_position(spoken: Spoken, frames: int) -> None:
    row = replace(spoken.rows[0], frames=frames)
    [found] = align(spoken.weights, [row], HEADS, text_tokens=END)
    assert torch.equal(found.attention, torch.ones(len(HEADS), len(row.tokens), 1))


@pytest.mark.parametrize("heads", [(), ((4, 0),), ((0, 6),), ((1, 0), (-1, 0))])
def test_heads_that_the_model_lacks_are_refused(
    spoken: Spoken, heads: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(OptionError, match=r"the model has layers 0 to 3 of heads 0 to 5; give"):
        list(align(spoken.weights, spoken.rows, heads, text_tokens=END))


def test_more_tokens_than_the_model_has_positions_are_refused(spoken: Spoken) -> None:
    row = replace(spoken.rows[0], tokens=(*PROMPT, *[11] * 447))
    with pytest.raises(OptionError, match="449 tokens to align; the model has 448 positions"):
        list(align(spoken.weights, [row], HEADS, text_tokens=END))


def test_what_is_not_finite_is_told(spoken: Spoken) -> None:
    row = replace(spoken.rows[0], states=torch.full_like(spoken.rows[0].states, float("nan")))
    with pytest.raises(NotFinite, match="while words were aligned"):
        list(align(spoken.weights, [row], HEADS, text_tokens=END))
