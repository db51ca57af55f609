"""Word error rate, by edit distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class WordErrors:
    """Word errors over several texts: substitutions, insertions and deletions, and words in all."""

    errors: int = 0
    words: int = 0

    def add(self, reference: str, found: str) -> None:
        """Count one pair of normalised texts."""
        wanted = reference.split()
        self.errors += edit_distance(wanted, found.split())
        self.words += len(wanted)

    @property
    def rate(self) -> float | None:
        """Errors per word of the references; None where those have no words."""
        return self.errors / self.words if self.words else None


def edit_distance(first: Sequence[object], second: Sequence[object]) -> int:
    """Fewest substitutions, insertions and deletions from `first` to `second` (Levenshtein)."""
    row = list(range(len(second) + 1))
    for index, item in enumerate(first, start=1):
        diagonal, row[0] = row[0], index
        for column, other in enumerate(second, start=1):
            best = min(diagonal + (item != other), row[column] + 1, row[column - 1] + 1)
            diagonal, row[column] = row[column], best
    return row[-1]
