"""The variables in a CTranslate2 `model.bin`, found and checked before any of their data is read.

Little endian, binary versions 1 to 6 (`Model::load` in CTranslate2's `src/models/model.cc`):

    u32 version . version >= 2: str spec, u32 revision . u32 number of variables
    per variable: str name . u8 rank . u32 dimensions[rank] . u8 dtype (version < 4: item size)
                  . u32 bytes (version < 4: items) . data
    version >= 3: u32 number of aliases . per alias: str alias, str variable
    str = u16 length with the trailing NUL, bytes, NUL

Every number is checked against the bytes that are left before it is used.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import Shape, shorten
from whisper_flash_attention.weights.files import JoinedFiles

SPEC = "WhisperSpec"
REVISION = 3
_VERSIONS = range(1, 7)
_LARGEST_RANK = 3  # the weights of a convolution
_SMALLEST_VARIABLE = 2 + 2 + 1 + 1 + 4  # name of one letter, rank, dtype, size
_SMALLEST_ALIAS = 2 * (2 + 2)

_DTYPES = (
    torch.float32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.float16,
    torch.bfloat16,
)
# Before version 4 only the size of an item was kept.
_DTYPES_BY_SIZE = {4: torch.float32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True, slots=True)
class Variable:
    """Where the data of a variable lies, and what it is."""

    name: str
    shape: Shape
    dtype: torch.dtype
    position: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class VariableReader:
    """The variables of an open `model.bin`, by name; aliases are names like any other.

    Raises:
        WeightsError: the header is not one of a Whisper, or a number in it cannot be true.
    """

    def __init__(self, file: JoinedFiles) -> None:
        self._file = file
        self._position = 0
        self.name = file.name
        self.variables: dict[str, Variable] = {}
        version = self._number("I", "the version")
        if version not in _VERSIONS:
            raise self._wrong(f"binary version {version}, expected 1 to 6: not a model.bin?")
        if version >= 2:
            self._check_spec()
        for index in range(self._count("variables", _SMALLEST_VARIABLE)):
            self._read_variable(version, index)
        if version >= 3:
            for index in range(self._count("aliases", _SMALLEST_ALIAS)):
                self._read_alias(index)
        if self._position != file.size:
            raise self._wrong(f"{file.size - self._position} bytes are left over")

    def tensor(self, name: str) -> torch.Tensor:
        """Read a variable, in the dtype and shape that it is stored in, into memory of its own."""
        variable = self.variables[name]
        if variable.size == 0:
            return torch.empty(variable.shape, dtype=variable.dtype)
        data = self._file.read(variable.position, variable.size)
        return torch.frombuffer(data, dtype=variable.dtype).reshape(variable.shape)

    def _check_spec(self) -> None:
        spec = self._string("the name of the specification")
        revision = self._number("I", "the revision")
        if spec != SPEC:
            raise self._wrong(f"a model of kind {shorten(spec)!r}, expected {SPEC!r}")
        if revision != REVISION:
            raise self._wrong(
                f"revision {revision} of {SPEC}, expected {REVISION}: convert the model again "
                "with a current ct2-transformers-converter"
            )

    def _read_variable(self, version: int, index: int) -> None:
        name = self._string(f"the name of variable {index}")
        what = f"variable {shorten(name)}"
        if name in self.variables:
            raise self._wrong(f"{what} is there twice")
        rank = self._number("B", f"the rank of {what}")
        if rank > _LARGEST_RANK:
            raise self._wrong(f"{what} has rank {rank}, expected at most {_LARGEST_RANK}")
        shape = tuple(self._number("I", f"the dimensions of {what}") for _ in range(rank))
        kind = self._number("B", f"the type of {what}")
        count = self._number("I", f"the size of {what}")
        if version >= 4:
            dtype = _DTYPES[kind] if kind < len(_DTYPES) else None
        else:
            dtype = _DTYPES_BY_SIZE.get(kind)
            count *= kind
        if dtype is None:
            raise self._wrong(f"{what} has unknown type {kind}")
        variable = Variable(name, shape, dtype, self._position)
        if variable.size != count:
            raise self._wrong(
                f"{what} of shape {list(shape)} takes {variable.size} bytes, not {count}"
            )
        if count > self._left:
            raise self._wrong(f"truncated: {what} takes {count} bytes, {self._left} are left")
        self.variables[name] = variable
        self._position += count

    def _read_alias(self, index: int) -> None:
        alias = self._string(f"the name of alias {index}")
        target = self._string(f"what alias {index} stands for")
        if alias in self.variables:
            raise self._wrong(f"alias {shorten(alias)} is there twice")
        if target not in self.variables:
            raise self._wrong(
                f"alias {shorten(alias)} stands for {shorten(target)}, which is missing"
            )
        self.variables[alias] = self.variables[target]

    @property
    def _left(self) -> int:
        return self._file.size - self._position

    def _take(self, count: int, what: str) -> bytearray:
        if count > self._left:
            raise self._wrong(f"truncated: {what} takes {count} bytes, {self._left} are left")
        data = self._file.read(self._position, count)
        self._position += count
        return data

    def _number(self, code: str, what: str) -> int:
        layout = struct.Struct("<" + code)
        return int(layout.unpack(self._take(layout.size, what))[0])

    def _count(self, what: str, smallest: int) -> int:
        count = self._number("I", f"the number of {what}")
        if count * smallest > self._left:
            raise self._wrong(f"{count} {what} do not fit into the {self._left} bytes left")
        return count

    def _string(self, what: str) -> str:
        length = self._number("H", what)
        data = bytes(self._take(length, what))
        if length < 2 or data.find(0) != length - 1:
            raise self._wrong(f"{what} is not a text that ends with a NUL")
        try:
            return data[:-1].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(f"{what} is not UTF-8") from error

    def _wrong(self, message: str) -> WeightsError:
        return WeightsError(f"{self.name}: {message} (at byte {self._position})")
