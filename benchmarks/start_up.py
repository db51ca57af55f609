"""Time the first token after loading, with a cold and with a warm cache of compiled kernels.

    python benchmarks/start_up.py --output benchmarks/results/start-up-h100.json

Every measurement is a process of its own: it builds a model with random weights on the device and
calls `generate` for one new token. "cold" starts with an empty Triton cache, "warm" with the one
that the process before left. Stock Transformers is measured for comparison. The clock runs from
the model's being there to the token's being on the host; imports and weights are not in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.settings import MODEL_SIZES

CHECKPOINTS = ("tiny", "base", "small", "medium", "large-v3")


def first_token(checkpoint: str, batch: int, stock: bool, device: str) -> float:
    """Seconds of the first `generate` in this process."""
    from transformers import WhisperForConditionalGeneration

    from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration
    from whisper_flash_attention.benchmark.random_weights import build_model

    size = MODEL_SIZES[checkpoint]
    kind = (
        WhisperForConditionalGeneration if stock else WhisperFlashAttentionForConditionalGeneration
    )
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = build_model(kind, size, size.decoder_layers, device=device, dtype=dtype)
    features = torch.randn(batch, size.mel_bins, 3000, device=device, dtype=dtype)
    features.sum().item()
    start = time.perf_counter()
    model.generate(features, max_new_tokens=1, do_sample=False).cpu()
    return time.perf_counter() - start


def in_process(checkpoint: str, batch: int, stock: bool, device: str, cache: str) -> float:
    """`first_token` in a fresh process with this folder as Triton's cache."""
    command = [sys.executable, __file__, "--checkpoint", checkpoint, "--batch", str(batch)]
    command += ["--device", device, "--child", "stock" if stock else "ours"]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise typer.BadParameter(f"{checkpoint}, batch {batch}: {done.stderr.strip()[-800:]}")
    return float(done.stdout.strip().splitlines()[-1])


def measure(checkpoint: str, batch: int, device: str) -> dict[str, Any]:
    """Seconds to the first token of a checkpoint: ours cold and warm, and stock's."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (in_process(checkpoint, batch, False, device, cache) for _ in range(2))
    stock = in_process(checkpoint, batch, True, device, "")
    return {"checkpoint": checkpoint, "batch": batch, "cold": cold, "warm": warm, "stock": stock}


def main(
    checkpoint: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time the first token after loading."""
    checkpoints, batches = checkpoint or list(CHECKPOINTS), batch or [1, 32]
    if child:
        print(first_token(checkpoints[0], batches[0], child == "stock", device))
        return
    rows = [measure(name, size, device) for name in checkpoints for size in batches]
    table = Table("checkpoint", "batch", "cold, s", "warm, s", "stock, s", title="first token")
    for row in rows:
        times = (f"{row[name]:.2f}" for name in ("cold", "warm", "stock"))
        table.add_row(row["checkpoint"], str(row["batch"]), *times)
    Console().print(table)
    if output is not None:
        document = {"environment": describe_environment(device, commit).as_json(), "rows": rows}
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
