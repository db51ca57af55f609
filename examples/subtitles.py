"""Write subtitles of a recording, with two lines of at most 42 characters per cue.

python examples/subtitles.py talk.mp4 talk.srt --model small
"""

import argparse
from pathlib import Path

from whisper_flash_attention import SubtitleOptions, Transcriber, write
from whisper_flash_attention.audio import bundled_recordings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio", nargs="?", default=bundled_recordings()[0].path)
    parser.add_argument("output", nargs="?", type=Path, default=Path("subtitles.srt"))
    parser.add_argument("--model", default="small")
    arguments = parser.parse_args()

    transcriber = Transcriber.from_pretrained(arguments.model)
    transcription = transcriber.transcribe(arguments.audio, word_timestamps=True)
    options = SubtitleOptions(max_line_width=42, max_line_count=2)
    write(transcription, arguments.output, options=options, overwrite=True)
    print(arguments.output)


if __name__ == "__main__":
    main()
