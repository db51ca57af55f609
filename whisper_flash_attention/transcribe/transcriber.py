"""`Transcriber`: a Whisper model and its processor, put to work on recordings of any length."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, Self, Unpack, overload

from whisper_flash_attention.audio.audio_source import Audio, AudioInput, is_pair
from whisper_flash_attention.audio.opener import AHEAD_FILES, AudioOpener, OpenedAudio
from whisper_flash_attention.errors import AudioError, OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.arguments import (
    CallOptions,
    TranscribeArguments,
    shows_options,
    windows_request,
)
from whisper_flash_attention.transcribe.loading import (
    EngineModel,
    announce_compilation,
    check_features,
    load,
    load_model,
    load_processor,
    warm_up_calls,
)
from whisper_flash_attention.transcribe.notebook import notebook_bar
from whisper_flash_attention.transcribe.recording import (
    Recording,
    are_done,
    merge_channels,
    numbered,
    recordings_of,
    share_of,
    stream_segments,
)
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.transcribe.tokenizer import Detokenizer, Vocabulary, WordSplitter
from whisper_flash_attention.validation import shown

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from whisper_flash_attention.engine.engine import Engine
    from whisper_flash_attention.engine.memory_plan import MemoryPlan


class Transcriber:
    """Transcribes recordings by OpenAI's sequential algorithm, on the engine where that can run.

    Windows of 30 s follow one another, each from where the last complete segment ended; a result
    that repeats itself or is unlikely is decoded again at a higher temperature. In batched mode
    chunks of speech are decoded side by side instead.

    Args:
        model: stock Whisper or `WhisperFlashAttentionForConditionalGeneration`; or what `load`
            returned.
        processor: the processor of the same checkpoint; None beside what `load` returned.

    Raises:
        WeightsError: the model's generation config is too old to know timestamps or languages, or
            its features are not Whisper's.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration | EngineModel,
        processor: WhisperProcessor | None,
    ) -> None:
        self._model = model
        self._processor = processor
        if isinstance(model, EngineModel):
            self._vocabulary, tokenizer = model.vocabulary, model.tokenizer
            self._alignment_heads = model.alignment_heads
        else:
            assert processor is not None
            generation, tokenizer = model.generation_config, processor.tokenizer
            check_features(processor.feature_extractor, model.config.num_mel_bins)
            self._vocabulary = Vocabulary.of(model.config, generation)
            self._alignment_heads = getattr(generation, "alignment_heads", None)
        self.tokenizer = Detokenizer(tokenizer)
        self._splitter = WordSplitter(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str = "small",
        *,
        device: str = "auto",
        compute_type: str = "auto",
        dtype: str | None = None,
        threads: int | None = None,
        attention: str = "auto",
        quiet: bool = False,
        download_root: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a checkpoint to transcribe with.

        Args:
            source: a short name ("tiny.en", "small", "turbo", ...), a Hub id, a Transformers or
                faster-whisper folder, an OpenAI `.pt` file, or `package:tiny.en`.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps".
            compute_type: "float32", "float16", "bfloat16", on a CPU also "int8"; or "auto", that is
                float16 on CUDA, int8 on a CPU if the checkpoint holds that, else float32.
            dtype: Transformers' name of `compute_type`.
            threads: of PyTorch on the CPU, for the whole process; None leaves them as they are.
            attention: a back-end's name, or "auto".
            quiet: have Transformers and the Hub's client print nothing.
            download_root: folder of downloaded checkpoints; None is the Hub's cache.
            local_files_only: take what was downloaded before, and do without the network.

        Raises:
            WeightsError: the checkpoint cannot be found, reached or read.
            DeviceError: there is no such device.
            OptionError: an unknown device, compute type or attention back-end, or an impossible
                number of threads.
        """
        if dtype is not None:
            if compute_type != "auto":
                raise OptionError("dtype and compute_type are the same: give one of them")
            compute_type = dtype
        loaded = load(
            source,
            device=device,
            compute_type=compute_type,
            threads=threads,
            attention=attention,
            quiet=quiet,
            download_root=download_root,
            local_files_only=local_files_only,
        )
        return cls(*loaded)

    def __repr__(self) -> str:
        model = self._model
        name = model.source.name if isinstance(model, EngineModel) else model.config.name_or_path
        return f"Transcriber({name!r}, {self.describe()})"

    @property
    def model(self) -> WhisperForConditionalGeneration:
        """The model as an object of Transformers; what is done to it takes effect here.

        A model that `from_pretrained` loaded for the engine alone is loaded once more when this is
        first read, which imports Transformers.
        """
        if isinstance(self._model, EngineModel):
            source, self._processor = self._model.source, self.processor
            self._model = load_model(source)
        return self._model

    @property
    def processor(self) -> WhisperProcessor:
        """The processor; loaded when this is first read, as `model`."""
        if self._processor is None:
            assert isinstance(self._model, EngineModel)
            self._processor = load_processor(self._model.source)
        return self._processor

    def running_engine(self) -> Engine | None:
        """The decode engine on the model's weights; None where Transformers must decode.

        Of the model, this and `GenerateReader` alone use more than its configuration.
        """
        if isinstance(self._model, EngineModel):
            from whisper_flash_attention.engine.engine import intercepted_by

            engine = self._model.engine
            if intercepted_by(engine.weights.device) is None:
                return engine
        if not hasattr(self.model, "attention_backend"):  # Transformers' own class
            return None
        from whisper_flash_attention.hf.eligibility import engine_for
        from whisper_flash_attention.hf.fallback import Fallback

        found = engine_for(self.model)
        return None if isinstance(found, Fallback) else found

    @property
    def runs_on_engine(self) -> bool:
        """Whether this package's decode engine can run the model as it is now."""
        return self.running_engine() is not None

    @property
    def engine(self) -> str:
        """What runs the decode loop: this package's engine, and how, or Transformers."""
        from whisper_flash_attention.engine.layout import backend_name

        engine = self.running_engine()
        if engine is None:
            return "Transformers generate"
        return f"decode engine ({backend_name(engine.weights.device)})"

    def describe(self) -> str:
        """What runs the model, in one line: decode loop, attention back-ends, device, type."""
        from whisper_flash_attention.flash_attention import survey

        engine, precision = self.running_engine(), None
        if engine is None:
            config = self.model.config
            device, dtype, width = self.model.device, self.model.dtype, config.d_model
            heads = config.encoder_attention_heads
            attention = str(getattr(self.model, "attention_backend", config._attn_implementation))
        else:
            weights, attention = engine.weights, "auto"
            device, dtype, width = weights.device, weights.dtype, weights.decoder.width
            heads, precision = weights.encoder.heads, weights.precision
        if attention == "auto":
            rows = survey(device, dtype, heads=heads, head_dim=width // heads)
            encoder, *decoder = (row.picked for row in rows)
            attention = f"encoder {encoder}"
            if engine is None:
                attention += f", decoder {' and '.join(dict.fromkeys(decoder))}"
        computes_in = precision or str(dtype).removeprefix("torch.")
        return f"{self.engine}; attention: {attention}; {device}, {computes_in}"

    def plan(
        self,
        *,
        batch_size: int | None = None,
        memory_gb: float | None = None,
        beam_size: int = 1,
    ) -> MemoryPlan:
        """Compute the memory that windows of the longest texts will need.

            print(transcriber.plan(batch_size=4))
            transcriber.plan(memory_gb=2).batch_size    # the windows that fit 2 GB

        Args:
            batch_size: windows side by side; or else
            memory_gb: a budget in units of 1e9 bytes, weights included: plan the most windows that
                fit.
            beam_size: beams of every window.

        Returns:
            A `MemoryPlan`; weights count as they are held, in 8 bits where they are int8.

        Raises:
            OptionError: not exactly one of `batch_size` and `memory_gb`, a number out of range, a
                budget too small for one window, or a model that runs on Transformers.
        """
        engine = self.running_engine()
        if engine is None:
            raise OptionError(
                "this model runs on Transformers' generate, whose memory is not planned"
            )
        from whisper_flash_attention.engine.memory_plan import make_plan

        wanted = windows_request(engine, beam_size)
        return make_plan(engine.weights, wanted, batch_size=batch_size, memory_gb=memory_gb)

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
        **arguments: Unpack[TranscribeArguments],
    ) -> Transcription: ...

    @overload
    def transcribe(
        self,
        audio: list[Audio] | tuple[Audio, ...],
        *,
        on_progress: Callable[[float], None] | None = None,
        **arguments: Unpack[TranscribeArguments],
    ) -> list[Transcription]: ...

    @shows_options
    def transcribe(
        self,
        audio: Audio | list[Audio] | tuple[Audio, ...],
        *,
        on_progress: Callable[[float], None] | None = None,
        **arguments: Unpack[TranscribeArguments],
    ) -> Transcription | list[Transcription]:
        """Transcribe one recording, or several side by side.

        Args:
            audio: a path, the bytes of a file, or a file that is open for reading bytes; an array
                or tensor of samples at 16 kHz, or a tuple of one and its sampling rate; or a list
                of any of these. Samples are mono `[T]`, `[channels, T]` or `[T, channels]`, of the
                types and scales that `audio.samples.recording_channels` lists.
            on_progress: called with the share that is done, from 0.0 to 1.0, as windows are
                decoded. None shows a bar where this is a notebook, and nothing elsewhere.
            **arguments: `language`, `task`, `channel`, `audio_track`, `initial_prompt`, `hotwords`,
                `prefix`, `options`, `batch_size` and the fields of `DecodeOptions`, as
                `TranscribeArguments` describes them.

        Returns:
            A transcription, or of a list a list of them in the same order.

        Raises:
            AudioError: a file cannot be read, or the samples are not such; nothing is returned.
            MissingPackage: batched mode needs a package that is not installed.
            OptionError: an option is unknown or out of range, or this model does not support it.
            UnsupportedAttention: the back-end requested by name cannot run this model here.
        """
        if isinstance(audio, list) or (isinstance(audio, tuple) and not is_pair(audio)):
            return self._transcribe_all(audio, arguments, on_progress)  # type: ignore[arg-type]
        return self._transcribe_all([audio], arguments, on_progress)[0]  # type: ignore[list-item]

    @shows_options
    def transcribe_many(
        self, recordings: Sequence[Audio], **arguments: Unpack[TranscribeArguments]
    ) -> list[Transcription]:
        """Transcribe several recordings, whose windows are decoded side by side.

        The arguments and errors are those of `transcribe`. What is the same for all is given once;
        what differs (language, task, prompts) is a list with one value per recording.
        """
        return self._transcribe_all(recordings, arguments, None)

    @shows_options
    def stream(self, audio: Audio, **arguments: Unpack[TranscribeArguments]) -> Iterator[Segment]:
        """Yield the segments of one recording, those of a window as soon as it is decoded.

        In batched mode on a GPU those of a batch come when the next one is decoded. Where each
        channel is transcribed by itself, segments come when all channels are decoded so far. The
        arguments and errors are those of `transcribe`.
        """
        options = CallOptions.of(arguments, 1, self.languages)
        channels: list[Recording] = []
        # The windows are closed first: another thread may be taking recordings for them.
        with (
            AudioOpener() as opener,
            closing(_open_all(opener, [audio], options, [channels])) as opened,
            closing(self._run(opened, options)) as windows,
        ):
            for number, segment in enumerate(stream_segments(windows, channels)):
                yield replace(segment, id=number)

    @shows_options
    def transcribe_each(
        self,
        recordings: Iterable[Audio],
        *,
        on_progress: Callable[[int, float], None] | None = None,
        on_segments: Callable[[int, Sequence[Segment]], None] | None = None,
        on_error: Callable[[int, AudioError], None] | None = None,
        **arguments: Unpack[TranscribeArguments],
    ) -> Generator[tuple[int, Transcription]]:
        """Transcribe any number of recordings side by side, and yield each as soon as it is done.

        Recordings are taken when there is room for them. About `batch_size` of them are in
        progress at a time, so that memory does not grow with their number; files are decoded
        ahead, up to two hours of audio (0.46 GB). In batched mode on a GPU another thread takes
        recordings, ahead, and reports that they begin, or cannot be opened.

        Args:
            recordings: as for `transcribe`; the options are the same for all of them.
            on_progress: called with the number of a recording and the share of it that is done,
                from 0.0 to 1.0, as windows are decoded.
            on_segments: called with the number of a recording and its next segments, as windows are
                decoded; not where each channel is transcribed by itself.
            on_error: called with the number of a recording that cannot be opened, and its error;
                the others go on. None raises the error.

        Returns:
            Numbers of recordings, counted from 0, with their transcriptions, in the order in which
            they are done.

        Raises:
            as `transcribe`; what is in progress then is lost.
        """
        options = CallOptions.of(arguments, 1, self.languages)
        report = on_progress or (lambda index, share: None)
        counts: Counter[int] = Counter()
        # The channels of every recording that is in progress.
        groups: dict[int, list[Recording]] = {}

        def report_share(recording: Recording) -> None:
            channels = groups[recording.index]
            if not are_done(channels):
                report(recording.index, share_of(channels))

        [shared] = options.recordings
        inputs = (AudioInput(audio, shared.channel, shared.audio_track) for audio in recordings)

        def opened(found: Iterator[OpenedAudio]) -> Generator[Recording]:
            for index, each in enumerate(found):
                report(index, 0.0)
                try:
                    audio = each.result()
                except AudioError as error:
                    if on_error is None:
                        raise
                    on_error(index, error)
                    continue
                groups[index] = recordings_of(audio, shared, index, report_share)
                del each, audio
                yield from groups[index]

        def take_done() -> Iterator[tuple[int, Transcription]]:
            # A copy: another thread may add to them.
            for index in [index for index, group in list(groups.items()) if are_done(group)]:
                report(index, 1.0)
                yield index, merge_channels(groups.pop(index), self.tokenizer)

        with (
            AudioOpener() as opener,
            closing(opener.open_each(inputs, ahead=_ahead(options))) as found,
            closing(self._run(opened(found), options)) as windows,
        ):
            for recording, segments in windows:
                if on_segments is not None and segments and recording.channel is None:
                    located = map(recording.located, segments)
                    ready = numbered(located, counts[recording.index])
                    counts[recording.index] += len(ready)
                    on_segments(recording.index, ready)
                yield from take_done()
        yield from take_done()

    @shows_options
    def warm_up(self, **arguments: Unpack[TranscribeArguments]) -> None:
        """Have compiled and allocated what calls with these arguments need.

        Kernels that are compiled are kept on disk for later runs; CUDA graphs and buffers are made
        by each process. Without this, the first calls take that time.

        Args:
            **arguments: as for `transcribe`; those of later calls, `batch_size` above all.
        """
        size = CallOptions.of(arguments, 1, self.languages).batch_size
        for recordings in warm_up_calls(size):
            self._transcribe_all(recordings, arguments, lambda share: None)

    def _transcribe_all(
        self,
        audios: Sequence[Audio],
        arguments: TranscribeArguments,
        on_progress: Callable[[float], None] | None,
    ) -> list[Transcription]:
        if isinstance(audios, str | bytes):
            raise AudioError(f"several recordings are a list, but got {shown(audios)}")
        options = CallOptions.of(arguments, len(audios), self.languages)
        if on_progress is None:
            on_progress = notebook_bar(_label(audios))
        groups: list[list[Recording]] = [[] for _ in audios]
        progress = _Progress(groups, on_progress)
        # Sums over all recordings are for callers alone.
        report = progress.report if on_progress else None
        with (
            AudioOpener() as opener,
            closing(_open_all(opener, audios, options, groups, report)) as opened,
            closing(self._run(opened, options)) as windows,
        ):
            for _ in windows:
                pass
        progress.finish()
        return [
            _with_path(merge_channels(channels, self.tokenizer), audio)
            for audio, channels in zip(audios, groups, strict=True)
        ]

    def _run(
        self, recordings: Iterable[Recording], options: CallOptions
    ) -> Generator[tuple[Recording, tuple[Segment, ...]]]:
        """Transcribe recordings, and yield the segments of every window as it is decoded.

        All methods are views of this generator. Recordings without sound are done at once.

        Args:
            recordings: taken as there is room for them; in batched mode on a GPU by another thread.
        """
        reader = self.reader(options.decode)
        with closing(reader.prepared(_with_sound(recordings))) as prepared:
            yield from reader.read(prepared, options.batch_size)

    def reader(self, options: DecodeOptions) -> Reader:
        """What transcribes recordings: on the engine, or through `generate`."""
        engine = self.running_engine()
        if engine is None:
            from whisper_flash_attention.transcribe.hf_long_form import GenerateReader

            return GenerateReader(self.model, self.processor, self._vocabulary, options)

        from whisper_flash_attention.transcribe.batched import BatchedReader
        from whisper_flash_attention.transcribe.sequential import SequentialReader
        from whisper_flash_attention.transcribe.words import WordAligner

        announce_compilation(engine.weights.device.type)
        aligner = None
        if options.word_timestamps:
            aligner = WordAligner(
                engine, self._vocabulary, self._alignment_heads, self._splitter, options
            )
        reader = BatchedReader if options.mode == "batched" else SequentialReader
        return reader(engine, self._vocabulary, self.tokenizer, options, aligner)


def _label(audios: Sequence[Audio]) -> str:
    """What is transcribed, in a few words."""
    if len(audios) != 1:
        return f"{len(audios)} recordings"
    return os.path.basename(audios[0]) if isinstance(audios[0], str | os.PathLike) else "audio"


def _with_path(transcription: Transcription, audio: Audio) -> Transcription:
    if not isinstance(audio, str | os.PathLike):
        return transcription
    return replace(transcription, path=os.fspath(audio))


class Reader(Protocol):
    """What transcribes recordings in one way."""

    def prepare(self, recording: Recording) -> Recording:
        """Compute what the recording needs before its first window."""

    def prepared(self, recordings: Iterable[Recording]) -> Generator[Recording]:
        """Prepare all recordings, in their order."""

    def read(
        self, recordings: Iterable[Recording], batch_size: int
    ) -> Iterator[tuple[Recording, tuple[Segment, ...]]]:
        """Transcribe prepared recordings, and yield the segments of every window."""


class _Progress:
    """Reports the share of all recordings that is done, whenever it grows; all of it at the end."""

    def __init__(
        self, groups: Sequence[list[Recording]], on_progress: Callable[[float], None] | None
    ) -> None:
        self._shares = [0.0] * len(groups)
        self._sum = 0.0
        self._groups = groups
        self._on_progress = on_progress
        self._reported = -1.0
        if groups:
            self._report_mean()

    def report(self, recording: Recording) -> None:
        share = share_of(self._groups[recording.index])
        self._sum += share - self._shares[recording.index]
        self._shares[recording.index] = share
        self._report_mean()

    def finish(self) -> None:
        """Report that all is done."""
        if self._on_progress is not None:
            self._on_progress(1.0)

    def _report_mean(self) -> None:
        share = self._sum / len(self._shares)
        if self._on_progress is not None and self._reported < share < 1:
            self._reported = share
            self._on_progress(share)


def _ahead(options: CallOptions) -> int:
    """Recordings that are decoded ahead, at most: windows of a batch may be of as many."""
    return max(AHEAD_FILES, 2 * options.batch_size)


def _open_all(
    opener: AudioOpener,
    audios: Sequence[Audio],
    options: CallOptions,
    groups: Sequence[list[Recording]],
    on_progress: Callable[[Recording], None] | None = None,
) -> Generator[Recording]:
    """Open recordings in order, files ahead of use; add the channels of each to its group."""
    inputs = (
        AudioInput(audio, each.channel, each.audio_track)
        for audio, each in zip(audios, options.recordings, strict=True)
    )
    with closing(opener.open_each(inputs, ahead=_ahead(options))) as opened:
        for index, (each, channels) in enumerate(zip(options.recordings, groups, strict=True)):
            channels += recordings_of(next(opened).result(), each, index, on_progress)
            yield from channels


def _with_sound(recordings: Iterable[Recording]) -> Iterator[Recording]:
    """Recordings in which there is sound; the others are done."""
    for recording in recordings:
        assert recording.source is not None
        silence = recording.source.seconds_of_silence()
        if silence is None:
            yield recording
        else:
            recording.add_silence(silence)
