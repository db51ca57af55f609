"""Transcribe every recording in a folder; run it again after an interruption to continue.

python examples/batch.py recordings texts --model small
"""

import argparse
import json
from pathlib import Path

from whisper_flash_attention.audio import bundled_recordings
from whisper_flash_attention.batch import run_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", default=bundled_recordings()[0].path.parent)
    parser.add_argument("output", nargs="?", type=Path, default=Path("texts"))
    parser.add_argument("--model", default="small")
    arguments = parser.parse_args()

    run_batch(arguments.source, arguments.output, model=arguments.model, subtitles=["srt"])
    for shard in sorted(arguments.output.glob("part-*.jsonl")):
        for line in shard.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            print(f"{row['id']}: {row['error'] or row['text']}")


if __name__ == "__main__":
    main()
