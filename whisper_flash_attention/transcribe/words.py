"""Word timestamps: `WordAligner` gives the segments of a window their words with times.

The decoder runs over the text of a window once more, without timestamps, and its alignment heads
show where each token is (`engine.alignment`). Tokens are split into words, which are
fitted to their segments: punctuation joins its word, and words that are too long shrink, because
alignment alone extends a word over the pause beside it. The rules and their order are those of
`add_word_timestamps` in whisper/timing.py of OpenAI, so that the times agree, whatever attention
the model itself runs on.

At last the times are corrected, which OpenAI's does not do; where the next window begins does not
depend on that. Usually the levels of the sound correct them. Alignment has a bias: with tiny.en
words are too late, with base too early. Speech is softest between words, so all words of a window
are shifted to where their starts and ends are softest (`best_shift`). Then words leave out the
silence at their edges (`trim_pauses`). With `word_alignment="characters"` another pass of the
decoder, over the characters of the text, gives their times (`engine.character_alignment`), to which
OpenAI's rules are applied, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from whisper_flash_attention.engine.alignment import (
    AlignmentInput,
    TokenTimestamps,
    check_heads,
    token_timestamps,
)
from whisper_flash_attention.engine.character_alignment import (
    MOST_CHARACTERS,
    CharacterInput,
    character_starts,
)
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.results import Segment, Word
from whisper_flash_attention.transcribe.spelled_text import POSITIONS_PER_SECOND, SpelledText
from whisper_flash_attention.transcribe.tokenizer import SplitWord, Vocabulary, WordSplitter
from whisper_flash_attention.transcribe.word_rules import (
    SegmentTimes,
    Timing,
    deal_out,
    fit_to_levels,
    fit_to_segment,
    join_punctuation,
    shorten_beside_sentence_ends,
    usual_duration,
)

logger = logging.getLogger("whisper_flash_attention")

TokenProbabilities: TypeAlias = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SpokenWindow:
    """One window of a recording and its segments.

    Args:
        states: the encoder's output [S, D] for the window, on the model's device.
        segments: in order of time, in seconds of the recording, with their tokens.
        start: where the window begins in the recording, in seconds.
        frames: log-mel frames of the recording in the window, 0 to 3,000; the rest is padding.
        seconds: length of the recording: no word or segment ends beyond it.
        language: code of the language spoken.
        task: "transcribe" or "translate".
        last_speech: where speech ended before this window, in seconds; 0.0 in the first one.
        words_end: where the words before this window end, in seconds; 0.0 in the first one.
        levels: of the frames, in dB, `[frames]` or with those of the padding, by which the times of
            words are corrected; None changes nothing, as in openai-whisper.
    """

    states: Tensor
    segments: tuple[Segment, ...]
    start: float
    frames: int
    seconds: float
    language: str = "en"
    task: str = "transcribe"
    last_speech: float = 0.0
    words_end: float = 0.0
    levels: Tensor | None = None


@dataclass(frozen=True)
class WindowWords:
    """A window's segments with their words.

    Args:
        segments: as they came, in number, text and tokens; those with words begin and end with
            them.
        last_word_end: seconds; None if there is no word.
        last_speech: what the recording's next window takes, in seconds.
        token_probabilities: text tokens of all segments, in order, each with its probability after
            those before it, without timestamps; of a text that has no room in a prompt, those of
            its beginning.
    """

    segments: tuple[Segment, ...]
    last_word_end: float | None
    last_speech: float
    token_probabilities: TokenProbabilities = ()


class WordAligner:
    """Aligns words by an engine's weights.

    Args:
        heads: (layer, head) pairs of cross-attention that the checkpoint names, see
            `alignment_heads`.
        splitter: of the model's tokenizer.
        options: with the marks that join a word, and what words are timed by.

    Raises:
        OptionError: the model does not have these heads.
    """

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        heads: Sequence[Sequence[int]] | None,
        splitter: WordSplitter,
        options: DecodeOptions = DecodeOptions(),
    ) -> None:
        self._weights = weights = engine.weights.decoder
        self._vocabulary = vocabulary
        self._heads = alignment_heads(heads, layers=len(weights.layers), heads=weights.heads)
        self._splitter = splitter
        self._marks = (options.prepend_punctuations, options.append_punctuations)
        self._by_characters = options.word_alignment == "characters"
        check_heads(weights, self._heads)

    def add_words(self, windows: Sequence[SpokenWindow]) -> list[WindowWords]:
        """Give the segments of each window their words; windows are aligned together.

        Windows of one recording need the `last_speech` of those before them: hand over one window
        of each recording at a time.

        Raises:
            OptionError: a language or task that the model does not know.
            NotFinite: the model computed NaN or infinity.
        """
        return self.begin(windows)()

    def begin(self, windows: Sequence[SpokenWindow]) -> Callable[[], list[WindowWords]]:
        """Have the device begin with it, and return the function that gives what `add_words` does.

        That function waits for the device, and raises what `add_words` raises.
        """
        texts = [
            [token for segment in window.segments for token in self._text(segment)]
            for window in windows
        ]
        spoken = [index for index, text in enumerate(texts) if text]
        aligned = self._align([windows[index] for index in spoken], [texts[i] for i in spoken])

        def finish() -> list[WindowWords]:
            found = dict(zip(spoken, aligned(), strict=True))
            nothing = _Aligned([], (), None)
            return [
                self._finish(window, found.get(index, nothing))
                for index, window in enumerate(windows)
            ]

        return finish

    def _text(self, segment: Segment) -> list[int]:
        return [token for token in segment.tokens if token < self._vocabulary.end]

    def _align(
        self, windows: Sequence[SpokenWindow], texts: Sequence[Sequence[int]]
    ) -> Callable[[], list[_Aligned]]:
        """Have the device begin; what is returned gives words, in seconds of their windows."""
        # All prompts are of one length.
        first = len(self._prompt(windows[0])) if windows else 0
        room = len(self._weights.positions) - first - 1
        texts = [text[:room] for text in texts]
        rows = [
            AlignmentInput(
                window.states, (*self._prompt(window), *text, self._vocabulary.end), window.frames
            )
            for window, text in zip(windows, texts, strict=True)
        ]
        times = token_timestamps(
            self._weights, rows, self._heads, first=first, text_tokens=self._vocabulary.end
        )
        split = [
            # Translations are English, which has blanks.
            self._splitter.words(text, "en" if window.task == "translate" else window.language)
            for window, text in zip(windows, texts, strict=True)
        ]
        characters = self._align_characters(windows, split, room)

        def finish() -> list[_Aligned]:
            found = []
            exact = characters()
            for index, (text, words, each) in enumerate(zip(texts, split, times(), strict=True)):
                timed = self._words(words, each)
                by_character = None
                if index in exact:
                    by_character = [
                        replace(word, start=start, end=end)
                        for word, (start, end) in zip(timed, exact[index], strict=True)
                    ]
                pairs = tuple(zip(text, each.probabilities.tolist(), strict=True))
                found.append(_Aligned(timed, pairs, by_character))
            return found

        return finish

    def _align_characters(
        self, windows: Sequence[SpokenWindow], split: Sequence[Sequence[SplitWord]], room: int
    ) -> Callable[[], dict[int, list[tuple[float, float]]]]:
        """Have the device begin; what is returned gives starts and ends of words by window.

        Windows are left out that are not to be corrected, and those whose text cannot be spelled or
        has too many characters.
        """
        spelled: dict[int, SpelledText] = {}
        rows = []
        for index, (window, words) in enumerate(zip(windows, split, strict=True)):
            if not self._by_characters or window.levels is None:
                continue
            text = SpelledText.of(words, self._splitter.spell)
            if text is None or len(text.tokens) >= MOST_CHARACTERS:
                logger.info(
                    "words from %.1f s on are timed by tokens: their characters are too many, or "
                    "not in the vocabulary",
                    window.start,
                )
                continue
            spelled[index] = text
            rows.append(
                CharacterInput(
                    window.states,
                    self._prompt(window),
                    text.parts(room),
                    text.is_silent,
                    window.frames,
                    window.levels.to(window.states.device),
                )
            )
        starts = character_starts(self._weights, rows, end=self._vocabulary.end)
        return lambda: {
            index: text.times(each)
            for (index, text), each in zip(spelled.items(), starts(), strict=True)
        }

    def _prompt(self, window: SpokenWindow) -> tuple[int, ...]:
        vocabulary, language, task = self._vocabulary, window.language, window.task
        if vocabulary.languages and not (
            language in vocabulary.languages and task in vocabulary.tasks
        ):
            raise OptionError(
                f"cannot align words of language {language!r} and task {task!r}: the model's "
                "generation_config.json knows no such language or task"
            )
        return tuple(vocabulary.prompt(language, task, without_timestamps=True))

    def _words(self, words: Sequence[SplitWord], times: TokenTimestamps) -> list[Timing]:
        """Words of a text [T], with its [T + 1] starts and [T] probabilities."""
        starts = (times.starts / POSITIONS_PER_SECOND).tolist()
        likely = times.probabilities.tolist()
        found, index = [], 0
        for word in words:
            after = index + word.count
            probability = sum(likely[index:after]) / word.count
            found.append(Timing(word.text, word.count, starts[index], starts[after], probability))
            index = after
        return found

    def _finish(self, window: SpokenWindow, aligned: _Aligned) -> WindowWords:
        """Fit a window's words to its segments."""
        fitted = self._fit(window, aligned.words)
        last_word_end = fitted.last_word_end
        if last_word_end is not None:
            if aligned.by_character is not None:
                fitted = self._fit(window, aligned.by_character)
            elif window.levels is not None:
                levels = window.levels[: window.frames].cpu().numpy()
                fit_to_levels(fitted.dealt, fitted.spans, levels, window.start, last_word_end)
            if self._by_characters:
                fitted.not_before(window.words_end)
        finished = [
            _segment(segment, span, mine, window.seconds)
            for segment, span, mine in zip(window.segments, fitted.spans, fitted.dealt, strict=True)
        ]
        last_speech = window.last_speech
        if last_word_end is not None:
            last_speech = last_word_end
        elif finished:
            last_speech = finished[-1].end
        return WindowWords(tuple(finished), last_word_end, last_speech, aligned.probabilities)

    def _fit(self, window: SpokenWindow, words: list[Timing]) -> _Fitted:
        """Apply OpenAI's rules to words, which are in seconds of the window before."""
        usual = usual_duration(words)
        shorten_beside_sentence_ends(words, usual)
        join_punctuation(words, *self._marks)
        for word in words:
            word.start = round(window.start + word.start, 2)
            word.end = round(window.start + word.end, 2)
        spans = [
            SegmentTimes(each.start, each.end, len(self._text(each))) for each in window.segments
        ]
        last_speech, last_word_end = window.last_speech, None
        dealt = deal_out(words, spans)
        for span, mine in zip(spans, dealt, strict=True):
            if mine:
                fit_to_segment(mine, span, usual, last_speech)
                last_speech = span.end
                last_word_end = min(mine[-1].end, window.seconds)
        return _Fitted(spans, dealt, last_word_end)


@dataclass(frozen=True)
class _Aligned:
    """Words of a window in its seconds, by tokens and, where there are any, by characters."""

    words: list[Timing]
    probabilities: TokenProbabilities
    by_character: list[Timing] | None


@dataclass(frozen=True)
class _Fitted:
    """Segments and their words, in seconds of the recording; None where there are no words."""

    spans: list[SegmentTimes]
    dealt: list[list[Timing]]
    last_word_end: float | None

    def not_before(self, earliest: float) -> None:
        """Let no word begin earlier, in seconds; segments begin and end with their words."""
        for span, mine in zip(self.spans, self.dealt, strict=True):
            for word in mine:
                word.start, word.end = max(word.start, earliest), max(word.end, earliest)
            if mine:
                span.start, span.end = mine[0].start, mine[-1].end


def alignment_heads(
    named: Sequence[Sequence[int]] | None, *, layers: int, heads: int
) -> tuple[tuple[int, int], ...]:
    """The (layer, head) pairs that a checkpoint names, or all of the last half of the layers.

    The latter are those of openai-whisper (`whisper/model.py`) for models that it does not know.

    Args:
        named: `alignment_heads` of the generation config, or None.
        layers, heads: of the decoder.
    """
    if named:
        return tuple((int(layer), int(head)) for layer, head in named)
    return tuple((layer, head) for layer in range(layers // 2, layers) for head in range(heads))


def _segment(
    segment: Segment, span: SegmentTimes, words: Sequence[Timing], seconds: float
) -> Segment:
    """The segment with its words, nothing of it beyond the recording."""
    if not words:
        return segment
    start, end = _within(span.start, span.end, seconds)
    word = tuple(
        Word(*_within(word.start, word.end, seconds), word.text, word.probability)
        for word in words
        if word.text.strip()
    )
    return replace(segment, start=start, end=end, words=word)


def _within(start: float, end: float, seconds: float) -> tuple[float, float]:
    """Times in hundredths of a second, in order, and within the length of the recording."""
    # Comparisons instead of calls, for this is done for every word.
    start, end = round(start, 2), round(end, 2)
    if end > seconds:
        end = seconds
    if start > end:
        start = end
    return start if start > 0 else 0.0, end
