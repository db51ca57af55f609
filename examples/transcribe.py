"""Print the segments of a recording of any length as they are decoded.

python examples/transcribe.py talk.mp3 --model small
"""

import argparse

from whisper_flash_attention import DecodeOptions, Transcriber
from whisper_flash_attention.audio import bundled_recordings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio", nargs="?", default=bundled_recordings()[0].path)
    parser.add_argument("--model", default="small")
    parser.add_argument("--beams", type=int, default=1)
    arguments = parser.parse_args()

    transcriber = Transcriber.from_pretrained(arguments.model)
    options = DecodeOptions(beam_size=arguments.beams)
    for segment in transcriber.stream(arguments.audio, options=options):
        print(f"{segment.start:7.2f} {segment.end:7.2f}  {segment.text}")


if __name__ == "__main__":
    main()
