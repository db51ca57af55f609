"""Decode windows of 30 s, many at a time, with fallback to higher temperatures where it is needed.

A result needs fallback if its text repeats itself (it compresses too well) or if its tokens are
unlikely; not if it is silence. "Robust Speech Recognition via Large-Scale Weak Supervision"
(Radford et al., 2022), section 4.5, and `decode_with_fallback` in whisper/transcribe.py of OpenAI.
The encoder states of a window are computed once, however often it is decoded.

At temperature 0 decoding is greedy or a beam search; above it several results may be sampled, side
by side on the same encoder states, of which the likeliest is kept. All are compared by the
log-probabilities of their tokens under the scores after the logits processors.

A first result that fails one threshold alone is doubtful, unless there is certainly speech. Its
window is decoded once more, greedily and without context, with the tokens of descriptions such as
"[Music]" or "(wind)"; while these are suppressed, a model has to write words for any sound. Where
it now writes none, nobody speaks; otherwise the first result stands. It does so in English, in
which most descriptions are: the language that is detected of noise is any.

First results differ in length and share slots of the engine (`decode_windows`): a window that has
ended makes room for the next. Windows that need fallback are few; they are put aside with their
encoder states until some can be decoded together.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_flash_attention.engine.cuda_graphs import to_device
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.request import Request, stays_on_device
from whisper_flash_attention.engine.scheduler import DecodeJob, FinishedJob, stream_key
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.prompts import PromptBuilder
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.requests import RequestBuilder
from whisper_flash_attention.transcribe.tokenizer import Vocabulary

# Descriptions of sounds, the last of which may be cut off; and those of speech that is not clear.
DESCRIPTION = re.compile(r"[\[［【][^\]］】]*[\]］】]?|[(（][^)）]*[)）]?|\*[^*]*\*?")  # noqa: RUF001
UNCLEAR = re.compile("speak|speech|talk|chatter|foreign|inaudible|indistinct|unintelligible", re.I)
# With a probability of no speech below this, a window is taken to hold speech.
LEAST_NO_SPEECH = 0.05
# Tokens of a result with descriptions, at most: one that is longer has words, or repeats itself.
MOST_DESCRIBING = 64


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class DecodingResult:
    """What a window was decoded to.

    Args:
        tokens: without the prompt and the end; a prefix is the beginning.
        text: theirs, without timestamps.
        avg_logprob: mean log-probability of the tokens and the end, without the prefix.
        no_speech_prob: probability that there is no speech; None if it was not computed.
        compression_ratio: length of the text to its length when compressed.
        temperature: at which it was decoded.
        is_sound: whether the window, decoded with descriptions of sounds, has no words.
    """

    tokens: tuple[int, ...]
    text: str
    avg_logprob: float
    no_speech_prob: float | None
    compression_ratio: float
    temperature: float
    is_sound: bool = False


@dataclass(frozen=True, slots=True)
class _DecodedRow:
    """A decoded row: a prefix, tokens up to the end, and the sum of their log-probabilities."""

    prefix: Sequence[int]
    tokens: list[int]
    sum_logprobs: float
    no_speech_prob: float | None


# Windows that fall back together, as a share of the slots: the slots wait meanwhile, and encoder
# states are held until then.
SLOTS_PER_FALLBACK = 8


@dataclass(frozen=True, eq=False)
class Window:
    """A window to be decoded.

    Args:
        states: the encoder's, `[S, D]`, in memory of their own.
        prompt: of any length.
        owner: what it belongs to, by the name that errors give it.
    """

    states: Tensor
    prompt: Sequence[int]
    owner: Any

    def __str__(self) -> str:
        return str(self.owner)


class WindowDecoder:
    """Decodes windows on an engine, each with a prompt of its own.

    Args:
        always_probe_no_speech: compute the probability of silence even if no threshold needs it.
    """

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        tokenizer: Any,
        options: DecodeOptions,
        *,
        always_probe_no_speech: bool = False,
    ) -> None:
        self.engine = engine
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._options = options
        self._requests = RequestBuilder(vocabulary, options)
        self._prompt_builder = PromptBuilder(vocabulary, tokenizer, options)
        self._probes_no_speech = always_probe_no_speech or options.no_speech_threshold is not None
        self._describing = self._describing_requests()
        first, *others = options.temperatures
        # Temperatures in the order in which they are tried; None is the look for descriptions.
        self._attempts = (first, *([None] if self._describing else []), *others)

    def decode(self, states: Tensor, prompts: Sequence[Sequence[int]]) -> list[DecodingResult]:
        """The first result of every window that needs no fallback; otherwise the likeliest.

        (openai-whisper takes the last one then, which tends to be noise; faster-whisper as here.)

        Args:
            states: the encoder's, `[B, S, D]`.
            prompts: of every window; those of one length are decoded together.
        """
        return self.decode_first(states, prompts)()

    def decode_first(
        self,
        states: Tensor,
        prompts: Sequence[Sequence[int]],
        meanwhile: Callable[[], None] = _nothing,
    ) -> Callable[[], list[DecodingResult]]:
        """As `decode`, but work of the host alone is left to the function returned.

        That is all that follows the first results if there is only one temperature: otherwise they
        are judged at once.

        Args:
            meanwhile: called once, at a time when the device has work to do.
        """
        first = self._options.temperatures[0]
        rows = self._decode_at(first, states, prompts, range(len(prompts)), meanwhile=meanwhile)
        if len(self._attempts) == 1:
            return lambda: [self._result(each, first) for each in rows]
        results = self.decode_with_fallback(
            states, prompts, [self._result(each, first) for each in rows]
        )
        return lambda: results

    def decode_with_fallback(
        self, states: Tensor, prompts: Sequence[Sequence[int]], first: Sequence[DecodingResult]
    ) -> list[DecodingResult]:
        """As `decode`, of windows that have their first results."""
        results = [[result] for result in first]
        while waiting := [i for i, each in enumerate(results) if not self.is_settled(each)]:
            self.decode_again(
                _rows(states, waiting), [prompts[i] for i in waiting], [results[i] for i in waiting]
            )
        return [self.best(each) for each in results]

    def decode_again(
        self,
        states: Tensor,
        prompts: Sequence[Sequence[int]],
        results: Sequence[list[DecodingResult]],
    ) -> None:
        """Decode windows as it follows on the results they have, and add these.

        Args:
            states: the encoder's, `[B, S, D]`.
            prompts: of every window.
            results: of every window so far, as many of each; none before the first.
        """
        temperature = self._attempts[len(results[0])]
        if temperature is None:
            self._describe(states, results)
            return
        silence = [each[0].no_speech_prob for each in results] if results[0] else None
        rows = self._decode_at(temperature, states, prompts, range(len(prompts)), silence)
        for found, row in zip(results, rows, strict=True):
            found.append(self._result(row, temperature))

    def _describe(self, states: Tensor, results: Sequence[list[DecodingResult]]) -> None:
        """Add the first results again, with whether their windows are sounds without speech."""
        doubtful = [i for i, each in enumerate(results) if self._is_doubtful(each[0])]
        languages = self._vocabulary.languages
        language = "en" if "en" in languages else next(iter(languages), "en")
        prompts = [self._vocabulary.prompt(language, "transcribe")] * len(results)
        silence = [results[index][0].no_speech_prob for index in doubtful]
        rows = self._decode_at(None, states, prompts, doubtful, silence)
        sounds = {
            index
            for index, row in zip(doubtful, rows, strict=True)
            if not has_words(self.text(row.tokens))
        }
        for index, found in enumerate(results):
            found.append(replace(found[0], is_sound=index in sounds))

    def is_settled(self, results: Sequence[DecodingResult]) -> bool:
        """Whether a window with these results is not decoded again."""
        last = results[-1]
        if len(results) == len(self._attempts):
            return True
        return not (self.needs_fallback(last) or (len(results) == 1 and self._is_doubtful(last)))

    @cached_property
    def fits_slots(self) -> bool:
        """Whether first results can share slots, and end after different numbers of tokens."""
        least, most = self._options.min_new_tokens, self._options.max_new_tokens
        return stays_on_device(self._any_request) and (most is None or (least or 0) < most)

    @cached_property
    def stream_key(self) -> tuple[object, ...]:
        """What decoders whose windows share slots have in common; it must have `fits_slots`."""
        request = self._any_request
        if self._probes_no_speech:
            request = replace(request, probe=(self._vocabulary.no_speech, 0))
        return stream_key(request)

    @property
    def _any_request(self) -> Request:
        return self._requests.request(1, 1, self._options.temperatures[0])

    @property
    def max_length(self) -> int:
        """Tokens of a window at most, the prompt included."""
        return self._vocabulary.positions

    def job(self, states: Tensor, prompt: Sequence[int], tag: object) -> DecodeJob:
        """The job that decodes a window, of states `[S, D]`, in a slot to its first result."""
        begin, first = self._vocabulary.sample_begin(prompt), self._options.temperatures[0]
        request = self._requests.request(begin, len(prompt), first, self._probe(prompt))
        return DecodeJob(states, prompt, request, tag)

    def result(self, finished: FinishedJob) -> DecodingResult:
        """The first result of a window that was decoded in a slot."""
        prompt, tokens = finished.job.prompt, list(finished.tokens)
        if tokens and tokens[-1] == self._vocabulary.end:
            tokens.pop()
        prefix = prompt[self._vocabulary.sample_begin(prompt) :]
        row = _DecodedRow(prefix, tokens, finished.sum_logprob, finished.probe_probability)
        return self._result(row, self._options.temperatures[0])

    def decode_windows(
        self, more: Callable[[int], Sequence[Window]], slots: int
    ) -> Iterator[tuple[Window, DecodingResult]]:
        """The result of every window, as `decode` gives it, as soon as it is known.

        The decoder must have `fits_slots`.

        Args:
            more: gives at most this many windows; it is called again when results have been
                taken, until it has none after the last result.
            slots: windows that are decoded side by side.

        Raises:
            NotFinite: NaN or infinity in the logits of a window.
        """
        pending: list[tuple[Window, DecodingResult]] = []
        most, since = max(1, slots // SLOTS_PER_FALLBACK), 0

        def jobs(count: int) -> list[DecodeJob]:
            return [self.job(each.states, each.prompt, each) for each in more(count)]

        while True:
            has_any = False
            for finished in self.engine.decode_stream(jobs, slots, max_length=self.max_length):
                has_any = True
                window, result = finished.job.tag, self.result(finished)
                if self.is_settled([result]):
                    yield window, result
                else:
                    pending.append((window, result))
                since = since + 1 if pending else 0
                # Bounds how long the first of them waits.
                if len(pending) >= most or since >= slots:
                    yield from self._fall_back(pending)
                    pending, since = [], 0
            if not has_any:
                return
            # Further windows may depend on these results.
            yield from self._fall_back(pending)
            pending, since = [], 0

    def _fall_back(
        self, pending: Sequence[tuple[Window, DecodingResult]]
    ) -> Iterator[tuple[Window, DecodingResult]]:
        if pending:
            states = torch.stack([window.states for window, _ in pending])
            prompts = [window.prompt for window, _ in pending]
            results = self.decode_with_fallback(states, prompts, [first for _, first in pending])
            for (window, _), result in zip(pending, results, strict=True):
                yield window, result

    def best(self, results: Sequence[DecodingResult]) -> DecodingResult:
        """The last result if it needs no fallback, else the likeliest without repetition."""
        if not self.needs_fallback(results[-1]):
            return results[-1]
        return max(results, key=lambda each: (not self._repeats(each), each.avg_logprob))

    def begin(self, recording: Recording) -> None:
        """Make the initial prompt of a recording its context.

        Raises:
            OptionError: the initial prompt contains a special token.
        """
        recording.context[:0] = self._prompt_builder.tokens(recording.options.initial_prompt)

    def prompt(self, recording: Recording, language: str, *, is_first: bool) -> list[int]:
        """The prompt of a window of a recording.

        Args:
            language: code of the language spoken in the window.
            is_first: whether it is the first window of its recording.

        Raises:
            OptionError: as `PromptBuilder.prompt`.
        """
        return self._prompt_builder.prompt(
            recording.options,
            language,
            recording.context,
            is_first=is_first,
            context_start=recording.context_start,
        )

    def detect_languages(self, recordings: Sequence[Recording], states: Tensor) -> list[str]:
        """Detect the language of a window of each recording, among its candidates if it has any;
        note it there, and return its code.

        Args:
            states: encoder states `[B, S, D]`, one row per recording.
        """
        found = [
            among(recording.options.candidates, probabilities)
            for recording, probabilities in zip(
                recordings, self.language_probabilities(states), strict=True
            )
        ]
        for recording, probabilities in zip(recordings, found, strict=True):
            recording.language = next(iter(probabilities))
            recording.detected.append(probabilities)
        return [next(iter(probabilities)) for probabilities in found]

    def language_probabilities(self, states: Tensor) -> list[dict[str, float]]:
        """Probabilities of all languages in every window, `[B, S, D]`, by code, likeliest first.

        They add up to 1. An English-only model knows one.
        """
        known = self._vocabulary.languages
        if not known:
            return [{"en": 1.0} for _ in range(len(states))]
        ids = torch.tensor(list(known.values()), device=states.device)
        logits = self.engine.language_logits(states, self._vocabulary.start, ids)
        chances = logits.double().softmax(dim=-1).tolist()
        return [likeliest_first(zip(known, row, strict=True)) for row in chances]

    def _describing_requests(self) -> RequestBuilder | None:
        """Requests of results that may describe sounds; None if no window is decoded so.

        That needs windows that may be silence, and descriptions that are suppressed otherwise.
        """
        options, words = self._options, self._vocabulary
        suppressed = set(words.suppressed) if -1 in options.suppress_tokens else set()
        may_be_silence = options.check_speech and options.no_speech_threshold is not None
        if not may_be_silence or not suppressed - set(words.steering):
            return None
        return RequestBuilder(
            words, DecodeOptions(suppress_tokens=(), max_new_tokens=MOST_DESCRIBING)
        )

    def _decode_at(
        self,
        temperature: float | None,
        states: Tensor,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        silence: Sequence[float | None] | None = None,
        meanwhile: Callable[[], None] = _nothing,
    ) -> list[_DecodedRow]:
        """Decode the windows `indices`, in that order; `silence` where it is known.

        At temperature None it is greedy, with descriptions of sounds.
        """
        found: dict[int, _DecodedRow] = {}
        known = None if silence is None else dict(zip(indices, silence, strict=True))
        requests = self._requests if temperature is not None else self._describing
        assert requests is not None
        width = requests.width(temperature or 0.0)
        for group in self._alike(prompts, indices):
            rows = to_device(np.array([prompts[index] for index in group]), states.device)
            begin, length = self._vocabulary.sample_begin(prompts[group[0]]), rows.shape[1]
            probe = self._probe(prompts[group[0]]) if known is None else None
            request = requests.request(begin, length, temperature or 0.0, probe)
            rows = rows.repeat_interleave(width, dim=0)
            decoded = self.engine.decode(_rows(states, group), rows, request, meanwhile)
            meanwhile = _nothing
            silent = [None if known is None else known[index] for index in group]
            if decoded.probe_probability is not None:
                silent = decoded.probe_probability[::width].tolist()
            best = requests.best(decoded, len(group), length)
            for index, (tokens, total), probability in zip(group, best, silent, strict=True):
                found[index] = _DecodedRow(prompts[index][begin:], tokens, total, probability)
        return [found[index] for index in indices]

    def _probe(self, prompt: Sequence[int]) -> tuple[int, int] | None:
        """<|nospeech|> at <|startoftranscript|>, if its probability is needed."""
        if not self._probes_no_speech:
            return None
        return self._vocabulary.no_speech, list(prompt).index(self._vocabulary.start)

    def _alike(self, prompts: Sequence[Sequence[int]], indices: Sequence[int]) -> list[list[int]]:
        """Those of `indices` whose prompts have one length and start at one place, together."""
        groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index in indices:
            prompt = list(prompts[index])
            groups[len(prompt), prompt.index(self._vocabulary.start)].append(index)
        return list(groups.values())

    def _result(self, row: _DecodedRow, temperature: float) -> DecodingResult:
        tokens = (*row.prefix, *row.tokens)
        text = self.text(tokens)
        return DecodingResult(
            tokens=tokens,
            text=text,
            avg_logprob=row.sum_logprobs / (len(row.tokens) + 1),
            no_speech_prob=row.no_speech_prob,
            compression_ratio=compression_ratio(text),
            temperature=temperature,
        )

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without timestamps and blanks around it."""
        plain = [token for token in tokens if token < self._vocabulary.end]
        text: str = self._tokenizer.decode(plain)
        return text.strip()

    def needs_fallback(self, result: DecodingResult) -> bool:
        """Whether a result repeats itself or is unlikely, and is not silence."""
        if self.is_silent(result):
            return False
        least = self._options.logprob_threshold
        return self._repeats(result) or (least is not None and result.avg_logprob < least)

    def _repeats(self, result: DecodingResult) -> bool:
        most = self._options.compression_ratio_threshold
        return most is not None and result.compression_ratio > most

    def is_credible(self, result: DecodingResult) -> bool:
        """Whether a result to sound that may be no speech can be believed.

        Each threshold alone can refuse it, whereas other windows are silent by two together; those
        that are switched off have their defaults here.
        """
        usual, options = DecodeOptions(), self._options
        assert usual.no_speech_threshold is not None and usual.logprob_threshold is not None
        most = options.no_speech_threshold
        most = usual.no_speech_threshold if most is None else most
        least = options.logprob_threshold
        least = usual.logprob_threshold if least is None else least
        is_speech = result.no_speech_prob is None or result.no_speech_prob <= most
        is_first = result.temperature == options.temperatures[0]
        return is_speech and is_first and result.avg_logprob >= least and not self._repeats(result)

    def is_silent(self, result: DecodingResult) -> bool:
        """Whether nobody speaks: silence is probable and the tokens are not, or it is a sound."""
        least = self._options.logprob_threshold
        is_unlikely = least is None or result.avg_logprob < least
        return result.is_sound or (self._may_be_silence(result) and is_unlikely)

    def _is_doubtful(self, result: DecodingResult) -> bool:
        """Whether a first result is to be checked: it fails a threshold, and may be silence."""
        if self._describing is None or (result.no_speech_prob or 0.0) < LEAST_NO_SPEECH:
            return False
        fails = self._may_be_silence(result) or self.needs_fallback(result)
        return fails and not self.is_silent(result)

    def _may_be_silence(self, result: DecodingResult) -> bool:
        bound, probability = self._options.no_speech_threshold, result.no_speech_prob
        return bound is not None and probability is not None and probability > bound


def has_words(text: str) -> bool:
    """Whether a text has words, or describes speech; "[Music]" does neither."""
    return any(each.isalnum() for each in DESCRIPTION.sub("", text)) or bool(UNCLEAR.search(text))


def likeliest_first(chances: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Probabilities by name, in descending order."""
    return dict(sorted(chances, key=lambda each: -each[1]))


def among(languages: Sequence[str], probabilities: dict[str, float]) -> dict[str, float]:
    """Probabilities of some languages alone, which add up to 1; of all if there are none."""
    if not languages:
        return probabilities
    total = sum(probabilities[language] for language in languages)
    return {code: p / total for code, p in probabilities.items() if code in languages}


def compression_ratio(text: str) -> float:
    """Bytes of a text to its bytes when compressed by zlib: above 2.4 it repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def _rows(states: Tensor, indices: list[int]) -> Tensor:
    """Some clips' states, without a copy if they are all."""
    return states if len(indices) == len(states) else states[indices]
