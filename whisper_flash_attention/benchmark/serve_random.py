"""A server whose model has random weights: `whisper-flash serve` where no checkpoint is at hand.

    python -m whisper_flash_attention.benchmark.serve_random CHECKPOINT TOKENS DEVICE DTYPE OPTIONS

Options are those of `ServeOptions`, as a JSON object.
"""

from __future__ import annotations

import json
import sys

from whisper_flash_attention.benchmark.random_weights import recite_
from whisper_flash_attention.benchmark.throughput import ThroughputCase, random_transcriber
from whisper_flash_attention.options import ModelOptions, ServeOptions
from whisper_flash_attention.serve.process import run_server
from whisper_flash_attention.serve.scheduler import Scheduler
from whisper_flash_attention.transcribe import Transcriber


def reciting_transcriber(checkpoint: str, tokens: int, device: str, dtype: str) -> Transcriber:
    """A model of this size that says a text of `tokens` tokens, whatever it hears.

    Raises:
        OptionError: the checkpoint is unknown, or the number out of range.
    """
    case = ThroughputCase(checkpoint, "flash", 1, tokens, False, 1, device, dtype)
    transcriber = random_transcriber(case)
    recite_(transcriber.model, tokens)
    return transcriber


def main() -> None:
    """Serve until SIGTERM."""
    checkpoint, tokens, device, dtype, given = sys.argv[1:]
    options = ServeOptions(**json.loads(given))

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    scheduler = Scheduler(
        checkpoint,
        ModelOptions(checkpoint),
        slots=options.slots,
        transcriber=reciting_transcriber(checkpoint, int(tokens), device, dtype),
    )
    run_server(options, {checkpoint: scheduler}, report)


if __name__ == "__main__":
    main()
