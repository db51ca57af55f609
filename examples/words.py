"""Print the words of a recording with their times, and mark those of low probability.

python examples/words.py talk.wav --model small
"""

import argparse

from whisper_flash_attention import Transcriber
from whisper_flash_attention.audio import bundled_recordings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio", nargs="?", default=bundled_recordings()[0].path)
    parser.add_argument("--model", default="small")
    parser.add_argument("--doubtful-below", type=float, default=0.5, metavar="PROBABILITY")
    arguments = parser.parse_args()

    transcriber = Transcriber.from_pretrained(arguments.model)
    transcription = transcriber.transcribe(arguments.audio, word_timestamps=True)
    for segment in transcription.segments:
        for word in segment.words:
            mark = "?" if word.probability < arguments.doubtful_below else " "
            print(f"{word.start:7.2f} {word.end:7.2f} {word.probability:5.2f} {mark} {word}")


if __name__ == "__main__":
    main()
