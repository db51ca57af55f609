"""A text as the tokens of its characters, and the words of that text.

Each word is spelled by itself, the blank before it as a token of its own. A word begins with its
first letter, or a little before that, in its blank, since sound precedes the attention to it. A
pause is in the blank, and so in no word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whisper_flash_attention.engine.alignment import Indices
from whisper_flash_attention.transcribe.tokenizer import SplitWord

POSITIONS_PER_SECOND = 50
# Categories of Unicode: punctuation, symbols, blanks and controls.
SILENT = "PSZC"
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
        has_blank: of each word, whether it begins with a blank.
    """

    tokens: tuple[int, ...]
    is_silent: tuple[bool, ...]
    words: tuple[tuple[int, int], ...]
    has_blank: tuple[bool, ...]

    @classmethod
    def of(cls, words: Sequence[SplitWord], spell: Spell) -> SpelledText | None:
        """Spell words; None if the vocabulary cannot, or if there is nothing to spell."""
        tokens: list[int] = []
        silent: list[bool] = []
        spans, blanks = [], []
        is_blank_before = False  # where blanks are words, as between phrases in Thai
        for word in words:
            first = len(tokens)
            letters = word.text.lstrip(" ")
            is_blank_before |= letters != word.text
            blanks.append(is_blank_before and bool(letters))
            for character in (" " if blanks[-1] else "") + letters:
                spelled = spell(character)
                if spelled is None:
                    return None
                tokens += spelled
                silent += [unicodedata.category(character)[0] in SILENT] * len(spelled)
            is_blank_before = is_blank_before and not letters
            spans.append((first, len(tokens)))
        if not tokens:
            return None
        return cls(tuple(tokens), tuple(silent), tuple(spans), tuple(blanks))

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
        for (first, after), has_blank in zip(self.words, self.has_blank, strict=True):
            if first == after:
                found.append((end, end))
                continue
            begin, end = seconds[first], seconds[after]
            if has_blank:
                begin = min(end, max(begin, seconds[first + 1] - MOST_BLANK))
            found.append((begin, end))
        return found
