"""Write the tables of options into `docs/reference/options.md`.

    python -m tools.option_tables

Each block between `<!-- options: NAME -->` and `<!-- end -->` is the table of that dataclass of
`whisper_flash_attention/options.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from whisper_flash_attention import options

PAGE = Path(__file__).parents[1] / "docs/reference/options.md"
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
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def with_tables(page: str) -> str:
    """Return the page with all of its tables as the dataclasses are now."""
    return _BLOCK.sub(lambda found: found[1] + table(getattr(options, found[2])) + found[3], page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
