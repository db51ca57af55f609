"""Use the class in place of Transformers' `WhisperForConditionalGeneration`.

python examples/drop_in.py talk.wav --model openai/whisper-small
"""

import argparse

import torch

from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration, load_processor
from whisper_flash_attention.audio import SAMPLING_RATE, bundled_recordings, load_audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio", nargs="?", default=bundled_recordings()[0].path)
    parser.add_argument("--model", default="openai/whisper-small")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = WhisperFlashAttentionForConditionalGeneration.from_pretrained(
        arguments.model, dtype=dtype
    ).to(device)  # type: ignore[arg-type]  # as Transformers declares it
    processor = load_processor(arguments.model)

    samples = load_audio(arguments.audio)[: 30 * SAMPLING_RATE]  # float32 [T], mono
    inputs = processor(samples, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    ids = model.generate(inputs.input_features.to(device, dtype), return_timestamps=True)
    print(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())


if __name__ == "__main__":
    main()
