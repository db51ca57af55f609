"""Align the characters of a text with audio by the decoder's cross-attention, for word timestamps.

Tokens of several characters say little about where a word begins within them. Given a text
character by character, which no model was trained to write, some heads of a decoder follow the
sound of each ("Whisper Has an Internal Word Aligner", Yeh et al., 2025). Which heads do depends on
the checkpoint and the window, so all are looked at: heads of sharp attention are kept, by the norms
over tokens of their attention to each position. Scores are smoothed by a median of 3 positions; the
attention of each head is normalised over tokens. A character is where its own token and the token
before it attend to. Where it is quiet, characters have a cost, and blanks and punctuation a gain.

The cheapest monotonic path is that of `alignment`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whisper_flash_attention.engine.alignment import (
    FRAMES_PER_POSITION,
    Indices,
    check_finite,
    start_positions,
)
from whisper_flash_attention.engine.cuda_graphs import to_device, to_host
from whisper_flash_attention.engine.layout import has_kernels
from whisper_flash_attention.engine.teacher_forcing import TeacherForcing
from whisper_flash_attention.engine.weights import DecoderWeights

# Memory of the windows that are aligned together, in bytes; it is exceeded by one window at most.
GPU_BUDGET = 2**30
CPU_BUDGET = 64 * 2**20

# Heads of a window that are kept, and by how much their scores are sharpened.
HEADS, SHARPER = 5, 1.5
# The share of a character's own attention, beside that of the token before it.
OWN = 0.5
# The cost of a quiet position for a character, and its gain for a blank. A position is quiet if it
# is SOFT dB softer than the window's loudest one; SLOPE dB above and below that it is in part.
QUIET, SOFT, SLOPE = 0.02, 30.0, 5.0
# The most tokens of a window's characters, the end included: the kernel's longest path.
MOST_CHARACTERS = 1024


@dataclass(frozen=True)
class CharacterInput:
    """The characters of one window of audio.

    Args:
        states: the encoder's output [S, D].
        prompt: ids of the tokens before the text.
        parts: ids of the tokens of the text's characters, in parts that have room between a prompt
            and the end; at least one, and together fewer than `MOST_CHARACTERS`.
        is_silent: of all of them: blanks and punctuation.
        frames: log-mel frames of audio in the window; the rest of the window is padding.
        levels: of these frames, and perhaps the padding's, in dB; on the states' device.
    """

    states: Tensor
    prompt: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    is_silent: tuple[bool, ...]
    frames: int
    levels: Tensor

    @property
    def positions(self) -> int:
        """Positions of the encoder's output with audio, at least one."""
        return max(1, min(self.frames // FRAMES_PER_POSITION, len(self.states)))

    @property
    def count(self) -> int:
        """Tokens whose place is sought: the characters and the end."""
        return len(self.is_silent) + 1


@torch.no_grad()
def character_starts(
    weights: DecoderWeights,
    rows: Sequence[CharacterInput],
    *,
    end: int,
    budget_bytes: int | None = None,
) -> Callable[[], list[Indices]]:
    """Queue the work on the device; return the function that waits for the result.

    Args:
        weights: on the device and in the dtype of the states.
        rows: windows, of any lengths.
        end: id of <|endoftext|>.
        budget_bytes: bound of one part's memory, except that a part has at least one window. None
            is `GPU_BUDGET` or `CPU_BUDGET`.

    Returns:
        For each window int64 [N + 1], ascending: the encoder's position at which each of its N
        characters begins, and the end.

    Raises:
        NotFinite: the model computed NaN or infinity; from the function.
    """
    device = weights.embedding.device
    if budget_bytes is None:
        budget_bytes = CPU_BUDGET if device.type == "cpu" else GPU_BUDGET
    finish: list[Callable[[], list[Indices]]] = []
    # Launches go to the current device: make it the weights'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        start = 0
        while start < len(rows):
            some = rows[start : start + _windows_within(weights, rows[start:], budget_bytes)]
            finish.append(_CharacterPass(weights, some, end).run())
            start += len(some)
    return lambda: [each for one in finish for each in one()]


def _windows_within(
    weights: DecoderWeights, rows: Sequence[CharacterInput], budget_bytes: int
) -> int:
    """The number of first windows that fit the budget together, at least one."""
    size = weights.positions.element_size()
    # Scores and, without kernels, what a median of them takes; the heads kept, while they change.
    planes = (1 if has_kernels(weights.embedding.device) else 5) * weights.heads + 4 * HEADS
    parts, longest = 0, 0
    for count, row in enumerate(rows):
        parts += len(row.parts)
        longest = max(longest, *(len(row.prompt) + len(part) + 1 for part in row.parts))
        # The states, their keys and values twice, and the keys in float32.
        each = (5 * size + 4) * row.states.numel() + planes * longest * len(row.states) * 4
        if count and parts * each > budget_bytes:
            return count
    return len(rows)


class _CharacterPass:
    """One pass over a few windows. Rows of it are the parts of their texts."""

    def __init__(
        self, weights: DecoderWeights, windows: Sequence[CharacterInput], end: int
    ) -> None:
        self._windows = windows
        rows = [(number, part) for number, row in enumerate(windows) for part in row.parts]
        tokens = [(*windows[number].prompt, *part, end) for number, part in rows]
        self._decoder = TeacherForcing(
            weights,
            [windows[number].states for number, _ in rows],
            tokens,
            [windows[number].positions for number, _ in rows],
        )
        device = weights.embedding.device
        shape = self._decoder.token_ids.shape
        counted = np.zeros(shape, np.int8)  # [R, L]: the prompt once, characters, the end once
        # Where the attention of each character's predecessor, and its own, is: [W, N + 1].
        most = max(row.count for row in windows)
        places = np.zeros((2, len(windows), most), np.int64)
        silent = np.zeros((len(windows), most), bool)
        for number, row in enumerate(windows):
            found: list[int] = []
            for index in (i for i, (which, _) in enumerate(rows) if which == number):
                first, last = len(row.prompt), len(tokens[index]) - 1
                counted[index, first if found else 0 : last] = 1
                begin = index * shape[1]
                found += range(begin + (first if found else first - 1), begin + last)
            counted[index, last] = 1
            found.append(begin + last)
            places[:, number, : row.count] = found[:-1], found[1:]
            silent[number, : row.count] = (*row.is_silent, True)
        self._counted = to_device(counted, device)
        audio = [windows[number].positions for number, _ in rows]
        self._seen = to_device(np.array(audio, np.int32), device)
        self._places = to_device(places, device)
        self._silent = to_device(silent, device)
        self._window = to_device(np.array([number for number, _ in rows]), device)
        self._row = torch.arange(len(rows), device=device)[:, None]
        self._best: Tensor | None = None  # [W, heads]
        self._kept: Tensor | None = None  # [R, heads, L, P]
        self._is_last: Tensor | None = None  # [R, 1, 1, P]: the last position with audio
        if self._decoder.padding is not None:
            after = torch.nn.functional.pad(self._decoder.padding[..., 1:], (0, 1), value=True)
            self._is_last = after & ~self._decoder.padding

    def run(self) -> Callable[[], list[Indices]]:
        x = self._decoder.run(self._record, to_the_end=False)
        costs = self._costs()
        is_finite = torch.isfinite(x.float().sum() + costs.sum())
        counts = [row.count for row in self._windows]
        audio = [row.positions for row in self._windows]
        if has_kernels(costs.device):
            return _paths_by_kernels(costs, counts, audio, is_finite)
        check_finite(is_finite)
        found = start_positions(
            [
                each[:count, :positions].cpu().numpy()
                for each, count, positions in zip(costs, counts, audio, strict=True)
            ]
        )
        return lambda: found

    def _record(self, layer: int, q: Tensor, k: Tensor) -> None:
        """Keep the heads of sharpest attention among these and the ones kept before."""
        attention, squares = self._attention(self._decoder.scores(q, k, SHARPER))
        sharpness = self._over_parts(squares).sqrt().sum(dim=-1)  # [W, H]
        before = 0 if self._best is None else self._best.shape[1]
        if self._best is not None:
            sharpness = torch.cat([self._best, sharpness], dim=1)
        self._best, which = sharpness.topk(min(HEADS, sharpness.shape[1]), dim=1)
        which = which[self._window]  # [R, heads]
        new = attention[self._row, (which - before).clamp(min=0)]
        if self._kept is None:
            self._kept = new
        else:
            old = self._kept[self._row, which.clamp(max=before - 1)]
            self._kept = torch.where((which < before)[:, :, None, None], old, new)

    def _attention(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Smooth attention [R, H, L, P], in place of scores, and the sums of its squares over L."""
        if has_kernels(scores.device):
            from whisper_flash_attention.kernels.character_attention import smooth_attention

            squares = scores.new_empty((*scores.shape[:2], scores.shape[3]))
            smooth_attention(scores, self._counted, self._seen, squares)
            return scores, squares
        attention = torch.softmax(self._smooth(scores), dim=-1)
        attention.mul_(self._counted[:, None, :, None])
        return attention, attention.square().sum(dim=2)

    def _smooth(self, scores: Tensor) -> Tensor:
        """Median of 3 positions of scores [R, H, L, P]; the first and the last are unchanged."""
        if scores.shape[-1] < 3:
            return scores
        before, here, after = scores[..., :-2], scores[..., 1:-1], scores[..., 2:]
        least, most = torch.minimum(before, here), torch.maximum(before, here)
        median = torch.maximum(least, torch.minimum(most, after))
        if self._is_last is not None:
            median = torch.where(self._is_last[..., 1:-1], here, median)
        scores[..., 1:-1] = median
        return scores

    def _over_parts(self, x: Tensor) -> Tensor:
        """Sums over the parts of each window: x [R, ...] to [W, ...]."""
        return x.new_zeros(len(self._windows), *x.shape[1:]).index_add_(0, self._window, x)

    def _costs(self) -> Tensor:
        """The cost of each character, and the end, at each position: [W, N + 1, P] float32."""
        assert self._kept is not None
        kept = self._kept
        sums = self._over_parts(kept.sum(dim=2)).clamp(min=torch.finfo(torch.float32).tiny)
        weights = 1 / (kept.shape[1] * sums[self._window])  # [R, heads, P]
        shares = (kept * weights[:, :, None]).sum(dim=1).flatten(0, 1)
        before, own = (shares[each] for each in self._places)
        quiet = torch.stack([self._quiet(row) for row in self._windows])[:, None]
        signs = torch.where(self._silent, -QUIET, QUIET)[:, :, None]
        return (OWN - 1) * before - OWN * own + signs * quiet

    def _quiet(self, row: CharacterInput) -> Tensor:
        """How quiet each position of a window is: [P] float32, 0 to 1, and 0 after the audio."""
        levels = row.levels[: FRAMES_PER_POSITION * row.positions].float()
        count = levels.shape[0] // FRAMES_PER_POSITION
        quiet = levels.new_zeros(self._decoder.positions)
        if count:
            pairs = levels[: FRAMES_PER_POSITION * count].view(count, FRAMES_PER_POSITION)
            means = pairs.mean(dim=1)
            below = means.max() - means - SOFT
            quiet[:count] = (below / SLOPE).clamp(-1, 1) / 2 + 0.5
        return quiet


def _paths_by_kernels(
    costs: Tensor, counts: Sequence[int], audio: Sequence[int], is_finite: Tensor
) -> Callable[[], list[Indices]]:
    from whisper_flash_attention.kernels.dtw import token_starts

    device = costs.device
    # The kernel takes lengths as of a text with its end, of which it locates all but one.
    lengths, seen = to_device(np.array([[each + 1 for each in counts], audio], np.int32), device)
    rows, longest, width = costs.shape
    size = 1 << (longest - 1).bit_length()
    choices = torch.empty((rows, longest + width, size), dtype=torch.int8, device=device)
    starts = torch.zeros((rows, longest), dtype=torch.int32, device=device)
    token_starts(costs, lengths, seen, 0, choices, starts)
    arrived = to_host(starts, is_finite)

    def finish() -> list[Indices]:
        found, finite = arrived()
        check_finite(finite)
        positions = found.numpy().astype(np.int64)
        return [row[:count] for row, count in zip(positions, counts, strict=True)]

    return finish
