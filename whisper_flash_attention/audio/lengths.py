"""The length in the header of a file, and whether the file confirms it.

Recorders write the length of WAV-like files when they begin and again when they end. One that wrote
into a pipe leaves a placeholder; one that was stopped, or that passed 4 GiB, leaves too little, and
what is beyond would not be read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

# Lengths of chunks from here on are what programs write who do not know: 2 GiB or 4 GiB and less of
# a header or a block.
_PLACEHOLDERS = (range(0x7FFF0000, 0x80010000), range(0xFFFF0000, 1 << 32))
_W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
# A shorter rest than this after the samples is not worth a word: tags, padding.
_LEAST_REST = 4096
_MOST_CHUNKS = 10_000
_MOST_TAGS = 100


@dataclass(frozen=True, slots=True)
class _Data:
    """The chunk of samples: where they begin, how many bytes, and where that number is."""

    start: int
    size: int
    field: int
    width: int
    order: str
    shift: int  # what the field counts beyond the samples' bytes

    def is_placeholder(self, rest: int) -> bool:
        """Whether the length is a placeholder, `rest` being the bytes of the file beyond it."""
        if self.size == 0:
            return rest > 0
        counted = self.size + self.shift
        if self.width == 8:
            return counted >= 1 << 63
        return rest < 0 and any(counted in each for each in _PLACEHOLDERS)


@dataclass(frozen=True, slots=True)
class Correction:
    """A better value for a header's length field.

    Args:
        offset: of the field in the file.
        value: its bytes.
        announced: bytes of sound in the header; None for a placeholder, which is no mistake.
        found: bytes of sound in the file.
    """

    offset: int
    value: bytes
    announced: int | None
    found: int


def length_correction(file: BinaryIO) -> Correction | None:
    """Return what has to be corrected in a WAV, RF64, BW64, W64, AIFF or CAF header, if anything.

    Args:
        file: can seek; is left at its beginning.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        data = _find_data(file, size)
        if data is None:
            return None
        rest = size - data.start - data.size
        announced: int | None = data.size
        if data.is_placeholder(rest) and not (rest > 0 and _is_chunk(file, data, size)):
            announced = None
        elif rest < _LEAST_REST or _is_chunk(file, data, size):
            return None
        found = size - data.start
        most = (1 << 8 * data.width) - 1
        value = min(found + data.shift, most).to_bytes(data.width, data.order)  # type: ignore[arg-type]
        return Correction(data.field, value, announced, found)
    finally:
        file.seek(0)


def mp3_frames(file: BinaryIO) -> int | None:
    """Return the number of frames in the header of an mp3 file (Xing, Info or VBRI).

    FFmpeg estimates lengths of mp3 files without such a header, and of joined ones.

    Args:
        file: can seek; is left at its beginning.
    """
    position = 0
    for _ in range(_MOST_TAGS):
        file.seek(position)
        size = id3_size(file.read(10))
        if size is None:
            break
        position += size
    file.seek(position)
    beginning = file.read(4096)
    file.seek(0)
    for mark, offset in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        at = beginning.find(mark)
        if at < 0 or at + offset + 4 > len(beginning):
            continue
        if mark == b"VBRI" or beginning[at + 7] & 1:  # a flag: frames are counted
            return int.from_bytes(beginning[at + offset : at + offset + 4], "big")
    return None


def id3_size(head: bytes) -> int | None:
    """Return the size in bytes of the ID3v2 tag that begins with these ten, or None."""
    if len(head) < 10 or head[:3] != b"ID3" or head[3] not in (2, 3, 4) or head[4] != 0:
        return None
    if head[5] & 0x0F or any(byte & 0x80 for byte in head[6:10]):
        return None
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte
    return 10 + size + (10 if head[5] & 0x10 else 0)


class CorrectedFile(io.RawIOBase):
    """A file that reads as if its header had been corrected."""

    def __init__(self, file: BinaryIO, correction: Correction) -> None:
        self._file, self._correction = file, correction

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        found = self._file.read(size)
        first = self._correction.offset - start
        value = self._correction.value
        if first >= len(found) or first + len(value) <= 0:
            return found
        patched = bytearray(found)
        for index, byte in enumerate(value, first):
            if 0 <= index < len(patched):
                patched[index] = byte
        return bytes(patched)


def _find_data(file: BinaryIO, size: int) -> _Data | None:
    file.seek(0)
    head = file.read(40)
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _find_in_riff(file, size)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        for position, kind, length in _chunks(file, 12, size, head=8, order="big", pad=2):
            if kind == b"SSND":
                # Eight bytes of offset and block size come before the samples.
                return _Data(position + 16, max(0, length - 8), position + 4, 4, "big", 8)
    elif head[:4] == b"caff":
        for position, kind, length in _chunks(file, 8, size, head=12, order="big", pad=1):
            if kind == b"data":  # an edit count of four bytes comes before the samples
                return _Data(position + 16, max(0, length - 4), position + 4, 8, "big", 4)
    elif head[:16] == _W64_RIFF:
        for position, kind, length in _chunks(file, 40, size, head=24, order="little", pad=8):
            if kind == _W64_DATA:
                return _Data(position + 24, max(0, length), position + 16, 8, "little", 24)
    return None


def _find_in_riff(file: BinaryIO, size: int) -> _Data | None:
    wide: tuple[int, int] | None = None  # RF64: position and value of the 64-bit length
    for position, kind, length in _chunks(file, 12, size, head=8, order="little", pad=2):
        if kind == b"ds64":
            file.seek(position + 16)
            wide = position + 16, int.from_bytes(file.read(8), "little")
        elif kind == b"data" and wide is not None:
            return _Data(position + 8, wide[1], wide[0], 8, "little", 0)
        elif kind == b"data":
            return _Data(position + 8, length, position + 4, 4, "little", 0)
    return None


def _chunks(
    file: BinaryIO, position: int, size: int, *, head: int, order: str, pad: int
) -> Iterator[tuple[int, bytes, int]]:
    """Yield position, kind and length of content, head excluded, of chunk after chunk."""
    kind_size = 16 if head == 24 else 4
    for _ in range(_MOST_CHUNKS):
        if position + head > size:
            return
        file.seek(position)
        found = file.read(head)
        if len(found) < head:
            return
        length = int.from_bytes(found[kind_size:], order)  # type: ignore[arg-type]
        length -= head if head == 24 else 0  # W64 counts the head, too
        yield position, found[:kind_size], length
        if length < 0:
            return
        position += head + length + -length % pad


def _is_chunk(file: BinaryIO, data: _Data, size: int) -> bool:
    """Whether what follows the samples is another chunk: a readable kind, a length that fits."""
    head = 24 if data.shift == 24 else 12 if data.order == "big" and data.width == 8 else 8
    pad = {24: 8, 12: 1, 8: 2}[head]
    position = data.start + data.size + -(data.size + data.shift) % pad
    for _, kind, length in _chunks(file, position, size, head=head, order=data.order, pad=pad):
        return (
            kind[:4].isascii()
            and kind[:4].decode("ascii").isprintable()
            and (0 <= length <= size - position)
        )
    return False
