"""Options of every kind through Python and the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import tempfile
from fractions import Fraction
from pathlib import Path

from attacks.loaders import transformers_folder
from attacks.reader import encoded
from attacks.values import ODD_NUMBERS, Case, any_name, any_value, run_command


def options(folder: Path) -> dict[str, Case]:

    import numpy as np
    import torch

    from whisper_flash_attention.audio import load_audio
    from whisper_flash_attention.audio.audio_source import stream_audio
    from whisper_flash_attention.batch import Cluster, Model, RunOptions, run_batch
    from whisper_flash_attention.options import DecodeOptions, TranscribeOptions, VadOptions, preset
    from whisper_flash_attention.transcribe import Transcriber
    from whisper_flash_attention.transcribe.arguments import TranscribeArguments
    from whisper_flash_attention.transcribe.writers import SubtitleOptions

    model = folder / "model"
    transformers_folder(model)
    transcriber = Transcriber.from_pretrained(str(model), device="cpu", compute_type="float32")
    wave = encoded("wav")
    (folder / "x.wav").write_bytes(wave)
    keys = list(TranscribeArguments.__annotations__)
    extra = [
        *(
            np.float32(1),
            np.int64(2),
            np.nan,
            Fraction(1, 2),
            torch.tensor(1),
            np.array([0.0, 1.0]),
        ),
        *(
            torch.zeros(2, device="meta"),
            object(),
            range(3),
            {1, 2},
            (),
            ("",),
            ["en"],
            "en",
            "each",
        ),
        *(
            "batched",
            "sequential",
            "translate",
            {"threshold": 0.4},
            {"x": 1},
            {1: 2},
            iter([1]),
            0.2,
        ),
        *(lambda: 0, int, 1 + 2j, np.array("x"), "1", " de ", b"de", DecodeOptions(), VadOptions()),
        *(10**30, -(10**30), (0.0, 0.4), [1, 2, 3, 4], "mix", "fast", "cpu", "cuda:99", "float16"),
    ]
    good = {
        "language": "en",
        "task": "transcribe",
        "channel": 1,
        "audio_track": 1,
        "batch_size": 2,
        "mode": "sequential",
        "temperature": 0.0,
        "beam_size": 2,
        "best_of": 2,
        "vad_filter": False,
        "without_timestamps": True,
        "clip_timestamps": [0.0, 0.2],
        "multilingual": False,
        "word_timestamps": True,
        "initial_prompt": "thin",
        "max_new_tokens": 2,
        "prefix": "in",
    }

    def value(rng: random.Random) -> object:
        return rng.choice(
            (lambda: rng.choice(extra), lambda: any_value(rng), lambda: any_name(rng))
        )()

    def chosen(rng: random.Random, keys: list[str]) -> dict[str, object]:
        found = {key: good[key] for key in rng.sample(list(good), rng.randrange(4)) if key in keys}
        found |= {
            key: value(rng) for key in rng.sample(keys, min(len(keys), rng.choice((0, 1, 1, 2))))
        }
        return found | ({any_name(rng): 1} if rng.random() < 0.02 else {})

    def audio(rng: random.Random) -> object:
        samples = np.sin(np.arange(8000) * 0.1).astype(np.float32) * (rng.random() < 0.1)
        return rng.choice(
            (
                lambda: samples,
                lambda: (samples, rng.choice((16_000, 8000, value(rng)))),
                lambda: torch.from_numpy(samples)[None].repeat(2, 1),
                lambda: (samples * 32767).astype(np.int16),
                lambda: value(rng),
                lambda: samples.astype(
                    rng.choice(("f8", "f2", "u1", "i4", "U1", "O", "c8", "?", "M8[s]"))
                ),
                lambda: np.full(9, rng.choice((np.nan, np.inf, 1e9)), np.float32),
                lambda: samples.reshape(rng.choice(((2, -1), (1, 1, -1), (-1, 1), (80, 100)))),
                lambda: torch.sparse_coo_tensor([[0]], [1.0], (9,)),
                lambda: samples[:0],
            )
        )()

    def calls(rng: random.Random) -> tuple[int, int]:
        arguments = chosen(rng, keys)
        arguments.setdefault("max_new_tokens", 2)
        arguments.setdefault("temperature", 0.0)
        many = rng.random() < 0.2
        given = [audio(rng), audio(rng)] if many else audio(rng)
        (transcriber.transcribe_many if many else transcriber.transcribe)(given, **arguments)
        return 0, 0

    def made(rng: random.Random) -> tuple[int, int]:
        kind = rng.choice((DecodeOptions, TranscribeOptions, VadOptions, SubtitleOptions))
        names = [field.name for field in dataclasses.fields(kind)]
        kind(
            **{key: value(rng) for key in rng.sample(names, min(len(names), rng.choice((1, 2, 3))))}
        )
        return 0, 0

    def read(rng: random.Random) -> tuple[int, int]:
        names = ["channel", "track", "sampling_rate"]
        names += ["block_seconds", "start", "end", "most_seconds"] * (which := rng.random() < 0.5)
        given = {key: value(rng) for key in rng.sample(names, rng.choice((0, 1, 2)))}
        source = wave if rng.random() < 0.8 else value(rng)
        with (
            contextlib.closing(x for x in stream_audio(source, **given))
            if which
            else contextlib.nullcontext() as blocks
        ):
            list(zip(blocks, range(9), strict=False)) if which else load_audio(source, **given)
        return 0, 0

    def opened(rng: random.Random) -> tuple[int, int]:
        names = ["device", "dtype", "attention"]
        given = {key: value(rng) for key in rng.sample(names, rng.choice((1, 1, 2)))}
        if rng.random() < 0.3:
            preset(
                value(rng), **chosen(rng, [key for key in keys if key in DecodeOptions.__slots__])
            )
        else:
            source = str(model) if rng.random() < 0.9 else value(rng)
            Transcriber.from_pretrained(source, **given)
        return 0, 0

    def batch(rng: random.Random) -> tuple[int, int]:
        names = ["workers", "group_hours", "group_files", "output_format", "subtitles", "limit"]
        names += ["engine", "decode_timeout", "run_options", "cluster"]
        given = {key: value(rng) for key in rng.sample(names, rng.choice((1, 1, 2)))}
        if rng.random() < 0.3:
            given["run_options"] = RunOptions(batch_size=value(rng))
        if rng.random() < 0.1:
            given["cluster"] = Cluster(value(rng), value(rng))
        with tempfile.TemporaryDirectory(dir=folder) as out:
            run_batch(str(folder / "missing.csv"), out, model=Model(str(model), "cpu"), **given)
        return 0, 0

    def command(rng: random.Random) -> str:
        import typer

        from whisper_flash_attention.cli import app

        group = typer.main.get_command(app)
        name = rng.choice(("transcribe", "transcribe", "transcribe", "batch", "parity", "doctor"))
        command = group.commands[name].home.load()
        known = [each for each in command.params if each.opts[0].startswith("-")]
        words = [str(folder / "missing.wav")] if name in ("transcribe", "batch") else []
        words += ["-o", str(folder / "out")] if name == "batch" else []
        for each in rng.sample(known, min(len(known), rng.choice((0, 1, 2, 3, 5)))):
            texts = (str(value(rng)), any_name(rng), str(rng.choice(ODD_NUMBERS)), "1", "0.5", "en")
            words.append(rng.choice(each.opts))
            words += [] if getattr(each, "is_flag", False) else [rng.choice(texts)]
        words += [any_name(rng)] * (rng.random() < 0.1) or (
            ["--model", str(model)] if name != "doctor" else []
        )
        if name in ("parity", "doctor") and len(words) < 4:
            words.append("--nonsense")  # which would run for long
        return run_command([name, *words])

    return {
        "Transcriber.transcribe": calls,
        "option classes": made,
        "load_audio": read,
        "from_pretrained, presets": opened,
        "run_batch": batch,
        "command line": command,
    }
