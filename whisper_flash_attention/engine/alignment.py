"""Align given tokens with audio by the decoder's cross-attention, for word timestamps.

One teacher-forced pass in PyTorch, on every device. Layers with alignment heads compute those
heads' attention once more, explicitly and in float32; all else goes through PyTorch's fused
attention. Dynamic time warping finds the frames of each token.

Quantities and arithmetic are those of OpenAI's `whisper/timing.py`, in the same order and with the
same preference where sums tie, so that the times agree: scores of the positions with audio only,
softmax over those, attention normalised over tokens, a median of 7 positions over time, the mean
over heads, the cheapest monotonic path through its negative; and probabilities of tokens among the
text tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor
from torch.nn import functional as F

from whisper_flash_attention.engine.cuda_graphs import to_device, to_host
from whisper_flash_attention.engine.layout import has_kernels
from whisper_flash_attention.engine.teacher_forcing import TeacherForcing
from whisper_flash_attention.engine.weights import DecoderWeights, linear, normalize
from whisper_flash_attention.errors import NotFinite, OptionError

# The rows that fit saturate a GPU; a CPU is saturated by one, and small parts fit its caches.
GPU_BUDGET = 512 * 2**20
CPU_BUDGET = 64 * 2**20

# Log-mel frames per position of the encoder.
FRAMES_PER_POSITION = 2


@dataclass(frozen=True)
class AlignmentInput:
    """Tokens of one window of audio.

    Args:
        states: the encoder's output [S, D].
        tokens: ids, the prompt's and the end included.
        frames: log-mel frames of audio in the window; the rest of the window is padding.
    """

    states: Tensor
    tokens: tuple[int, ...]
    frames: int


@dataclass(frozen=True)
class Alignment:
    """Attention and probabilities of one row.

    Args:
        attention: [heads, L, P] float32, P the encoder's positions with audio; sums to 1 over P.
        probabilities: [L] float32: of each token, after those before it, among the text tokens; 0
            for the first one and for those that are no text.
    """

    attention: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class AlignmentBatch:
    """Attention and probabilities of several rows of different lengths.

    Args:
        rows: the inputs.
        attention: [B, heads, L, P] float32; valid up to each row's tokens and positions.
        probabilities: [B, L] float32.
        is_finite: bool [], on the device: whether the model computed neither NaN nor infinity.
    """

    rows: Sequence[AlignmentInput]
    attention: Tensor
    probabilities: Tensor
    is_finite: Tensor

    def alignments(self) -> Iterator[Alignment]:
        """Every row by itself. Raises `NotFinite`."""
        check_finite(self.is_finite)
        for row, attention, probabilities in zip(
            self.rows, self.attention, self.probabilities, strict=True
        ):
            length = len(row.tokens)
            yield Alignment(
                attention[:, :length, : positions_with_audio(row)], probabilities[:length]
            )


def check_finite(is_finite: Tensor) -> None:
    """Raise `NotFinite` if a bool [] does not hold; waits for the device."""
    if not bool(is_finite):
        raise NotFinite(
            "the model computed NaN or infinity while words were aligned; its weights may be "
            "damaged, or too large for half precision: try float32"
        )


@torch.no_grad()
def align_batches(
    weights: DecoderWeights,
    rows: Sequence[AlignmentInput],
    heads: Sequence[tuple[int, int]],
    *,
    text_tokens: int,
    budget_bytes: int | None = None,
) -> Iterator[AlignmentBatch]:
    """Run the decoder over all tokens of each row at once; yields rows in order, part by part.

    Args:
        weights: on the device and in the dtype of the states.
        rows: of any lengths.
        heads: (layer, head) pairs.
        text_tokens: ids below this are text.
        budget_bytes: bound of one part's memory, except that a part has at least one row. None is
            `GPU_BUDGET` or `CPU_BUDGET`.

    Raises:
        OptionError: the model has no such head, or fewer positions than a row has tokens.
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
        yield _AlignmentPass(weights, part, heads).run(text_tokens, budget_bytes)
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


def positions_with_audio(row: AlignmentInput) -> int:
    """Return the number of encoder positions with audio, at least one."""
    return max(1, min(row.frames // FRAMES_PER_POSITION, len(row.states)))


def _rows_within(
    weights: DecoderWeights, rows: Sequence[AlignmentInput], heads: int, budget_bytes: int
) -> int:
    """The number of first rows that fit the budget together, at least one."""
    size, width = weights.positions.element_size(), weights.width
    ffn = max(layer.fc1.weight.shape[0] for layer in weights.layers)
    length = 0
    for count, row in enumerate(rows):
        length = max(length, len(row.tokens))
        positions = len(row.states)
        # States, their keys and values twice (projected, and in the kernel's layout); the residual
        # stream and the layers' temporaries; a layer's scores, and the softmax of all heads.
        each = 5 * positions * width * size + length * (6 * width + 2 * ffn) * size
        each += (heads + min(heads, weights.heads)) * length * positions * 4
        if count and (count + 1) * each > budget_bytes:
            return count
    return len(rows)


class _AlignmentPass:
    """One pass of the decoder over a few rows, whose alignment heads' attention it keeps."""

    def __init__(
        self,
        weights: DecoderWeights,
        rows: Sequence[AlignmentInput],
        heads: Sequence[tuple[int, int]],
    ) -> None:
        self._weights = weights
        self._rows = rows
        self._heads = heads
        audio = [positions_with_audio(row) for row in rows]
        self._decoder = TeacherForcing(
            weights, [row.states for row in rows], [row.tokens for row in rows], audio
        )
        shape = (len(rows), len(heads), self._decoder.token_ids.shape[1], max(audio))
        self._attention = torch.empty(shape, device=weights.embedding.device)

    def run(self, text_tokens: int, budget_bytes: int) -> AlignmentBatch:
        x = self._decoder.run(self._record)
        probabilities = self._probabilities(x, text_tokens, budget_bytes)
        is_finite = torch.isfinite(probabilities.sum() + x.float().sum())
        return AlignmentBatch(self._rows, self._attention, probabilities, is_finite)

    def _record(self, layer: int, q: Tensor, k: Tensor) -> None:
        """Keep the attention of some of a layer's heads: q [B, H, L, 64], k [B, H, S, 64]."""
        wanted = {i: head for i, (at, head) in enumerate(self._heads) if at == layer}
        if not wanted:
            return
        # Indexing with a list of heads would make the host wait for the device.
        queries, keys = (torch.stack([x[:, each] for each in wanted.values()], 1) for x in (q, k))
        seen = torch.softmax(self._decoder.scores(queries, keys), dim=-1)
        for index, attention in zip(wanted, seen.unbind(1), strict=True):
            self._attention[:, index] = attention

    def _probabilities(self, x: Tensor, text_tokens: int, budget_bytes: int) -> Tensor:
        """Probabilities [B, L] of tokens, from the residual stream x [B, L, D] after all layers."""
        ids, lengths = self._decoder.token_ids, self._decoder.lengths
        is_text = (ids < text_tokens) & (np.arange(ids.shape[1]) < lengths[:, None])
        is_text[:, 0] = False
        positions = to_device(np.flatnonzero(is_text), x.device)
        # Logits in the model's dtype; their softmax in float32.
        normed = normalize(x.flatten(0, 1)[positions - 1], self._weights.final_norm)
        target = self._decoder.tokens.flatten()[positions]
        at_once = max(1, budget_bytes // (3 * 4 * len(self._weights.embedding)))
        probabilities = torch.zeros(ids.size, device=x.device)
        for some, chosen, where in zip(
            *(torch.split(each, at_once) for each in (normed, target, positions)), strict=True
        ):
            scores = linear(some, self._weights.projection)[:, :text_tokens]
            logprobs = torch.log_softmax(scores, dim=-1, dtype=torch.float32)
            probabilities[where] = logprobs.gather(1, chosen[:, None])[:, 0].exp()
        return probabilities.view(ids.shape)


@dataclass(frozen=True)
class TokenTimestamps:
    """Timestamps of one window's tokens after the prompt, the end included.

    Args:
        starts: int64 [N], ascending: the encoder's position at which each begins.
        probabilities: float32 [N - 1]: of each but the end, among the text tokens.
    """

    starts: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]


def token_timestamps(
    weights: DecoderWeights,
    rows: Sequence[AlignmentInput],
    heads: Sequence[tuple[int, int]],
    *,
    first: int,
    text_tokens: int,
) -> Callable[[], list[TokenTimestamps]]:
    """Queue the work on the device; return the function that waits for the result.

    Args:
        weights, rows, heads, text_tokens: as for `align_batches`.
        first: number of prompt tokens of each row.

    Raises:
        OptionError: as `align_batches`.
        NotFinite: the model computed NaN or infinity; here or from the function.
    """
    device = weights.embedding.device
    if not rows or not has_kernels(device):
        found = _one_by_one(weights, rows, heads, first, text_tokens)
        return lambda: found
    # Launches go to the current device: make it the weights'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _by_kernels(weights, rows, heads, first, text_tokens)


def _one_by_one(
    weights: DecoderWeights,
    rows: Sequence[AlignmentInput],
    heads: Sequence[tuple[int, int]],
    first: int,
    text_tokens: int,
) -> list[TokenTimestamps]:
    costs, probabilities = [], []
    batches = align_batches(weights, rows, heads, text_tokens=text_tokens)
    alignments = (alignment for batch in batches for alignment in batch.alignments())
    for row, alignment in zip(rows, alignments, strict=True):
        end = len(row.tokens) - 1
        # A token is located by the attention of the token before it.
        costs.append(token_costs(alignment.attention, first - 1, end).cpu().numpy())
        probabilities.append(alignment.probabilities[first:end].cpu().numpy())
    return [
        TokenTimestamps(*each) for each in zip(start_positions(costs), probabilities, strict=True)
    ]


def _by_kernels(
    weights: DecoderWeights,
    rows: Sequence[AlignmentInput],
    heads: Sequence[tuple[int, int]],
    first: int,
    text_tokens: int,
) -> Callable[[], list[TokenTimestamps]]:
    from whisper_flash_attention.kernels import dtw as kernels

    device = weights.embedding.device
    counts = [len(row.tokens) for row in rows]
    audio = [positions_with_audio(row) for row in rows]
    lengths, seen = to_device(np.array([counts, audio], np.int32), device)
    longest, width, before = max(counts), max(audio), first - 1
    costs = torch.empty((len(rows), longest - first, width), device=device)
    probabilities = torch.zeros((len(rows), longest), device=device)
    finite, done = [], 0
    for part in align_batches(weights, rows, heads, text_tokens=text_tokens):
        some = slice(done, done + len(part.rows))
        done = some.stop
        batch, count, _, positions = part.attention.shape
        moments = torch.empty((2, batch, count, positions), device=device)
        kernels.token_costs(part.attention, lengths[some], seen[some], before, moments, costs[some])
        probabilities[some, : part.probabilities.shape[1]] = part.probabilities
        finite.append(part.is_finite)
    size = 1 << (costs.shape[1] - 1).bit_length()
    choices = torch.empty(
        (len(rows), costs.shape[1] + width, size), dtype=torch.int8, device=device
    )
    starts = torch.zeros((len(rows), costs.shape[1]), dtype=torch.int32, device=device)
    kernels.token_starts(costs, lengths, seen, before, choices, starts)
    arrived = to_host(starts, probabilities, torch.stack(finite).all())

    def finish() -> list[TokenTimestamps]:
        starts, probabilities, is_finite = arrived()
        check_finite(is_finite)
        positions, chosen = starts.numpy().astype(np.int64), probabilities.numpy()
        return [
            TokenTimestamps(positions[row, : count - first], chosen[row, first : count - 1])
            for row, count in enumerate(counts)
        ]

    return finish


MEDIAN_WIDTH = 7
# Matrices aligned at a time.
MOST_MATRICES = 8

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

# A sorting network of 7 entries, reduced to the fourth (N. Devillard, "Fast median search: an ANSI
# C implementation", 1998): of each pair the lesser goes to the first place.
_MEDIAN_OF_7 = (
    (0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6), (2, 3), (3, 6), (4, 5), (1, 4), (1, 3),
    (3, 4),
)  # fmt: skip


def token_costs(attention: Tensor, first: int, end: int) -> Tensor:
    """The cost of each token at each position.

    Args:
        attention: [heads, L, P] float32, of all tokens: the normalisation takes all of them.
        first, end: the range of tokens.

    Returns:
        [end - first, P] float32; less is better.
    """
    std, mean = torch.std_mean(attention, dim=1, keepdim=True, correction=0)
    # Where all tokens have equal attention, none is preferred.
    std = std.clamp(min=torch.finfo(torch.float32).tiny)
    normed = (attention[:, first:end] - mean) / std
    return -median_filter(normed).mean(dim=0)


def median_filter(x: Tensor) -> Tensor:
    """Median of 7 neighbours along the last axis of x [N, L, P], which is reflected at its ends.

    Too few positions to be reflected are left unchanged.
    """
    half_width = MEDIAN_WIDTH // 2
    if x.shape[-1] <= half_width:
        return x
    padded = F.pad(x, (half_width, half_width), mode="reflect")
    entries = [padded[..., shift : shift + x.shape[-1]] for shift in range(MEDIAN_WIDTH)]
    for one, other in _MEDIAN_OF_7:
        less = torch.minimum(entries[one], entries[other])
        entries[other] = torch.maximum(entries[one], entries[other])
        entries[one] = less
    return entries[half_width]


def start_positions(costs: Sequence[Floats]) -> list[Indices]:
    """Where each token begins: [N] int64, ascending, for each matrix [N, P] of costs."""
    starts = []
    for begin in range(0, len(costs), MOST_MATRICES):
        for tokens, positions in dtw(costs[begin : begin + MOST_MATRICES]):
            starts.append(positions[np.diff(tokens, prepend=-1) > 0])
    return starts


def dtw(costs: Sequence[Floats]) -> list[tuple[Indices, Indices]]:
    """The cheapest path through each matrix, from its first entry to its last.

    A step goes to the next token, the next position, or both. Matrices may be of any shapes; all
    are computed together, one anti-diagonal after the other.

    Args:
        costs: matrices [N, P] float32, N and P at least 1; sums are in float32.

    Returns:
        For each, the tokens and the positions of its path, int64 of one length.
    """
    shapes = [matrix.shape for matrix in costs]
    tokens, positions = (max(sizes) for sizes in zip(*shapes, strict=True))
    padded = np.zeros((len(costs), tokens, positions), np.float32)
    for row, matrix in zip(padded, costs, strict=True):
        row[: matrix.shape[0], : matrix.shape[1]] = matrix
    diagonal, next_token = _choices(padded)
    return [
        _trace_back(diagonal[:, index], next_token[:, index], *shape)
        for index, shape in enumerate(shapes)
    ]


def _choices(costs: Floats) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether an entry is best reached diagonally, or else from the token before.

    Args:
        costs: [B, N, P].

    Returns:
        Two of [N + P - 1, B, N]: the entry (i, j) is at (i + j, b, i).
    """
    batch, tokens, positions = costs.shape
    last = tokens + positions - 1
    diagonal, next_token = (np.zeros((last, batch, tokens), np.bool_) for _ in range(2))
    item = costs.itemsize
    # Entry (i, j) of each matrix at (i + j, b, i); rows overlap others where j is out of range.
    strides = (item, tokens * positions * item, (positions - 1) * item)
    skewed = as_strided(costs, (last, batch, tokens), strides, writeable=False)
    # Totals of three anti-diagonals, after one token that is never reached.
    totals = [np.full((batch, tokens + 1), np.inf, np.float32) for _ in range(3)]
    spare = np.empty((batch, tokens), np.float32)
    totals[1][:, 1] = costs[:, 0, 0]
    for index in range(1, last):
        begin, end = max(0, index - positions + 1), min(tokens, index + 1)
        past, previous, now = totals
        both, token = past[:, begin:end], previous[:, begin:end]
        position, here = previous[:, begin + 1 : end + 1], now[:, begin + 1 : end + 1]
        least, is_both = spare[:, begin:end], diagonal[index, :, begin:end]
        is_token = next_token[index, :, begin:end]
        # A tie goes to the next position, even if it costs more: as OpenAI's `dtw_cpu`.
        np.minimum(token, position, out=least)
        np.less(both, least, out=is_both)
        np.minimum(both, position, out=least)
        np.less(token, least, out=is_token)
        np.copyto(here, position)
        np.copyto(here, token, where=is_token)
        np.copyto(here, both, where=is_both)
        np.add(here, skewed[index, :, begin:end], out=here)
        totals = [previous, now, past]
    return diagonal, next_token


def _trace_back(
    diagonal: npt.NDArray[np.bool_], next_token: npt.NDArray[np.bool_], tokens: int, positions: int
) -> tuple[Indices, Indices]:
    """The path that ends at the last entry, by the choices [N + P - 1, N] of one matrix."""
    i, j = tokens - 1, positions - 1
    path = [(i, j)]
    while i or j:
        if not i:
            j -= 1
        elif not j:
            i -= 1
        elif diagonal[i + j, i]:
            i, j = i - 1, j - 1
        elif next_token[i + j, i]:
            i -= 1
        else:
            j -= 1
        path.append((i, j))
    found = np.array(path[::-1], np.int64)
    return found[:, 0], found[:, 1]
