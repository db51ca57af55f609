"""An interpreter for the few pickle instructions that `torch.save` writes for tensors.

It is no unpickler: it imports nothing and calls nothing. Its values are dicts (keys are strings or
whole numbers), lists, short tuples, numbers, strings, and records of storages and tensors; every
other instruction or name is refused. Time and memory are proportional to the pickle, whose size
and number of instructions are bounded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import Shape, shorten

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
