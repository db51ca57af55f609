"""Transcribe through the model's own `generate`, where the engine does not run the model.

That is Transformers' long form: the same algorithm, one recording at a time, with the back-end or
the adapters that the model has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.transcribe.segments import Segment
from whisper_flash_attention.transcribe.vocabulary import Vocabulary


def transcribe_by_generate(
    model: Any,
    processor: Any,
    vocabulary: Vocabulary,
    features: Tensor,
    mask: Tensor,
    *,
    seconds: float,
    language: str | None,
    task: str,
    options: DecodeOptions,
    on_progress: Callable[[float], None] | None,
) -> tuple[str, tuple[Segment, ...]]:
    """The language and the segments of one recording.

    Args:
        features, mask: `[1, mel bins, frames]` and `[1, frames]`, as the extractor gives them.
        seconds: length of the recording.
        language: code of the language spoken; None detects it.
    """
    spoken = language or _detect_language(model, vocabulary, features)
    multilingual = bool(vocabulary.languages)
    prompt = (options.initial_prompt or "").strip()
    generated = model.generate(
        features,
        attention_mask=mask,
        # An English-only model has no tokens for language and task, and `generate` refuses them.
        language=spoken if multilingual else None,
        task=task if multilingual else None,
        return_timestamps=True,
        return_segments=True,
        monitor_progress=_monitor(on_progress),
        prompt_ids=processor.get_prompt_ids(prompt, return_tensors="pt").to(features.device)
        if prompt
        else None,
        **_thresholds(options, features.shape[2]),
        **_lengths(options),
    )
    return spoken, _segments(generated["segments"][0], processor.tokenizer, seconds)


def _thresholds(options: DecodeOptions, frames: int) -> dict[str, Any]:
    """The options by Transformers' names; it judges answers only in its long form."""
    if frames <= 3000:
        return {}
    return {
        "temperature": options.temperatures,
        "compression_ratio_threshold": options.compression_ratio_threshold,
        "logprob_threshold": options.logprob_threshold,
        "no_speech_threshold": options.no_speech_threshold,
        "condition_on_prev_tokens": options.condition_on_previous_text,
    }


def _lengths(options: DecodeOptions) -> dict[str, int]:
    lengths = {
        "min_new_tokens": options.min_new_tokens,
        "max_new_tokens": options.max_new_tokens,
    }
    return {name: length for name, length in lengths.items() if length is not None}


def _detect_language(model: Any, vocabulary: Vocabulary, features: Tensor) -> str:
    """The code of the language of the first window; generate's own detection is the same."""
    if not vocabulary.languages:
        return "en"
    detected = int(model.detect_language(features)[0])
    return next(code for code, token in vocabulary.languages.items() if token == detected)


def _segments(rows: list[dict[str, Any]], tokenizer: Any, seconds: float) -> tuple[Segment, ...]:
    """Segments of what `generate` returned, none reaching beyond the recording.

    A window is padded with silence, in which Whisper may hear things: those are left out.
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


def _monitor(on_progress: Callable[[float], None] | None) -> Callable[[torch.Tensor], None] | None:
    """Adapt `on_progress` to `generate`, which reports frames: rows of (reached, all)."""
    if on_progress is None:
        return None

    def report(frames: torch.Tensor) -> None:
        reached, total = frames[0].tolist()
        on_progress(reached / total)

    return report
