"""Measure what a shorter window of the encoder changes: words, word errors, loops and time.

    python benchmarks/short_windows.py --model package:tiny.en --audio recordings \\
        --output benchmarks/results/short-windows-tiny.en-cpu.json

Whisper's encoder takes 30 s, however short the recording is. Here it gets the speech, rounded up to
whole seconds, and some seconds of padding, with the positions that belong to them, and the decoder
attends to no more, as with whisper.cpp's audio context. Clips are cut where Silero's detector finds
a pause of 0.2 s. They are decoded greedily, at temperature 0, without thresholds, so that nothing
repairs a text; with `--fallback` as `transcribe` does by default.

Words that changed are those of the full window's text that would have to be edited. Word error
rates are over recordings: the texts of a recording's clips are joined. A text loops if zlib
compresses it below the threshold at which Whisper decodes again. Systems take turns, clip by clip.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from _harness import Commit, Output, Threads, app_of, console, print_rows, write_json
from texts import PLAIN

from whisper_flash_attention.audio.audio_source import AudioSource, load_audio
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.audio.vad import find_speech
from whisper_flash_attention.benchmark.spoken import Spoken, find_spoken, normalised, word_errors
from whisper_flash_attention.engine import encoder
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.weights import Weights
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import DecodeOptions, VadOptions
from whisper_flash_attention.parity.report import WordErrors, edit_distance
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.loading import EngineModel, load
from whisper_flash_attention.transcribe.window_decoder import compression_ratio

FULL_SECONDS = 30
POSITIONS_PER_SECOND = 50
PAUSE_MS = 200
LOOPING = DecodeOptions().compression_ratio_threshold or math.inf


class ShortWindows(Engine):
    """An engine whose encoder gets the sound of a window and some seconds more.

    Args:
        padding: seconds.
    """

    def __init__(self, weights: Weights, padding: int) -> None:
        super().__init__(weights)
        self._padding = padding

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encoder states `[B, S, D]` of features `[B, mel bins, 3000]`, with S of 1500 or less."""
        weights = self.weights.encoder
        # After the sound all frames are the same.
        is_sound = features.ne(features[:, :, -1:]).any(dim=1).any(dim=0)
        frames = int(is_sound.nonzero().max()) + 1
        seconds = math.ceil(frames / (2 * POSITIONS_PER_SECOND)) + self._padding
        count = min(POSITIONS_PER_SECOND * seconds, len(weights.positions))
        short = replace(weights, positions=weights.positions[:count])
        return encoder.encode(short, features[:, :, : 2 * count])


def cut_in_pauses(samples: Samples, most: float) -> list[Samples]:
    """Clips with the speech of a recording, each of `most` seconds or less."""
    if samples.size <= most * SAMPLING_RATE:
        return [samples]
    options = VadOptions(min_silence_duration_ms=PAUSE_MS)
    _, chunks = find_speech(AudioSource(samples), most, options)
    return [chunk.samples for chunk in chunks]


def measure_clip(
    transcribers: dict[str, Transcriber], samples: Samples, language: str, options: DecodeOptions
) -> dict[str, dict[str, Any]]:
    """Of every window, by name: the text, whether it loops, tokens, and seconds of a call."""
    found = {}
    for name, transcriber in transcribers.items():
        start = time.perf_counter()
        result = transcriber.transcribe(samples, language=language, options=options)
        seconds = time.perf_counter() - start
        ratios = [compression_ratio(segment.text) for segment in result.segments]
        found[name] = {
            "text": result.text,
            "loops": max([compression_ratio(result.text), *ratios]) > LOOPING,
            "tokens": sum(len(segment.tokens) for segment in result.segments),
            "seconds": round(seconds, 4),
        }
    return found


def summarise(name: str, clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row: a window against the full one, over all clips."""
    errors = WordErrors()
    changed = []
    for clip in clips:
        full, text = (
            normalised(clip["windows"][each]["text"], clip["language"]) for each in ("full", name)
        )
        changed.append(edit_distance(full.split(), text.split()))
    for spoken in dict.fromkeys(clip["spoken"] for clip in clips):
        own = [clip["windows"][name]["text"] for clip in clips if clip["spoken"] == spoken]
        found = word_errors(spoken, " ".join(own))
        errors.errors += found.errors
        errors.words += found.words
    windows = [clip["windows"][name] for clip in clips]
    return {
        "window": name,
        "clips": len(clips),
        "clips_changed": sum(map(bool, changed)),
        "words_changed": sum(changed),
        "words": errors.words,
        "wer": errors.rate,
        "loops": sum(window["loops"] for window in windows),
        "tokens": sum(window["tokens"] for window in windows),
        "seconds": sum(window["seconds"] for window in windows),
    }


def measure(
    model: str,
    recordings: Sequence[tuple[Spoken, Samples]],
    paddings: Sequence[int],
    lengths: Sequence[float],
    options: DecodeOptions,
) -> dict[str, Any]:
    """Rows of all windows by longest clip, and the clips themselves."""
    loaded, _ = load(model, device="cpu", compute_type="float32")
    if not isinstance(loaded, EngineModel):
        raise OptionError(f"the engine cannot run {model}")
    transcribers = {"full": Transcriber(loaded, None)}
    for padding in paddings:
        short = replace(loaded, engine=ShortWindows(loaded.engine.weights, padding))
        transcribers[f"speech + {padding} s"] = Transcriber(short, None)
    rows, all_clips = [], []
    for most in lengths:
        clips = []
        for spoken, samples in recordings:
            if spoken.language not in transcribers["full"].languages:
                continue
            for part in cut_in_pauses(samples, most):
                windows = measure_clip(transcribers, part, spoken.language, options)
                facts = {"most_seconds": most, "seconds": part.size / SAMPLING_RATE}
                facts |= {"recording": spoken.path.name, "language": spoken.language}
                clips.append({"spoken": spoken, **facts, "windows": windows})
            console.print(f"{model}, up to {most:g} s, {spoken.path.name}: done")
        for name in transcribers:
            rows.append({"checkpoint": model, "most_seconds": most, **summarise(name, clips)})
        all_clips += [{"checkpoint": model, **clip} for clip in clips]
    for clip in all_clips:
        del clip["spoken"]
    return {"rows": rows, "clips": all_clips}


def main(
    audio: Annotated[list[str], typer.Option(help="Recordings or folders; repeatable.")],
    model: Annotated[list[str], typer.Option(help="As of `transcribe --model`; repeatable.")],
    padding: Annotated[
        list[int] | None, typer.Option(help="Seconds after the speech; repeatable.")
    ] = None,
    length: Annotated[
        list[float] | None, typer.Option(help="Longest clip in seconds; repeatable.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Names of recordings begin so; repeatable.")
    ] = None,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Decode as `transcribe` does by default.")
    ] = False,
    language: Annotated[
        str, typer.Option(help="Code, for recordings without an index.json.")
    ] = "en",
    threads: Threads = 2,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Compare texts of short windows with those of the full one, on a CPU."""
    torch.set_num_threads(threads)
    options = DecodeOptions() if fallback else DecodeOptions(**PLAIN)
    spoken = [each for each in find_spoken(audio, language) if each.transcript]
    kept = [each for each in spoken if not each.path.name.startswith(tuple(skip or ()))]
    recordings = [(each, load_audio(each.path)) for each in kept]
    document: dict[str, Any] = {"fallback": fallback, "threads": threads, "rows": [], "clips": []}
    for name in model:
        found = measure(name, recordings, padding or [0, 1, 2, 4, 8], length or [10], options)
        document["rows"] += found["rows"]
        document["clips"] += found["clips"]
    columns: dict[str, Any] = {"checkpoint": "{checkpoint}", "clips up to": "{most_seconds:g} s"}
    columns |= {"window": "{window}", "clips": "{clips}", "changed": "{clips_changed}"}
    columns |= {"words": "{words}", "changed words": "{words_changed}", "WER": "{wer:.2%}"}
    columns |= {"loops": "{loops}", "tokens": "{tokens}", "seconds": "{seconds:.1f}"}
    print_rows(None, document["rows"], columns)
    write_json(output, "cpu", commit, document)


app = app_of(__doc__, main)

if __name__ == "__main__":
    app()
