"""Write the tables of options into `docs/reference/options.md`, of fields into `docs/serve.md`.

    python -m tools.option_tables

Each block between `<!-- options: NAME -->` and `<!-- end -->` is the table of that dataclass of
`whisper_flash_attention/options.py`; `<!-- fields -->` begins the table of a request's fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from whisper_flash_attention import options

DOCS = Path(__file__).parents[1] / "docs"
PAGE, SERVER_PAGE = DOCS / "reference/options.md", DOCS / "serve.md"
_BLOCK = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(group: Any) -> str:
    """Return the Markdown table of a dataclass of options."""
    flagged = group is not options.VadOptions  # which are values of one flag
    heads = ["option", *(["command line"] if flagged else []), "values", "default", "meaning"]
    rows = [heads, ["---"] * len(heads)]
    for each, about in options.declared(group):
        flags = [" ".join(f"`{flag}`" for flag in options.flags_of(each))] if flagged else []
        default = options.default_text(each)
        values = about.kind.expected
        rows.append(
            [f"`{each.name}`", *flags, values, f"`{default}`" if default else "", about.help]
        )
    return _markdown(rows)


def _markdown(rows: Iterable[list[str]]) -> str:
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def field_table() -> str:
    """Return the Markdown table of the fields of a request to the server."""
    from whisper_flash_attention.serve.fields import FIELDS

    rows = [["field", "of OpenAI's API", "meaning"], ["---"] * 3]
    rows.append(["`file`", "yes", "The recording, in any format that `transcribe` reads."])
    for each in FIELDS.values():
        name = f"{each.name}[]" if each.schema.get("type") == "array" else each.name
        rows.append([f"`{name}`", "yes" if each.is_openai else "", each.meaning])
    return _markdown(rows)


def with_tables(page: str) -> str:
    """Return the page with all of its tables as the dataclasses are now."""
    return _BLOCK.sub(lambda found: found[1] + table(getattr(options, found[2])) + found[3], page)


def with_fields(page: str) -> str:
    """Return the page of the server with the table of fields as it is now."""
    block = re.compile(r"(<!-- fields -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda found: found[1] + field_table() + found[2], page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    SERVER_PAGE.write_text(with_fields(SERVER_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
