"""Import directions: which part of the package may import which, and who may import Transformers.

Imports inside functions count; imports for type checkers alone do not.
"""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import whisper_flash_attention

NAME = "whisper_flash_attention"
PACKAGE = Path(whisper_flash_attention.__file__).parent

# Part -> what it may import of the package, from the bottom to the top.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"_version"},
    "_version": set(),
    "errors": set(),
    "terminal": set(),
    "validation": {"errors"},
    "languages": {"errors", "validation"},
    "option_kinds": {"errors", "validation"},
    "options": {"errors", "languages", "option_kinds", "validation"},
    "devices": {"errors", "options", "validation"},
    "flash_attention": {"errors"},
    "kernels": {"errors"},
    "weights": {"errors", "languages", "terminal", "validation"},
    "audio": {"errors", "option_kinds", "options", "terminal", "validation"},
    "engine": {"errors", "flash_attention", "kernels", "validation"},
    "hf": {"engine", "errors", "flash_attention"},
    "modeling_whisper_flash_attention": {
        *("engine", "errors", "flash_attention", "hf", "validation", "weights")
    },
    "transcribe": {
        "audio",
        "devices",
        "engine",
        "errors",
        "flash_attention",
        "hf",
        "languages",
        "modeling_whisper_flash_attention",
        "option_kinds",
        "options",
        "terminal",
        "validation",
        "weights",
    },
    "batch": {
        "audio",
        "errors",
        "languages",
        "option_kinds",
        "options",
        "terminal",
        "transcribe",
        "validation",
    },
    "benchmark": {
        "_version",
        "audio",
        "batch",
        "devices",
        "engine",
        "errors",
        "flash_attention",
        "modeling_whisper_flash_attention",
        "options",
        "parity",
        "serve",
        "terminal",
        "transcribe",
        "validation",
        "weights",
    },
    "parity": {
        "audio",
        "devices",
        "errors",
        "modeling_whisper_flash_attention",
        "options",
        "terminal",
        "transcribe",
        "validation",
        "weights",
    },
    "serve": {
        "_version",
        "audio",
        "engine",
        "errors",
        "languages",
        "options",
        "terminal",
        "transcribe",
    },
    "cli": {
        "_version",
        "audio",
        "batch",
        "benchmark",
        "devices",
        "engine",
        "errors",
        "flash_attention",
        "hf",
        "languages",
        "options",
        "parity",
        "serve",
        "terminal",
        "transcribe",
        "validation",
        "weights",
    },
    "__main__": {"cli"},
}
WITHOUT_TRANSFORMERS = {
    "errors",
    "validation",
    "languages",
    "audio",
    "flash_attention",
    "kernels",
    "engine",
    "batch",
    "cli",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported_names(node: ast.AST) -> Iterator[str]:
    """Dotted names that run-time imports below a node name, in full."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for branch in node.orelse:
            yield from imported_names(branch)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module is not None, "relative imports are not used"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in MODULES else node.module
    for child in ast.iter_child_nodes(node):
        yield from imported_names(child)


IMPORTS = {
    name: set(imported_names(ast.parse(path.read_text()))) - {name}
    for name, path in MODULES.items()
}


def part_of(module: str) -> str:
    """The folder of the package, or its module, that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_there_is_a_rule_for_every_part() -> None:
    assert {part_of(module) for module in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_it_may(part: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        if part_of(module) == part
        for name in sorted(names)
        if name in MODULES and part_of(name) not in MAY_IMPORT[part] | {part}
    ]
    assert not wrong


def test_the_rules_go_one_way() -> None:
    """No part may import, over any number of others, one that may import it."""
    assert list(TopologicalSorter(MAY_IMPORT).static_order())


def test_no_modules_import_each_other() -> None:
    within = {module: names & MODULES.keys() for module, names in IMPORTS.items()}
    try:
        TopologicalSorter(within).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("part", sorted(WITHOUT_TRANSFORMERS))
def test_parts_that_do_without_transformers(part: str) -> None:
    wrong = [
        module
        for module, names in IMPORTS.items()
        if part_of(module) == part
        and any(name.split(".")[0] in ("transformers", "huggingface_hub") for name in names)
    ]
    assert not wrong


def test_the_script_that_counts_imports_knows_every_room() -> None:
    rooms = runpy.run_path(str(PACKAGE.parent / "tools" / "journeys.py"))["ROOMS"]
    assert {name for row in rooms for name in row} >= MAY_IMPORT.keys()
