"""The zip archives that `torch.save` writes, read without unpickling.

An archive is accepted only if it has one meaning to every reader: one directory, directly before
the end records and where they say it is; stored entries that fill the file from its first byte to
the directory without gaps or overlaps; unique names. (PyTorch's reader goes by the offset in the
end record, others by its position, and names match regardless of case.) The layout is that of
PyTorch's `caffe2/serialize/inline_container.cc` since 1.6.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import Shape, shorten
from whisper_flash_attention.weights.files import JoinedFiles
from whisper_flash_attention.weights.torch_pickle import StoredTensor, read_pickle

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
            self._file.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.size

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Read a contiguous tensor into memory of its own."""
        if tensor.elements == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        entry = self._data[f"data/{tensor.storage}"]
        item = tensor.dtype.itemsize
        data = self._file.read(entry.start + tensor.offset * item, tensor.elements * item)
        return torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape)

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
