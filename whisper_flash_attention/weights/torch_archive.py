"""The zip archives that `torch.save` writes, read without unpickling.

An archive is accepted only if it has one meaning to every reader: one directory, directly before
the end records and at the offset that they state; stored entries that fill the file from its first
byte to the directory without gaps or overlaps; unique names. (PyTorch's reader uses the offset in
the end record, others its position, and names match regardless of case.) The layout is that of
PyTorch's `caffe2/serialize/inline_container.cc` since 1.6.

The pickle inside goes through an interpreter for the few instructions that `torch.save` writes for
tensors. It imports nothing and calls nothing. Its values are dicts (keys are strings or integers),
lists, short tuples, numbers, strings, and records of storages and tensors; every other instruction
or name is refused. Time and memory are proportional to the pickle, whose size and number of
instructions are bounded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import Convert, Shape, shorten
from whisper_flash_attention.weights.files import JoinedFiles

_MOST_INSTRUCTIONS = 400_000
_LARGEST_RANK = 8
_LONGEST_TUPLE = 64  # arguments, shapes; longer ones are not PyTorch's

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_ORDERED_DICT = "collections.OrderedDict"
_GLOBALS = frozenset(
    (
        *(_REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT),
        *(f"torch.{name}" for name in _STORAGES),
    )
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: a view of a storage, which it does not exceed.

    Attributes:
        storage: name of the storage's entry.
        offset, strides: in elements.
    """

    dtype: torch.dtype
    storage: str
    offset: int
    shape: Shape
    strides: Shape

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    name: str
    elements: int


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


class _OrderedDict(dict[Any, Any]):
    """A `collections.OrderedDict` of the file."""

    __slots__ = ()


def read_pickle(name: str, data: bytes | bytearray, sizes: Mapping[str, int]) -> Any:
    """Read a pickle of tensors and plain containers.

    Args:
        name: the file, for messages.
        data: the pickle.
        sizes: bytes of each storage, by name.

    Raises:
        WeightsError: the pickle is cut off, too long, or holds anything else.
    """
    return _Interpreter(name, bytes(data), sizes).run()


class _Interpreter:
    def __init__(self, name: str, data: bytes, sizes: Mapping[str, int]) -> None:
        self._name = name
        self._data = data
        self._sizes = sizes
        self._position = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MOST_INSTRUCTIONS):
            code = self._take(1)[0]
            if code == _STOP:
                if self._position != len(self._data) or self._marks or len(self._stack) != 1:
                    raise self._refuse("does not end with one value")
                return self._stack[0]
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise self._refuse(f"has the instruction {bytes([code])!r}, which could run code")
            instruction(self)
        raise self._refuse(f"has more than {_MOST_INSTRUCTIONS} instructions")

    # Bytes

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise self._refuse("is cut off")
        found = self._data[self._position : end]
        self._position = end
        return found

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position, self._position + 200)
        if end < 0:
            raise self._refuse("has a name without an end")
        line = self._take(end - self._position)
        self._position += 1
        return line.decode("utf-8", "replace")

    # Stack

    @property
    def _is_empty(self) -> bool:
        """Whether nothing lies above the last mark."""
        return len(self._stack) <= (self._marks[-1] if self._marks else 0)

    def _pop(self) -> Any:
        if self._is_empty:
            raise self._refuse("takes a value that is not there")
        return self._stack.pop()

    def _pop_marked(self) -> list[Any]:
        if not self._marks:
            raise self._refuse("takes values that are not there")
        mark = self._marks.pop()
        found = self._stack[mark:]
        del self._stack[mark:]
        return found

    def _top(self, kind: type) -> Any:
        top = None if self._is_empty else self._stack[-1]
        if not isinstance(top, kind):
            raise self._refuse(f"fills a {type(top).__name__} as if it were a {kind.__name__}")
        return top

    # Instructions

    def protocol(self) -> None:
        found = self._take(1)[0]
        if found != 2:
            raise self._refuse(f"is of protocol {found}, expected 2")

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def push_global(self) -> None:
        name = f"{self._line()}.{self._line()}"
        if name not in _GLOBALS:
            raise self._refuse(f"names {shorten(name)}, which would have to run as code")
        self._stack.append(_Global(name))

    def push_string(self) -> None:
        data = self._take(self._number("<I"))
        try:
            self._stack.append(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self._refuse("has a string that is not UTF-8") from error

    def push_long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def put(self, index: int) -> None:
        if not self._stack:
            raise self._refuse("keeps a value that is not there")
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise self._refuse("takes a value that was not kept")
        self._stack.append(self._memo[index])

    def push_tuple(self, items: list[Any]) -> None:
        # A tuple within a tuple holds numbers only: a shape, strides. This bounds the depth.
        plain = len(items) <= _LONGEST_TUPLE and all(
            type(item) is not tuple or all(type(number) is int for number in item) for item in items
        )
        if not plain:
            raise self._refuse("has nested tuples, which no tensor needs")
        self._stack.append(tuple(items))

    def short_tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.push_tuple(items[::-1])

    def append(self) -> None:
        item = self._pop()
        self._top(list).append(item)

    def appends(self) -> None:
        items = self._pop_marked()
        self._top(list).extend(items)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self._pop_marked())

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise self._refuse("has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise self._refuse(f"has a {type(key).__name__} for a key")
            target[key] = value

    def persistent(self) -> None:
        found = self._pop()
        if type(found) is not tuple or len(found) != 5:
            raise self._refuse("has a storage that is none")
        tag, kind, name, _, elements = found
        is_known = type(kind) is _Global and kind.name.removeprefix("torch.") in _STORAGES
        if tag != "storage" or not is_known or type(name) is not str or type(elements) is not int:
            raise self._refuse("has a storage that is none")
        dtype = _STORAGES[kind.name.removeprefix("torch.")]
        size = self._sizes.get(name)
        if size is None:
            raise self._refuse(f"has a storage {shorten(name)}, which is missing")
        if elements < 0 or size != elements * dtype.itemsize:
            raise self._refuse(
                f"has a storage {shorten(name)} of {shorten(elements)} {dtype} in {size} bytes"
            )
        self._stack.append(_Storage(dtype, name, elements))

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        called = function.name if type(function) is _Global else None
        if type(arguments) is not tuple:
            raise self._refuse("calls something without arguments")
        if called == _ORDERED_DICT and not arguments:
            self._stack.append(_OrderedDict())
        elif called == _REBUILD_TENSOR and len(arguments) in (6, 7):
            self._stack.append(self._tensor(*arguments[:4]))
        elif called == _REBUILD_PARAMETER and len(arguments) == 3:
            if type(arguments[0]) is not StoredTensor:
                raise self._refuse("has a parameter that is no tensor")
            self._stack.append(arguments[0])
        else:
            raise self._refuse(f"calls {called or type(function).__name__}, as no tensor needs")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
        if type(storage) is not _Storage or type(offset) is not int:
            raise self._refuse("has a tensor without a storage")
        for numbers in (shape, strides):
            if type(numbers) is not tuple or not all(
                type(number) is int and 0 <= number < 1 << 48 for number in numbers
            ):
                raise self._refuse("has a tensor without a shape")
        if not len(shape) == len(strides) <= _LARGEST_RANK:
            raise self._refuse("has a tensor of an impossible rank")
        tensor = StoredTensor(storage.dtype, storage.name, offset, shape, strides)
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        needed = offset + last + 1 if tensor.elements else offset
        if offset < 0 or needed > storage.elements:
            raise self._refuse(
                f"has a tensor of shape {list(shape)} in a storage of {storage.elements} elements"
            )
        return tensor

    def build(self) -> None:
        """Accept what a module's `state_dict()` carries beside its items; it is not needed."""
        state = self._pop()
        self._top(_OrderedDict)
        # Any other attribute could stand in for a method of the dict.
        if type(state) is not dict or set(state) != {"_metadata"}:
            raise self._refuse("sets attributes of an object")

    def _refuse(self, reason: str) -> WeightsError:
        return WeightsError(
            f"{self._name}: damaged, or holds more than tensors and plain containers: its data.pkl "
            f"{reason} (at byte {self._position})"
        )


_STOP = ord(".")
_INSTRUCTIONS = {
    code[0]: instruction
    for code, instruction in {
        b"\x80": _Interpreter.protocol,
        b"(": _Interpreter.mark,
        b"}": lambda i: i._stack.append({}),
        b"]": lambda i: i._stack.append([]),
        b")": lambda i: i._stack.append(()),
        b"N": lambda i: i._stack.append(None),
        b"\x88": lambda i: i._stack.append(True),
        b"\x89": lambda i: i._stack.append(False),
        b"J": lambda i: i._stack.append(i._number("<i")),
        b"K": lambda i: i._stack.append(i._number("<B")),
        b"M": lambda i: i._stack.append(i._number("<H")),
        b"\x8a": _Interpreter.push_long,
        b"G": lambda i: i._stack.append(i._number(">d")),
        b"X": _Interpreter.push_string,
        b"c": _Interpreter.push_global,
        b"q": lambda i: i.put(i._number("<B")),
        b"r": lambda i: i.put(i._number("<I")),
        b"h": lambda i: i.get(i._number("<B")),
        b"j": lambda i: i.get(i._number("<I")),
        b"t": lambda i: i.push_tuple(i._pop_marked()),
        b"\x85": lambda i: i.short_tuple(1),
        b"\x86": lambda i: i.short_tuple(2),
        b"\x87": lambda i: i.short_tuple(3),
        b"a": _Interpreter.append,
        b"e": _Interpreter.appends,
        b"s": _Interpreter.set_item,
        b"u": _Interpreter.set_items,
        b"Q": _Interpreter.persistent,
        b"R": _Interpreter.reduce,
        b"b": _Interpreter.build,
    }.items()
}


_END = struct.Struct("<4s4H2IH")
_END_64_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR_SIZES = (16, 24)  # signature, checksum and two sizes, of 4 or 8 bytes
_HAS_DESCRIPTOR, _ENCRYPTED = 1 << 3, 1 << 0
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

# The largest model with the state of its optimizer has 5,000 entries and a pickle of 0.7 MB.
_MOST_ENTRIES = 1 << 15
_LARGEST_PICKLE = 4 << 20


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    header: int  # position of the local header
    size: int
    flags: int
    start: int = 0  # position of the data


class TorchArchive:
    """An open file of `torch.save`. A context manager.

    Attributes:
        content: what was saved: dicts, lists, tuples, numbers, strings and, for tensors,
            `StoredTensor`, each of which lies within its entry of the archive.

    Raises:
        WeightsError: the file is not such an archive, is damaged, or holds anything but tensors
            and plain containers.
    """

    content: Any

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = JoinedFiles((path,))
        self._data: dict[str, _Entry] = {}

    def __enter__(self) -> Self:
        self._file.__enter__()
        try:
            self._open()
        except BaseException:
            self._file.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.size

    def read(self, tensor: StoredTensor, convert: Convert | None = None) -> torch.Tensor:
        """Read a contiguous tensor; see `JoinedFiles.tensor`."""
        entry = self._data[f"data/{tensor.storage}"]
        position = entry.start + tensor.offset * tensor.dtype.itemsize
        return self._file.tensor(position, tensor.dtype, tensor.shape, convert)

    def _open(self) -> None:
        entries = self._entries()
        folder = entries[0].name.partition("/")[0]
        for entry in entries:
            if not entry.name.startswith(f"{folder}/"):
                raise self._not_ours()
            self._data[entry.name.removeprefix(f"{folder}/")] = entry
        if "data.pkl" not in self._data or "constants.pkl" in self._data:
            raise self._not_ours()
        order = self._data.get("byteorder")
        if order is not None and self._file.read(order.start, min(order.size, 6)) != b"little":
            raise WeightsError(f"{self.name}: written on a big-endian machine; save it on another")
        pickle = self._data["data.pkl"]
        if pickle.size > _LARGEST_PICKLE:
            raise WeightsError(
                f"{self.name}: its data.pkl has {pickle.size} bytes, more than any model's names "
                "and shapes take"
            )
        sizes = {
            name.removeprefix("data/"): entry.size
            for name, entry in self._data.items()
            if name.startswith("data/")
        }
        self.content = read_pickle(self.name, self._file.read(pickle.start, pickle.size), sizes)

    def _entries(self) -> list[_Entry]:
        """Entries in the order in which they lie in the file, each checked against its header."""
        start, size, count = self._locate_directory()
        data = bytes(self._file.read(start, size))
        entries: list[_Entry] = []
        names: set[str] = set()
        position = 0
        for _ in range(count):
            entry, position = self._central_entry(data, position)
            if entry.name.lower() in names:
                raise self._damaged(f"{shorten(entry.name)} is there twice")
            names.add(entry.name.lower())
            entries.append(entry)
        if position != size:
            raise self._damaged("its directory has another size than it says")
        entries.sort(key=lambda entry: entry.header)
        ends = [entry.header for entry in entries[1:]] + [start]
        if entries[0].header != 0:
            raise self._damaged("something stands before its first entry")
        return [self._locate_data(entry, end) for entry, end in zip(entries, ends, strict=True)]

    def _locate_directory(self) -> tuple[int, int, int]:
        """Position, size and number of entries of the directory, from the records at the end."""
        file = self._file
        if file.size < _END.size:
            raise self._not_an_archive()
        end = file.size - _END.size
        fields = _END.unpack(file.read(end, _END.size))
        signature, disk, first_disk, on_disk, count, size, start, comment = fields
        if signature != b"PK\5\6" or comment:
            raise self._not_an_archive()
        directory_end = end
        locator_at = end - _END_64_LOCATOR.size
        if locator_at >= 0 and file.read(locator_at, 4) == b"PK\6\7":
            _, disk, record_at, disks = _END_64_LOCATOR.unpack(
                file.read(locator_at, _END_64_LOCATOR.size)
            )
            if record_at != locator_at - _END_64.size or disks != 1:
                raise self._damaged("its end records contradict one another")
            short = (on_disk, count, size, start)
            fields = _END_64.unpack(file.read(record_at, _END_64.size))
            signature, length, _, _, disk_64, first_disk, *long = fields
            if signature != b"PK\6\6" or length != _END_64.size - 12 or disk_64:
                raise self._damaged("its end records contradict one another")
            most = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
            for value, value_64, escape in zip(short, long, most, strict=True):
                if value not in (value_64, escape):
                    raise self._damaged("its end records contradict one another")
            on_disk, count, size, start = long
            directory_end = record_at
        if disk or first_disk or on_disk != count or start + size != directory_end:
            raise self._damaged("its directory is not where its end records say")
        if not 0 < count <= min(_MOST_ENTRIES, size // _CENTRAL.size):
            raise self._damaged(f"its directory of {size} bytes claims {count} entries")
        return start, size, count

    def _central_entry(self, data: bytes, position: int) -> tuple[_Entry, int]:
        after = position + _CENTRAL.size
        if after > len(data):
            raise self._damaged("its directory is cut off")
        fields = _CENTRAL.unpack_from(data, position)
        signature, _, _, flags, method, *_, packed, size, name, extra, comment = fields[:13]
        header = fields[-1]
        end = after + name + extra + comment
        if signature != b"PK\1\2" or end > len(data):
            raise self._damaged("its directory is cut off")
        text = data[after : after + name]
        sizes = self._long_sizes(data[after + name : after + name + extra], size, packed, header)
        size, packed, header = sizes
        if not text.isascii() or not text.decode("ascii").isprintable():
            raise self._damaged("an entry has an odd name")
        if method or packed != size:
            raise WeightsError(f"{self.name}: has compressed entries; torch.save writes none")
        if flags & _ENCRYPTED:
            raise self._damaged("it is encrypted")
        return _Entry(text.decode("ascii"), header, size, flags), end

    def _long_sizes(self, extra: bytes, *sizes: int) -> list[int]:
        """Replace sizes that do not fit 4 bytes by those in the zip64 field."""
        field = b""
        while len(extra) >= 4:
            kind, length = struct.unpack_from("<2H", extra)
            if kind == 1:
                field = extra[4 : 4 + length]
            extra = extra[4 + length :]
        found = []
        for size in sizes:
            if size == 0xFFFFFFFF:
                if len(field) < 8:
                    raise self._damaged("an entry lacks its size")
                size = int.from_bytes(field[:8], "little")
                field = field[8:]
            found.append(size)
        return found

    def _locate_data(self, entry: _Entry, end: int) -> _Entry:
        """Check the local header of an entry that must end at `end`."""
        if entry.header + _LOCAL.size > end:
            raise self._damaged(f"entry {shorten(entry.name)} overlaps another")
        fields = _LOCAL.unpack(self._file.read(entry.header, _LOCAL.size))
        signature, _, flags, method, _, _, _, _, _, name, extra = fields
        start = entry.header + _LOCAL.size + name + extra
        text = bytes(self._file.read(entry.header + _LOCAL.size, name)) if start <= end else b""
        if (
            signature != b"PK\3\4"
            or method
            or flags != entry.flags
            or text != entry.name.encode("ascii")
        ):
            raise self._damaged(f"entry {shorten(entry.name)} is not what the directory says")
        left = end - start - entry.size
        if left not in (_DESCRIPTOR_SIZES if flags & _HAS_DESCRIPTOR else (0,)):
            raise self._damaged(f"entry {shorten(entry.name)} does not end where the next begins")
        return _Entry(entry.name, entry.header, entry.size, entry.flags, start)

    def _not_an_archive(self) -> WeightsError:
        if self._file.size > 15 and self._file.read(0, 15) == _LEGACY_MAGIC:
            return WeightsError(
                f"{self.name}: written in the format of PyTorch before 1.6, which is not read "
                "here. If you trust the file, write it again: "
                "torch.save(torch.load(path, weights_only=True), path)"
            )
        return WeightsError(
            f"{self.name}: truncated, or not an archive of torch.save. Expected an OpenAI "
            "checkpoint"
        )

    def _not_ours(self) -> WeightsError:
        return WeightsError(f"{self.name}: an archive, but not one of torch.save")

    def _damaged(self, reason: str) -> WeightsError:
        return WeightsError(f"{self.name}: a damaged archive, or not one of torch.save: {reason}")


def is_contiguous(shape: Shape, strides: Shape) -> bool:
    """Whether elements lie one after another, in PyTorch's sense (strides of 1s do not count)."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1:
            if stride != expected:
                return False
            expected *= length
    return True
