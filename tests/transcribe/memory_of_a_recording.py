"""Print how long a recording is, the most resident MB while it is transcribed, and its segments.

    python -m tests.transcribe.memory_of_a_recording FILE MODE

The model is small and random, and decodes one token per window; the detector takes loud sound for
speech.
"""

from __future__ import annotations

import resource
import sys
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, WhisperFeatureExtractor

from tests.random_whisper import perturbed, small_whisper_config
from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration
from whisper_flash_attention.audio import voice
from whisper_flash_attention.transcribe import Transcriber

PLAIN = {
    "temperature": 0.0,
    "no_speech_threshold": None,
    "without_timestamps": True,
    "max_new_tokens": 1,
}


class Numbers:
    """Tokens as numbers."""

    eos_token_id = 50256

    def convert_ids_to_tokens(self, tokens: range) -> list[str]:
        return [str(token) for token in tokens]

    def convert_tokens_to_ids(self, name: str) -> int:
        return {"<|startofprev|>": 50360}[name]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


class LoudIsSpeech:
    """A detector that takes loud sound for speech."""

    def reset_states(self) -> None:
        pass

    def __call__(self, frame: torch.Tensor, sampling_rate: int) -> torch.Tensor:
        return torch.tensor(0.9 if frame.abs().max() > 0.01 else 0.1)


def random_transcriber() -> Transcriber:
    """Windows are 30 s long, as real ones; everything else is small."""
    config = small_whisper_config(
        vocab_size=51864,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        max_source_positions=1500,
        decoder_start_token_id=50257,
        eos_token_id=50256,
    )
    model = perturbed(WhisperFlashAttentionForConditionalGeneration(config))
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50257,
        eos_token_id=50256,
        is_multilingual=False,
        no_timestamps_token_id=50362,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    processor = SimpleNamespace(feature_extractor=WhisperFeatureExtractor(), tokenizer=Numbers())
    return Transcriber(model, processor)  # type: ignore[arg-type]


def main(path: str, mode: str) -> None:
    real = voice._detector

    def loud() -> tuple[Any, Any]:
        return LoudIsSpeech(), real()[1]

    voice._detector = loud  # type: ignore[assignment]
    torch.set_num_threads(1)
    transcriber = random_transcriber()
    found = transcriber.transcribe(path, mode=mode, batch_size=4, **PLAIN)  # type: ignore[arg-type]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(found.seconds, peak, len(found.segments))


if __name__ == "__main__":
    main(*sys.argv[1:])
