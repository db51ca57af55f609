"""Printable forms of text that others wrote: names of files, ids, columns, titles, transcripts.

Such text may hold escape sequences that retitle or rewrite a terminal, line breaks that imitate a
message of ours, overrides that reorder what is read, and bytes that are not UTF-8. Whatever reaches
a terminal, a log or a line of a text file goes through `printable`. Data files keep the text as it
is: `json_line` escapes the same characters as JSON does, which readers undo.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# C0, DEL and C1 controls; line and paragraph separators; surrogates, which stand for bytes that are
# not UTF-8; noncharacters, by which a terminal may resynchronise.
_CONTROLS = "\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff\\ufffe\\uffff"
# Marks, embeddings, overrides and isolates of writing direction; deprecated format characters.
_DIRECTIONS = "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u206f"
# Invisible: zero-width space, word joiner and invisible operators, byte order mark, annotations,
# tags. Zero-width joiners are not among them: Persian, Hindi and emoji are spelled with them.
_INVISIBLE = "\\u200b\\u2060-\\u2064\\ufeff\\ufff9-\\ufffb\\U000e0000-\\U000e007f"

# What `printable` escapes.
UNPRINTABLE = re.compile(f"[{_CONTROLS}{_DIRECTIONS}{_INVISIBLE}]")
_CONTROL = re.compile(f"[{_CONTROLS}]")
_NOT_IN_JSON = re.compile(f"[{_CONTROLS}{_DIRECTIONS}]")


def printable(text: object, *, is_speech: bool = False) -> str:
    """Return `str(text)` on one line, with what a terminal would act on shown as Python's escapes.

    ESC becomes `\\x1b`, a line break `\\n`, a right-to-left override `\\u202e`, a byte that is not
    UTF-8 `\\udce9`. All other characters, backslashes among them, stay: the result is for reading,
    and printable text is its own printable form.

    Args:
        text: anything; its `str` is taken.
        is_speech: keep marks of writing direction and invisible characters, with which subtitles in
            Arabic and Hebrew are written. Controls are escaped all the same.
    """
    return (_CONTROL if is_speech else UNPRINTABLE).sub(_escape, str(text))


def json_line(value: Any) -> str:
    """Return JSON on one line, readable where it can be: only unprintable characters are escaped.

    Unlike `json.dumps(value, ensure_ascii=False)` it can be encoded whatever it holds, and nothing
    in it acts on a terminal; readers get the same value.
    """
    return _NOT_IN_JSON.sub(
        lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False)
    )


def print_line(console: Console, text: object) -> None:
    """Print the printable form of `text` as one line, whatever the width, without markup."""
    from rich.text import Text

    console.print(Text(printable(text)), soft_wrap=True)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
