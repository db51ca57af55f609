"""Small `.pt` files that would take much memory or time, or crash, in a general unpickler.

Run as a program with paths, it reads each and prints a line of JSON: what came of it, the seconds,
and how many bytes the peak of resident memory grew.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import time
from pathlib import Path

from tests.weights.mutations import packed


def archive(*entries: tuple[str, bytes]) -> bytes:
    return packed({f"a/{name}": data for name, data in entries})


def _pickle(body: bytes) -> bytes:
    return archive(("data.pkl", b"\x80\x02" + body + b"."))


_ORDERED = b"ccollections\nOrderedDict\n)R"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _shadowed() -> bytes:
    """A dict whose `items` is another object's, by its `__dict__`."""
    return _pickle(_ORDERED + b"}" + _text("items") + _text("x") + b"s" + b"b")


def _two_directories() -> bytes:
    """The end record states the place of one directory and stands after another."""
    stated = archive(("data.pkl", b"\x80\x02}."), ("data/0", b"x"))
    directory = stated.index(b"PK\1\2")
    records, size = stated[:directory], len(stated) - 22 - directory
    # A directory of equal size with other names, directly before the end record.
    other = stated[directory : directory + size].replace(b"data.pkl", b"atad.pkl")
    end = bytearray(stated[-22:])
    end[16:20] = struct.pack("<I", directory)
    return records + stated[directory : directory + size] + other + bytes(end)


def _overlapping() -> bytes:
    """Two entries of the directory share one header."""
    whole = archive(("data.pkl", b"\x80\x02}."), ("data/0", b"x" * 100))
    directory = bytearray(whole[whole.index(b"PK\1\2") : -22])
    second = directory.index(b"PK\1\2", 4)
    directory[second + 42 : second + 46] = struct.pack("<I", 0)
    return whole[: whole.index(b"PK\1\2")] + bytes(directory) + whole[-22:]


def _tuple_graph(levels: int) -> bytes:
    """A key whose hash visits 2 ** levels tuples."""
    body = b"}" + b")"
    for level in range(levels):
        body += b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86"
    return _pickle(body + b"K\x01s")


BOMBS = {
    "a method shadowed by an attribute": _shadowed(),
    "two directories": _two_directories(),
    "something before the archive": b"MZ" * 50 + archive(("data.pkl", b"\x80\x02}.")),
    "a tuple 300,000 deep": _pickle(b")" + b"\x85" * 300_000),
    "a list 300,000 deep": _pickle(b"]" * 300_000 + b"a" * 299_999),
    "a bytearray of 1 GiB": _pickle(b"cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R"),
    "a tuple graph of 24 levels as a key": _tuple_graph(24),
    "a tuple graph of 200 levels as a key": _tuple_graph(200),
    "four million dicts": _pickle(b"}" * 4_000_000),
    "a million marks": _pickle(b"(" * 1_000_000),
    "a tuple of 100,000 tuples": _pickle(b"(" + b")" * 100_000 + b"t"),
    "a pickle of 8 MB": _pickle(_text("x" * (8 << 20))),
    "a number of 2 GiB": _pickle(b"\x8b\xff\xff\xff\x7f"),
    "a string of 4 GiB": _pickle(b"X\xff\xff\xff\xff"),
    "names that differ by case": archive(("data.pkl", b"\x80\x02}."), ("DATA.pkl", b"\x80\x02}.")),
    "entries that overlap": _overlapping(),
    "a storage that is larger than its entry": archive(
        (
            "data.pkl",
            b"\x80\x02(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu")
            + b"J\xff\xff\xff\x7ftQ.",
        ),
        ("data/0", bytes(4)),
    ),
}  # fmt: skip


def main(paths: list[str]) -> None:
    from whisper_flash_attention.errors import WeightsError
    from whisper_flash_attention.weights.openai_reader import read_openai

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    for path in paths:
        start = time.process_time()
        try:
            read_openai(Path(path))
            outcome = "read"
        except WeightsError as error:
            outcome = str(error)
        seconds = time.process_time() - start
        print(json.dumps({"outcome": outcome, "seconds": seconds, "grown": peak() - before}))


if __name__ == "__main__":
    main(sys.argv[1:])
