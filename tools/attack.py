"""Attack the loaders, the reader, names and options with generated input, and count what happens.

    python tools/attack.py loaders|reader|names|options --count N --seed S [--target NAME]
    python tools/attack.py loaders --target safetensors --seed 1 --first 17 --count 1   # one again

A case is made from its seed, target and number alone, and runs in a forked process with a watch on
its time and its memory. Right are: a good result, or an error of the package's own. A fault is any
other exception, a process that dies, more than `LIMIT_SECONDS`, or memory of more than twice the
input and the result and `LIMIT_MEMORY`. Faults are printed with the number that makes them again.
The generators know formats, and nothing of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from attacks.loaders import loaders
from attacks.names import names
from attacks.options import options
from attacks.reader import reader
from attacks.values import Case

TARGETS = {"loaders": loaders, "reader": reader, "names": names, "options": options}
LIMIT_SECONDS, LIMIT_MEMORY, KILL_SECONDS = 10.0, 64 << 20, 40.0


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def judge(case: Case, rng: random.Random) -> tuple[str, str]:
    """Run one case: what it came to, and of a fault a description."""
    from whisper_flash_attention.errors import WhisperFlashError

    Path("/proc/self/clear_refs").write_text("5")
    before, began, sizes = peak_bytes(), time.process_time(), (0, 0)
    kind, fault = "loaded", ""
    try:
        result = case(rng)
        kind, sizes = (result, sizes) if isinstance(result, str) else (kind, result)
    except WhisperFlashError as error:
        kind = f"refused: {type(error).__name__}"
        if not str(error).strip():
            fault = "an error without a message"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)
        inner = [each for each in place if "whisper_flash_attention" in each.filename] or place
        where = f"{Path(inner[-1].filename).name}:{inner[-1].lineno}"
        fault = (
            f"{type(error).__name__} at {where} ({Path(place[-1].filename).name}): {error!s:.300}"
        )
    taken, spent = peak_bytes() - before, time.process_time() - began
    if taken > LIMIT_MEMORY + 2 * sum(sizes) and not fault:
        fault = f"{taken >> 20} MB of memory for {sizes} bytes in and out"
    if spent > LIMIT_SECONDS and not fault:
        fault = f"{spent:.0f} s"
    return ("FAULT" if fault else kind), fault


def work(cases: dict[str, Case], name: str, seed: int, numbers: range, pipe: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    warnings.simplefilter("ignore")
    for number in numbers:
        outcome = judge(cases[name], random.Random(f"{seed} {name} {number}"))
        os.write(pipe, json.dumps([number, *outcome]).encode() + b"\n")
    os._exit(0)


def attack(cases: dict[str, Case], name: str, seed: int, first: int, count: int) -> Counter[str]:
    """Run cases in a forked process, and in another one after each that dies or hangs."""
    counts: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    following, end = first, first + count
    while following < end:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            os.setsid()
            try:
                work(cases, name, seed, range(following, min(end, following + 500)), writing)
            finally:
                os._exit(70)
        os.close(writing)
        buffer, ended = b"", ""
        while not ended:
            ready, _, _ = select.select([reading], [], [], KILL_SECONDS)
            data = os.read(reading, 65_536) if ready else b""
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                number, kind, fault = json.loads(line)
                counts[kind] += 1
                following = number + 1
                if fault and seen[fault[:60]] < 3:
                    print(f"{name} no. {number}: {fault}", flush=True)
                seen[fault[:60]] += 1
            ended = "" if data else "died" if ready else "hung"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        os.close(reading)
        status = os.waitpid(process, 0)[1]
        if ended == "hung" or (
            status != 0 and following < end and os.waitstatus_to_exitcode(status)
        ):
            print(
                f"{name} no. {following}: the process {ended}, {os.waitstatus_to_exitcode(status)}"
            )
            counts["FAULT"] += 1
            following += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=TARGETS)
    parser.add_argument("--count", type=int, default=100, help="cases of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--target", action="append", help="only this one; repeatable")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        cases = TARGETS[arguments.what](Path(folder))
        for name in arguments.target or cases:
            counts = attack(cases, name, arguments.seed, arguments.first, arguments.count)
            faults += counts["FAULT"]
            found = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
            print(f"{arguments.what}, {name}: {counts.total()}: {found}", flush=True)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
