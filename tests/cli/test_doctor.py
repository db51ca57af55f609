from __future__ import annotations

import json
import platform
import sys
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from whisper_flash_attention.cli import app, doctor
from whisper_flash_attention.cli.doctor import OPTIONAL, Report, examine, print_report
from whisper_flash_attention.engine import layout as layouts
from whisper_flash_attention.flash_attention import backend_names
from whisper_flash_attention.hf import compat
from whisper_flash_attention.hf.fallback import FALLBACK_REASONS

runner = CliRunner()


@pytest.fixture(scope="module")
def report() -> Report:
    return examine()


def value(report: Report, name: str) -> str:
    [found] = [finding.value for finding in report.findings if finding.name == name]
    return found


def test_this_machine_is_usable_and_its_versions_are_named(report: Report) -> None:
    assert report.usable
    assert value(report, "python") == platform.python_version()
    assert value(report, "torch") == torch.__version__
    assert value(report, "transformers' internals") == "as expected"


def test_packaged_weights_that_are_installed_are_found(tiny_en: str, report: Report) -> None:
    assert value(report, tiny_en) == "found, checksum right"


def test_the_layout_of_weights_on_a_cpu_is_named(report: Report) -> None:
    (found,) = [each for each in report.findings if each.name == "weights on cpu"]
    assert "int8" in found.value


def test_every_back_end_can_run_or_says_why_not(report: Report) -> None:
    on_cpu = [row for row in report.attention if row.device == "cpu"]
    assert {row.dtype for row in on_cpu} == {"float32", "float16", "bfloat16"}
    for row in on_cpu:
        assert set(row.reasons) == set(backend_names()) - {"auto"}
        assert row.reasons[row.picked] == []
        assert "needs a CUDA GPU" in " ".join(row.reasons["sdpa_cudnn"])


def test_the_cpu_decodes_with_pytorch_and_says_why(report: Report) -> None:
    assert value(report, "decode on cpu") == "PyTorch's operations: the kernels need a CUDA GPU"


@pytest.mark.parametrize(
    ("capability", "hip", "triton", "runs"),
    [
        ((8, 0), None, True, "Triton kernels in CUDA graphs"),
        (
            (7, 5),
            None,
            True,
            "PyTorch's operations: the kernels need compute capability 8.0, and this GPU has 7.5",
        ),
        (
            (9, 4),
            "6.4",
            True,
            "PyTorch's operations: the kernels need CUDA, and PyTorch is built for ROCm",
        ),
        ((9, 0), None, False, "PyTorch's operations: Triton cannot be imported: "),
    ],
)
def test_what_runs_the_decode_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    hip: str | None,
    triton: bool,
    runs: str,
) -> None:
    monkeypatch.setattr(doctor, "_devices", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    if not triton:
        monkeypatch.setitem(sys.modules, "triton", None)
    found = {finding.name: finding.value for finding in doctor._engine()}
    assert found["decode on cuda:0"].startswith(runs)
    assert layouts.has_kernels.__wrapped__(torch.device("cuda:0")) == runs.startswith("Triton")


def test_triton_is_named_with_its_version(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    assert value(report, "triton") == version("triton")

    def without(name: str) -> str:
        if name == "triton":
            raise metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    assert value(examine(), "triton").startswith("not installed (kernels")


def test_every_fallback_reason_is_listed(report: Report) -> None:
    assert report.fallback_reasons == FALLBACK_REASONS


def test_a_package_that_is_missing_comes_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": ("nothing", "flash")})
    [finding] = [found for found in examine().findings if found.name == "no-such-package"]
    assert finding.value == "not installed (nothing)"
    assert finding.advice == "pip install 'whisper-flash-attention[flash]'"
    assert not finding.broken


def test_json_is_the_whole_report_and_names_no_host(report: Report) -> None:
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(report.to_dict()))
    host = platform.node()
    assert not host or f'"{host}' not in result.stdout


def test_the_tables_show_findings_reasons_and_the_verdict(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(report)
    shown = capsys.readouterr().out
    for expected in (
        "encoder self-attention",
        "xformers",
        "decode on cpu",
        "own decode loop where",
        *FALLBACK_REASONS,
        "Ready to use.",
    ):
        assert expected in shown


@pytest.mark.parametrize("broken", ["package", "promise"])
def test_what_is_broken_gives_exit_code_1_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "package":
        monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no_such_package"))
    else:
        monkeypatch.setitem(
            compat.REQUIRED_PARAMETERS, "some.function", (examine, ("a_parameter",))
        )
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "pip install" in result.stdout
    assert "Something that is needed is broken" in result.stdout


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_capability_and_memory(report: Report) -> None:
    assert torch.cuda.get_device_name(0) in value(report, "cuda:0")
    assert "capability" in value(report, "cuda:0")
    assert {"cpu", "cuda:0"} <= {row.device for row in report.attention}


def test_the_detector_is_an_optional_package() -> None:
    use, extra = OPTIONAL["silero-vad"]
    assert "voice activity" in use and extra == "vad"
