"""`Transcriber`: a Whisper model and its processor, put to work on recordings of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.audio import SAMPLING_RATE, load_audio
from whisper_flash_attention.audio.waveforms import check_finite, unchecked_samples
from whisper_flash_attention.config import DecodeOptions, TranscribeOptions
from whisper_flash_attention.errors import AudioError, OptionError, WeightsError
from whisper_flash_attention.transcribe.detokenizer import Detokenizer
from whisper_flash_attention.transcribe.segments import Segment, Transcription
from whisper_flash_attention.transcribe.spelling import Speller
from whisper_flash_attention.transcribe.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from whisper_flash_attention.transcribe.batched import Speech
    from whisper_flash_attention.transcribe.sequential import Read, Reading

    Audio = str | Path | npt.NDArray[np.floating[Any]] | torch.Tensor

# What the encoder sees at once; longer recordings are read window by window.
WINDOW_SECONDS = 30
# What `log_mel` computes, in the words of `WhisperFeatureExtractor`.
WHISPER_FEATURES = MappingProxyType(
    {"sampling_rate": 16_000, "n_fft": 400, "hop_length": 160, "chunk_length": 30, "dither": 0.0}
)


class Transcriber:
    """Transcribes recordings by OpenAI's sequential algorithm, on the engine where that can run.

    Windows of 30 s follow one another, each from where the last complete segment ended; an answer
    that repeats itself or is unlikely is decoded again at a higher temperature.

    Args:
        model: stock Whisper or `WhisperFlashAttentionForConditionalGeneration`.
        processor: the processor of the same checkpoint.

    Raises:
        WeightsError: the model's generation config is too old to know timestamps or languages, or
            its features are not Whisper's.
    """

    def __init__(self, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
        _check_features(processor)
        self.model = model
        self.processor = processor
        self._vocabulary = Vocabulary.of(model)
        self._tokenizer = Detokenizer(processor.tokenizer)
        self._speller = Speller(processor.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str = "small",
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
    ) -> Self:
        """Load a checkpoint to transcribe with.

        Args:
            source: a short name ("tiny.en", "small", "turbo", ...), a Hub id, a Transformers or
                faster-whisper folder, an OpenAI `.pt` file, or `package:tiny.en`.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps".
            dtype: "auto" (float16 on CUDA, float32 elsewhere), "float32", "float16", "bfloat16".
            attention: a back-end's name, or "auto".

        Raises:
            WeightsError: the checkpoint cannot be found, reached or read.
            DeviceError: there is no such device.
            OptionError: an unknown device, dtype or attention back-end.
        """
        from whisper_flash_attention.transcribe.loading import load

        return cls(*load(source, device=device, dtype=dtype, attention=attention))

    @property
    def runs_on_engine(self) -> bool:
        """Whether this package's decode engine can run the model as it is now."""
        from whisper_flash_attention.generation.fitness import engine_for
        from whisper_flash_attention.generation.handover import Handover

        ours = hasattr(self.model, "attention_backend")
        return ours and not isinstance(engine_for(self.model), Handover)

    @property
    def engine(self) -> str:
        """What runs the decode loop: this package's engine, and how, or Transformers."""
        from whisper_flash_attention.engine.plan import runs_on

        if not self.runs_on_engine:
            return "Transformers generate"
        return f"decode engine ({runs_on(self.model.device)})"

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the model knows; `("en",)` if it is English-only."""
        return tuple(self._vocabulary.languages) or ("en",)

    def transcribe(
        self,
        audio: Audio,
        *,
        language: str | None = None,
        task: str = "transcribe",
        options: DecodeOptions | None = None,
        batch_size: int = 16,
        on_progress: Callable[[float], None] | None = None,
    ) -> Transcription:
        """Transcribe one recording.

        Args:
            audio: a file, or mono samples `[T]` in floating point at 16 kHz.
            language: name or code of the language spoken; None detects it in the first 30 s.
            task: "transcribe", or "translate" into English.
            options: how windows are decoded; None is OpenAI's sequential algorithm with its
                thresholds and temperatures.
            batch_size: chunks at a time in batched mode.
            on_progress: called with the share that is done, from 0.0, before each window.

        Raises:
            AudioError: the file cannot be read, or the samples are not such.
            MissingPackage: batched mode needs a package that is not installed.
            OptionError: the language or task is unknown, or this model cannot do it.
            UnsupportedAttention: the back-end asked for by name cannot run this model here.
        """
        work = _Work.of(self, audio, language, task)
        if not self.runs_on_engine:
            return self._by_generate(work, options or DecodeOptions(), on_progress)
        if on_progress is not None:
            on_progress(0.0)
        for read in self._read([work], options, batch_size):
            if on_progress is not None and read.done < read.total:
                on_progress(read.done / read.total)
        return work.transcription(self._tokenizer)

    def transcribe_many(
        self,
        recordings: Sequence[Audio],
        *,
        language: str | None = None,
        task: str = "transcribe",
        options: DecodeOptions | None = None,
        batch_size: int = 16,
    ) -> list[Transcription]:
        """Transcribe several recordings, whose windows are decoded side by side.

        What is read is held in memory; the arguments are those of `transcribe`.

        Args:
            batch_size: windows at a time, at most.

        Raises:
            AudioError, OptionError, UnsupportedAttention: as `transcribe`; nothing is returned.
        """
        works = [_Work.of(self, audio, language, task) for audio in recordings]
        if not self.runs_on_engine:
            return [self._by_generate(each, options or DecodeOptions(), None) for each in works]
        for _ in self._read(works, options, batch_size):
            pass
        return [each.transcription(self._tokenizer) for each in works]

    def stream(
        self,
        audio: Audio,
        *,
        language: str | None = None,
        task: str = "transcribe",
        options: DecodeOptions | None = None,
        batch_size: int = 16,
    ) -> Iterator[Segment]:
        """The segments of one recording, those of a window as soon as it is read.

        In batched mode on a GPU those of a batch come when the next one is decoded. The arguments
        and errors are those of `transcribe`.
        """
        work = _Work.of(self, audio, language, task)
        if not self.runs_on_engine:
            yield from self._by_generate(work, options or DecodeOptions(), None).segments
            return
        for read in self._read([work], options, batch_size):
            yield from (_within(segment, work.seconds) for segment in read.segments)

    def _read(
        self, works: list[_Work], options: DecodeOptions | None, batch_size: int
    ) -> Iterator[Read]:
        """Read recordings on the engine, and note what their windows say."""
        from whisper_flash_attention.generation.fitness import engine_for
        from whisper_flash_attention.generation.handover import Handover
        from whisper_flash_attention.transcribe.batched import BatchedReader
        from whisper_flash_attention.transcribe.sequential import SequentialReader
        from whisper_flash_attention.transcribe.words import WordAligner

        engine = engine_for(self.model)
        assert not isinstance(engine, Handover)
        options = options or DecodeOptions()
        aligner = None
        if options.word_timestamps:
            aligner = WordAligner(self.model, self.processor, self._speller)
        parts = (engine, self._vocabulary, self._tokenizer, options, aligner)
        recordings: list[Reading] | list[Speech]
        if options.mode == "batched":
            recordings = [self._speech(work, options) for work in works]
            reads = BatchedReader(*parts).read(recordings, batch_size)
        else:
            recordings = [self._reading(work) for work in works]
            reads = SequentialReader(*parts).read(recordings, batch_size)
        for read in reads:
            work = works[read.index]
            work.language = recordings[read.index].language
            work.segments += read.segments
            yield read

    def _reading(self, work: _Work) -> Reading:
        from whisper_flash_attention.audio.mel import HOP
        from whisper_flash_attention.transcribe.sequential import Reading

        features = self._features(work.samples)[0][0]
        return Reading(features, max(1, work.samples.size // HOP), work.task, work.language)

    def _speech(self, work: _Work, options: DecodeOptions) -> Speech:
        from whisper_flash_attention.audio.vad import all_chunks, speech_chunks
        from whisper_flash_attention.transcribe.batched import Speech

        chunks = all_chunks if options.vad_filter is False else speech_chunks
        if chunks is speech_chunks:
            check_finite(work.samples)
        return Speech(chunks(work.samples), work.seconds, work.task, work.language)

    def _by_generate(
        self, work: _Work, options: DecodeOptions, on_progress: Callable[[float], None] | None
    ) -> Transcription:
        from whisper_flash_attention.transcribe.by_generate import transcribe_by_generate

        for what, is_wanted in (
            (f"mode {options.mode!r}", options.mode != "sequential"),
            ("word_timestamps", options.word_timestamps),
        ):
            if is_wanted:
                raise OptionError(
                    f"{what} needs the decode engine, which does not run this model as it is "
                    "(`whisper-flash doctor` says when it does): do without"
                )
        features, mask = self._features(work.samples)
        work.language, segments = transcribe_by_generate(
            self.model,
            self.processor,
            self._vocabulary,
            features,
            mask,
            seconds=work.seconds,
            language=work.language,
            task=work.task,
            options=options,
            on_progress=on_progress,
        )
        work.segments += segments
        return work.transcription(self._tokenizer)

    def _features(self, samples: npt.NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mel features `[1, 80|128, frames]` and their mask `[1, frames]` on the device.

        Up to 30 s it is one window, silent to its end; `generate` wants a longer recording whole.
        """
        import torch

        from whisper_flash_attention.audio.log_mel import log_mel, log_mel_whole
        from whisper_flash_attention.audio.mel import HOP

        is_long = samples.size > WINDOW_SECONDS * SAMPLING_RATE
        features = (log_mel_whole if is_long else log_mel)(
            samples,
            mel_bins=self.processor.feature_extractor.feature_size,
            device=self.model.device,
            dtype=self.model.dtype,
        )
        starts = HOP * torch.arange(features.shape[2], device=features.device)
        return features, (starts < samples.size).to(torch.int32)[None]


@dataclass
class _Work:
    """A recording on its way: mono samples `[T]`, what is asked, and what was heard so far."""

    samples: npt.NDArray[np.float32]
    task: str
    language: str | None
    segments: list[Segment] = field(default_factory=list)

    @classmethod
    def of(cls, transcriber: Transcriber, audio: Audio, language: str | None, task: str) -> _Work:
        options = TranscribeOptions(language=language, task=task)
        options.check_model(transcriber.languages)
        samples = load_audio(audio) if isinstance(audio, str | Path) else _mono_samples(audio)
        return cls(samples, task, options.language)

    @property
    def seconds(self) -> float:
        return self.samples.size / SAMPLING_RATE

    def transcription(self, tokenizer: Detokenizer) -> Transcription:
        segments = tuple(_within(segment, self.seconds) for segment in self.segments)
        # Blanks between segments are in their tokens, where the language has any.
        texts = (tokenizer.decode(each.tokens, skip_special_tokens=True) for each in segments)
        # In a recording without any sound no language can be heard.
        language = self.language or "en"
        return Transcription("".join(texts).strip(), language, segments, self.seconds)


def _within(segment: Segment, seconds: float) -> Segment:
    """The segment, not reaching beyond the recording."""
    if segment.end <= seconds:
        return segment
    return replace(segment, start=min(segment.start, seconds), end=seconds)


def _check_features(processor: WhisperProcessor) -> None:
    """Raise `WeightsError` if a checkpoint was trained on features that `log_mel` does not give."""
    for name, value in WHISPER_FEATURES.items():
        found = getattr(processor.feature_extractor, name)
        if found != value:
            raise WeightsError(
                f"the checkpoint's preprocessor_config.json has {name} {found!r}, but Whisper's "
                f"features have {value!r}: transcribe with Transformers' own pipeline"
            )


def _mono_samples(audio: npt.NDArray[np.floating[Any]] | torch.Tensor) -> npt.NDArray[np.float32]:
    """Check samples that a caller brings, and return them as float32 `[T]`.

    Whether they are finite is found when features are made of them.
    """
    if isinstance(audio, np.ndarray):
        is_floating = np.issubdtype(audio.dtype, np.floating)
    else:
        is_floating = audio.is_floating_point()
    if audio.ndim != 1 or not is_floating:
        kind = str(audio.dtype).removeprefix("torch.")
        raise AudioError(
            f"samples must be mono [T] in floating point at 16 kHz; got {kind} of shape "
            f"{list(audio.shape)}"
        )
    return unchecked_samples(audio, SAMPLING_RATE)
