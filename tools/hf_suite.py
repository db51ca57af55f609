"""Transformers' own tests of Whisper, with this package's class in place of the stock class.

    python tools/hf_suite.py --tests CHECKOUT/tests [--work FOLDER] [--output SUMMARY.json] [-k ...]

The tests run twice in processes of their own, with the stock class and with ours, with attention
heads of 64 values so that the engine runs. What passes with stock must pass with ours, and the
engine must have decoded; the exit code is 1 otherwise, unless `DIFFERENCES` has the reason.

The source distribution on PyPI, of the installed version, carries the tests that all models share
(`test_modeling_common.py`), but neither those of `generate` nor Whisper's own: these come from the
checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

# Tests that pass with stock alone, and why.
_NO_CHECKPOINT = (
    "looks for a small checkpoint on the Hub by the name of the class, and skips without one"
)
DIFFERENCES = {
    "test_sdpa_can_dispatch_non_composite_models": (
        'wants "sdpa" as the default of the attention; ours is a back-end of this package'
    ),
    "test_inherits_generation_mixin": (
        "wants GenerationMixin among the direct bases; ours inherits it through the stock class"
    ),
    "test_pipeline_automatic_speech_recognition": _NO_CHECKPOINT,
    "test_pipeline_automatic_speech_recognition_fp16": _NO_CHECKPOINT,
}

# Folders and files that the source distribution lacks.
FROM_CHECKOUT = ("tests", "utils", "conftest.py", "pyproject.toml", "setup.py")
WHISPER = "models/whisper/test_modeling_whisper.py"

# Of one test: its outcome, the error if it failed, and what the plugin counted.
Outcome = dict[str, Any]


def installed_version() -> str:
    import transformers

    return transformers.__version__


def download_tests(work: Path) -> Path:
    """The `tests` folder of the source distribution of the installed Transformers."""
    version = installed_version()
    name = f"transformers-{version}"
    if not (work / name / "tests").exists():
        command = ["download", "--no-binary", "transformers", "--no-deps", "--dest", str(work)]
        pip = [sys.executable, "-m", "pip", *command, f"transformers=={version}"]
        subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            members = [each for each in archive if each.name.startswith(f"{name}/tests/")]
            archive.extractall(work, members=members, filter="data")
    return work / name / "tests"


def prepare(work: Path, checkout: Path) -> Path:
    """Lay the shared tests over those of the checkout.

    Returns:
        The root of a copy, in which the tests find the sources where they stand in a checkout.
    """
    import transformers

    root = work / "suite"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name in FROM_CHECKOUT:
        if (checkout.parent / name).is_dir():
            shutil.copytree(checkout.parent / name, root / name)
        elif (checkout.parent / name).exists():
            shutil.copy(checkout.parent / name, root / name)
    if not (root / "tests" / WHISPER).exists():
        raise SystemExit(f"{checkout} has no {WHISPER}: give the tests folder of a checkout")
    shutil.copytree(download_tests(work), root / "tests", dirs_exist_ok=True)
    (root / "src").mkdir()
    (root / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    return root


def run(work: Path, root: Path, which: str, keyword: str) -> dict[str, Outcome]:
    """The outcome of every test, with "stock" or "ours"."""
    tools, report = Path(__file__).resolve().parent, (work / f"{which}.json").resolve()
    report.unlink(missing_ok=True)
    path = [str(root), str(tools), str(tools.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "HF_SUITE": which,
        "HF_SUITE_REPORT": str(report),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }
    options = ["-q", "-p", "no:cacheprovider", "-p", "hf_suite_plugin", "-o", "addopts="]
    options += ["--tb=short", "-k", keyword, f"--rootdir={root}"]
    with (work / f"{which}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"tests/{WHISPER}"],
            env=environment,
            cwd=root,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not report.exists():
        raise SystemExit(f"the tests with {which} did not run: see {work / which}.log")
    found: dict[str, Outcome] = json.loads(report.read_text())
    return found


def summarise(stock: dict[str, Outcome], ours: dict[str, Outcome]) -> dict[str, Any]:
    """Compare the outcomes of the two runs."""
    lost = {
        name: each.get("error", each.get("outcome", "not run"))
        for name, outcome in stock.items()
        if outcome.get("outcome") == "passed"
        and (each := ours.get(name, {})).get("outcome") != "passed"
    }
    reasons: Counter[str] = Counter()
    for each in ours.values():
        reasons.update(set(each.get("fell_back", ())))
    return {
        "stock": Counter(each.get("outcome", "not run") for each in stock.values()),
        "ours": Counter(each.get("outcome", "not run") for each in ours.values()),
        "tests_that_call_generate": sum(1 for each in ours.values() if each.get("generate_calls")),
        "tests_in_which_the_engine_decoded": sum(
            1 for each in ours.values() if each.get("engine_decodes")
        ),
        "engine_decodes": sum(each.get("engine_decodes", 0) for each in ours.values()),
        "reasons_for_fallback_by_tests": dict(reasons.most_common()),
        "bypassed": sorted({text for each in ours.values() for text in each.get("bypassed", ())}),
        "passed_with_stock_only": {
            name: DIFFERENCES.get(name, f"UNEXPLAINED: {error}") for name, error in lost.items()
        },
        "failed_with_both": {
            name: outcome.get("error", "")
            for name, outcome in stock.items()
            if outcome.get("outcome") == "failed" and ours.get(name, {}).get("outcome") == "failed"
        },
        "failed_with_stock_only": sorted(
            name
            for name, outcome in stock.items()
            if outcome.get("outcome") == "failed" and ours.get(name, {}).get("outcome") == "passed"
        ),
    }


def is_passed(summary: dict[str, Any]) -> bool:
    """Whether nothing was lost without a reason, and the engine ran."""
    unexplained = [name for name in summary["passed_with_stock_only"] if name not in DIFFERENCES]
    return not unexplained and summary["engine_decodes"] > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/hf-suite"))
    parser.add_argument(
        "--tests", type=Path, required=True, help="the tests folder of a Transformers checkout"
    )
    parser.add_argument("-k", dest="keyword", default="", help="as pytest's -k")
    parser.add_argument(
        "--compare-again", action="store_true", help="compare the reports of an earlier run"
    )
    parser.add_argument("--output", type=Path, help="where the summary goes, as JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    checkout = options.tests.resolve()
    if options.compare_again:
        root = options.work.resolve() / "suite"
    else:
        root = prepare(options.work.resolve(), checkout)
    version = next(
        (line.split('"')[1] for line in (root / "setup.py").open() if "version=" in line), "unknown"
    )
    outcomes = [
        json.loads((options.work / f"{each}.json").read_text())
        if options.compare_again
        else run(options.work, root, each, options.keyword)
        for each in ("stock", "ours")
    ]
    summary = {
        "transformers": installed_version(),
        "whisper_tests_of": version,
        **summarise(*outcomes),
    }
    text = json.dumps(summary, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    return 0 if is_passed(summary) else 1


if __name__ == "__main__":
    raise SystemExit(main())
