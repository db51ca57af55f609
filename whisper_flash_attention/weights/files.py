"""Bounded reading of files that nobody vouches for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from whisper_flash_attention.errors import WeightsError

# Whisper's largest JSON file, a tokenizer, has 4 MB.
_LARGEST_JSON = 64 * 1024 * 1024


class JoinedFiles:
    """Files read by position as if they were one; usually there is just one. A context manager.

    Raises:
        WeightsError: a file cannot be opened or read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = str(paths[0]) if len(paths) == 1 else " + ".join(str(path) for path in paths)
        self._paths = tuple(paths)
        self._stack = ExitStack()
        self._files: list[tuple[int, int, BufferedReader]] = []  # first byte, size, file
        self.size = 0

    def __enter__(self) -> Self:
        try:
            for path in self._paths:
                file = self._stack.enter_context(path.open("rb"))
                size = path.stat().st_size
                self._files.append((self.size, size, file))
                self.size += size
        except OSError as error:
            self._stack.close()
            raise WeightsError(f"{self.name}: cannot be opened ({error})") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self, position: int, count: int) -> bytearray:
        """Read `count` bytes; nothing is allocated unless the files hold that many."""
        if count > self.size - position:
            left = max(0, self.size - position)
            raise WeightsError(
                f"{self.name}: truncated: {count} bytes are needed at byte {position}, {left} left"
            )
        data = bytearray(count)
        view = memoryview(data)
        done = 0
        try:
            for start, size, file in self._files:
                here = position + done - start
                if 0 <= here < size and done < count:
                    file.seek(here)
                    wanted = min(count - done, size - here)
                    done += _read_fully(file, view[done : done + wanted])
        except OSError as error:
            raise WeightsError(f"{self.name}: cannot be read ({error})") from error
        if done < count:
            raise WeightsError(f"{self.name}: became shorter while it was read")
        return data


def _read_fully(file: BufferedReader, view: memoryview) -> int:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    return done


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: the file is missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise WeightsError(f"{path}: {path.stat().st_size} bytes are too many for a JSON file")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
