#!/usr/bin/env python3
"""Count what a reader of the package must follow: modules on four journeys, and imports.

    python tools/journeys.py                         # of this checkout
    python tools/journeys.py --tree ../old --list    # of another one, with the names of modules

A journey runs in a fresh process in which a profiler notes the modules of the package whose
functions are called; what runs while a module is imported does not count. Processes that it starts
are included. `generate`, on a CPU, is counted until the encoder's first attention, and until the
decoder's first forward pass. The model is the packaged tiny.en (extra `demo`).

Imports are counted in the source: statements per file, cycles (groups of modules that import one
another, also inside functions), and imports of a module in a higher room (`ROOMS`, from low to
high). Hops that carry nothing are functions that only call another one with their own arguments.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "whisper_flash_attention"
# From low to high; tests/test_imports.py says which rooms of one line may import others of it.
ROOMS = (
    ("errors", "_version"),
    ("validation", "config", "option_kinds", "options", "devices", "languages", "terminal"),
    ("kernels", "flash_attention", "audio"),
    ("weights", "engine", "cache"),
    ("hf", "generation", "compat"),
    ("modeling_whisper_flash_attention",),
    ("transcribe",),
    ("batch", "parity", "serve", "benchmark"),
    ("doctor", "cli", "__main__", "__init__"),
)
# Installed in every process of a journey by Python itself, which imports `sitecustomize`.
PROFILER = """
import os, sys, threading
from pathlib import Path

PACKAGE, NOTES = os.environ["JOURNEY_PACKAGE"], os.environ["JOURNEY_NOTES"]
STACK = "(on the stack)"
seen = set()

def profile(frame, event, argument):
    code = frame.f_code
    if event != "call" or code in seen or not code.co_filename.startswith(PACKAGE):
        return
    if not code.co_flags & 1:  # the body of a module or class
        return
    outer = frame
    while outer is not None:
        if outer.f_code.co_name == "<module>" and outer.f_code.co_filename.startswith(PACKAGE):
            return
        outer = outer.f_back
    seen.add(code)
    with open(NOTES, "a") as notes:
        module = Path(code.co_filename).relative_to(PACKAGE)
        print(module, code.co_name, file=notes)
        if module.name in ("torch_decoder.py", "plain.py") and code.co_name == "forward":
            while frame is not None:
                if frame.f_code.co_filename.startswith(PACKAGE):
                    print(Path(frame.f_code.co_filename).relative_to(PACKAGE), STACK, file=notes)
                frame = frame.f_back

def begin():
    threading.setprofile(profile)
    sys.setprofile(profile)

if os.environ.get("JOURNEY_BEGINS_AT_ONCE"):
    begin()
"""
GENERATE = """
import os, sys, sitecustomize, torch
from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Model
from whisper_flash_attention.weights import packaged_source
model = Model.from_pretrained("package:tiny.en")
features = torch.zeros(1, 80, 3000)
if sys.argv[1] == "warm":
    model.generate(features, max_new_tokens=4)
    model.generate(features, max_new_tokens=4)
sitecustomize.seen.clear()
sitecustomize.begin()
model.generate(features, max_new_tokens=4)
"""
COMMAND = f"from {PACKAGE}.cli import main; main()"
ON_STACK = "(on the stack)"
FIRST_KERNEL = ("flash_attention/dispatch.py", "attend")
DECODER_BEGINS = ("engine/torch_decoder.py", "forward")
# Names of today by names of earlier versions.
EARLIER = {"engine/plain.py": "engine/torch_decoder.py"}


def functions_of_run(tree: Path, arguments: list[str], *, at_once: bool) -> list[tuple[str, str]]:
    """Modules and functions that a run of Python enters, in the order of their first calls.

    Args:
        tree: the checkout.
        arguments: of Python.
        at_once: begin with the process, instead of where the program says.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(PROFILER)
        notes = Path(folder) / "notes"
        notes.touch()
        variables = {
            "PYTHONPATH": f"{folder}{os.pathsep}{tree}",
            "JOURNEY_PACKAGE": f"{tree / PACKAGE}{os.sep}",
            "JOURNEY_NOTES": str(notes),
            "JOURNEY_BEGINS_AT_ONCE": "1" if at_once else "",
            "HF_HUB_OFFLINE": "1",
        }
        run = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{run.stdout}{run.stderr}")
        lines = [line.split(" ", 1) for line in notes.read_text().splitlines()]
        return [(module, function) for module, function in lines]


def modules_until(
    functions: list[tuple[str, str]], end: tuple[str, str] | None = None
) -> list[str]:
    """Distinct modules, up to and including that of the function `end`."""
    modules: dict[str, None] = {}
    for module, function in functions:
        if function == ON_STACK:
            continue
        modules[module] = None
        if (EARLIER.get(module, module), function) == end:
            break
    return list(modules)


def journeys(tree: Path) -> dict[str, list[str]]:
    """Modules that each journey enters."""
    recording = tree / PACKAGE / "data" / "recordings" / "austen_0870.wav"
    one = [str(recording), "--model", "package:tiny.en"]
    commands = {
        "`transcribe x.wav` to a written .srt": ["transcribe", *one, "-f", "srt", "-o", "out"],
        "one archive item, `batch --engine local`": [
            "batch",
            *one,
            "--output",
            "out",
            "--engine",
            "local",
        ],
    }
    found = {}
    for name, arguments in commands.items():
        functions = functions_of_run(tree, ["-c", COMMAND, *arguments], at_once=True)
        found[name] = modules_until(functions)
        stack = dict.fromkeys(module for module, function in functions if function == ON_STACK)
        found[f"{name}, on the stack when the decoder begins"] = list(stack)[::-1]
    for state in ("warm", "cold"):
        functions = functions_of_run(tree, ["-c", GENERATE, state], at_once=False)
        for name, end in (("first kernel", FIRST_KERNEL), ("decoder", DECODER_BEGINS)):
            found[f"`generate(features)`, {state}, to the {name}"] = modules_until(functions, end)
    return found


class Source:
    """The syntax trees of a package's modules, by dotted name without the package's."""

    def __init__(self, package: Path) -> None:
        self.trees: dict[str, ast.Module] = {}
        self.lines = 0
        for path in sorted(package.rglob("*.py")):
            text = path.read_text("utf-8")
            self.lines += len(text.splitlines())
            name = ".".join(path.relative_to(package).with_suffix("").parts)
            self.trees[name.removesuffix(".__init__")] = ast.parse(text)

    def import_statements(self) -> int:
        """Statements that import anything but `__future__`."""
        return sum(
            isinstance(node, ast.Import)
            or (isinstance(node, ast.ImportFrom) and node.module != "__future__")
            for tree in self.trees.values()
            for node in ast.walk(tree)
        )

    def imports(self) -> dict[str, set[str]]:
        """Modules of the package that each module imports, except for type checkers only."""
        return {name: set(self._imports_of(tree)) - {name} for name, tree in self.trees.items()}

    def _imports_of(self, node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith(PACKAGE):
                module = (child.module or "").removeprefix(PACKAGE).removeprefix(".")
                for alias in child.names:
                    inner = f"{module}.{alias.name}".removeprefix(".")
                    yield inner if inner in self.trees else module or "__init__"
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    if alias.name.startswith(f"{PACKAGE}."):
                        yield alias.name.removeprefix(f"{PACKAGE}.")
            yield from self._imports_of(child)

    def hops(self) -> list[str]:
        """Functions whose body only calls another function with the same arguments."""
        return [
            f"{name}.{node.name}"
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and not node.decorator_list and is_hop(node)
        ]


def is_hop(function: ast.FunctionDef) -> bool:
    """Whether a function does nothing but pass all of its arguments on, in their order."""
    body = [
        each
        for each in function.body
        if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        and not isinstance(each, ast.Import | ast.ImportFrom)
    ]
    if len(body) != 1 or not isinstance(body[0], ast.Return | ast.Expr):
        return False
    call = body[0].value
    if not isinstance(call, ast.Call) or function.name.startswith("__"):
        return False
    spec = function.args
    names = [each.arg for each in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    names += [each.arg for each in (spec.vararg, spec.kwarg) if each]
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    values = [each.value if isinstance(each, ast.Starred) else each for each in values]
    passed = [each.id for each in values if isinstance(each, ast.Name)]
    own = [name for name in names if name not in ("self", "cls")]
    return bool(own) and len(passed) == len(values) and passed == own


def cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach one another by imports."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            for each in imports.get(waiting.pop(), set()) - found:
                found.add(each)
                waiting.append(each)
        return found

    reached = {name: reachable(name) for name in imports}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached.get(other, set())))
        for name in imports
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def upward(imports: dict[str, set[str]]) -> list[str]:
    """Imports of a module in a higher room."""
    ranks = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

    def rank_of(module: str) -> int:
        return ranks[(module or "__init__").split(".")[0]]

    return [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in sorted(others)
        if rank_of(other) > rank_of(name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="a checkout")
    parser.add_argument("--list", action="store_true", help="print names as well as counts")
    parser.add_argument("--imports-only", action="store_true", help="run no journey")
    options = parser.parse_args()
    tree = options.tree.resolve()
    source = Source(tree / PACKAGE)
    imports = source.imports()
    found = {} if options.imports_only else journeys(tree)
    files = len(source.trees)
    counted: dict[str, object] = {f"modules: {name}": len(each) for name, each in found.items()}
    counted["files"], counted["lines"] = files, f"{source.lines:,}"
    counted["import statements per file"] = f"{source.import_statements() / files:.1f}"
    named = {
        "import cycles": [" ".join(group) for group in cycles(imports)],
        "imports of a higher room": upward(imports),
        "hops that carry nothing": source.hops(),
    }
    counted |= {name: len(each) for name, each in named.items()}
    for name, count in counted.items():
        print(f"| {name} | {count} |")
    if options.list:
        for name, each in (found | named).items():
            print(f"\n{name}\n" + "\n".join(f"    {one}" for one in each))


if __name__ == "__main__":
    main()
