"""The command `whisper-flash benchmark throughput`: rows of speech per second, shown and kept.

Exit codes: 0 every row is ok; 1 some are not; 2 the options make no sense.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.errors import BenchmarkError, OptionError
from whisper_flash_attention.terminal import print_line

if TYPE_CHECKING:
    from whisper_flash_attention.benchmark.features import Samples
    from whisper_flash_attention.benchmark.throughput import ThroughputCase, ThroughputRow

EXIT_SOME_FAILED = 1
# Enough batches for host and device to work side by side.
LEAST_BATCHES, LEAST_WINDOWS = 4, 8
# What makes two rows stand for the same thing: the newer one is kept.
SLOT = (
    *("checkpoint", "system", "batch_size", "new_tokens", "word_timestamps"),
    *("device", "dtype"),
)


def throughput_command(
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="tiny, base, small, medium, large-v3 or large-v3-turbo. Repeatable. Left out: "
            "tiny.",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Windows at a time. Repeatable. Left out: 16; 2 on a CPU."),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of every window of 30 s.")
    ] = 100,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="N", help="Sound to transcribe. Left out: four batches of it."),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Recordings to take, over and over. Repeatable. Left out: this package's own.",
        ),
    ] = None,
    word_timestamps: Annotated[
        bool,
        typer.Option("--word-timestamps", help="Measure each row with words' times, too."),
    ] = False,
    system: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="flash (this package, from samples to text) or sdpa (stock Transformers, from "
            "features to text). Repeatable. Left out: flash.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed runs.")] = 3,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto (float16 on a GPU, float32 on a CPU), float32, float16 or bfloat16.",
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            *("--output", "-o"),
            metavar="FILE",
            help="JSON file for the rows; rows that it has of other cases stay.",
        ),
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Commit to record instead of what git says."),
    ] = None,
) -> None:
    """Measure how much faster than real time recordings become text.

    From samples in memory to text, by random weights that say the same number of tokens in every
    window of 30 s. Beside the factor, what each part of a batch takes alone: copies, log-mel,
    encoder, decoder, text and segments, words.

    [b]Examples[/b]

      whisper-flash benchmark throughput --checkpoint large-v3-turbo --batch-size 128

      whisper-flash benchmark throughput --checkpoint tiny --batch-size 1 --word-timestamps

      whisper-flash benchmark throughput --system sdpa --system flash --output rows.json
    """
    from whisper_flash_attention.benchmark.environment import describe_environment
    from whisper_flash_attention.benchmark.throughput import ThroughputCase, measure_throughput
    from whisper_flash_attention.config import resolve_device, resolve_dtype

    place = resolve_device(device)
    number = str(resolve_dtype(dtype, place)).removeprefix("torch.")
    sizes = batch_size or ([2] if place.type == "cpu" else [16])
    kinds = [(name, False) for name in system or ["flash"]]
    if word_timestamps:
        kinds += [(name, True) for name, _ in kinds if name == "flash"]
    cases = [
        ThroughputCase(name, kind, size, new_tokens, words, repeats, str(place), number)
        for name in checkpoint or ["tiny"]
        for size in sizes
        for kind, words in kinds
    ]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    environment = describe_environment(str(place), commit).as_json()
    keeper = Keeper(output)
    rows = []
    for case in cases:
        samples, description = speech(audio or [], windows_of(case, minutes))
        row = measure_throughput(case, samples, description, environment)
        rows.append(row)
        keeper.keep(row)
        print_line(console, told(row))
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=200)).print(as_table(rows))
    if output is not None:
        print_line(console, f"wrote {output}")
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(EXIT_SOME_FAILED)


def windows_of(case: ThroughputCase, minutes: float | None) -> int:
    """How many windows of 30 s a case transcribes.

    Raises:
        OptionError: it is less than one.
    """
    if minutes is None:
        return max(LEAST_BATCHES * case.batch_size, LEAST_WINDOWS)
    if minutes < 0.5:
        raise OptionError(f"minutes {minutes:g}: give 0.5, a window, or more")
    return int(minutes * 2)


def speech(files: list[Path], windows: int) -> tuple[Samples, str]:
    """So many windows of recordings, over and over, and what they are."""
    import numpy as np

    from whisper_flash_attention.benchmark.features import CLIP_SAMPLES, MOST_CLIPS, bundled_clips

    if files:
        from whisper_flash_attention.audio import load_audio

        loop = np.concatenate([load_audio(path) for path in files])
        origin = f"{len(files)} recordings of {loop.size / 16_000:.1f} s, repeated"
    else:
        clips, made_of = bundled_clips(min(windows, MOST_CLIPS))
        loop, origin = np.concatenate(clips), f"bundled: {made_of}"
    return np.resize(loop, windows * CLIP_SAMPLES), origin


class Keeper:
    """Rows in a JSON file, written anew with each one.

    Raises:
        BenchmarkError: the file is there and holds something else, or its folder is not there.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        if path is None:
            return
        if not path.parent.is_dir():
            raise BenchmarkError(f"output {path}: there is no folder {path.parent}")
        if path.exists():
            try:
                self._rows = json.loads(path.read_text())["rows"]
            except (ValueError, KeyError, TypeError) as error:
                raise BenchmarkError(f"output {path} is there and holds no rows") from error

    def keep(self, row: ThroughputRow) -> None:
        """Add a row, or replace that of the same case."""
        new = row.as_json()
        slot = [new[name] for name in SLOT]
        kept = [each for each in self._rows if [each[name] for name in SLOT] != slot]
        self._rows = [*kept, new]
        if self._path is not None:
            self._path.write_text(json.dumps({"rows": self._rows}, indent=1) + "\n")


def told(row: ThroughputRow) -> str:
    """A row in one line, and what its parts take."""
    case = row.case
    words = ", words" if case.word_timestamps else ""
    head = f"{case.checkpoint}, {case.system}, batch {case.batch_size}{words}"
    if row.realtime_factor is None:
        return f"{head}: {row.status}: {row.error}"
    parts = "; ".join(f"{name} {1e3 * took:.2f} ms" for name, took in row.parts.items())
    return f"{head}: {row.realtime_factor:.0f} x real time" + (f" ({parts})" if parts else "")


def as_table(rows: list[ThroughputRow]) -> Table:
    """Cases and their factors."""
    place = rows[0].environment["device_name"]
    table = Table(
        *("checkpoint", "system", "dtype", "batch", "words", "x real time", "audio, min"),
        *("seconds", "GPU memory, GB"),
        title=f"{rows[0].case.new_tokens} tokens per 30 s, {place}",
    )
    for row in rows:
        case, factor, memory = row.case, row.realtime_factor, row.vram_allocated_gb
        table.add_row(
            *(case.checkpoint, case.system, case.dtype, str(case.batch_size)),
            "yes" if case.word_timestamps else "",
            row.error or f"{factor:.0f}",
            f"{row.audio_seconds / 60:.0f}",
            ", ".join(f"{each:.3f}" for each in row.seconds),
            "" if memory is None else f"{memory:.2f}",
        )
    return table
