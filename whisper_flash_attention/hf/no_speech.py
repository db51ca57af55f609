"""Stock Whisper's detection of silence, without a second run of the encoder.

`WhisperNoSpeechDetection` is a logits processor that changes nothing: at the first step it notes
how likely the token <|nospeech|> is, and the temperature fallback reads that afterwards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.logits_processors import Rules
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.hf.compat import BaseModelOutput, WhisperNoSpeechDetection


def detects_silence(processors: list[Any]) -> bool:
    """Whether any of the processors listens for silence."""
    return any(type(processor) is WhisperNoSpeechDetection for processor in processors)


def listen(
    processors: list[Any],
    engine: Engine,
    states: torch.Tensor,
    prompt: torch.Tensor,
    request: Request,
) -> None:
    """Have every `WhisperNoSpeechDetection` among the processors note what it notes.

    Args:
        states: the encoder's output `[clips, S, D]`.
        prompt: `[B, P]` int64.
        request: what is about to be decoded.
    """
    for index, processor in enumerate(processors):
        if type(processor) is not WhisperNoSpeechDetection:
            continue
        if processor.start_of_trans_offset > 1:
            _listen_in_the_prompt(processor, states, prompt)
        else:
            scores = _first_logits(engine, states, prompt, request)
            for earlier in processors[:index]:
                scores = earlier(prompt, scores)
            processor(prompt, scores)


def _listen_in_the_prompt(processor: Any, states: torch.Tensor, prompt: torch.Tensor) -> None:
    """Stock runs the whole model on the inputs of the first temperature: give it the states.

    After a fallback of some rows only, those inputs belong to more rows than `states` does; stock
    looks at all of them, and so does this.
    """
    inputs = processor.inputs
    if inputs is not None and inputs["input_features"].shape[0] == states.shape[0]:
        known = {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}
        processor.inputs = {k: v for k, v in inputs.items() if k != "input_features"} | known
    try:
        processor(prompt, prompt.new_empty(0))
    finally:
        processor.inputs = inputs


def _first_logits(
    engine: Engine, states: torch.Tensor, prompt: torch.Tensor, request: Request
) -> torch.Tensor:
    """The model's logits `[B, V]` after the prompt, float32."""
    one_step = replace(
        request,
        rules=Rules(),
        max_length=prompt.shape[1] + 1,
        sample=False,
        beams=None,
        want_scores=False,
        want_logits=True,
        on_token=None,
    )
    logits = engine.decode(states, prompt, one_step).logits
    assert logits is not None
    return logits[0]
