"""Transformers' own tests of Whisper, with this package's class in place of the stock class.

    python tools/hf_suite.py --work build/hf-suite [--tests CHECKOUT/tests] [-k EXPRESSION]

The tests run twice in processes of their own, with the stock class and with ours, with attention
heads of 64 values so that the engine runs. What passes with stock must pass with ours; the exit
code is 1 if something does not and `docs/hf-suite.md` has no reason for it.

The source distribution on PyPI carries the tests that all models share (`test_modeling_common.py`)
but neither those of `generate` nor Whisper's. With `--tests`, the `tests` folder of a checkout of
Transformers, all of them run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

# What is known to differ, as "name of the test": "reason"; `docs/hf-suite.md` says more.
DIFFERENCES: dict[str, str] = {}

# The tests that all models share import these, which the source distribution lacks.
MISSING = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
}
WHISPER = "models/whisper/test_modeling_whisper.py"
COMMON = '''
import unittest

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel

from ...generation.test_utils import GenerationTesterMixin
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor


class WhisperModelTester:
    """A small Whisper, and inputs for it."""

    is_training = False
    seq_length, batch_size, encoder_layers, decoder_layers = 60, 2, 2, 2
    num_hidden_layers, hidden_size, num_attention_heads, encoder_seq_length = 2, 128, 2, 30
    decoder_seq_length = 7

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return WhisperConfig(
            vocab_size=200, d_model=128, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
            decoder_ffn_dim=64, num_mel_bins=80, max_source_positions=30, max_target_positions=40,
            dropout=0.0, attention_dropout=0.0, eos_token_id=2, bos_token_id=1, pad_token_id=0,
            decoder_start_token_id=85, suppress_tokens=None,
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "input_features": floats_tensor([2, 80, 60]),
            "decoder_input_ids": ids_tensor([2, 7], 200).clamp(3),
        }


class WhisperModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (WhisperModel, WhisperForConditionalGeneration)
    is_encoder_decoder = True
    has_attentions = False
    test_missing_keys = False

    def setUp(self):
        self.model_tester = WhisperModelTester(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = dict(inputs_dict)
        if return_labels and model_class is not WhisperModel:
            inputs["labels"] = torch.zeros(2, 7, dtype=torch.long)
        return inputs
'''
# Substitutes the class before a test module imports it, and gives Whisper's testers other sizes.
PLUGIN = """
import inspect
import os
import sys

import pytest
import transformers

Ours = None

if os.environ["HF_SUITE"] == "ours":
    from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
    from whisper_flash_attention.engine.engine import Engine

    # Transformers replaces its own entry while it is imported.
    sys.modules["transformers"].WhisperForConditionalGeneration = Ours
    decode, decodes = Engine.decode, []

    def counted(self, *args, **kwargs):
        decodes.append(None)
        return decode(self, *args, **kwargs)

    Engine.decode = counted

    def pytest_sessionfinish():
        with open(os.environ["HF_SUITE_DECODES"], "w") as file:
            file.write(str(len(decodes)))


SIZES = {"hidden_size": 128, "num_attention_heads": 2}


def pytest_collection_modifyitems(items):
    for module in {item.module for item in items}:
        assert Ours is None or module.WhisperForConditionalGeneration is Ours
        tester = module.WhisperModelTester.__init__
        if tester.__defaults__:
            names = list(inspect.signature(tester).parameters)[-len(tester.__defaults__) :]
            given = dict(zip(names, tester.__defaults__, strict=True)) | SIZES
            tester.__defaults__ = tuple(given[name] for name in names)


@pytest.fixture(autouse=True)
def same_seed():
    transformers.set_seed(0)
"""


def installed_version() -> str:
    import transformers

    return transformers.__version__


def download_tests(work: Path) -> Path:
    """The `tests` folder of the source distribution of the installed Transformers."""
    version = installed_version()
    command = ["download", "--no-binary", "transformers", "--no-deps", "--dest", str(work)]
    pip = [sys.executable, "-m", "pip", *command, f"transformers=={version}"]
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
    name = f"transformers-{version}"
    with tarfile.open(work / f"{name}.tar.gz") as archive:
        members = [each for each in archive if each.name.startswith(f"{name}/tests/")]
        archive.extractall(work, members=members, filter="data")
    return work / name / "tests"


def prepare(work: Path, tests: Path | None) -> Path:
    """A copy of the tests that can be imported; the path of Whisper's."""
    target = work / "suite" / "tests"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(download_tests(work) if tests is None else tests, target)
    for name, text in MISSING.items():
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text)
    if not (target / WHISPER).exists():
        (target / WHISPER).parent.mkdir(parents=True, exist_ok=True)
        (target / WHISPER).write_text(COMMON)
    for folder in (target, *(target / name for name in ("exporters", "generation", "models"))):
        (folder / "__init__.py").touch()
    (target / WHISPER).with_name("__init__.py").touch()
    (target.parent / "hf_suite_plugin.py").write_text(PLUGIN)
    return target / WHISPER


def run(work: Path, whisper: Path, which: str, keyword: str) -> dict[str, str]:
    """The outcome of every test: passed, failed or skipped, with "stock" or "ours"."""
    root = whisper.parents[3]
    report = (work / f"{which}.xml").resolve()
    environment = os.environ | {
        "HF_SUITE": which,
        "HF_SUITE_DECODES": str((work / "decodes").resolve()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(root), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    options = ["-q", "-p", "no:cacheprovider", "-p", "hf_suite_plugin", "-o", "addopts="]
    options += ["--tb=short", "-k", keyword, f"--rootdir={root}", f"--junitxml={report}"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"{whisper}::WhisperModelTest"],
        env=environment,
        cwd=root,
        stdout=(work / f"{which}.log").open("w"),
        check=False,
    )
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        outcomes[case.attrib["name"]] = (
            "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/hf-suite"))
    parser.add_argument("--tests", type=Path, help="the tests folder of a Transformers checkout")
    parser.add_argument("-k", dest="keyword", default="", help="as pytest's -k")
    parser.add_argument("--output", type=Path, help="where the summary goes, as JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    whisper = prepare(options.work, options.tests)
    outcomes = {
        each: run(options.work, whisper, each, options.keyword) for each in ("stock", "ours")
    }
    count = {
        each: {kind: list(found.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        for each, found in outcomes.items()
    }
    lost = sorted(
        name
        for name, outcome in outcomes["stock"].items()
        if outcome == "passed" and outcomes["ours"].get(name) != "passed"
    )
    summary = {
        "transformers": installed_version(),
        "tests": "source distribution" if options.tests is None else "checkout",
        "counts": count,
        "engine_decodes": int((options.work / "decodes").read_text()),
        "passed_with_stock_only": {name: DIFFERENCES.get(name, "") for name in lost},
        "failed_with_stock": sorted(k for k, v in outcomes["stock"].items() if v == "failed"),
    }
    text = json.dumps(summary, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    return 1 if any(name not in DIFFERENCES for name in lost) else 0


if __name__ == "__main__":
    raise SystemExit(main())
