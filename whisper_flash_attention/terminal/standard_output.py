"""Standard output: text in its encoding, whatever that can hold, and JSON lines in UTF-8."""

from __future__ import annotations

import sys


class StandardOutput:
    """Writes to standard output; what its encoding cannot hold becomes `?`.

    Attributes:
        lost: the encoding that could not hold some text; None if nothing was lost.
    """

    def __init__(self) -> None:
        self.lost: str | None = None

    def write(self, text: str) -> None:
        """Write text as it is, and flush."""
        # Redirected under Windows, it may be of an encoding that knows few characters.
        encoding = sys.stdout.encoding or "utf-8"
        encoded = text.encode(encoding, errors="replace")
        if encoded.decode(encoding) != text:
            self.lost = encoding
        sys.stdout.write(encoded.decode(encoding))
        sys.stdout.flush()

    def write_json(self, line: str) -> None:
        """Write a line of JSON in UTF-8, whatever the encoding, and flush."""
        sys.stdout.flush()
        sys.stdout.buffer.write(f"{line}\n".encode())
        sys.stdout.buffer.flush()
