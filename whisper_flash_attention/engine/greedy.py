"""Choose the likeliest tokens under masks and the timestamp grammar, with few passes over scores.

The same tokens as `LogitsProcessors.apply` and an argmax give, where the host knows the tokens so
far: what the grammar forbids are a few ranges of ids, which are filled in place. NumPy goes through
a vocabulary's scores in microseconds with one thread, where PyTorch would start all of its threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from whisper_flash_attention.engine.logits_processors import KernelProcessors, Timestamps

Scores = npt.NDArray[np.float32]


class GreedyChooser:
    """Chooses the next token of rows that share their processors.

    Args:
        processors: what forbids tokens.
        vocabulary: number of scores of a row; unknown ids do nothing.
    """

    def __init__(self, processors: KernelProcessors, vocabulary: int) -> None:
        self._processors = processors
        stamps = processors.timestamps
        always = processors.suppress + ((stamps.no_timestamps,) if stamps else ())
        self._always, self._at_begin, self._waiting = (
            np.array([token for token in set(tokens) if token < vocabulary], np.int64)
            for tokens in (always, processors.suppress_at_begin, processors.waiting)
        )

    def choose(
        self, logits: torch.Tensor, rows: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[float]]:
        """Choose a token for every row.

        Args:
            logits: [N, V] float32 on the CPU; forbidden ones become minus infinity in place.
            rows: the tokens of each so far, prompt included.

        Returns:
            The tokens, and their log-probabilities among what is allowed.
        """
        processors, scores = self._processors, logits.numpy()
        scores[:, self._always] = -math.inf
        for mine, row in zip(scores, rows, strict=True):
            if len(row) == processors.begin_index:
                mine[self._at_begin] = -math.inf
            if len(row) < processors.min_length:
                mine[self._waiting] = -math.inf
            if processors.timestamps is not None:
                _apply_grammar(processors.timestamps, mine, row)
        tokens: list[int] = scores.argmax(axis=1).tolist()
        logprobs = torch.log_softmax(logits, dim=-1)
        return tokens, [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]


def are_finite(logits: torch.Tensor) -> list[bool]:
    """Whether rows [N, V] float32 on the CPU hold neither NaN nor infinity (nor sum up to it)."""
    with np.errstate(all="ignore"):
        found: list[bool] = np.isfinite(logits.numpy().sum(axis=1)).tolist()
    return found


def _apply_grammar(grammar: Timestamps, scores: Scores, tokens: Sequence[int]) -> None:
    """Forbid what may not follow `tokens` in one row of scores [V]."""
    begin, size = grammar.timestamp_begin, scores.size
    text_from, stamp_from, stamp_end = grammar.next_limits(tokens, size)
    for start, end in ((0, text_from), (begin, stamp_from), (stamp_end, size)):
        scores[start:end] = -math.inf
    if not grammar.detect or text_from >= begin or stamp_from >= stamp_end:
        return
    text, stamps = scores[:begin], scores[stamp_from:stamp_end]
    likeliest = stamps.max()
    if not math.isfinite(likeliest):  # every timestamp is forbidden
        return
    total = likeliest + np.log(np.exp(stamps - likeliest).sum())
    if total > text.max():
        text.fill(-math.inf)
