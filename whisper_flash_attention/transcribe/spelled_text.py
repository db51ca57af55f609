"""A text as the tokens of its characters, and the words of that text.

Each word is spelled by itself, the blank before it as a token of its own. A word is where its
characters are; its blank counts as a part of it for a moment alone, since the sound of a word often
begins before its first letter is attended to, and a pause is in the blank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whisper_flash_attention.engine.alignment import Indices
from whisper_flash_attention.transcribe.tokenizer import SplitWord

POSITIONS_PER_SECOND = 50
# A word takes this much of the blank before it at most, in seconds.
MOST_BLANK = 0.08

# The tokens of a character; None if the vocabulary cannot spell it.
Spell = Callable[[str], tuple[int, ...] | None]


@dataclass(frozen=True)
class SpelledText:
    """The characters of a text.

    Args:
        tokens: ids of all characters.
        is_silent: of each, whether it is a blank or punctuation.
        words: for every word its first token, its blank included, and the token after its last.
    """

    tokens: tuple[int, ...]
    is_silent: tuple[bool, ...]
    words: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, words: Sequence[SplitWord], spell: Spell) -> SpelledText | None:
        """Spell words; None if the vocabulary cannot, or if there is nothing to spell."""
        tokens: list[int] = []
        silent: list[bool] = []
        spans = []
        for word in words:
            first = len(tokens)
            letters = word.text.lstrip(" ")
            for character in (" " if letters and letters != word.text else "") + letters:
                spelled = spell(character)
                if spelled is None:
                    return None
                tokens += spelled
                # Marks of scripts without letters of their own are not alphanumeric.
                is_silent = character.isascii() and not character.isalnum()
                silent += [is_silent] * len(spelled)
            spans.append((first, len(tokens)))
        return cls(tuple(tokens), tuple(silent), tuple(spans)) if tokens else None

    def parts(self, room: int) -> tuple[tuple[int, ...], ...]:
        """The tokens in parts of at most `room`, cut before words that fit into one."""
        cuts, begin, fits = [0], 0, 0
        for _, after in self.words:
            while after - begin > room:
                begin = fits if begin < fits else begin + room
                cuts.append(begin)
            fits = after
        return tuple(
            self.tokens[one:other]
            for one, other in zip(cuts, [*cuts[1:], len(self.tokens)], strict=True)
        )

    def times(self, starts: Indices) -> list[tuple[float, float]]:
        """Start and end of every word in seconds.

        Args:
            starts: the position at which each token begins, and the end: [N + 1], ascending.
        """
        seconds = (starts / POSITIONS_PER_SECOND).tolist()
        found, end = [], 0.0
        for first, after in self.words:
            if first == after:
                found.append((end, end))
                continue
            begin, end = seconds[first], seconds[after]
            if self.is_silent[first] and after - first > 1:
                begin = min(end, max(begin, seconds[first + 1] - MOST_BLANK))
            found.append((begin, end))
        return found
