"""How much faster than real time recordings become text: from samples in memory to the words.

Weights are random and every window of 30 s gets the same number of tokens, so that models of any
size can be compared; the speech is real. Ours is what users run, `Transcriber` in batched mode
without a detector. Stock is Transformers' `generate` with features computed before the clock
starts, and its tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.log_mel import log_mel
from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.benchmark.environment import driver_memory
from whisper_flash_attention.benchmark.features import (
    CLIP_SAMPLES,
    MOST_CLIPS,
    SAMPLING_RATE,
    SECONDS_PER_CLIP,
    Samples,
    bundled_clips,
)
from whisper_flash_attention.benchmark.measure import GB, peak_rss, synchronize
from whisper_flash_attention.benchmark.random_weights import (
    build_model,
    generation_config,
    random_processor,
    talking_config,
)
from whisper_flash_attention.benchmark.settings import (
    DECODER_POSITIONS,
    MODEL_SIZES,
    PROMPT_TOKENS,
    ModelSize,
)
from whisper_flash_attention.benchmark.systems import FLASH
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.errors import BenchmarkError, OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.arguments import RecordingOptions
from whisper_flash_attention.transcribe.batched import (
    BatchedReader,
    PendingChunk,
    prefetch,
    spoken_window,
)
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.tokenizer import Detokenizer, Vocabulary, WordSplitter
from whisper_flash_attention.transcribe.window_decoder import WindowDecoder
from whisper_flash_attention.transcribe.words import WordAligner

THROUGHPUT = "throughput"
STOCK = "sdpa"
SYSTEMS = (FLASH, STOCK)
# Enough batches for host and device to work side by side.
LEAST_BATCHES, LEAST_WINDOWS = 4, 8


@dataclass(frozen=True)
class ThroughputCase:
    """A system, a model, and the work.

    Args:
        checkpoint: one of `MODEL_SIZES`.
        system: one of `SYSTEMS`.
        batch_size: windows at a time.
        new_tokens: of every window.
        word_timestamps: give words their times; ours only.
        repeats: timed runs over all of the audio.
        device, dtype: by name.

    Raises:
        OptionError: a value is invalid.
    """

    checkpoint: str
    system: str
    batch_size: int
    new_tokens: int
    word_timestamps: bool
    repeats: int
    device: str
    dtype: str

    def __post_init__(self) -> None:
        for name, value, known in (
            ("checkpoint", self.checkpoint, MODEL_SIZES),
            ("system", self.system, SYSTEMS),
        ):
            check.one_of(name, value, known)
        for name, number in (("batch_size", self.batch_size), ("repeats", self.repeats)):
            check.whole_number(name, number, least=1)
        most = DECODER_POSITIONS - PROMPT_TOKENS
        check.whole_number("new_tokens", self.new_tokens, least=2, most=most)
        if self.word_timestamps and self.system != FLASH:
            raise OptionError(f'word_timestamps=True is measured with system="{FLASH}" only')

    @property
    def size(self) -> ModelSize:
        return MODEL_SIZES[self.checkpoint]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def options(self) -> DecodeOptions:
        """Options that decode every window once, to exactly `new_tokens` tokens."""
        return DecodeOptions(
            mode="batched",
            vad_filter=False,
            temperature=0.0,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            word_timestamps=self.word_timestamps,
        )


@dataclass(frozen=True)
class ThroughputRow:
    """One case as it was measured; units are those of `results.ResultRow`.

    `seconds` are those of every timed run over `audio_seconds` of sound. `parts` are seconds of one
    batch, each part run alone and waited for, and so more than their share of a run, in which host
    and device work at the same time. `words` counts those that got times.
    """

    case: ThroughputCase
    audio: str
    audio_seconds: float
    environment: dict[str, Any]
    status: str = "failed"
    error: str | None = None
    first_run_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    tokens_checked: int = 0
    words: int = 0
    vram_driver_gb: float | None = None
    vram_allocated_gb: float | None = None
    rss_peak_gb: float | None = None

    @property
    def realtime_factor(self) -> float | None:
        """Seconds of sound per second, in the median run."""
        return self.audio_seconds / median(self.seconds) if self.seconds else None

    def as_json(self) -> dict[str, Any]:
        """All fields, the case's among them, and what follows from the times."""
        fields = asdict(self)
        case = fields.pop("case")
        return {
            "setting": THROUGHPUT,
            **case,
            **fields,
            "seconds_total": median(self.seconds) if self.seconds else None,
            "realtime_factor": self.realtime_factor,
        }


@dataclass(frozen=True)
class Counted:
    """What a run gave: tokens, and words with times."""

    tokens: int
    words: int = 0


@dataclass(frozen=True)
class System:
    """A system that is ready: `run` turns all samples into text; `parts` measures one batch."""

    run: Callable[[], Counted]
    parts: Callable[[], dict[str, float]]


def measure_throughput(
    case: ThroughputCase, samples: Samples, audio: str, environment: dict[str, Any]
) -> ThroughputRow:
    """Build the case's system with random weights, warm it up, and time it.

    Args:
        case: what to run.
        samples: mono at 16 kHz, of a whole number of windows.
        audio: what they are, in words.
        environment: of this machine.

    Returns:
        The row; "failed" if the GPU's memory does not hold it.

    Raises:
        BenchmarkError: a window got another number of tokens than requested.
    """
    device = torch.device(case.device)
    blank = ThroughputRow(case, audio, samples.size / SAMPLING_RATE, environment)
    try:
        system = (_flash if case.system == FLASH else _stock)(case, samples)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        first, _ = _timed(system.run, device)
        runs = [_timed(system.run, device) for _ in range(case.repeats)]
        allocated = torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None
        parts = system.parts()
    except torch.OutOfMemoryError:
        return replace(blank, error="out of memory")
    windows = samples.size // CLIP_SAMPLES
    for _, counted in runs:
        if counted.tokens != windows * case.new_tokens:
            raise BenchmarkError(
                f"{windows} windows of {case.new_tokens} tokens gave {counted.tokens} tokens"
            )
    return replace(
        blank,
        status="ok",
        first_run_seconds=first,
        seconds=[took for took, _ in runs],
        parts=parts,
        tokens_checked=sum(counted.tokens for _, counted in runs),
        words=runs[0][1].words,
        vram_driver_gb=driver_memory(device)[0],
        vram_allocated_gb=allocated,
        rss_peak_gb=peak_rss(),
    )


def windows_of(case: ThroughputCase, minutes: float | None) -> int:
    """How many windows of 30 s a case transcribes.

    Raises:
        OptionError: it is less than one, or more than those of a week.
    """
    if minutes is None:
        return max(LEAST_BATCHES * case.batch_size, LEAST_WINDOWS)
    expected = "0.5, a window, or more, up to a week"
    return int(2 * check.number("minutes", minutes, expected, least=0.5, most=7 * 24 * 60))


def speech(files: list[Path], windows: int) -> tuple[Samples, str]:
    """This many windows of recordings, repeated as needed, and a description of them."""
    if files:
        loop = np.concatenate([load_audio(path) for path in files])
        origin = f"{len(files)} recordings of {loop.size / SAMPLING_RATE:.1f} s, repeated"
    else:
        clips, made_of = bundled_clips(min(windows, MOST_CLIPS))
        loop, origin = np.concatenate(clips), f"bundled: {made_of}"
    return np.resize(loop, windows * CLIP_SAMPLES), origin


def random_transcriber(case: ThroughputCase) -> Transcriber:
    """Our model of the case's size with random weights, and a processor that fits."""
    from whisper_flash_attention.modeling_whisper_flash_attention import (
        WhisperFlashAttentionForConditionalGeneration,
    )

    size = case.size
    model = build_model(
        WhisperFlashAttentionForConditionalGeneration,
        size,
        size.decoder_layers,
        device=case.device,
        dtype=case.torch_dtype,
    )
    model.generation_config = talking_config(size, size.decoder_layers)
    return Transcriber(model, random_processor(size))


def _flash(case: ThroughputCase, samples: Samples) -> System:
    transcriber = random_transcriber(case)

    # Each a recording of its own: a longer one is cut where it is quiet, not every 30 s.
    windows = list(_windows(samples))

    def run() -> Counted:
        found = transcriber.transcribe_many(
            windows, language="en", options=case.options, batch_size=case.batch_size
        )
        segments = [segment for each in found for segment in each.segments]
        return Counted(
            sum(len(segment.tokens) for segment in segments),
            sum(len(segment.words) for segment in segments),
        )

    first = windows[: case.batch_size]
    return System(run, Parts(transcriber, case.options, first).measure)


def _stock(case: ThroughputCase, samples: Samples) -> System:
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    size = case.size
    model = build_model(
        WhisperForConditionalGeneration,
        size,
        size.decoder_layers,
        device=case.device,
        dtype=case.torch_dtype,
    )
    model.set_attn_implementation(case.system)
    model.generation_config = generation_config(size.vocabulary)
    tokenizer: Any = random_processor(size).tokenizer
    extractor: Any = WhisperFeatureExtractor(feature_size=size.mel_bins)
    # Clips repeat themselves: each is computed once.
    known: dict[bytes, torch.Tensor] = {}
    features = []
    for window in _windows(samples):
        key = window[:: CLIP_SAMPLES // 64].tobytes()
        if key not in known:
            found = extractor(window, sampling_rate=SAMPLING_RATE, return_tensors="pt")
            known[key] = found.input_features[0].to(case.torch_dtype)
        features.append(known[key])
    batches = [
        torch.stack(features[start : start + case.batch_size])
        for start in range(0, len(features), case.batch_size)
    ]

    def run() -> Counted:
        tokens = 0
        for batch in batches:
            ids = model.generate(
                batch.to(case.device, non_blocking=True),
                max_new_tokens=case.new_tokens,
                min_new_tokens=case.new_tokens,
                do_sample=False,
            )
            tokenizer.batch_decode(ids, skip_special_tokens=True)
            tokens += ids.numel()
        return Counted(tokens)

    return System(run, dict)


def _windows(samples: Samples) -> Sequence[Samples]:
    return np.split(samples, samples.size // CLIP_SAMPLES)


def _timed(work: Callable[[], Counted], device: torch.device) -> tuple[float, Counted]:
    synchronize(device)
    start = time.perf_counter()
    counted = work()
    synchronize(device)
    return time.perf_counter() - start, counted


ROUNDS = 3

Result = TypeVar("Result")


class Parts:
    """The parts of one batch of windows, as `BatchedReader` goes through them.

    Args:
        transcriber: what to measure.
        options: how windows are decoded.
        windows: of a batch, mono at 16 kHz.
    """

    def __init__(
        self, transcriber: Transcriber, options: DecodeOptions, windows: Sequence[Samples]
    ) -> None:
        self._model: Any = transcriber.model
        self._engine = Engine.of(self._model)
        generation = self._model.generation_config
        self._vocabulary = Vocabulary.of(self._model.config, generation)
        tokenizer = Detokenizer(transcriber.processor.tokenizer)
        parts = (self._engine, self._vocabulary, tokenizer, options)
        self._reader, self._decoder = BatchedReader(*parts), WindowDecoder(*parts)
        splitter = WordSplitter(transcriber.processor.tokenizer)
        heads = getattr(generation, "alignment_heads", None)
        self._aligner = (
            WordAligner(self._engine, self._vocabulary, heads, splitter)
            if options.word_timestamps
            else None
        )
        chunks = [Chunk(i * SECONDS_PER_CLIP, window) for i, window in enumerate(windows)]
        recording = Recording(None, RecordingOptions(language="en"))
        recording.begin_chunks(chunks, SECONDS_PER_CLIP * len(chunks))
        self._batch = [
            PendingChunk(recording, chunk, is_first=chunk is chunks[0]) for chunk in chunks
        ]

    def measure(self) -> dict[str, float]:
        """Seconds of every part, the median of a few rounds."""
        rounds = [self._round() for _ in range(ROUNDS)]
        return {name: median(each[name] for each in rounds) for name in rounds[0]}

    def _round(self) -> dict[str, float]:
        weights, took = self._engine.weights, dict[str, float]()
        device = weights.device

        def timed(name: str, work: Callable[[], Result]) -> Result:
            synchronize(device)
            start = time.perf_counter()
            result = work()
            synchronize(device)
            took[name] = time.perf_counter() - start
            return result

        samples = [each.chunk.samples for each in self._batch]
        [(_, clips)] = timed(
            "copies to the device", lambda: list(prefetch(iter([samples]), list, device))
        )
        bins = weights.encoder.conv1.weight.shape[1]
        features = timed(
            "log-mel",
            lambda: log_mel(clips, mel_bins=bins, device=device, dtype=weights.dtype),
        )
        states: torch.Tensor = timed("encoder", lambda: self._engine.encode(features))
        prompts = [self._vocabulary.prompt("en", "transcribe")] * len(self._batch)
        later = timed("decoder", lambda: self._decoder.decode_first(states, prompts))
        segments = timed("text and segments", lambda: self._reader.segments(self._batch, later()))
        aligner = self._aligner
        if aligner is not None:
            windows = [
                spoken_window(*each) for each in zip(self._batch, states, segments, strict=True)
            ]
            words = timed("words, device", lambda: aligner.begin(windows))
            timed("words, host", words)
        return took
