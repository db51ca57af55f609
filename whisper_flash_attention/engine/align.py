"""Where in the audio the decoder looks while it says given tokens: the ground of word timestamps.

One teacher-forced pass in plain PyTorch, on every device, beside whatever runs the decode. Layers
with alignment heads compute those heads' attention once more, explicitly and in float32; all else
goes through PyTorch's fused attention.

What is read is what OpenAI's `whisper/timing.py` (`find_alignment`) reads: scores of the positions
with audio only, softmax over those; and probabilities of tokens among the text tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from whisper_flash_attention.engine import step
from whisper_flash_attention.engine.products import linear
from whisper_flash_attention.engine.weights import Attention, DecoderLayer, DecoderWeights
from whisper_flash_attention.errors import NotFinite, OptionError

# A GPU is saturated by the rows that fit here; a CPU is by one, and likes its caches.
GPU_BUDGET = 512 * 2**20
CPU_BUDGET = 64 * 2**20

# The encoder sees two frames of the log-mel spectrogram at each of its positions.
FRAMES_PER_POSITION = 2


@dataclass(frozen=True)
class Said:
    """Tokens that were said in one window of audio.

    Args:
        states: the encoder's output [S, D].
        tokens: ids, the prompt's and the end included.
        frames: log-mel frames of audio in the window; the rest of the window is padding.
    """

    states: Tensor
    tokens: tuple[int, ...]
    frames: int


@dataclass(frozen=True)
class Heard:
    """What the decoder made of them.

    Args:
        attention: [heads, L, P] float32, P the encoder's positions with audio; sums to 1 over P.
        probabilities: [L] float32: of each token, after those before it, among the text tokens; 0
            for the first one and for those that are no text.
    """

    attention: Tensor
    probabilities: Tensor


@torch.no_grad()
def listen(
    weights: DecoderWeights,
    rows: Sequence[Said],
    heads: Sequence[tuple[int, int]],
    *,
    text_tokens: int,
    budget_bytes: int | None = None,
) -> Iterator[Heard]:
    """Run the decoder over all tokens of each row at once; yields rows in order, part by part.

    Args:
        weights: on the device and in the dtype of the states.
        rows: of any lengths.
        heads: (layer, head) pairs.
        text_tokens: ids below this are text.
        budget_bytes: bound of what one part takes; one row at a time where even that needs more.
            None is `GPU_BUDGET` or `CPU_BUDGET`.

    Raises:
        OptionError: the model has no such head, or not so many positions as a row has tokens.
        NotFinite: the model computed NaN or infinity.
    """
    check_heads(weights, heads)
    longest = max((len(row.tokens) for row in rows), default=0)
    if longest > len(weights.positions):
        raise OptionError(
            f"{longest} tokens to align; the model has {len(weights.positions)} positions"
        )
    if budget_bytes is None:
        budget_bytes = CPU_BUDGET if weights.embedding.device.type == "cpu" else GPU_BUDGET
    start = 0
    while start < len(rows):
        count = _rows_within(weights, rows[start:], len(heads), budget_bytes)
        part = rows[start : start + count]
        yield from _Pass(weights, part, heads).run(text_tokens, budget_bytes)
        start += count


def check_heads(weights: DecoderWeights, heads: Sequence[tuple[int, int]]) -> None:
    """Raise `OptionError` if there are no alignment heads, or the model has no such head."""
    layers = len(weights.layers)
    wrong = [
        (layer, head)
        for layer, head in heads
        if not (0 <= layer < layers and 0 <= head < weights.heads)
    ]
    if wrong or not heads:
        raise OptionError(
            f"alignment heads {[*map(tuple, wrong or heads)]}: the model has layers 0 to "
            f"{layers - 1} of heads 0 to {weights.heads - 1}; give (layer, head) pairs of these in "
            "generation_config.alignment_heads, or leave that out"
        )


def positions_with_audio(row: Said) -> int:
    """How many of the encoder's positions saw audio: one at least."""
    return max(1, min(row.frames // FRAMES_PER_POSITION, len(row.states)))


def _rows_within(
    weights: DecoderWeights, rows: Sequence[Said], heads: int, budget_bytes: int
) -> int:
    """How many of the first rows fit the budget together, one at least."""
    size, width = weights.embedding.element_size(), weights.width
    ffn = max(layer.fc1.weight.shape[0] for layer in weights.layers)
    length = 0
    for count, row in enumerate(rows):
        length = max(length, len(row.tokens))
        positions = len(row.states)
        # States, their keys and values twice (projected, and as the kernel wants them); the
        # residual stream and what hangs on it; a layer's scores, and the softmax of all heads.
        each = 5 * positions * width * size + length * (6 * width + 2 * ffn) * size
        each += (heads + min(heads, weights.heads)) * length * positions * 4
        if count and (count + 1) * each > budget_bytes:
            return count
    return len(rows)


class _Pass:
    """One pass of the decoder over a few rows, padded on the right to the longest.

    Causal self-attention keeps the padding from all that is before it.
    """

    def __init__(
        self, weights: DecoderWeights, rows: Sequence[Said], heads: Sequence[tuple[int, int]]
    ) -> None:
        self._weights = weights
        self._rows = rows
        self._heads = heads
        self._states = torch.stack([row.states for row in rows])
        lengths = [len(row.tokens) for row in rows]
        padded = [(*row.tokens, *[0] * (max(lengths) - len(row.tokens))) for row in rows]
        device = weights.embedding.device
        self._tokens = torch.tensor(padded, device=device)  # [B, L]
        self._lengths = torch.tensor(lengths, device=device)
        self._audio = [positions_with_audio(row) for row in rows]
        # Per row and alignment head: [L, P].
        self._attention: list[dict[int, Tensor]] = [{} for _ in rows]

    def run(self, text_tokens: int, budget_bytes: int) -> list[Heard]:
        tokens, weights = self._tokens, self._weights
        x = F.embedding(tokens, weights.embedding) + weights.positions[: tokens.shape[1]]
        for index, layer in enumerate(weights.layers):
            x += _self_attention(layer, x)
            x += self._cross_attention(layer, index, x)
            hidden = F.gelu(linear(step.normalize(x, layer.ffn_norm), layer.fc1))
            x += linear(hidden, layer.fc2)
        probabilities = self._probabilities(x, text_tokens, budget_bytes)
        return [
            Heard(
                torch.stack([found[each] for each in range(len(self._heads))]),
                likely[: len(row.tokens)],
            )
            for row, found, likely in zip(self._rows, self._attention, probabilities, strict=True)
        ]

    def _cross_attention(self, layer: DecoderLayer, index: int, x: Tensor) -> Tensor:
        attention = layer.cross_attention
        q = step.split_heads(linear(step.normalize(x, layer.cross_norm), attention.q))
        k, v = _keys_and_values(attention, self._states)
        wanted = {i: head for i, (at, head) in enumerate(self._heads) if at == index}
        if wanted:
            self._look(wanted, q, k)
        out = F.scaled_dot_product_attention(q, k, v)
        return linear(step.join_heads(out), attention.out)

    def _look(self, wanted: dict[int, int], q: Tensor, k: Tensor) -> None:
        """Keep the attention of some of a layer's heads: q [B, H, L, 64], k [B, H, S, 64]."""
        heads = list(wanted.values())
        keys = k[:, heads, : max(self._audio)].float()
        scores = torch.matmul(q[:, heads].float() * step.SCALE, keys.transpose(2, 3))
        for row, length, audio in zip(
            range(len(scores)), self._lengths.tolist(), self._audio, strict=True
        ):
            seen = torch.softmax(scores[row, :, :length, :audio], dim=-1)
            self._attention[row].update(zip(wanted, seen, strict=True))

    def _probabilities(self, x: Tensor, text_tokens: int, budget_bytes: int) -> Tensor:
        """Of tokens [B, L], from the residual stream x [B, L, D] after the last layer."""
        following = self._tokens[:, 1:]
        places = torch.arange(1, self._tokens.shape[1], device=x.device)
        is_text = (following < text_tokens) & (places < self._lengths[:, None])
        before, spoken = x[:, :-1][is_text], following[is_text]
        # Logits in the model's dtype, in float32, and their softmax.
        at_once = max(1, budget_bytes // (3 * 4 * len(self._weights.projection)))
        found = [
            torch.log_softmax(step.logits(self._weights, some)[:, :text_tokens], dim=-1)
            .gather(1, ids[:, None])[:, 0]
            .exp()
            for some, ids in zip(
                torch.split(before, at_once), torch.split(spoken, at_once), strict=True
            )
        ]
        probabilities = torch.zeros(self._tokens.shape, device=x.device)
        if found:
            probabilities[:, 1:][is_text] = torch.cat(found)
        if not bool(torch.isfinite(probabilities.sum() + x.float().sum())):
            raise NotFinite(
                "the model computed NaN or infinity while words were aligned; its weights may be "
                "damaged, or too large for half precision: try float32"
            )
        return probabilities


def _self_attention(layer: DecoderLayer, x: Tensor) -> Tensor:
    attention = layer.self_attention
    normed = step.normalize(x, layer.self_norm)
    q, k, v = (
        step.split_heads(linear(normed, part)) for part in (attention.q, attention.k, attention.v)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(step.join_heads(out), attention.out)


def _keys_and_values(attention: Attention, states: Tensor) -> tuple[Tensor, Tensor]:
    """Each [B, H, S, 64]."""
    k, v = (step.split_heads(linear(states, part)) for part in (attention.k, attention.v))
    return k, v
