"""Whether the reference's own scores explain that another token was chosen.

All scores here are the reference's, or those of float32 stock; ours are never consulted, so that a
broken model cannot excuse itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

from whisper_flash_attention.parity.decode import (
    Ids,
    decode,
    log_probabilities,
    scores_after,
)
from whisper_flash_attention.parity.models import Models
from whisper_flash_attention.parity.settings import Mode

LIKELIEST = 10


@dataclass(frozen=True, slots=True)
class Tie:
    """How near a choice was.

    Attributes:
        gap: how much the scores would have to change for the other choice, in logits; for beams in
            summed log-probabilities, and for samples in log-probabilities over the temperature.
            Infinity where the reference's rules forbid it.
        bound: up to what the dtype's error explains it, in the same unit.
        what: which two things are compared.
    """

    gap: float
    bound: float
    what: str

    @property
    def explained(self) -> bool:
        """Whether it was a near-tie. A gap that is not a number never is."""
        return self.gap <= self.bound


def shortfall(scores: torch.Tensor, token: int, first_timestamp: int | None) -> float:
    """How far `token` is from being chosen, in the unit of the scores.

    It is twice the least e for which scores that are off by e or less would have it chosen.

    Args:
        scores: `[vocabulary]`, minus infinity for what is forbidden.
        token: the id in question.
        first_timestamp: id of the first timestamp where timestamps are decoded: they are chosen if,
            together, they are likelier than the best text token (Radford et al., 2022, section 4.5,
            and OpenAI's `ApplyTimestampRules`). None without timestamps.
    """
    if not math.isfinite(scores[token]):
        return math.inf
    if first_timestamp is None:
        return float(scores.max() - scores[token])
    wanted = scores[token]
    best_text, timestamps = scores[:first_timestamp].max(), scores[first_timestamp:]
    if token < first_timestamp:
        missing = (best_text - wanted, timestamps.logsumexp(0) - wanted)
    else:
        # Where all timestamps rise together, none of them may pass the wanted one.
        missing = (timestamps.max() - wanted, best_text - timestamps.clamp(max=wanted).logsumexp(0))
    return max(0.0, *map(float, missing))


def deviation(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error in the distance between the likeliest token and the nine after it, in logits.

    Args:
        scores, truth: `[vocabulary]`; "likeliest" is by `truth`.
    """
    best = truth.topk(LIKELIEST)
    error = (scores - truth)[best.indices[best.values.isfinite()]]
    return float((error - error[0]).abs().max())


@dataclass
class Judge:
    """Explains differences between ours and stock, one recording at a time.

    Args:
        models: the models that are compared.
        bound: gap in logits that explains a difference.
        seed: with which samples were drawn.
        fixed: whether only `bound` counts, and not the reference's own error at the position.
    """

    models: Models
    bound: float
    seed: int = 0
    fixed: bool = False

    def next_token(
        self,
        features: torch.Tensor,
        mode: Mode,
        language: str | None,
        prefix: Sequence[int],
        tokens: tuple[int, int],
    ) -> Tie:
        """Look at two tokens (the reference's, ours) after the same prefix.

        Both must be within the bound of being chosen by float32 stock. In half precision the bound
        is at least twice the error that stock itself makes there against float32.
        """

        def scores(model: Any) -> torch.Tensor:
            return scores_after(model, features, mode, prefix, language=language)[0]

        first = self.models.first_timestamp if mode.has_timestamps else None
        return self.judge(scores, tokens, first, "next token")

    def language(self, features: torch.Tensor, tokens: tuple[int, int]) -> Tie:
        """Look at two detected languages: token ids, the reference's and ours."""
        known = torch.tensor(sorted(self.models.language_ids.values()))

        def scores(model: Any) -> torch.Tensor:
            start = [int(model.generation_config.decoder_start_token_id)]
            found = log_probabilities(model, features, start, [0])[0].cpu()
            return torch.full_like(found, -torch.inf).index_copy(0, known, found[known])

        return self.judge(scores, tokens, None, "language")

    def judge(
        self, scores: Any, tokens: tuple[int, int], first_timestamp: int | None, what: str
    ) -> Tie:
        """Compare by `scores(model)`, a function that gives `[vocabulary]` of a stock model."""
        truth, bound = scores(self.models.yardstick or self.models.stock), self.bound
        if self.models.yardstick is not None and not self.fixed:
            bound = max(bound, 2 * deviation(scores(self.models.stock), truth))
        gap = max(shortfall(truth, token, first_timestamp) for token in tokens)
        return Tie(gap, bound, what)

    def draw(
        self,
        features: torch.Tensor,
        mode: Mode,
        language: str | None,
        prefix: Sequence[int],
        tokens: tuple[int, int],
    ) -> Tie:
        """Look at a draw that came out otherwise: at the random numbers that it was made with.

        PyTorch draws one of several on a CPU by the largest p / q, q from the exponential
        distribution (`aten/src/ATen/native/Distributions.cpp`), so that log p - log q tells how
        near another outcome was.
        """
        scores, state = scores_after(
            self.models.stock, features, mode, prefix, language=language, seed=self.seed
        )
        generator = torch.Generator()
        generator.set_state(state)
        chances = scores.softmax(-1)[None]
        drawn = torch.empty_like(chances).exponential_(1, generator=generator)[0]
        keys = scores.log_softmax(-1) - drawn.log()
        return Tie(max(shortfall(keys, token, None) for token in tokens), self.bound, "draw")

    def beams(
        self,
        features: torch.Tensor,
        mode: Mode,
        language: str | None,
        prompt: Sequence[int],
        sequences: tuple[Ids, Ids],
    ) -> Tie:
        """Look at two results of a beam search: the reference's and ours, without the prompt.

        Where the reference drops ours on the way, the gap is what it lacked to its worst beam;
        else it is what our final score lacks to the reference's, times our length. Errors of n
        tokens add up as errors do that know nothing of each other: the bound grows by sqrt(n).
        """
        chosen, ours = (self._ended(prompt, ids) for ids in sequences)
        trace = BeamTrace(ours)
        stock = self.models.stock
        decode(stock, features, mode, language=language, seed=self.seed, processor=trace)
        if trace.dropped_at is not None:
            what = f"our beam, dropped at token {trace.dropped_at}"
            return Tie(trace.missing, self.bound * math.sqrt(trace.dropped_at), what)
        better, worse = (self._score(features, prompt, ids) for ids in (chosen, ours))
        gap = max((better - worse) * len(ours), trace.missing_at_end, 0.0)
        return Tie(gap, self.bound * math.sqrt(len(ours)), "score of the sequence")

    def _ended(self, prompt: Sequence[int], ids: Ids) -> Ids:
        """With the end of text, unless it was the length that ended it."""
        room = self.models.longest - len(prompt)
        return [*ids, self.end_of_text] if len(ids) < room else ids

    def _score(self, features: torch.Tensor, prompt: Sequence[int], ids: Ids) -> float:
        """Summed log-probability over length to the power of the length penalty."""
        table = log_probabilities(self.models.stock, features, prompt, ids).cpu()
        penalty = self.models.stock.generation_config.length_penalty
        total = float(table.gather(1, torch.tensor(ids)[:, None]).sum())
        return total / float(len(ids) ** (1.0 if penalty is None else penalty))

    @property
    def end_of_text(self) -> int:
        """The id that ends a text."""
        end = self.models.stock.generation_config.eos_token_id
        return int(end[0] if isinstance(end, list) else end)


class BeamTrace(LogitsProcessor):
    """Follows one sequence through a beam search of one recording, and changes nothing.

    Args:
        target: the sequence after the prompt, with its end of text.

    Attributes:
        dropped_at: how many tokens of it the search had seen when no beam began with them any more;
            None if it was among the beams to its end, or until the search stopped.
        missing: what the summed log-probability of those tokens lacked to the worst beam.
        missing_at_end: what it lacked, with its last token, to the worst candidate for a beam.
    """

    def __init__(self, target: Sequence[int]) -> None:
        self.target = tuple(target)
        self.dropped_at: int | None = None
        self.missing = math.nan
        self.missing_at_end = 0.0
        self._prompt_length: int | None = None
        self._totals: dict[tuple[int, ...], float] = {(): 0.0}
        self._last: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1]
        step = input_ids.shape[1] - self._prompt_length
        if self.dropped_at is not None or step >= len(self.target):
            return scores
        rows = [tuple(row) for row in input_ids[:, self._prompt_length :].tolist()]
        if step:
            self._extend(rows)
        self._last = dict(zip(rows, scores.float().cpu(), strict=True))
        if self.target[:step] not in self._totals:
            self.dropped_at = step
            self.missing = min(self._totals.values()) - self._candidate
            return scores
        self._look_ahead(step, beams=len(rows))
        return scores

    def _extend(self, rows: list[tuple[int, ...]]) -> None:
        """Add what each beam's last token brought to its sum."""
        self._totals = {
            row: self._totals[row[:-1]] + float(self._last[row[:-1]][row[-1]]) for row in rows
        }

    def _look_ahead(self, step: int, beams: int) -> None:
        """Note what the sequence will have with its next token, and what that lacks at its end."""
        prefix, token = self.target[:step], self.target[step]
        self._candidate = self._totals[prefix] + float(self._last[prefix][token])
        if step == len(self.target) - 1:
            best = torch.cat(
                [total + self._last[row].topk(beams).values for row, total in self._totals.items()]
            )
            worst = float(best.topk(beams).values[-1])
            self.missing_at_end = max(0.0, worst - self._candidate)
