"""`Transcriber`: a Whisper model and its processor, put to work on recordings of any length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.audio import SAMPLING_RATE, load_audio
from whisper_flash_attention.audio.waveforms import mono_samples
from whisper_flash_attention.config import TranscribeOptions
from whisper_flash_attention.errors import AudioError, WeightsError
from whisper_flash_attention.transcribe.segments import Segment, Transcription

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

# What the encoder sees at once; longer recordings are read window by window.
WINDOW_SECONDS = 30
# What `log_mel` computes, in the words of `WhisperFeatureExtractor`.
WHISPER_FEATURES = MappingProxyType(
    {"sampling_rate": 16_000, "n_fft": 400, "hop_length": 160, "chunk_length": 30, "dither": 0.0}
)


class Transcriber:
    """Transcribes recordings, greedily and with timestamps, through the model's own `generate`.

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
        self._language_ids = _language_ids(model)

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
        return tuple(self._language_ids) or ("en",)

    def transcribe(
        self,
        audio: str | Path | npt.NDArray[np.floating[Any]] | torch.Tensor,
        *,
        language: str | None = None,
        task: str = "transcribe",
        on_progress: Callable[[float], None] | None = None,
    ) -> Transcription:
        """Transcribe one recording.

        Args:
            audio: a file, or mono samples `[T]` in floating point at 16 kHz.
            language: name or code of the language spoken; None detects it in the first 30 s.
            task: "transcribe", or "translate" into English.
            on_progress: called with the share that is done, from 0.0, before each window.

        Raises:
            AudioError: the file cannot be read, or the samples are not such.
            OptionError: the language or task is unknown, or this model cannot do it.
            UnsupportedAttention: the back-end asked for by name cannot run this model here.
        """
        options = TranscribeOptions(language=language, task=task)
        options.check_model(self.languages)
        samples = load_audio(audio) if isinstance(audio, str | Path) else _mono_samples(audio)
        features, mask = self._features(samples)
        spoken = options.language or self._detect_language(features)
        # An English-only model has no tokens for language and task, and `generate` refuses them.
        multilingual = bool(self._language_ids)
        generated = self.model.generate(
            features,
            attention_mask=mask,
            language=spoken if multilingual else None,
            task=task if multilingual else None,
            return_timestamps=True,
            return_segments=True,
            monitor_progress=_monitor(on_progress),
        )
        return self._transcription(generated["segments"][0], spoken, samples.size / SAMPLING_RATE)

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

    def _detect_language(self, features: torch.Tensor) -> str:
        """The code of the language of the first window; generate's own detection is the same."""
        if not self._language_ids:
            return "en"
        detected = int(self.model.detect_language(features)[0])
        return next(code for code, token in self._language_ids.items() if token == detected)

    def _transcription(
        self, rows: list[dict[str, Any]], language: str, seconds: float
    ) -> Transcription:
        """Make segments of what `generate` returned, none reaching beyond the recording.

        A window is padded with silence, in which Whisper may hear things: those are left out.
        """
        segments, texts = [], []
        for row in rows:
            # Timestamps are 0.02 s apart; rounding takes off what adding windows up left.
            start, end = round(float(row["start"]), 2), round(float(row["end"]), 2)
            tokens = row["tokens"].tolist()
            text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
            if start >= seconds or not text.strip():
                continue
            end = max(start, min(end, seconds))
            segments.append(Segment(start, end, text.strip(), tuple(tokens)))
            texts.append(text)
        return Transcription("".join(texts).strip(), language, tuple(segments), seconds)


def _check_features(processor: WhisperProcessor) -> None:
    """Raise `WeightsError` if a checkpoint was trained on features that `log_mel` does not give."""
    for name, value in WHISPER_FEATURES.items():
        found = getattr(processor.feature_extractor, name)
        if found != value:
            raise WeightsError(
                f"the checkpoint's preprocessor_config.json has {name} {found!r}, but Whisper's "
                f"features have {value!r}: transcribe with Transformers' own pipeline"
            )


def _language_ids(model: WhisperForConditionalGeneration) -> dict[str, int]:
    """Token ids by language code, empty for an English-only model."""
    config = model.generation_config
    multilingual = getattr(config, "is_multilingual", None)
    known = getattr(config, "lang_to_id", None)
    if multilingual is None or not hasattr(config, "no_timestamps_token_id"):
        raise WeightsError(
            "the model's generation_config.json is too old: it lacks is_multilingual or "
            "no_timestamps_token_id; take it from the openai/whisper-* model that it came from"
        )
    if not multilingual:
        return {}
    if not known:
        raise WeightsError(
            "the model's generation_config.json lacks lang_to_id; take it from the "
            "openai/whisper-* model that it came from"
        )
    return {token.strip("<|>"): number for token, number in known.items()}


def _mono_samples(audio: npt.NDArray[np.floating[Any]] | torch.Tensor) -> npt.NDArray[np.float32]:
    """Check samples that a caller brings, and return them as float32 `[T]`."""
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
    return mono_samples(audio, SAMPLING_RATE)


def _monitor(on_progress: Callable[[float], None] | None) -> Callable[[torch.Tensor], None] | None:
    """Adapt `on_progress` to `generate`, which reports frames: rows of (reached, all)."""
    if on_progress is None:
        return None

    def report(frames: torch.Tensor) -> None:
        reached, total = frames[0].tolist()
        on_progress(reached / total)

    return report
