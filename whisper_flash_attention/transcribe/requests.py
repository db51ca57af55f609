"""Requests to the engine, of decode options, and what they gave."""

from __future__ import annotations

from whisper_flash_attention.engine.logits_processors import (
    LogitsProcessor,
    LogitsProcessors,
    MinLength,
    NoRepeatNgram,
    Normalise,
    RepetitionPenalty,
    Suppress,
    SuppressAtBegin,
    Timestamps,
)
from whisper_flash_attention.engine.request import Beams, DecodeOutput, Request
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.tokenizer import PRECISION, Vocabulary

# Timestamps from <|0.00|> to <|30.00|>.
STAMPS = 1501


class RequestBuilder:
    """Builds engine requests from decode options, and selects the best row of what was decoded."""

    def __init__(self, vocabulary: Vocabulary, options: DecodeOptions) -> None:
        self._vocabulary = vocabulary
        self._options = options
        self._suppress = Suppress(_suppressed(vocabulary, options.suppress_tokens))

    def width(self, temperature: float) -> int:
        """How many rows of a prompt each window takes at a temperature."""
        wanted = self._options.best_of if temperature > 0 else self._options.beam_size
        return wanted or 1

    def request(
        self, begin: int, length: int, temperature: float, probe: tuple[int, int] | None = None
    ) -> Request:
        """The request of windows whose prompts have one length.

        Args:
            begin: where in the prompt the result begins.
            length: of the prompt.
            probe: a token id and the position in the prompt at which its probability is read.
        """
        words, options = self._vocabulary, self._options
        most = words.positions
        if options.max_new_tokens is not None:
            most = min(most, length + options.max_new_tokens)
        beams = self._beams() if temperature == 0 and self.width(temperature) > 1 else None
        rules = self._rules(begin, length)
        return Request(
            # Beams add up log-probabilities, which must be those of what the rules left.
            processors=LogitsProcessors((*rules, Normalise()) if beams else rules),
            max_length=most,
            eos=(words.end,),
            pad=words.end,
            sample=temperature > 0,
            temperature=temperature or 1.0,
            beams=beams,
            want_logprobs=beams is None,
            probe=probe,
        )

    def best(
        self, decoded: DecodeOutput, windows: int, length: int
    ) -> list[tuple[list[int], float]]:
        """The best result of every window: its tokens up to the end, and the sum of the
        log-probabilities of them and of the end.

        Args:
            length: of the prompt.
        """
        end = self._vocabulary.end
        sequences = decoded.sequences[:, length:].tolist()
        rows = [row[: row.index(end)] if end in row else row for row in sequences]
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
            # As openai-whisper, which stops when this number of beams has ended.
            early_stopping=True,
            candidates=2 * size,
            patience=self._options.patience,
        )

    def _rules(self, begin: int, length: int) -> tuple[LogitsProcessor, ...]:
        options = self._options
        rules: list[LogitsProcessor] = []
        if options.repetition_penalty != 1:
            rules.append(RepetitionPenalty(options.repetition_penalty, begin))
        if options.no_repeat_ngram_size:
            rules.append(NoRepeatNgram(options.no_repeat_ngram_size, begin))
        rules.append(self._suppress)
        if options.suppress_blank:
            rules.append(SuppressAtBegin(self._vocabulary.at_begin, begin))
        if options.min_new_tokens:
            rules.append(MinLength(length + options.min_new_tokens, (self._vocabulary.end,)))
        rules.append(self._timestamps(begin))
        return tuple(rules)

    def _timestamps(self, begin: int) -> LogitsProcessor:
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


def _suppressed(vocabulary: Vocabulary, given: tuple[int, ...]) -> tuple[int, ...]:
    """Ids that are never sampled: those given, with the list of the checkpoint in place of -1."""
    always = vocabulary.suppressed if -1 in given else vocabulary.steering
    return tuple(dict.fromkeys((*always, *(each for each in given if each >= 0))))
