"""Transcribe through the model's own `generate`, where the engine does not run the model.

That is Transformers' long form: the same algorithm, one recording at a time, with the back-end or
the adapters that the model has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.prompts import PromptFields
from whisper_flash_attention.transcribe.results import Segment
from whisper_flash_attention.transcribe.tokenizer import Vocabulary
from whisper_flash_attention.transcribe.window_decoder import likeliest_first

# What `generate` can do; `best_of` and `max_initial_timestamp` it leaves out.
SHARED = frozenset(
    {
        *("temperature", "compression_ratio_threshold", "logprob_threshold"),
        *("no_speech_threshold", "condition_on_previous_text", "initial_prompt"),
        *("beam_size", "length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
        *("min_new_tokens", "max_new_tokens", "best_of", "max_initial_timestamp"),
    }
)


def refuse_engine_only(options: DecodeOptions, prompt_fields: PromptFields) -> None:
    """Raise `OptionError` if something is asked for that only the decode engine can do."""
    usual = DecodeOptions()
    for field in fields(options):
        value = getattr(prompt_fields, field.name, None) or getattr(options, field.name)
        if field.name not in SHARED and value != getattr(usual, field.name):
            raise OptionError(
                f"{field.name} {value!r} needs the decode engine, which does not run this model "
                "as it is (`whisper-flash doctor` says when it does): do without"
            )


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
    initial_prompt: str | None,
    on_progress: Callable[[float], None],
) -> tuple[str, list[dict[str, float]], tuple[Segment, ...]]:
    """The language, its probabilities if it was detected, and the segments of one recording.

    Args:
        features, mask: `[1, mel bins, frames]` and `[1, frames]`, as the extractor gives them.
        seconds: length of the recording.
        language: code of the language spoken; None detects it.
        initial_prompt: what the first window is told was said before.
    """
    detected = [] if language else [_language_probabilities(model, vocabulary, features)]
    spoken = language or next(iter(detected[0]))
    multilingual = bool(vocabulary.languages)
    prompt = (initial_prompt or "").strip()
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
        **_search(options),
    )
    segments = _segments(generated["segments"][0], processor.tokenizer, seconds)
    return spoken, detected, segments


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
def _language_probabilities(
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


def _monitor(on_progress: Callable[[float], None]) -> Callable[[torch.Tensor], None]:
    """Adapt `on_progress` to `generate`, which reports frames: rows of (reached, all)."""

    def report(frames: torch.Tensor) -> None:
        reached, total = frames[0].tolist()
        on_progress(reached / total)

    return report
