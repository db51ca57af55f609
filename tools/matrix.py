"""Try what pyproject.toml admits: every supported Python, dependencies newest and oldest.

    python tools/matrix.py                     # everything; several GB for each PyTorch release
    python tools/matrix.py --without-pytorch   # what needs no PyTorch, a small environment each

For each Python that is found and each set of dependencies: install the package, transcribe a
bundled recording in every format, run `doctor`, and run the tests of readers, weights, the command
line and what Transformers must keep. The newest set also tries a Transformers release beyond the
supported range, if there is one, on the contract tests: that result is reported and fails nothing.

Needs uv for the oldest dependencies and for speed; without it, pip installs the newest ones.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
SETS = {"newest": "highest", "oldest": "lowest-direct"}
TESTS = ("tests/audio", "tests/weights", "tests/cli/test_main.py", "tests/contract")
NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
# Compiling all of Transformers takes longer than installing it.
PIP_INSTALL = ("-m", "pip", "install", "--quiet", "--no-compile")
PACKAGES = ("av", "numpy", "safetensors", "silero-vad", "torch", "transformers", "typer")

# The part that needs no PyTorch: what it imports, and its tests. Of Transformers it needs the names
# of languages only.
SMALL = (
    "av>=18",
    "fsspec",
    "hypothesis",
    "numpy",
    "pytest",
    "rich",
    "safetensors",
    "transformers>=5.17,<5.25",
    "typer",
)
SMALL_TESTS = (
    "tests/audio/test_audio_source_load.py",
    "tests/audio/test_bundled_clips.py",
    "tests/batch/test_manifest.py",
    "tests/batch/test_shards.py",
    "tests/batch/test_sink.py",
    "tests/transcribe/test_cues.py",
    "tests/transcribe/test_output.py",
    "tests/transcribe/test_results.py",
    "tests/transcribe/test_writers.py",
)


@dataclass(frozen=True)
class Environment:
    """A virtual environment to try, and where its output goes."""

    python: str
    dependencies: str
    folder: Path

    @property
    def executable(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *arguments: str) -> tuple[bool, str]:
        """Run its Python on the repository; whether it succeeded, and all output."""
        # The suite's own settings, and no package of the calling environment. Packages are
        # installed without byte code, which is kept beside them where it is first needed.
        kept = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON}
        variables = kept | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        variables["PYTHONPYCACHEPREFIX"] = str(self.folder / "pycache")
        done = subprocess.run(
            [str(self.executable), *arguments],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        return done.returncode == 0, done.stdout


def interpreters(wanted: list[str]) -> dict[str, str]:
    """The path of an interpreter for each version that this machine has."""
    found = {}
    for version in wanted:
        uv = shutil.which("uv")
        candidates = [shutil.which(f"python{version}"), shutil.which("python3"), sys.executable]
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        candidates += [str(p) for p in sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]
        if uv is not None:
            known = subprocess.run([uv, "python", "find", version], capture_output=True, text=True)
            candidates.append(known.stdout.strip() or None)
        for candidate in filter(None, candidates):
            script = "import sys; print('%d.%d' % sys.version_info[:2])"
            answer = subprocess.run([candidate, "-c", script], capture_output=True, text=True)
            if answer.stdout.strip() == version:
                found[version] = candidate
                break
    return found


def create(environment: Environment, interpreter: str, requirements: list[str]) -> tuple[bool, str]:
    """Make the environment and install into it; whether that worked, and the installer's output."""
    uv = shutil.which("uv")
    if uv is not None:
        install = [uv, "pip", "install", "--quiet", "--python", str(environment.executable)]
        commands = [
            [uv, "venv", "--quiet", "--clear", "--python", interpreter, str(environment.folder)],
            [*install, "--resolution", SETS[environment.dependencies], *requirements],
        ]
    else:
        commands = [
            [interpreter, "-m", "venv", "--clear", str(environment.folder)],
            [str(environment.executable), *PIP_INSTALL, *requirements],
        ]
    output = ""
    for command in commands:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output += done.stdout
        if done.returncode:
            return False, output
    return True, output


def anonymous(text: str, environment: Environment) -> str:
    """Text without the paths of this machine."""
    for path, name in ((str(environment.folder), "ENV"), (str(ROOT), "."), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return text


def report(
    what: str, succeeded: bool, output: str, environment: Environment, started: float
) -> bool:
    """Print one line for a step, and its last lines where it failed."""
    lines = [line for line in anonymous(output, environment).splitlines() if line.strip()]
    summary = ""
    if succeeded and lines and re.search(r"\d+ (passed|of \d+)", lines[-1]):
        summary = re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= "))
    state = "ok" if succeeded else "FAILED"
    print(f"  {what:<32} {state:<7} {time.monotonic() - started:5.0f} s  {summary}".rstrip())
    if not succeeded:
        print("".join(f"    | {line[:300]}\n" for line in lines[-30:]), end="")
    sys.stdout.flush()
    return succeeded


def try_all(environment: Environment, interpreter: str) -> bool:
    """Install, transcribe, `doctor` and tests in one environment; whether all succeeded."""
    print(f"Python {environment.python}, {environment.dependencies} dependencies")
    started = time.monotonic()
    succeeded, output = create(environment, interpreter, ["-e", ".[demo,dev]"])
    if not report("install", succeeded, output, environment, started):
        return False
    print(f"  {versions(environment)}")
    steps = {
        "transcribe every format": ["tools/every_format.py"],
        "doctor": ["-m", "whisper_flash_attention", "doctor"],
        "tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
    }
    results = [succeeded]
    for name, arguments in steps.items():
        started = time.monotonic()
        results.append(report(name, *environment.run(*arguments), environment, started))
    if environment.dependencies == "newest":
        try_next_transformers(environment)
    return all(results)


def versions(environment: Environment) -> str:
    """The installed versions of the packages that matter, in one line."""
    script = (
        "import importlib.metadata as m\n"
        f"print(', '.join(f'{{n}} {{m.version(n)}}' for n in {PACKAGES!r}))"
    )
    return environment.run("-c", script)[1].strip()


def try_next_transformers(environment: Environment) -> None:
    """Run the contract tests on a Transformers release beyond the supported range, if any."""
    uv = shutil.which("uv")
    installer = (
        [uv, "pip", "install", "--quiet", "--python", str(environment.executable)]
        if uv
        else [str(environment.executable), *PIP_INSTALL]
    )
    before = versions(environment)
    started = time.monotonic()
    subprocess.run([*installer, "--upgrade", "transformers"], cwd=ROOT, capture_output=True)
    if versions(environment) == before:
        print("  no newer Transformers release than the supported range")
        return
    print(f"  beyond the supported range: {versions(environment)}")
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract", "tests/hf")
    report("contract with that release", *environment.run(*tests), environment, started)


def try_small(environment: Environment, interpreter: str) -> bool:
    """The part that needs no PyTorch, in one environment; whether it succeeded."""
    print(f"Python {environment.python}, without PyTorch")
    started = time.monotonic()
    succeeded, output = create(environment, interpreter, list(SMALL))
    if not report("install", succeeded, output, environment, started):
        return False
    started = time.monotonic()
    helped = environment.run("-m", "whisper_flash_attention", "transcribe", "--help")
    results = [report("whisper-flash transcribe --help", *helped, environment, started)]
    started = time.monotonic()
    tests = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *SMALL_TESTS)
    results.append(report("tests", *tests, environment, started))
    return all(results)


def main() -> int:
    parser = argparse.ArgumentParser(description="Try every supported Python and dependency set.")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this version")
    parser.add_argument("--dependencies", action="append", choices=SETS, help="only this set")
    parser.add_argument("--without-pytorch", action="store_true", help="only what needs no PyTorch")
    parser.add_argument("--work", type=Path, help="keep the environments in this folder")
    options = parser.parse_args()
    found = interpreters(options.python or list(PYTHONS))
    for version in options.python or PYTHONS:
        if version not in found:
            print(f"Python {version}: not on this machine, not tried")
    sets = ["newest"] if options.without_pytorch else options.dependencies or list(SETS)
    if "oldest" in sets and shutil.which("uv") is None:
        print("uv is not installed: the oldest dependencies are not tried")
        sets.remove("oldest")
    attempt = try_small if options.without_pytorch else try_all
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        for version, interpreter in found.items():
            for dependencies in sets:
                # One after another in the same place, as each takes gigabytes.
                name = f"{version}-{dependencies}" if options.work else "environment"
                folder = (options.work or Path(temporary)) / name
                environment = Environment(version, dependencies, folder)
                failures += not attempt(environment, interpreter)
    passed = len(found) * len(sets) - failures
    print(f"{passed} of {passed + failures} environments passed")
    return 1 if failures or not found else 0


if __name__ == "__main__":
    sys.exit(main())
