"""Decode windows of 30 s, many at a time, and again at higher temperatures where an answer is bad.

An answer is bad if its text repeats itself (it compresses too well) or if its tokens are unlikely;
not if nobody speaks. "Robust Speech Recognition via Large-Scale Weak Supervision" (Radford et al.,
2022), section 4.5, and `decode_with_fallback` in OpenAI's whisper/transcribe.py. The encoder's
states of a window are computed once, however often it is decoded.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.loop import Engine
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.rules import Rules
from whisper_flash_attention.transcribe.searching import Search
from whisper_flash_attention.transcribe.vocabulary import Vocabulary


@dataclass(frozen=True)
class Answer:
    """What a window says.

    Args:
        tokens: without the prompt and the end; the prefix that was asked for is the beginning.
        text: theirs, without timestamps.
        avg_logprob: mean log-probability of the tokens and the end, without the prefix.
        no_speech_prob: probability that nobody speaks; None if that was not asked for.
        compression_ratio: length of the text to its length when compressed.
        temperature: at which it was decoded.
    """

    tokens: tuple[int, ...]
    text: str
    avg_logprob: float
    no_speech_prob: float | None
    compression_ratio: float
    temperature: float


class WindowDecoder:
    """Decodes windows on an engine, each with a prompt of its own."""

    def __init__(
        self, engine: Engine, vocabulary: Vocabulary, tokenizer: Any, options: DecodeOptions
    ) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._options = options
        self._search = Search(vocabulary, options)

    def decode(self, states: Tensor, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """The first good answer of every window; where there is none, the likeliest.

        (openai-whisper takes the last one then, which tends to be noise; faster-whisper as here.)

        Args:
            states: the encoder's, `[B, S, D]`.
            prompts: of every window; those of one length are decoded together.
        """
        silence = self._no_speech(states, prompts)
        answers: list[list[Answer]] = [[] for _ in prompts]
        waiting = list(range(len(prompts)))
        for temperature in self._options.temperatures:
            found = self._decode_at(temperature, states, prompts, waiting, silence)
            for index, answer in found.items():
                answers[index].append(answer)
            waiting = [index for index in waiting if self.is_bad(found[index])]
            if not waiting:
                break
        return [self._best(each) for each in answers]

    def _best(self, answers: list[Answer]) -> Answer:
        """The last answer if it is good, else the likeliest that does not repeat itself."""
        if not self.is_bad(answers[-1]):
            return answers[-1]
        return max(answers, key=lambda each: (not self._repeats(each), each.avg_logprob))

    def languages(self, states: Tensor) -> list[str]:
        """The likeliest language of every window, `[B, S, D]`; "en" for an English-only model."""
        known = self._vocabulary.languages
        if not known:
            return ["en"] * len(states)
        logits = self._first_logits(states, [[self._vocabulary.start]] * len(states))
        codes, ids = list(known), list(known.values())
        return [codes[best] for best in logits[:, ids].argmax(dim=-1).tolist()]

    def _decode_at(
        self,
        temperature: float,
        states: Tensor,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        silence: Sequence[float | None],
    ) -> dict[int, Answer]:
        answers = {}
        width = self._search.width(temperature)
        for group in self._alike(prompts, indices):
            rows = torch.tensor([prompts[index] for index in group], device=states.device)
            begin, length = self._vocabulary.answer_begin(prompts[group[0]]), rows.shape[1]
            request = self._search.request(begin, length, temperature)
            rows = rows.repeat_interleave(width, dim=0)
            decoded = self._engine.decode(_rows(states, group), rows, request)
            found = self._search.best(decoded, len(group), length)
            for index, (tokens, total) in zip(group, found, strict=True):
                prefix = prompts[index][begin:]
                answers[index] = self._answer(prefix, tokens, total, temperature, silence[index])
        return answers

    def _answer(
        self,
        prefix: Sequence[int],
        tokens: Sequence[int],
        total: float,
        temperature: float,
        silence: float | None,
    ) -> Answer:
        said = (*prefix, *tokens)
        text = self.text(said)
        return Answer(
            tokens=said,
            text=text,
            avg_logprob=total / (len(tokens) + 1),
            no_speech_prob=silence,
            compression_ratio=compression_ratio(text),
            temperature=temperature,
        )

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without timestamps and blanks around it."""
        plain = [token for token in tokens if token < self._vocabulary.end]
        text: str = self._tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        return text.strip()

    def is_bad(self, answer: Answer) -> bool:
        """Whether an answer repeats itself or is unlikely, and is not silence."""
        if self.is_silent(answer):
            return False
        least = self._options.logprob_threshold
        return self._repeats(answer) or (least is not None and answer.avg_logprob < least)

    def _repeats(self, answer: Answer) -> bool:
        most = self._options.compression_ratio_threshold
        return most is not None and answer.compression_ratio > most

    def is_silent(self, answer: Answer) -> bool:
        """Whether nobody speaks: the model says so, and its words are unlikely."""
        bound, least = self._options.no_speech_threshold, self._options.logprob_threshold
        if bound is None or answer.no_speech_prob is None or answer.no_speech_prob <= bound:
            return False
        return least is None or answer.avg_logprob < least

    def _no_speech(
        self, states: Tensor, prompts: Sequence[Sequence[int]]
    ) -> Sequence[float | None]:
        """Probability of <|nospeech|> where the answer's start is, of every window."""
        if self._options.no_speech_threshold is None:
            return [None] * len(prompts)
        start = self._vocabulary.start
        logits = self._first_logits(states, [row[: list(row).index(start) + 1] for row in prompts])
        found: list[float] = logits.softmax(dim=-1)[:, self._vocabulary.no_speech].tolist()
        return found

    def _first_logits(self, states: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The model's logits after every prompt, `[B, V]` float32."""
        found: dict[int, Tensor] = {}
        for group in self._alike(prompts, range(len(prompts))):
            rows = torch.tensor([prompts[index] for index in group], device=states.device)
            request = Request(Rules(), rows.shape[1] + 1, (), 0, want_logits=True)
            decoded = self._engine.decode(_rows(states, group), rows, request)
            assert decoded.logits is not None
            found |= dict(zip(group, decoded.logits[0], strict=True))
        return torch.stack([found[index] for index in range(len(prompts))])

    def _alike(self, prompts: Sequence[Sequence[int]], indices: Sequence[int]) -> list[list[int]]:
        """The indices in groups of prompts of one length, whose answers begin at one place."""
        groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index in indices:
            begin = self._vocabulary.answer_begin(prompts[index])
            groups[len(prompts[index]), begin].append(index)
        return list(groups.values())


def compression_ratio(text: str) -> float:
    """Bytes of a text to its bytes when compressed by zlib: above 2.4 it repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def _rows(states: Tensor, indices: list[int]) -> Tensor:
    """Some clips' states, without a copy if they are all."""
    return states if len(indices) == len(states) else states[indices]
