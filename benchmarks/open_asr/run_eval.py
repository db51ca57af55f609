"""Evaluate this package on a data set of the Open ASR leaderboard, and write its manifest.

    pip install whisper-flash-attention datasets kaldialign
    python benchmarks/open_asr/run_eval.py --model_id openai/whisper-large-v3 --device 0 \\
        --dataset_path hf-audio/open-asr-leaderboard --dataset librispeech \\
        --split test.clean --batch_size 128
    python benchmarks/open_asr/run_eval.py --model_id package:tiny.en --dataset_path data \\
        --dataset librispeech --split test.clean --batch_size 16 --row row.json

The arguments are those of the leaderboard's scripts, as far as they apply. So is the manifest: its
name, and for every sample its path, duration, time, transcript and the text found, both as they
are. It is what the leaderboard's own scorer takes, `score_results` in its normalizer/eval_utils.py.

The word error rate that is printed here is not the leaderboard's. It is after Whisper's normaliser
of English as Transformers has it; the leaderboard's differs in British spellings, abbreviations,
fillers and names. In both a compound and its parts are the same. RTFx is the seconds of audio per
second from samples in memory to text. Samples are read and resampled before the clock starts, and
runs that are not timed come first.

`--dataset_path` may be a folder in the layout of the leaderboard's data sets: a folder per data set
with the Parquet files of each split, which have the columns audio and text. Anything else is a name
on the Hub, for which the package `datasets` is needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer

from whisper_flash_attention.audio import SAMPLING_RATE, load_audio
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.mlperf import english_normaliser, offline_options
from whisper_flash_attention.devices import resolve_dtype
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import Transcriber

TEXT_COLUMNS = ("text", "sentence", "normalized_text", "transcript", "transcription")
# What stands for no transcript in one of the data sets.
NOT_SCORED = "ignore time segment in scoring"
ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class Sample:
    """Mono samples at 16 kHz, and the transcript."""

    samples: npt.NDArray[np.float32]
    text: str


def read_samples(
    dataset_path: str, dataset: str, split: str, *, streaming: bool
) -> Iterator[Sample]:
    """Samples of a split that have a transcript, from a folder or from the Hub."""
    folder = Path(dataset_path) / dataset
    rows = (
        local_rows(folder, split)
        if folder.is_dir()
        else hub_rows(dataset_path, dataset, split, streaming=streaming)
    )
    for row in rows:
        columns = [name for name in TEXT_COLUMNS if name in row]
        if not columns:
            raise typer.BadParameter(f"{dataset}: no column of {', '.join(TEXT_COLUMNS)}")
        text = row[columns[0]].strip()
        if text and text != NOT_SCORED:
            audio = row["audio"]
            source = audio["bytes"] if audio["bytes"] is not None else folder / audio["path"]
            yield Sample(load_audio(source), text)


def local_rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Rows of the Parquet files of a split."""
    from pyarrow import parquet

    files = sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet"))
    if not files:
        raise typer.BadParameter(f"{folder}: no {split}.parquet or {split}-*.parquet")
    for path in files:
        for batch in parquet.ParquetFile(path).iter_batches(ROWS_AT_A_TIME):
            yield from batch.to_pylist()


def hub_rows(
    dataset_path: str, dataset: str, split: str, *, streaming: bool
) -> Iterator[dict[str, Any]]:
    """Rows of a data set on the Hub, with the bytes of its files."""
    try:
        from datasets import Audio, load_dataset
    except ImportError as error:
        raise typer.BadParameter(
            f"{dataset_path} is no folder with {dataset} in it, and a data set on the Hub needs: "
            "pip install datasets"
        ) from error
    loaded = load_dataset(dataset_path, dataset, split=split, streaming=streaming)
    yield from loaded.cast_column("audio", Audio(decode=False))


def transcribe(
    transcriber: Transcriber, batch: Sequence[Sample], options: DecodeOptions, batch_size: int
) -> tuple[list[str], float]:
    """The texts of samples, and the seconds from samples to texts."""
    start = time.perf_counter()
    found = transcriber.transcribe_many(
        [sample.samples for sample in batch],
        language="en",
        options=options,
        batch_size=batch_size,
    )
    texts = [each.text.strip() for each in found]
    return texts, time.perf_counter() - start


def batches_of(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(islice(samples, size)):
        yield batch


def manifest_path(folder: Path, model: str, dataset_path: str, dataset: str, split: str) -> Path:
    """The leaderboard's name of a manifest."""
    names = [name.replace("/", "-") for name in (model, dataset_path, dataset)]
    return folder / "MODEL_{}_DATASET_{}_{}_{}.jsonl".format(*names, split)


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a line of JSON per sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def score(rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """Word error rate in percent, and RTFx, rounded as the leaderboard rounds them.

    The rate is after Whisper's normaliser as Transformers has it, not after the leaderboard's.
    `spelling_normalised` is whether British spellings are the same as American ones, for which the
    checkpoint has to have normalizer.json, or openai-whisper to be installed.
    """
    from kaldialign import batch_error_rate

    normalise, with_spelling = english_normaliser(tokenizer)
    references, found = (
        [tuple(normalise(row[name]).split()) for row in rows] for name in ("text", "pred_text")
    )
    errors = batch_error_rate(references, found, merge_compounds=True)
    seconds, took = (sum(row[name] for row in rows) for name in ("duration", "time"))
    return {
        "wer": round(100 * errors["err_rate"], 2),
        "rtfx": round(seconds / took, 4),
        "spelling_normalised": with_spelling,
    }


def main(
    model_id: Annotated[str, typer.Option("--model_id", help="As `transcribe --model`.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Name of the data set.")],
    dataset_path: Annotated[
        str, typer.Option("--dataset_path", help="Folder, or name on the Hub.")
    ] = "hf-audio/open-asr-leaderboard",
    split: Annotated[str, typer.Option("--split")] = "test",
    device: Annotated[int, typer.Option("--device", help="Of a GPU; -1 is the CPU.")] = -1,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1)] = 16,
    max_eval_samples: Annotated[
        int | None, typer.Option("--max_eval_samples", help="All of them, if below 1.")
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming/--no-streaming")] = True,
    max_new_tokens: Annotated[int | None, typer.Option("--max_new_tokens", min=1)] = None,
    longform: Annotated[
        bool, typer.Option("--longform", help="OpenAI's sequential algorithm, for long samples.")
    ] = False,
    warmup_steps: Annotated[int, typer.Option("--warmup_steps", min=0)] = 10,
    results: Annotated[Path, typer.Option(help="Folder of the manifest.")] = Path("results"),
    row: Annotated[Path | None, typer.Option(help="JSON file for figures and environment.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to record instead of git's.")] = None,
) -> None:
    """Evaluate a model on a data set of the Open ASR leaderboard."""
    name = "cpu" if device < 0 else f"cuda:{device}"
    transcriber = Transcriber.from_pretrained(model_id, device=name)
    options = DecodeOptions() if longform else offline_options(None)
    if max_new_tokens is not None:
        options = replace(options, max_new_tokens=max_new_tokens)
    # The leaderboard's scripts give -1 for all samples.
    most = max_eval_samples if max_eval_samples is not None and max_eval_samples > 0 else None

    def read() -> Iterator[list[Sample]]:
        samples = read_samples(dataset_path, dataset, split, streaming=streaming)
        return batches_of(islice(samples, most), batch_size)

    for batch in islice(read(), warmup_steps):
        transcribe(transcriber, batch, options, batch_size)
    rows: list[dict[str, Any]] = []
    for batch in read():
        texts, took = transcribe(transcriber, batch, options, batch_size)
        for sample, text in zip(batch, texts, strict=True):
            rows.append(
                {
                    "audio_filepath": f"sample_{len(rows)}",
                    "duration": sample.samples.size / SAMPLING_RATE,
                    "time": took / len(batch),
                    "text": sample.text,
                    "pred_text": text,
                }
            )
    path = manifest_path(results, model_id, dataset_path, dataset, split)
    write_manifest(path, rows)
    found = score(rows, transcriber.processor.tokenizer)
    typer.echo(f"Results saved at path: {path.resolve()}")
    typer.echo(f"WER: {found['wer']} % RTFx: {found['rtfx']}")
    if row is not None:
        document = {
            "setting": "open-asr",
            "system": "ours-sequential" if longform else "ours-batched",
            "checkpoint": model_id,
            "dataset": dataset,
            "split": split,
            "device": name,
            "dtype": str(resolve_dtype("auto", torch.device(name))).removeprefix("torch."),
            "batch_size": batch_size,
            "samples": len(rows),
            "audio_seconds": sum(each["duration"] for each in rows),
            **found,
            "environment": describe_environment(name, commit).as_json(),
        }
        row.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
