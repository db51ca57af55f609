"""`Transcriber`: a Whisper model and its processor, put to work on recordings of any length."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Self, Unpack, overload

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.audio.audio_source import AudioSource, join_blocks
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.errors import AudioError, WeightsError
from whisper_flash_attention.transcribe.arguments import Asked, Order
from whisper_flash_attention.transcribe.channels import in_order_of_time, merged, share_of, split
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.transcribe.tokenizer import Detokenizer, Vocabulary, WordSplitter
from whisper_flash_attention.transcribe.work import (
    Outstanding,
    Progress,
    Work,
    is_pair,
    open_all,
    sound_of,
)
from whisper_flash_attention.validation import shown

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from whisper_flash_attention.transcribe.batched import Speech
    from whisper_flash_attention.transcribe.reading import Read, Reading
    from whisper_flash_attention.transcribe.work import Audio

    # A recording, and what a window of it gave.
    Heard = tuple[Work, Read]

# What the encoder sees at once; longer recordings are read window by window.
WINDOW_SECONDS = 30
# What `log_mel` computes, in the words of `WhisperFeatureExtractor`.
WHISPER_FEATURES = MappingProxyType(
    {"sampling_rate": 16_000, "n_fft": 400, "hop_length": 160, "chunk_length": 30, "dither": 0.0}
)


class Transcriber:
    """Transcribes recordings by OpenAI's sequential algorithm, on the engine where that can run.

    Windows of 30 s follow one another, each from where the last complete segment ended; a result
    that repeats itself or is unlikely is decoded again at a higher temperature.

    Args:
        model: stock Whisper or `WhisperFlashAttentionForConditionalGeneration`.
        processor: the processor of the same checkpoint.

    Raises:
        WeightsError: the model's generation config is too old to know timestamps or languages, or
            its features are not Whisper's.
    """

    def __init__(self, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
        _check_features(model, processor)
        self.model = model
        self.processor = processor
        self._vocabulary = Vocabulary.of(model)
        self._tokenizer = Detokenizer(processor.tokenizer)
        self._splitter = WordSplitter(processor.tokenizer)

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
        from whisper_flash_attention.hf.eligibility import engine_for
        from whisper_flash_attention.hf.handover import Handover

        ours = hasattr(self.model, "attention_backend")
        return ours and not isinstance(engine_for(self.model), Handover)

    @property
    def engine(self) -> str:
        """What runs the decode loop: this package's engine, and how, or Transformers."""
        from whisper_flash_attention.engine.decode_plan import runs_on

        if not self.runs_on_engine:
            return "Transformers generate"
        return f"decode engine ({runs_on(self.model.device)})"

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the model knows; `("en",)` if it is English-only."""
        return tuple(self._vocabulary.languages) or ("en",)

    @overload
    def transcribe(
        self,
        audio: Audio,
        *,
        on_progress: Callable[[float], None] | None = None,
        **asked: Unpack[Asked],
    ) -> Transcription: ...

    @overload
    def transcribe(
        self,
        audio: list[Audio] | tuple[Audio, ...],
        *,
        on_progress: Callable[[float], None] | None = None,
        **asked: Unpack[Asked],
    ) -> list[Transcription]: ...

    def transcribe(
        self,
        audio: Audio | list[Audio] | tuple[Audio, ...],
        *,
        on_progress: Callable[[float], None] | None = None,
        **asked: Unpack[Asked],
    ) -> Transcription | list[Transcription]:
        """Transcribe one recording, or several side by side.

        Args:
            audio: a path, a file's bytes, or a file that is open for reading bytes; an array or
                tensor of samples at 16 kHz, or a tuple of one and its sampling rate; or a list of
                any of these. Samples are mono `[T]`, `[channels, T]` or `[T, channels]`, of the
                types and scales that `audio.samples.recording_channels` tells.
            on_progress: called with the share that is done, from 0.0, as windows are read.
            **asked: `language`, `task`, `channel`, `audio_track`, `initial_prompt`, `hotwords`,
                `prefix`, `options`, `batch_size` and the fields of `DecodeOptions`, as `Asked`
                describes them.

        Returns:
            A transcription, or a list of them in the order of a list.

        Raises:
            AudioError: a file cannot be read, or the samples are not such; nothing is returned.
            MissingPackage: batched mode needs a package that is not installed.
            OptionError: an option makes no sense, or this model cannot do what is asked.
            UnsupportedAttention: the back-end asked for by name cannot run this model here.
        """
        if isinstance(audio, list) or (isinstance(audio, tuple) and not is_pair(audio)):
            return self._all(audio, asked, on_progress)  # type: ignore[arg-type]
        return self._all([audio], asked, on_progress)[0]  # type: ignore[list-item]

    def transcribe_many(
        self, recordings: Sequence[Audio], **asked: Unpack[Asked]
    ) -> list[Transcription]:
        """Transcribe several recordings, whose windows are decoded side by side.

        The arguments and errors are those of `transcribe`. What is the same for all is given once;
        what differs (language, task, prompts) is a list with one for each.
        """
        return self._all(recordings, asked, None)

    def stream(self, audio: Audio, **asked: Unpack[Asked]) -> Iterator[Segment]:
        """The segments of one recording, those of a window as soon as it is read.

        In batched mode on a GPU those of a batch come when the next one is decoded. Where each
        channel is transcribed by itself, segments come when all channels are read so far. The
        arguments and errors are those of `transcribe`.
        """
        order = Order.of(asked, 1, self.languages)
        parts: list[Work] = []
        reads = self._read_all([Work(audio, order.wishes[0])], order, Progress(1), [parts])
        yield from in_order_of_time(reads, parts)

    def transcribe_each(
        self,
        recordings: Iterable[Audio],
        *,
        on_progress: Callable[[int, float], None] | None = None,
        **asked: Unpack[Asked],
    ) -> Generator[tuple[int, Transcription]]:
        """Transcribe any number of recordings side by side, and give each as soon as it is done.

        Recordings are taken when there is room for them. About `batch_size` of them are under way
        at a time, so that memory does not grow with their number. In batched mode on a GPU another
        thread takes them, ahead, and tells that they begin.

        Args:
            recordings: as for `transcribe`; what is asked is the same for all of them.
            on_progress: called with a recording's number and the share of it that is done, from
                0.0, as windows are read.

        Returns:
            Numbers of recordings, counted from 0, with their transcriptions, in the order in which
            they are done.

        Raises:
            as `transcribe`; what is under way then is lost.
        """
        order = Order.of(asked, 1, self.languages)
        note = on_progress or (lambda index, share: None)
        # Of every recording: itself, or its channels.
        parts: dict[int, list[Work]] = {}

        def opened() -> Iterator[tuple[Work, AudioSource]]:
            for index, audio in enumerate(recordings):
                note(index, 0.0)
                work = Work(audio, order.wishes[0], index)
                found = split(work, sound_of(work))
                parts[index] = [part for part, _ in found]
                yield from found

        def note_share(work: Work) -> None:
            works = parts[work.number]
            if not _are_done(works):
                note(work.number, share_of(works))

        for _ in self._read(opened(), order, note_share):
            yield from self._take_done(parts)
        yield from self._take_done(parts)

    def _take_done(self, parts: dict[int, list[Work]]) -> Iterator[tuple[int, Transcription]]:
        # A copy: another thread may add to them.
        for index in [index for index, works in list(parts.items()) if _are_done(works)]:
            yield index, merged(parts.pop(index), self._tokenizer)

    def _all(
        self,
        recordings: Sequence[Audio],
        asked: Asked,
        on_progress: Callable[[float], None] | None,
    ) -> list[Transcription]:
        if isinstance(recordings, str | bytes):
            raise AudioError(f"several recordings are a list, but got {shown(recordings)}")
        order = Order.of(asked, len(recordings), self.languages)
        works = [
            Work(audio, wish, number)
            for number, (audio, wish) in enumerate(zip(recordings, order.wishes, strict=True))
        ]
        progress = Progress(len(works), on_progress)
        if works:
            progress.note(0, 0.0)
        parts: list[list[Work]] = [[] for _ in works]
        for _ in self._read_all(works, order, progress, parts):
            pass
        return [merged(each, self._tokenizer) for each in parts]

    def _read_all(
        self,
        works: Sequence[Work],
        order: Order,
        progress: Progress,
        parts: Sequence[list[Work]],
    ) -> Iterator[Heard]:
        """Read recordings that are all known.

        Args:
            parts: of every recording an empty list, which gets itself, or its channels.
        """
        with closing(open_all(works)) as sources:

            def opened() -> Iterator[tuple[Work, AudioSource]]:
                for work, sound in zip(works, sources, strict=True):
                    found = split(work, sound)
                    parts[work.number].extend(part for part, _ in found)
                    yield from found

            def note(work: Work) -> None:
                progress.note(work.number, share_of(parts[work.number]))

            yield from self._read(opened(), order, note)

    def _read(
        self, opened: Iterable[tuple[Work, AudioSource]], order: Order, note: Callable[[Work], None]
    ) -> Iterator[Heard]:
        """Read recordings, which are taken as there is room, and note what their windows say.

        Args:
            note: called whenever more of a recording was read.
        """
        audible = _audible(opened)
        if self.runs_on_engine:
            found = self._on_engine(audible, order)
        else:
            found = self._by_generate(audible, order, note)
        for work, read in found:
            note(work)
            yield work, read

    def _on_engine(
        self, opened: Iterable[tuple[Work, AudioSource]], order: Order
    ) -> Iterator[Heard]:
        from whisper_flash_attention.hf.eligibility import engine_for
        from whisper_flash_attention.hf.handover import Handover
        from whisper_flash_attention.transcribe.batched import BatchedReader
        from whisper_flash_attention.transcribe.sequential import SequentialReader
        from whisper_flash_attention.transcribe.words import WordAligner

        engine = engine_for(self.model)
        assert not isinstance(engine, Handover)
        options, aligner = order.decode, None
        if options.word_timestamps:
            aligner = WordAligner(self.model, self.processor, self._splitter)
        parts = (engine, self._vocabulary, self._tokenizer, options, aligner)
        active: dict[int, Work] = {}

        def begun() -> Iterator[tuple[Work, AudioSource]]:
            for index, (work, sound) in enumerate(opened):
                active[index] = work
                yield work, sound
                if work.is_done:
                    active.pop(index, None)  # nobody speaks in it

        reads: Iterator[Read]
        if options.mode == "batched":
            speeches = (self._speech(*each, options) for each in begun())
            reads = BatchedReader(*parts).read(speeches, order.batch_size)
        else:
            readings = (self._reading(*each, options) for each in begun())
            reads = SequentialReader(*parts).read(readings, order.batch_size)
        for read in reads:
            work = active[read.index]
            work.take(read)
            if work.is_done:
                active.pop(read.index, None)
            yield work, read

    def _reading(self, work: Work, sound: AudioSource, options: DecodeOptions) -> Reading:
        from whisper_flash_attention.audio.log_mel import MelWindows
        from whisper_flash_attention.audio.vad import find_stretches
        from whisper_flash_attention.transcribe.reading import Reading
        from whisper_flash_attention.transcribe.segmentation import (
            frames_of,
            spans_of,
            spans_within,
        )

        features = MelWindows(
            sound,
            mel_bins=self.processor.feature_extractor.feature_size,
            device=self.model.device,
            dtype=self.model.dtype,
        )
        work.seconds = features.seconds
        spans = spans_of(options.clip_timestamps)
        if options.uses_vad:
            spans = spans_within(find_stretches(sound, options.vad_parameters), spans)
        parts = frames_of(spans, features.frames)
        work.reading = Reading(features, work.task, work.language, work.prompt_fields, parts)
        return work.reading

    def _speech(self, work: Work, sound: AudioSource, options: DecodeOptions) -> Speech:
        from whisper_flash_attention.audio.vad import cut_all, find_speech
        from whisper_flash_attention.transcribe.batched import Speech
        from whisper_flash_attention.transcribe.segmentation import chunks_within, spans_of

        if options.uses_vad:
            work.seconds, chunks = find_speech(sound, options=options.vad_parameters)
        else:
            work.seconds, chunks = cut_all(sound)
        chunks = chunks_within(chunks, spans_of(options.clip_timestamps))
        work.chunks = Outstanding(chunks)
        work.is_done = work.chunks.are_done
        work.reading = Speech(
            work.chunks, work.seconds, work.task, work.language, work.prompt_fields
        )
        return work.reading

    def _by_generate(
        self, opened: Iterable[tuple[Work, AudioSource]], order: Order, note: Callable[[Work], None]
    ) -> Iterator[Heard]:
        """Read recordings one after the other, each whole, by the model's own `generate`."""
        from whisper_flash_attention.transcribe.hf_long_form import (
            refuse_engine_only,
            transcribe_by_generate,
        )
        from whisper_flash_attention.transcribe.reading import Read

        for index, (work, sound) in enumerate(opened):
            refuse_engine_only(order.decode, work.prompt_fields)
            samples = join_blocks(sound.blocks()) if sound.samples is None else sound.samples
            work.seconds = samples.size / SAMPLING_RATE
            features, mask = self._features(samples)
            work.language, work.detected, segments = transcribe_by_generate(
                self.model,
                self.processor,
                self._vocabulary,
                features,
                mask,
                seconds=work.seconds,
                language=work.language,
                task=work.task,
                options=order.decode,
                initial_prompt=work.prompt_fields.initial_prompt,
                on_progress=partial(_note_share, note, work),
            )
            work.segments += segments
            work.share, work.is_done = 1.0, True
            yield work, Read(index, segments, 1, 1)

    def _features(self, samples: npt.NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mel features `[1, 80|128, frames]` and their mask `[1, frames]` on the device.

        Up to 30 s it is one window, silent to its end; `generate` wants a longer recording whole.
        """
        import torch

        from whisper_flash_attention.audio.log_mel import HOP, log_mel, log_mel_whole

        is_long = samples.size > WINDOW_SECONDS * SAMPLING_RATE
        features = (log_mel_whole if is_long else log_mel)(
            samples,
            mel_bins=self.processor.feature_extractor.feature_size,
            device=self.model.device,
            dtype=self.model.dtype,
        )
        starts = HOP * torch.arange(features.shape[2], device=features.device)
        return features, (starts < samples.size).to(torch.int32)[None]


def _are_done(works: Sequence[Work]) -> bool:
    return all(work.is_done for work in works)


def _note_share(note: Callable[[Work], None], work: Work, share: float) -> None:
    work.share = share
    note(work)


def _audible(opened: Iterable[tuple[Work, AudioSource]]) -> Iterator[tuple[Work, AudioSource]]:
    """Recordings in which there is sound; the others are done."""
    for work, sound in opened:
        silence = sound.seconds_of_silence()
        if silence is None:
            yield work, sound
        else:
            work.take_silence(silence)


def _check_features(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Raise `WeightsError` if a checkpoint was trained on features that `log_mel` does not give."""
    for name, value in WHISPER_FEATURES.items():
        found = getattr(processor.feature_extractor, name)
        if found != value:
            raise WeightsError(
                f"the checkpoint's preprocessor_config.json has {name} {found!r}, but Whisper's "
                f"features have {value!r}: transcribe with Transformers' own pipeline"
            )
    found, bins = processor.feature_extractor.feature_size, model.config.num_mel_bins
    if found != bins:
        raise WeightsError(
            f"the checkpoint's preprocessor_config.json has feature_size {found!r}, but its model "
            f"takes {bins} mel bins: they do not belong together"
        )
