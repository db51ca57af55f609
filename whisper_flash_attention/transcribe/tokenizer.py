"""The vocabulary of a Whisper model: special tokens, the text of tokens, the words that they spell.

Multilingual models and English-only ones have other ids of special tokens, and the latter no
languages or tasks ("Robust Speech Recognition via Large-Scale Weak Supervision", Radford et al.,
2022, figure 1). `Detokenizer` decodes text by a table of bytes, as the tokenizer of Transformers
does at many times the cost, which matters beside a GPU that transcribes thousands of seconds per
second. `WordSplitter` splits tokens into words as `whisper/tokenizer.py` of OpenAI does.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Self

from whisper_flash_attention.errors import WeightsError

# Seconds between two timestamps.
PRECISION = 0.02


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a model's special tokens.

    Args:
        start, end: <|startoftranscript|> and <|endoftext|>.
        no_timestamps: <|notimestamps|>; timestamps are all ids after it.
        languages: ids by code; empty for an English-only model.
        tasks: ids of "transcribe" and "translate"; empty likewise.
        suppressed: never sampled; at_begin: not as the first token.
        positions: tokens of a window at most, the prompt included.
    """

    start: int
    end: int
    no_timestamps: int
    languages: dict[str, int]
    tasks: dict[str, int]
    suppressed: tuple[int, ...]
    at_begin: tuple[int, ...]
    positions: int

    @classmethod
    def of(cls, model: Any, generation: Any) -> Self:
        """The ids that a generation config names.

        Args:
            model: a model's `WhisperConfig` or `Dimensions`.
            generation: its `GenerationConfig`, or the values of its file as attributes.

        Raises:
            WeightsError: the config is too old to know timestamps or languages, or names no single
                token for the start, the end or <|notimestamps|>.
        """
        multilingual = getattr(generation, "is_multilingual", None)
        if multilingual is None or not hasattr(generation, "no_timestamps_token_id"):
            raise _too_old("is_multilingual or no_timestamps_token_id")
        languages = getattr(generation, "lang_to_id", None) or {}
        if multilingual and not languages:
            raise _too_old("lang_to_id")
        for name in ("decoder_start_token_id", "eos_token_id", "no_timestamps_token_id"):
            value = getattr(generation, name, None)
            if type(value) is not int:
                raise WeightsError(
                    f"the model's generation config has {name} {value!r}, expected one token id"
                )
        tasks = dict(getattr(generation, "task_to_id", None) or {}) if multilingual else {}
        if multilingual and not {"transcribe", "translate"} <= tasks.keys():
            raise _too_old("task_to_id")
        # The four ids before <|notimestamps|> are special, too, and the timestamps follow it.
        if not 4 <= generation.no_timestamps_token_id < model.vocab_size - 1:
            raise WeightsError(
                f"the model's generation config has no_timestamps_token_id "
                f"{generation.no_timestamps_token_id}, of {model.vocab_size} tokens"
            )
        codes = {token.strip("<|>"): number for token, number in languages.items()}
        return cls(
            start=generation.decoder_start_token_id,
            end=generation.eos_token_id,
            no_timestamps=generation.no_timestamps_token_id,
            languages=codes if multilingual else {},
            tasks=tasks,
            suppressed=tuple(getattr(generation, "suppress_tokens", None) or ()),
            at_begin=tuple(getattr(generation, "begin_suppress_tokens", None) or ()),
            positions=model.max_target_positions,
        )

    @property
    def timestamp_begin(self) -> int:
        """The id of <|0.00|>."""
        return self.no_timestamps + 1

    @property
    def no_speech(self) -> int:
        """<|nospeech|> (<|nocaptions|> in older tokenizers)."""
        return self.no_timestamps - 1

    @property
    def previous(self) -> int:
        """<|startofprev|>."""
        return self.no_timestamps - 2

    @property
    def steering(self) -> tuple[int, ...]:
        """Tokens of prompts only, which are never sampled: starts, tasks, <|nospeech|>."""
        language_model = self.no_timestamps - 3  # <|startoflm|>
        starts = (self.start, self.previous, language_model)
        return (*starts, *self.tasks.values(), self.no_speech)

    @property
    def room_before(self) -> int:
        """The most tokens of context."""
        return self.positions // 2 - 1

    def prompt(
        self,
        language: str,
        task: str,
        before: Sequence[int] = (),
        *,
        without_timestamps: bool = False,
    ) -> list[int]:
        """The prompt of a window, with as much of the context before it as there is room for."""
        kept = list(before)[-self.room_before :] if before else []
        prompt = [self.previous, *kept] if kept else []
        prompt.append(self.start)
        if self.languages:
            prompt += [self.languages[language], self.tasks[task]]
        if without_timestamps:
            prompt.append(self.no_timestamps)
        return prompt

    def sample_begin(self, prompt: Sequence[int]) -> int:
        """Where in a prompt the result begins: what stands there is its prefix."""
        after = list(prompt).index(self.start) + (3 if self.languages else 1)
        return after + (list(prompt[after : after + 1]) == [self.no_timestamps])

    def seconds(self, timestamp: int) -> float:
        """The time of a timestamp token, in seconds from the beginning of its window."""
        return (timestamp - self.timestamp_begin) * PRECISION


def _too_old(missing: str) -> WeightsError:
    return WeightsError(
        f"the model's generation_config.json is too old: it lacks {missing}; take it from the "
        "openai/whisper-* model that it came from"
    )


# Languages written without blanks: every character that is whole is a word.
UNSPACED = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
MOST_BYTES = 4  # of a character in UTF-8
# What `bytes.decode` puts where bytes are no character.
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class SplitWord:
    """A word: its text, with the blank before it, and how many tokens it takes."""

    text: str
    count: int


@dataclass(frozen=True, slots=True)
class _Token:
    """The bytes of a token, and the word that they are if they are whole characters."""

    data: bytes
    word: SplitWord | None


class WordSplitter:
    """Splits text tokens of one vocabulary into words, and caches tokens.

    Args:
        tokenizer: Transformers' or `weights.tokenizer`'s, whose tokens are GPT-2's: bytes in
            disguise.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, _Token] = {}

    def words(self, tokens: Sequence[int], language: str) -> list[SplitWord]:
        """The words of text tokens, in a language given by its code.

        A word begins with a blank or is punctuation, which thus stands alone; in `UNSPACED`
        languages it is what the fewest tokens spell that end with a whole character. No token is
        lost: the counts add up to `len(tokens)`.
        """
        characters = self._characters(tokens)
        if language in UNSPACED:
            return characters
        words: list[SplitWord] = []
        for each in characters:
            if not words or _begins_word(each.text):
                words.append(each)
            else:
                words[-1] = SplitWord(words[-1].text + each.text, words[-1].count + each.count)
        return words

    def _characters(self, tokens: Sequence[int]) -> list[SplitWord]:
        """The shortest runs of tokens that end where a character does."""
        parts = self._look_up(tokens)
        alone = [part.word for part in parts if part.word is not None]
        if len(alone) == len(parts):
            return alone
        whole = _decode(b"".join(part.data for part in parts))
        found: list[SplitWord] = []
        run, count, offset = b"", 0, 0
        for part in parts:
            run, count = run + part.data, count + 1
            text = _decode(run)
            bad = text.find(REPLACEMENT)
            # A bad character is final only where it is one in the whole text, too.
            if bad < 0 or whole[offset + bad : offset + bad + 1] == REPLACEMENT:
                found.append(SplitWord(text, count))
                offset += len(text)
                run, count = b"", 0
        if count:
            found.append(SplitWord(_decode(run), count))
        return found

    def spell(self, character: str) -> tuple[int, ...] | None:
        """The tokens of one character: its own, or those of its bytes; None if there are none."""
        data = character.encode("utf-8", errors="replace")
        if (whole := self._ids.get(data)) is not None:
            return (whole,)
        found = [self._ids.get(bytes((byte,))) for byte in data]
        return tuple(each for each in found if each is not None) if None not in found else None

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """Ids of short text tokens, all characters and single bytes among them, by their bytes."""
        from whisper_flash_attention.weights.tokenizer import token_bytes

        names = self._tokenizer.convert_ids_to_tokens(list(range(self._tokenizer.eos_token_id)))
        found: dict[bytes, int] = {}
        for token, name in enumerate(names):
            if len(name) <= MOST_BYTES:
                with suppress(KeyError):  # of an added token, whose name is no bytes in disguise
                    found.setdefault(token_bytes(name), token)
        return found

    def _look_up(self, tokens: Sequence[int]) -> list[_Token]:
        from whisper_flash_attention.weights.tokenizer import token_bytes

        cache = self._cache
        new = [token for token in tokens if token not in cache]
        for token, name in zip(new, self._tokenizer.convert_ids_to_tokens(new), strict=True):
            data = token_bytes(name)
            text = _decode(data)
            cache[token] = _Token(data, None if REPLACEMENT in text else SplitWord(text, 1))
        return [cache[token] for token in tokens]


@lru_cache(maxsize=1 << 16)
def _begins_word(text: str) -> bool:
    """Whether text begins a word, where words have blanks between them."""
    # Whether it is *within* the string: also a blank alone, or ").", is punctuation.
    return text.startswith(" ") or text.strip() in string.punctuation


def _decode(some: bytes) -> str:
    return some.decode("utf-8", errors="replace")


class _TokenBytes(dict[int, bytes]):
    """Bytes of text tokens by id, each found when it is first read: there are 50,000."""

    def __init__(self, tokenizer: Any) -> None:
        self._names = tokenizer.convert_ids_to_tokens

    def __missing__(self, token: int) -> bytes:
        from whisper_flash_attention.weights.tokenizer import token_bytes

        [name] = self._names([token])
        found = self[token] = token_bytes(name)
        return found


class Detokenizer:
    """A Whisper tokenizer, of which `decode` is quick for text tokens.

    Args:
        tokenizer: Transformers' or `weights.tokenizer`'s; ids below its end's are text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = int(tokenizer.eos_token_id)
        self._prompt = int(tokenizer.convert_tokens_to_ids("<|startofprev|>"))
        self._bytes = _TokenBytes(tokenizer)

    @property
    def end(self) -> int:
        """Ids below this are text."""
        return self._end

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a text token, which may be a part of a character."""
        return self._bytes[token]

    def encode(self, text: str, **options: Any) -> list[int]:
        """As the tokenizer's own."""
        tokens: list[int] = self._tokenizer.encode(text, **options)
        return tokens

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids; with `skip_special_tokens` without special ones and timestamps.

        As the tokenizer does, which decodes whatever is not plain text.
        """
        end, table = self._end, self._bytes
        plain = self._bare(tokens) if skip_special_tokens else tokens
        if max(plain, default=0) >= end:
            text: str = self._tokenizer.decode(
                list(tokens),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
            return text
        return b"".join(map(table.__getitem__, plain)).decode("utf-8", errors="replace")

    def _bare(self, tokens: Sequence[int]) -> Sequence[int]:
        """Without what is no text at the ends, where timestamps are; not without what is a prompt.

        The tokenizer drops the text of a prompt, too.
        """
        first, last = 0, len(tokens)
        if last and tokens[0] == self._prompt:
            return tokens
        while first < last and tokens[first] >= self._end:
            first += 1
        while first < last and tokens[last - 1] >= self._end:
            last -= 1
        return tokens[first:last]
