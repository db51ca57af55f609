"""When each word of a window was said: `WordAligner` gives segments their words.

The decoder hears the text of a whole window once more, without timestamps, and its alignment heads
tell where each token is (`engine.align`, `engine.warp`); `spelling` makes words of the tokens and
`timing` fits them to their segments. All as openai-whisper's `word_timestamps`, whatever attention
the model itself runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe import word_durations
from whisper_flash_attention.transcribe.results import Segment, Word
from whisper_flash_attention.transcribe.word_durations import SegmentTimes, Timing
from whisper_flash_attention.transcribe.word_splitting import WordSplitter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from whisper_flash_attention.engine.alignment import Said
    from whisper_flash_attention.engine.token_timestamps import TokenTimes

POSITIONS_PER_SECOND = 50


@dataclass(frozen=True)
class SpokenWindow:
    """One window of a recording, and what was said in it.

    Args:
        states: the encoder's output [S, D] for the window, on the model's device.
        segments: in order of time, in seconds of the recording, with their tokens.
        start: where the window begins in the recording, in seconds.
        frames: log-mel frames of the recording in the window, 0 to 3,000; the rest is padding.
        seconds: length of the recording: no word or segment ends beyond it.
        language: code of the language spoken.
        task: "transcribe" or "translate".
        last_speech: where speech ended before this window, in seconds; 0.0 in the first one.
    """

    states: Tensor
    segments: tuple[Segment, ...]
    start: float
    frames: int
    seconds: float
    language: str = "en"
    task: str = "transcribe"
    last_speech: float = 0.0


@dataclass(frozen=True)
class WindowWords:
    """A window's segments with their words.

    Args:
        segments: as they came, in number, text and tokens; those with words begin and end with
            them.
        last_word_end: seconds; None if there is no word.
        last_speech: what the recording's next window takes, in seconds.
    """

    segments: tuple[Segment, ...]
    last_word_end: float | None
    last_speech: float


class WordAligner:
    """Aligns words by one model's weights, which it reads in place, beside the model's modules.

    Where the checkpoint names no alignment heads all heads of the last half of the layers count,
    as in openai-whisper.

    Args:
        model: any Whisper whose weights are plain tensors.
        processor: the processor of the same checkpoint.
        splitter: of its tokenizer, if there is one that has met tokens before.

    Raises:
        OptionError: the model's modules are not plain (adapters, quantisation, hooks), or its
            `generation_config.alignment_heads` names heads that it does not have.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        processor: WhisperProcessor,
        splitter: WordSplitter | None = None,
    ) -> None:
        from whisper_flash_attention.engine.alignment import check_heads
        from whisper_flash_attention.engine.weights import collect
        from whisper_flash_attention.hf.stock_modules import why_not

        reason = why_not(model)
        if reason is not None:
            raise OptionError(
                f"word timestamps need a model of plain weights, and this one has {reason}; merge "
                "adapters, remove hooks, or leave word timestamps out"
            )
        self._weights = collect(model).decoder
        self._heads = alignment_heads(model)
        check_heads(self._weights, self._heads)
        self._config: Any = model.generation_config
        self._end = int(processor.tokenizer.eos_token_id)
        self._splitter = splitter or WordSplitter(processor.tokenizer)

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
        words = self._align([windows[index] for index in spoken], [texts[i] for i in spoken])

        def finish() -> list[WindowWords]:
            timings = dict(zip(spoken, words(), strict=True))
            return [
                self._finish(window, timings.get(index, [])) for index, window in enumerate(windows)
            ]

        return finish

    def _text(self, segment: Segment) -> list[int]:
        return [token for token in segment.tokens if token < self._end]

    def _align(
        self, windows: Sequence[SpokenWindow], texts: Sequence[Sequence[int]]
    ) -> Callable[[], list[list[Timing]]]:
        """Have the device begin; what is returned gives words, in seconds of their windows."""
        from whisper_flash_attention.engine.token_timestamps import token_times

        rows = [self._said(window, text) for window, text in zip(windows, texts, strict=True)]
        # All prompts are of one length.
        first = len(self._prompt(windows[0])) if windows else 0
        times = token_times(self._weights, rows, self._heads, first=first, text_tokens=self._end)

        def finish() -> list[list[Timing]]:
            return [
                self._words(window, text[: len(each.probabilities)], each)
                for window, text, each in zip(windows, texts, times(), strict=True)
            ]

        return finish

    def _said(self, window: SpokenWindow, text: Sequence[int]) -> Said:
        """The text between a prompt without timestamps and the end, as far as there is room."""
        from whisper_flash_attention.engine.alignment import Said

        prompt = self._prompt(window)
        room = len(self._weights.positions) - len(prompt) - 1
        return Said(window.states, (*prompt, *text[:room], self._end), window.frames)

    def _prompt(self, window: SpokenWindow) -> tuple[int, ...]:
        config = self._config
        start, plain = config.decoder_start_token_id, config.no_timestamps_token_id
        if not config.is_multilingual:
            return start, plain
        language = config.lang_to_id.get(f"<|{window.language}|>")
        task = config.task_to_id.get(window.task)
        if language is None or task is None:
            raise OptionError(
                f"cannot align words of language {window.language!r} and task {window.task!r}: the "
                "model's generation_config.json knows no such language or task"
            )
        return start, language, task, plain

    def _words(self, window: SpokenWindow, text: Sequence[int], times: TokenTimes) -> list[Timing]:
        """Words with their punctuation, of text [T], its [T + 1] starts and [T] probabilities."""
        starts = (times.starts / POSITIONS_PER_SECOND).tolist()
        likely = times.probabilities.tolist()
        # Translations are English, which has blanks.
        language = "en" if window.task == "translate" else window.language
        words, index = [], 0
        for word in self._splitter.words(text, language):
            after = index + word.count
            probability = sum(likely[index:after]) / word.count
            words.append(Timing(word.text, word.count, starts[index], starts[after], probability))
            index = after
        return words

    def _finish(self, window: SpokenWindow, words: list[Timing]) -> WindowWords:
        """Fit a window's words to its segments."""
        usual = word_durations.usual_duration(words)
        word_durations.shorten_beside_sentence_ends(words, usual)
        word_durations.join_punctuation(words)
        for word in words:
            word.start = round(window.start + word.start, 2)
            word.end = round(window.start + word.end, 2)
        spans = [
            SegmentTimes(each.start, each.end, len(self._text(each))) for each in window.segments
        ]
        finished, last_speech, last_word_end = [], window.last_speech, None
        for segment, span, mine in zip(
            window.segments, spans, word_durations.deal_out(words, spans), strict=True
        ):
            if mine:
                word_durations.fit_to_segment(mine, span, usual, last_speech)
                last_speech = span.end
                last_word_end = min(mine[-1].end, window.seconds)
            finished.append(_segment(segment, span, mine, window.seconds))
        if last_word_end is not None:
            last_speech = last_word_end
        elif finished:
            last_speech = finished[-1].end
        return WindowWords(tuple(finished), last_word_end, last_speech)


def alignment_heads(model: WhisperForConditionalGeneration) -> tuple[tuple[int, int], ...]:
    """The (layer, head) pairs that the checkpoint names, or all of the last half of the layers.

    The latter are those of openai-whisper (`whisper/model.py`) for models that it does not know.
    """
    named = getattr(model.generation_config, "alignment_heads", None)
    if named:
        return tuple((int(layer), int(head)) for layer, head in named)
    layers, heads = model.config.decoder_layers, model.config.decoder_attention_heads
    return tuple((layer, head) for layer in range(layers // 2, layers) for head in range(heads))


def _segment(
    segment: Segment, span: SegmentTimes, words: Sequence[Timing], seconds: float
) -> Segment:
    """The segment with its words, nothing of it beyond the recording."""
    if not words:
        return segment
    start, end = _within(span.start, span.end, seconds)
    word = tuple(
        Word(*_within(word.start, word.end, seconds), text, word.probability)
        for word in words
        if (text := word.text.strip())
    )
    return replace(segment, start=start, end=end, words=word)


def _within(start: float, end: float, seconds: float) -> tuple[float, float]:
    """Times in hundredths of a second, in order, and within a recording of so many seconds."""
    # Comparisons instead of calls, for this is done for every word.
    start, end = round(start, 2), round(end, 2)
    if end > seconds:
        end = seconds
    if start > end:
        start = end
    return start if start > 0 else 0.0, end
