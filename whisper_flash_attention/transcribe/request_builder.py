"""How an result is searched for at a temperature: the likeliest token each time, beams, or draws.

At temperature 0 there may be several beams; above it several results may be drawn, side by side on
the same encoder states, of which the likeliest is kept. All are compared by their tokens'
log-probabilities under the scores after the rules ("Robust Speech Recognition via Large-Scale Weak
Supervision", Radford et al., 2022, section 4.5).
"""

from __future__ import annotations

from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.logits_processors import (
    MinLength,
    NoRepeatNgram,
    Normalise,
    RepetitionPenalty,
    Rule,
    Rules,
    Suppress,
    SuppressAtBegin,
    Timestamps,
)
from whisper_flash_attention.engine.request import Beams, Decoded, Request
from whisper_flash_attention.transcribe.vocabulary import PRECISION, Vocabulary

# Timestamps from <|0.00|> to <|30.00|>.
STAMPS = 1501


class RequestBuilder:
    """Makes requests of decode options, and takes the best of what the engine results."""

    def __init__(self, vocabulary: Vocabulary, options: DecodeOptions) -> None:
        self._vocabulary = vocabulary
        self._options = options
        self._suppressed = _suppressed(vocabulary, options.suppress_tokens)

    def width(self, temperature: float) -> int:
        """How many rows of a prompt each window takes at a temperature."""
        wanted = self._options.best_of if temperature > 0 else self._options.beam_size
        return wanted or 1

    def request(
        self, begin: int, length: int, temperature: float, watch: tuple[int, int] | None = None
    ) -> Request:
        """What the engine is asked for.

        Args:
            begin: where in the prompt the result begins.
            length: of the prompt.
            watch: as the engine takes it.
        """
        words, options = self._vocabulary, self._options
        most = words.positions
        if options.max_new_tokens is not None:
            most = min(most, length + options.max_new_tokens)
        beams = self._beams() if temperature == 0 and self.width(temperature) > 1 else None
        rules = self._rules(begin, length)
        return Request(
            # Beams add up log-probabilities, which must be those of what the rules left.
            rules=Rules((*rules, Normalise()) if beams else rules),
            max_length=most,
            eos=(words.end,),
            pad=words.end,
            sample=temperature > 0,
            temperature=temperature or 1.0,
            beams=beams,
            want_logprobs=beams is None,
            watch=watch,
        )

    def best(self, decoded: Decoded, windows: int, length: int) -> list[tuple[list[int], float]]:
        """The best result of every window: its tokens up to the end, and the sum of the
        log-probabilities of them and of the end.

        Args:
            length: of the prompt.
        """
        end = self._vocabulary.end
        rows = [_up_to(end, row) for row in decoded.sequences[:, length:].tolist()]
        penalty = self._options.length_penalty
        if decoded.beam_indices is not None:
            assert decoded.sequences_scores is not None
            counts = (decoded.beam_indices >= 0).sum(dim=1)
            sums = (decoded.sequences_scores * counts**penalty).tolist()
            return list(zip(rows, sums, strict=True))
        assert decoded.sum_logprobs is not None
        sums = decoded.sum_logprobs.tolist()
        draws = len(rows) // windows
        found = []
        for first in range(0, len(rows), draws):
            mine = range(first, first + draws)
            best = max(mine, key=lambda row: sums[row] / (len(rows[row]) + 1) ** penalty)
            found.append((rows[best], sums[best]))
        return found

    def _beams(self) -> Beams:
        size = self.width(0.0)
        return Beams(
            num_beams=size,
            num_return_sequences=1,
            length_penalty=self._options.length_penalty,
            # As openai-whisper, which stops when so many have ended.
            early_stopping=True,
            candidates=2 * size,
        )

    def _rules(self, begin: int, length: int) -> tuple[Rule, ...]:
        options = self._options
        rules: list[Rule] = []
        if options.repetition_penalty != 1:
            rules.append(RepetitionPenalty(options.repetition_penalty, begin))
        if options.no_repeat_ngram_size:
            rules.append(NoRepeatNgram(options.no_repeat_ngram_size, begin))
        rules.append(Suppress(self._suppressed))
        if options.suppress_blank:
            rules.append(SuppressAtBegin(self._vocabulary.at_begin, begin))
        if options.min_new_tokens:
            rules.append(MinLength(length + options.min_new_tokens, (self._vocabulary.end,)))
        rules.append(self._timestamps(begin))
        return tuple(rules)

    def _timestamps(self, begin: int) -> Rule:
        """The grammar of timestamps, or none of them."""
        words, latest = self._vocabulary, self._options.max_initial_timestamp
        if self._options.without_timestamps:
            return Suppress(tuple(range(words.no_timestamps, words.timestamp_begin + STAMPS)))
        return Timestamps(
            timestamp_begin=words.timestamp_begin,
            begin_index=begin,
            eos=words.end,
            no_timestamps=words.no_timestamps,
            max_initial=None if latest is None else round(latest / PRECISION),
        )


def _suppressed(vocabulary: Vocabulary, asked: tuple[int, ...]) -> tuple[int, ...]:
    """Ids that are never said: those asked for, the checkpoint's list in place of -1."""
    always = vocabulary.suppressed if -1 in asked else vocabulary.steering
    return tuple(dict.fromkeys((*always, *(each for each in asked if each >= 0))))


def _up_to(end: int, row: list[int]) -> list[int]:
    return row[: row.index(end)] if end in row else row
