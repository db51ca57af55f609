"""Time decoding many clips with answers of mixed lengths: batch by batch, and in slots.

    python benchmarks/slots.py --device cuda --size large-v3 --output benchmarks/results/slots.json

Random weights, random encoder states, greedy; every clip answers with a number of tokens drawn once
(the logarithm is normal, as lengths of speech are), which no end cuts short. A batch runs until its
longest answer is there; slots are refilled, by each of several numbers of clips at a time. Ways
take turns; the time is from encoder states to tokens on the host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.settings import MODEL_SIZES
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.logits_processors import Rules, Suppress
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.scheduler import Job

PROMPT = (50258, 50259, 50360)
# Of the lengths' logarithm: half of the answers have 90 tokens or more.
CENTRE, SPREAD, LONGEST = 4.5, 0.5, 224


def request(answer: int) -> Request:
    """An answer of exactly so many tokens."""
    return Request(Rules((Suppress((1, 2)),)), len(PROMPT) + answer, (), 0, want_logprobs=True)


def jobs_of(clips: int, engine: Engine, held: int) -> list[Job]:
    """Clips with answers of mixed lengths, which share `held` encoder states."""
    weights = engine.weights
    generator = torch.Generator().manual_seed(0)
    drawn = (CENTRE + SPREAD * torch.randn(clips, generator=generator)).exp()
    lengths = drawn.clamp(8, LONGEST).int().tolist()
    shape = (held, *weights.encoder.positions.shape)
    states = torch.randn(shape, generator=generator).to(weights.device, weights.dtype)
    return [
        Job(states[number % held], PROMPT, request(length), number)
        for number, length in enumerate(lengths)
    ]


def by_batches(engine: Engine, jobs: list[Job], size: int) -> int:
    """Decode batch by batch, each to its longest answer; the tokens that were wanted."""
    wanted = 0
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        lengths = [job.request.max_length - len(PROMPT) for job in batch]
        prompt = torch.tensor([PROMPT] * len(batch), device=engine.weights.device)
        states = torch.stack([job.states for job in batch])
        rows = engine.decode(states, prompt, request(max(lengths))).sequences.tolist()
        cut = [row[len(PROMPT) :][:length] for row, length in zip(rows, lengths, strict=True)]
        wanted += sum(map(len, cut))
    return wanted


def by_slots(engine: Engine, jobs: list[Job], slots: int, refill: int) -> int:
    """Decode in slots; the tokens that were wanted."""
    waiting = iter(jobs)
    answers = engine.decode_stream(
        lambda count: list(islice(waiting, count)),
        slots,
        max_length=len(PROMPT) + LONGEST,
        refill=refill,
    )
    return sum(len(answer.tokens) for answer in answers)


def seconds_of(work: Callable[[], int], tokens: int) -> float:
    """Seconds of one call, which must give so many tokens; they are on the host then."""
    start = time.perf_counter()
    found = work()
    taken = time.perf_counter() - start
    assert found == tokens, f"{found} tokens instead of {tokens}"
    return taken


def measure(engine: Engine, slots: int, clips: int, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of each way, after a call of each that does not count."""
    jobs = jobs_of(clips, engine, min(clips, slots))
    tokens = sum(job.request.max_length - len(PROMPT) for job in jobs)
    refills = sorted({max(1, slots // share) for share in (16, 8, 4, 2)})
    ways: dict[int | None, Callable[[], int]] = {None: lambda: by_batches(engine, jobs, slots)}
    for refill in refills:
        ways[refill] = lambda refill=refill: by_slots(engine, jobs, slots, refill)  # type: ignore[misc]
    times: dict[int | None, list[float]] = {refill: [] for refill in ways}
    for turn in range(rounds + 1):
        for refill, way in ways.items():
            taken = seconds_of(way, tokens)
            if turn:
                times[refill].append(taken)
    return [
        {
            "slots": slots,
            "clips": clips,
            "tokens": tokens,
            "refill": refill,
            "seconds": median(each),
        }
        for refill, each in times.items()
    ]


def main(
    device: Annotated[str, typer.Option()] = "cpu",
    size: Annotated[str, typer.Option(help=f"one of {', '.join(MODEL_SIZES)}")] = "tiny",
    slots: Annotated[list[int] | None, typer.Option(help="may be given several times")] = None,
    clips: Annotated[int, typer.Option(help="per slot", min=1)] = 6,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time batches against slots."""
    torch.set_num_threads(threads)
    kind = MODEL_SIZES[size]
    dtype = torch.float32 if device == "cpu" else torch.float16
    model: Any = build_model(
        WhisperFlashAttentionForConditionalGeneration,
        kind,
        kind.decoder_layers,
        device=device,
        dtype=dtype,
    )
    engine = Engine.of(model)
    rows = [row for each in slots or [16] for row in measure(engine, each, clips * each, rounds)]
    table = Table("slots", "refilled by", "seconds", "tokens per second", title=f"{size}, {device}")
    for row in rows:
        refill = "batches" if row["refill"] is None else str(row["refill"])
        rate = row["tokens"] / row["seconds"]
        table.add_row(str(row["slots"]), refill, f"{row['seconds']:.3f}", f"{rate:.0f}")
    Console().print(table)
    if output is not None:
        environment = describe_environment(device).as_json()
        document = {"environment": environment, "size": size, "rows": rows}
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
