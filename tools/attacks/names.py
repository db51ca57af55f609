"""Odd names of files, recordings, columns and models, and odd text in subtitles."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import tempfile
from pathlib import Path

from attacks.loaders import transformers_folder
from attacks.reader import encoded
from attacks.values import UNPRINTABLE, Case, any_name, mutate_bytes, run_command


def names(folder: Path) -> dict[str, Case]:
    from rich.console import Console

    from whisper_flash_attention.batch import Model, RunOptions, run_batch
    from whisper_flash_attention.batch.manifest import read_archive
    from whisper_flash_attention.options import DecodeOptions
    from whisper_flash_attention.transcribe.loading import load
    from whisper_flash_attention.transcribe.results import Segment, Transcription, Word
    from whisper_flash_attention.transcribe.writers import FORMATS as WRITTEN
    from whisper_flash_attention.transcribe.writers import SubtitleOptions, render
    from whisper_flash_attention.weights import load_processor, read_checkpoint

    model = folder / "model"
    transformers_folder(model)
    silence, broken = encoded("wav")[:44] + bytes(12_800), encoded("mp3")[:50]

    def file_names(rng: random.Random) -> str:
        with tempfile.TemporaryDirectory(dir=folder) as place, contextlib.chdir(place):
            inside, outside = Path(place, "in"), os.path.join(place, "out")
            inside.mkdir()
            arguments = []
            for _ in range(8):
                name = os.fsencode(
                    any_name(rng)
                    .encode("utf-8", "surrogatepass")
                    .decode("utf-8", "surrogateescape")
                )
                with contextlib.suppress(OSError, ValueError):
                    path = os.path.join(os.fsencode(inside), name.replace(b"/", b"_") + b".wav")
                    with open(path, "wb") as file:
                        file.write(silence if rng.random() < 0.7 else broken)
                    arguments.append(os.fsdecode(path))
            arguments += [any_name(rng)] * (rng.random() < 0.3)
            arguments = [str(inside)] if rng.random() < 0.5 else arguments
            arguments += (
                ["--model", str(model)] if rng.random() < 0.9 else ["--model", any_name(rng)]
            )
            arguments += ["-f", rng.choice(("all", "txt", "json,srt"))]
            if rng.random() < 0.2:
                outside = os.path.join(place, any_name(rng).replace("/", "_").lstrip("."))
            arguments += ["-o", outside] if rng.random() < 0.9 else ["--json-lines"]
            return run_command(
                ["transcribe", *arguments, "--max-new-tokens", "2", "--temperature", "0"]
            )

    def manifest(rng: random.Random) -> bytes:
        rows, ids = [], []
        for index in range(12):
            ids.append(any_name(rng) if rng.random() < 0.6 else f"id{index}")
            row = {"id": ids[-1], "path": rng.choice(("good.wav", "bad.wav", any_name(rng)))}
            for key in ("language", "task", "prompt", "start", "end", "channel", "audio_track"):
                if rng.random() < 0.1:
                    row[key] = rng.choice((any_name(rng), 1, "1", "en", -1, 1e9, "each", None))
            row |= {any_name(rng): any_name(rng)} if rng.random() < 0.05 else {}
            rows.append(row)
        return "\n".join(map(json.dumps, rows)).encode("utf-8", "surrogatepass") + b"\n"

    def csv_of(data: bytes, rng: random.Random) -> bytes:

        rows, text = [json.loads(line) for line in data.splitlines()], io.StringIO()
        heads = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(text, heads, lineterminator=rng.choice(("\n", "\r\n")))
        writer.writeheader()
        with contextlib.suppress(csv.Error):
            writer.writerows(rows)
        found = text.getvalue().encode("utf-8", "surrogatepass")
        return found if rng.random() < 0.7 else mutate_bytes(rng, found)

    def manifests(rng: random.Random) -> str:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            kind = rng.choice((".csv", ".jsonl"))
            data = manifest(rng)
            path = Path(place, f"m{kind}")
            path.write_bytes(csv_of(data, rng) if kind == ".csv" else data)
            archive = read_archive(str(path))
            assert len({item.id for item in archive.items}) == len(archive.items)
            for row in archive.rejected:
                str(row)
            return "read, with rejected rows" if archive.rejected else "read"

    def batches(rng: random.Random) -> str:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            base, out = Path(place), Path(place, "out")
            (base / "good.wav").write_bytes(silence)
            (base / "bad.wav").write_bytes(broken)
            (base / "m.jsonl").write_bytes(manifest(rng))
            text = io.StringIO()
            console = Console(file=text, highlight=False, soft_wrap=True, force_terminal=False)
            try:
                summary = run_batch(
                    base / "m.jsonl",
                    out,
                    model=Model(str(model), "cpu"),
                    run_options=RunOptions(decode=DecodeOptions(max_new_tokens=2)),
                    workers=1,
                    subtitles=("srt", "vtt"),
                    console=console,
                )
            finally:
                found = UNPRINTABLE.search(text.getvalue().replace("\n", ""))
                assert found is None, repr(text.getvalue())
            rows = [json.loads(line) for part in out.glob("part-*") for line in part.open("rb")]
            known = [row["id"] for row in rows]
            assert len(set(known)) == len(known) == summary.items == summary.done + summary.failed
            assert sorted(os.listdir(place)) == ["bad.wav", "good.wav", "m.jsonl", "out"]
            assert not list(out.rglob("*.tmp"))
            return "run, with errors of rows" if summary.failed else "run"

    def sources(rng: random.Random) -> tuple[int, int]:
        name = any_name(rng)
        read = rng.choice((read_checkpoint, load_processor, lambda x: load(x, device="cpu")))
        read(name if rng.random() < 0.8 else Path(name))
        return 0, 0

    def texts(rng: random.Random) -> str:
        segments = []
        for index in range(rng.randrange(4)):
            words = [
                Word(index, index + rng.random(), any_name(rng), 0.5)
                for _ in range(rng.randrange(3))
            ]
            text = " ".join(any_name(rng) for _ in range(3))
            segments.append(Segment(index, index + 1, text, words=tuple(words)))
        made = Transcription(any_name(rng), "en", tuple(segments), 9.0)
        options = SubtitleOptions(rng.choice((None, 1, 42)), None, 3.0, rng.random() < 0.5)
        for name in WRITTEN:
            text = render(made, name, options)
            text.encode("utf-8")
            plain = text.replace("\n", "").replace("\t", "") if name != "json" else text.strip("\n")
            assert not re.search("[\x00-\x1f\x7f-\x9f]", plain), (name, plain[:300])
            if name in ("srt", "vtt"):
                assert text.count("-->") <= 2 * sum(1 + len(each.words) for each in segments), text
        assert Transcription.from_dict(json.loads(render(made, "json"))) == made
        return "written"

    return {
        "files": file_names,
        "manifests": manifests,
        "batch runs": batches,
        "checkpoints": sources,
        "texts": texts,
    }
