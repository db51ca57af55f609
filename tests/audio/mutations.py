"""Read mutated recordings in processes of their own, under limits of time and memory.

    python -m tests.audio.mutations COUNT [SEED]

Prints one line of JSON: how many inputs gave samples or an `AudioError`, and every input that did
anything else: crashed the process, raised another error, ran out of memory or time.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from tests.audio.encoding import Samples, encode, read_wave, write_wave
from whisper_flash_attention.audio import bundled_recordings, load_audio, stream_audio
from whisper_flash_attention.errors import AudioError

SECONDS = 30  # of processor time for one input
MEMORY = 4 << 30  # bytes of address space; FFmpeg and NumPy take 1 GB of it

FORMATS = [
    ("a.wav", "pcm_s16le", 16_000, "mono"),
    ("b.wav", "pcm_f32le", 48_000, "stereo"),
    ("c.wav", "adpcm_ms", 22_050, "mono"),
    ("d.wav", "pcm_s24le", 48_000, "7.1"),
    ("e.w64", "pcm_s16le", 16_000, "mono"),
    ("f.aiff", "pcm_s16be", 44_100, "stereo"),
    ("g.caf", "alac", 44_100, "stereo"),
    ("h.au", "pcm_mulaw", 8_000, "mono"),
    ("i.flac", "flac", 16_000, "mono"),
    ("j.flac", "flac", 48_000, "5.1"),
    ("k.mp3", "mp3", 44_100, "stereo"),
    ("l.mp2", "mp2", 16_000, "mono"),
    ("m.opus", "libopus", 48_000, "mono"),
    ("n.ogg", "flac", 16_000, "mono"),
    ("o.m4a", "aac", 44_100, "stereo"),
    ("p.m4a", "alac", 48_000, "7.1(wide)"),
    ("q.mp4", "aac", 16_000, "mono"),
    ("r.mov", "pcm_s16le", 48_000, "stereo"),
    ("s.mkv", "aac", 44_100, "stereo"),
    ("t.mka", "flac", 16_000, "mono"),
    ("u.webm", "libopus", 48_000, "stereo"),
    ("v.ts", "aac", 44_100, "stereo"),
    ("w.mpg", "mp2", 44_100, "stereo"),
    ("x.avi", "mp3", 44_100, "mono"),
    ("y.flv", "mp3", 44_100, "mono"),
    ("z.wma", "wmav2", 44_100, "mono"),
    ("za.aac", "aac", 44_100, "stereo"),
    ("zb.ac3", "ac3", 48_000, "5.1"),
    ("zc.tta", "tta", 16_000, "mono"),
    ("zd.wv", "wavpack", 16_000, "stereo"),
    ("ze.mkv", "pcm_s16le", 8_000, "mono"),
    ("zf.eac3", "eac3", 48_000, "5.1"),
]


def make_seeds(folder: Path, speech: Samples) -> list[bytes]:
    """Return one short recording of each format."""
    found = []
    for name, codec, rate, layout in FORMATS:
        encode(folder / name, speech[:24_000], codec=codec, rate=rate, layout=layout)
        found.append((folder / name).read_bytes())
    write_wave(folder / "many.wav", np.tile(speech[:2_000], (32, 1)), 16_000)
    return [*found, (folder / "many.wav").read_bytes()]


def mutate(seeds: list[bytes], number: int, seed: int) -> bytes:
    """Return a mutated recording: flipped, cut, repeated, spliced or overwritten."""
    draw = random.Random(f"{seed}/{number}")
    data = bytearray(seeds[number % len(seeds)])
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        # Headers decide about most; half of the mutations are in the first or last kilobyte.
        ends = (
            draw.randrange(min(1024, len(data))),
            len(data) - 1 - draw.randrange(1024) % len(data),
        )
        at = draw.choice((*ends, draw.randrange(len(data)), draw.randrange(len(data))))
        size = draw.choice((1, 1, 2, 4, 8, 64, 1000))
        kind = draw.randrange(8)
        if kind == 0:
            for _ in range(draw.choice((1, 3, 30))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + size] = draw.randbytes(size)
        elif kind == 2:
            data[at : at + size] = draw.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * size
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + size]
        elif kind == 5:
            data[at:at] = data[at : at + size] * draw.choice((1, 3, 100))
        elif kind == 6:
            other = seeds[draw.randrange(len(seeds))]
            data[at:] = other[draw.randrange(len(other)) :]
        else:
            value = draw.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, draw.getrandbits(32)))
            data[at : at + 4] = value.to_bytes(4, draw.choice(("little", "big")))
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


def read_all(folder: Path, first: int, count: int, seed: int) -> None:
    """Read inputs `first` to `count`; print each number before, and what came of it after."""
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    seeds = [path.read_bytes() for path in sorted(folder.iterdir())]
    for number in range(first, count):
        print(number, end=" ", flush=True)
        data = mutate(seeds, number, seed)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        try:
            samples = sum(block.size for block in stream_audio(data))
            outcome = "samples" if samples else "nothing"
            if number % 16 == 0 and load_audio(data).size != samples:
                outcome = "the whole differs from the stream"
        except AudioError:
            outcome = "AudioError"
        except BaseException as error:  # whatever it is, it is what this looks for
            outcome = f"{type(error).__name__}: {error}"[:200]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(outcome), flush=True)


def attack(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Read mutated recordings; return outcomes, and a line for each that is a fault."""
    outcomes: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        make_seeds(Path(folder), read_wave(bundled_recordings()[0].path))
        first = 0
        while first < count:
            command = [sys.executable, "-m", "tests.audio.mutations", "--read", folder]
            run = subprocess.run(
                [*command, str(first), str(count), str(seed)], stdout=subprocess.PIPE, text=True
            )
            for line in run.stdout.splitlines():
                number, _, outcome = line.partition(" ")
                first = int(number) + 1
                found = json.loads(outcome) if outcome else f"signal {-run.returncode}"
                outcomes[found] += 1
                if found not in ("samples", "AudioError"):
                    faults.append(f"input {number} of seed {seed}: {found}")
            if run.returncode != 0 and not run.stdout:
                raise RuntimeError(f"the reader ended with {run.returncode}")
    return outcomes, faults


def main(arguments: list[str]) -> None:
    if arguments[0] == "--read":
        read_all(Path(arguments[1]), *map(int, arguments[2:]))
        return
    count, seed = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 0
    outcomes, faults = attack(count, seed)
    print(json.dumps({"inputs": count, "seed": seed, "outcomes": outcomes, "faults": faults}))


if __name__ == "__main__":
    main(sys.argv[1:])
