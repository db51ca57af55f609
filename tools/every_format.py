"""Encode a bundled recording in every common format and transcribe each with the command.

Exits with 1 if any transcript lacks words of the recording; `tools/matrix.py` runs it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np

from whisper_flash_attention.audio import bundled_recordings

# File type -> codec, sampling rate in Hz, layout.
FORMATS = {
    "wav": ("pcm_s16le", 16_000, "mono"),
    "flac": ("flac", 44_100, "stereo"),
    "mp3": ("mp3", 44_100, "stereo"),
    "m4a": ("aac", 44_100, "stereo"),
    "aac": ("aac", 22_050, "mono"),
    "opus": ("libopus", 48_000, "mono"),
    "ogg": ("libopus", 48_000, "stereo"),
    "webm": ("libopus", 48_000, "stereo"),
    "mkv": ("aac", 48_000, "stereo"),
    "mp4": ("aac", 48_000, "stereo"),
    "aiff": ("pcm_s16be", 44_100, "mono"),
}


def encode(path: Path, samples: np.ndarray, codec: str, rate: int, layout: str) -> None:
    """Encode mono 16 kHz int16 samples `[T]`."""
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts = 16_000, 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(stream.format.name, layout, rate)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def main() -> int:
    recording = bundled_recordings()[4]  # 3.3 s that tiny.en transcribes without a mistake
    samples = np.frombuffer(recording.path.read_bytes()[44:], dtype="<i2")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = [folder / f"in-{kind}.{kind}" for kind in FORMATS]
        for path, (codec, rate, layout) in zip(files, FORMATS.values(), strict=True):
            encode(path, samples, codec, rate, layout)
        command = [sys.executable, "-m", "whisper_flash_attention", "transcribe", *map(str, files)]
        command += ["--model", "package:tiny.en", "-f", "json", "--output-dir", temporary]
        done = subprocess.run(command, capture_output=True, text=True)
        failures = []
        for path in files:
            written = path.with_suffix(".json")
            text = json.loads(written.read_text())["text"] if written.is_file() else None
            if text is None or words(text) != words(recording.transcript):
                failures.append(path.suffix)
                print(f"{path.suffix}: {text!r}")
    if failures or done.returncode:
        print(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    print(f"{len(FORMATS) - len(failures)} of {len(FORMATS)} formats transcribed")
    return 1 if failures or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
