"""Where the time of a batch goes: each part of its way run alone, and waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, TypeVar

import torch

from whisper_flash_attention.audio.log_mel import log_mel
from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.benchmark.ceilings import synchronize
from whisper_flash_attention.benchmark.features import SECONDS_PER_CLIP, Samples
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.batched import BatchedReader, Item, Speech, spoken_window
from whisper_flash_attention.transcribe.detokenizer import Detokenizer
from whisper_flash_attention.transcribe.prefetch import staged_ahead
from whisper_flash_attention.transcribe.vocabulary import Vocabulary
from whisper_flash_attention.transcribe.window_decoder import WindowDecoder
from whisper_flash_attention.transcribe.words import WordAligner

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
        self._vocabulary = Vocabulary.of(self._model)
        tokenizer = Detokenizer(transcriber.processor.tokenizer)
        parts = (self._engine, self._vocabulary, tokenizer, options)
        self._reader, self._decoder = BatchedReader(*parts), WindowDecoder(*parts)
        self._aligner = (
            WordAligner(self._model, transcriber.processor) if options.word_timestamps else None
        )
        chunks = [Chunk(i * SECONDS_PER_CLIP, window) for i, window in enumerate(windows)]
        speech = Speech(chunks, SECONDS_PER_CLIP * len(chunks), "transcribe", "en")
        self._batch = [Item(0, speech, chunk, is_first=chunk is chunks[0]) for chunk in chunks]

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
            "copies to the device", lambda: list(staged_ahead(iter([samples]), list, device))
        )
        bins = weights.encoder.conv1.weight.shape[1]
        features = timed(
            "log-mel",
            lambda: log_mel(clips, mel_bins=bins, device=device, dtype=weights.dtype),
        )
        states: torch.Tensor = timed("encoder", lambda: self._engine.encode(features))
        prompts = [self._vocabulary.prompt("en", "transcribe")] * len(self._batch)
        later = timed("decoder", lambda: self._decoder.decode_first(states, prompts))
        said = timed("text and segments", lambda: self._reader.segments(self._batch, later()))
        aligner = self._aligner
        if aligner is not None:
            spoken = [spoken_window(*each) for each in zip(self._batch, states, said, strict=True)]
            words = timed("words, device", lambda: aligner.begin(spoken))
            timed("words, host", words)
        return took
