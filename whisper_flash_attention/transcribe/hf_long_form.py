"""Transcribe through `generate` of the model, where the engine does not run the model.

That is the long form of Transformers: the same algorithm, one recording at a time, with the
attention back-end or the adapters that the model has.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from whisper_flash_attention.audio.log_mel import HOP, log_mel, log_mel_whole
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.arguments import RecordingOptions
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.results import Segment
from whisper_flash_attention.transcribe.tokenizer import Vocabulary
from whisper_flash_attention.transcribe.window_decoder import likeliest_first

# Length of the window that the encoder takes.
WINDOW_SECONDS = 30
# What `generate` can do; `best_of`, `max_initial_timestamp` and `check_speech` it leaves out.
SHARED = frozenset(
    {
        *("temperature", "compression_ratio_threshold", "logprob_threshold"),
        *("no_speech_threshold", "condition_on_previous_text", "initial_prompt"),
        *("beam_size", "length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
        *("min_new_tokens", "max_new_tokens", "best_of", "max_initial_timestamp"),
        "check_speech",
    }
)


def refuse_engine_only(options: DecodeOptions, texts: RecordingOptions) -> None:
    """Raise `OptionError` if an option needs the decode engine."""
    usual = DecodeOptions()
    for field in fields(options):
        value = getattr(texts, field.name, None) or getattr(options, field.name)
        if field.name not in SHARED and value != getattr(usual, field.name):
            raise OptionError(
                f"{field.name} {value!r} needs the decode engine, which does not run this model "
                "as it is (`whisper-flash doctor` says when it does): do without"
            )


class GenerateReader:
    """Transcribes recordings one after the other, each as a whole.

    Args:
        model, processor: of one checkpoint.
        options: those that `generate` cannot do are refused.
    """

    def __init__(
        self, model: Any, processor: Any, vocabulary: Vocabulary, options: DecodeOptions
    ) -> None:
        self._model = model
        self._processor = processor
        self._vocabulary = vocabulary
        self._options = options

    def prepare(self, recording: Recording) -> Recording:
        """Check the options. Raises `OptionError` if one needs the decode engine."""
        refuse_engine_only(self._options, recording.options)
        return recording

    def prepared(self, recordings: Iterable[Recording]) -> Generator[Recording]:
        """Prepare all recordings, each when it is taken."""
        yield from map(self.prepare, recordings)

    def read(
        self, recordings: Iterable[Recording], batch_size: int
    ) -> Iterator[tuple[Recording, tuple[Segment, ...]]]:
        """Transcribe all recordings; yield the segments of each when it is done.

        Args:
            recordings: prepared ones.
            batch_size: without effect: `generate` decodes one recording at a time.
        """
        for recording in recordings:
            segments = self._transcribe(recording)
            recording.add_all(segments)
            yield recording, segments

    def _transcribe(self, recording: Recording) -> tuple[Segment, ...]:
        assert recording.source is not None
        samples = recording.source.whole()
        recording.seconds = samples.size / SAMPLING_RATE
        features, mask = features_and_mask(self._model, samples)
        if recording.language is None:
            probabilities = language_probabilities(self._model, self._vocabulary, features)
            recording.language = next(iter(probabilities))
            recording.detected.append(probabilities)
        multilingual = bool(self._vocabulary.languages)
        padding = self._model.generation_config.pad_token_id
        generated = self._model.generate(
            features,
            attention_mask=mask,
            # An English-only model has no tokens for these, and `generate` refuses them.
            language=recording.language if multilingual else None,
            task=recording.options.task if multilingual else None,
            return_timestamps=True,
            return_segments=True,
            monitor_progress=_monitor(recording.report),
            prompt_ids=self._prompt_ids(recording.options.initial_prompt),
            # Without one, `generate` fails on the second window with previous text.
            pad_token_id=self._vocabulary.end if padding is None else padding,
            **_thresholds(self._options, features.shape[2]),
            **_search(self._options),
        )
        tokenizer = self._processor.tokenizer
        return _segments(generated["segments"][0], tokenizer, recording.seconds)

    def _prompt_ids(self, text: str | tuple[int, ...] | None) -> Tensor | None:
        if isinstance(text, tuple):
            first = self._processor.tokenizer.convert_tokens_to_ids("<|startofprev|>")
            return torch.tensor([first, *text], device=self._model.device)
        prompt = (text or "").strip()
        if not prompt:
            return None
        ids: Tensor = self._processor.get_prompt_ids(prompt, return_tensors="pt")
        return ids.to(self._model.device)


def features_and_mask(model: Any, samples: Samples) -> tuple[Tensor, Tensor]:
    """Log-mel features `[1, 80|128, frames]` and their mask `[1, frames]` on the device of a model.

    Up to 30 s it is one window, silent to its end; `generate` takes a longer recording whole.
    """
    is_long = samples.size > WINDOW_SECONDS * SAMPLING_RATE
    features = (log_mel_whole if is_long else log_mel)(
        samples, mel_bins=model.config.num_mel_bins, device=model.device, dtype=model.dtype
    )
    starts = HOP * torch.arange(features.shape[2], device=features.device)
    return features, (starts < samples.size).to(torch.int32)[None]


def _thresholds(options: DecodeOptions, frames: int) -> dict[str, Any]:
    """The options by Transformers' names; it judges results only in its long form."""
    if frames <= 3000:
        return {}
    return {
        "temperature": options.temperatures,
        "compression_ratio_threshold": options.compression_ratio_threshold,
        "logprob_threshold": options.logprob_threshold,
        "no_speech_threshold": options.no_speech_threshold,
        "condition_on_prev_tokens": options.condition_on_previous_text,
    }


def _search(options: DecodeOptions) -> dict[str, Any]:
    """What else differs from the checkpoint's own generation config, by Transformers' names."""
    wanted = {
        "num_beams": options.beam_size,
        "length_penalty": options.length_penalty,
        "repetition_penalty": options.repetition_penalty,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "min_new_tokens": options.min_new_tokens,
        "max_new_tokens": options.max_new_tokens,
    }
    usual = (None, 1.0, 1.0, 0, None, None)
    return {
        name: value
        for (name, value), each in zip(wanted.items(), usual, strict=True)
        if value != each
    }


@torch.no_grad()
def language_probabilities(
    model: Any, vocabulary: Vocabulary, features: Tensor
) -> dict[str, float]:
    """Probabilities of languages in the first window, by code, likeliest first.

    They are what the model's own `detect_language` takes the likeliest of.
    """
    known = vocabulary.languages
    if not known:
        return {"en": 1.0}
    start = torch.full((1, 1), vocabulary.start, device=features.device)
    frames = 2 * model.config.max_source_positions
    logits = model(features[:, :, :frames], decoder_input_ids=start, use_cache=False).logits
    chances = logits[0, -1, list(known.values())].double().softmax(dim=-1).tolist()
    return likeliest_first(zip(known, chances, strict=True))


def _segments(rows: list[dict[str, Any]], tokenizer: Any, seconds: float) -> tuple[Segment, ...]:
    """Segments of what `generate` returned, none reaching beyond the recording.

    A window is padded with silence, for which Whisper may invent text: that is left out.
    """
    segments = []
    for row in rows:
        # Timestamps are 0.02 s apart; rounding takes off what adding windows up left.
        start, end = round(float(row["start"]), 2), round(float(row["end"]), 2)
        tokens = row["tokens"].tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if start < seconds and text:
            end = max(start, min(end, seconds))
            segments.append(Segment(start, end, text, tuple(tokens)))
    return tuple(segments)


def _monitor(on_progress: Callable[[float], None]) -> Callable[[torch.Tensor], None]:
    """Adapt `on_progress` to `generate`, which reports frames: rows of (reached, all)."""

    def report(frames: torch.Tensor) -> None:
        reached, total = frames[0].tolist()
        on_progress(reached / total)

    return report
