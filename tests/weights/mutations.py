"""Random damage to files: bytes, JSON values and pickle instructions, the same for a seed."""

from __future__ import annotations

import io
import itertools
import json
import math
import pickletools
import random
import zipfile
from typing import Any

_DEEP = "@deep@"  # stands for nesting that `json.dumps` itself could not write
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 255, 65536, 10**9, 2**31, 2**63, 2**64, 10**30),
    *(-(2**63), 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "\ud800", "a\0b", "a\nb\x1b[31m", "../../../etc/passwd", "/dev/zero", "x" * 5000),
    *("float32", "torch.float16", "gelu", "swish", "eager", "left", "<|endoftext|>", "1" * 400),
    *([], {}, [None], [-1], [[]], [[0, 0]], [0] * 300, {"a": 1}, {"": None}, {"content": 5}),
    *([[[[[[[[[[[[[]]]]]]]]]]]]], _DEEP),
)


def damaged_json(rng: random.Random, content: Any) -> bytes:
    """Change one to three values of a JSON document, sometimes its bytes."""
    content = json_copy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _changed(rng, content)
    depth = rng.choice((40, 900, 5000, 20_000))
    text = json.dumps(content).replace(f'"{_DEEP}"', "[" * depth + "]" * depth)
    data = text.encode()
    return damaged_bytes(rng, data) if rng.random() < 0.15 else data


def _changed(rng: random.Random, root: Any) -> Any:
    places: list[tuple[Any, Any]] = []
    pending = [root]
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list) and value:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            keys = keys if len(keys) <= 40 else rng.sample(keys, 40)
            places += [(value, key) for key in keys]
            pending += [value[key] for key in keys]
    if not places or rng.random() < 0.01:
        return rng.choice(_VALUES)
    # Places high up are few and matter most.
    parent, key = rng.choice(places[: rng.choice((8, 40, len(places)))])
    kind = rng.randrange(8)
    if kind < 4:
        parent[key] = json_copy(rng.choice(_VALUES))
    elif kind == 4:
        del parent[key]
    elif kind == 5:
        other, where = rng.choice(places)
        if where in other if isinstance(other, dict) else where < len(other):
            parent[key] = json_copy(other[where])
    elif kind == 6 and isinstance(parent[key], int | float):
        parent[key] = rng.choice((-1, 1, 1000)) * parent[key] + rng.choice((-1, 0, 1))
    elif isinstance(parent, dict):
        parent[rng.choice(("", "x", "__class__", "self", f"{key}_"))] = parent.pop(key)
    else:
        parent.extend(parent[:50] * rng.choice((1, 20)))
    return root


def damaged_bytes(
    rng: random.Random, data: bytes, places: tuple[tuple[int, int], ...] | None = None
) -> bytes:
    """Flip, overwrite, insert, remove or cut bytes, within ranges of positions if given."""
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        first, last = rng.choice(places) if places else (0, len(broken))
        place = rng.randrange(first, max(first + 1, min(last, len(broken))))
        kind = rng.randrange(6)
        if kind < 2 and place < len(broken):
            broken[place] ^= rng.randrange(1, 256)
        elif kind == 2:
            extreme = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF, rng.getrandbits(32)))
            broken[place : place + 4] = extreme.to_bytes(4, "little")
        elif kind == 3:
            broken[place:place] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 4:
            del broken[place : place + rng.randrange(1, 40)]
        else:
            del broken[place:]
    return bytes(broken)


def instructions(data: bytes) -> list[bytes]:
    """Split a pickle into its instructions."""
    positions = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    return [data[first:last] for first, last in itertools.pairwise(positions)]


def damaged_pickle(rng: random.Random, steps: list[bytes]) -> bytes:
    """Drop, repeat, move or replace whole instructions of a pickle."""
    steps = list(steps)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(steps))
        kind = rng.randrange(5)
        if kind == 0 and len(steps) > 1:
            del steps[place]
        elif kind == 1:
            steps.insert(place, rng.choice(steps))
        elif kind == 2:
            steps[place] = rng.choice(steps)
        elif kind == 3:
            steps[place] = rng.choice(INSTRUCTIONS)
        else:
            steps[place:place] = [rng.choice(INSTRUCTIONS) for _ in range(rng.randrange(1, 6))]
    return b"".join(steps)


INSTRUCTIONS = (
    *(b"(", b")", b"}", b"]", b"N", b"\x88", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s"),
    *(b"u", b"R", b"b", b"Q", b"0", b"1", b"2", b".", b"\x81", b"\x92", b"\x93", b"o", b"l", b"d"),
    *(b"K\x07", b"M\xff\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"G\x7f\xf8" + bytes(6)),
    *(b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"\x8b\xff\xff\xff\x7f", b"X\x01\x00\x00\x00a"),
    *(b"X\xff\xff\xff\xff", b"q\x00", b"q\x05", b"h\x00", b"h\x05", b"j\xff\xff\xff\xff"),
    *(b"cbuiltins\nbytearray\n", b"cos\nsystem\n", b"ccollections\nOrderedDict\n"),
    *(
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"P0\n",
        b"\x95" + bytes(8),
    ),
)


def packed(entries: dict[str, bytes]) -> bytes:
    """Write a zip archive as `torch.save` could have: stored entries, without gaps."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return made.getvalue()


def json_copy(value: Any) -> Any:
    """A deep copy of a JSON value, quicker than `copy.deepcopy`."""
    return json.loads(json.dumps(value))
