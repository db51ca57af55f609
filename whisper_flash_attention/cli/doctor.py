"""`whisper-flash doctor`: what can run on this machine, and what cannot and why."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whisper_flash_attention._version import __version__
from whisper_flash_attention.benchmark.environment import cpu_name, driver_version
from whisper_flash_attention.cli.parameters import EXIT_FAILED
from whisper_flash_attention.errors import MissingPackage, WeightsError
from whisper_flash_attention.hf.fallback import FALLBACK_REASONS
from whisper_flash_attention.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

PIP = "pip install 'whisper-flash-attention[{}]'"
REQUIRED = (
    *("torch", "transformers", "huggingface_hub", "tokenizers", "numpy", "safetensors"),
    *("av", "fsspec", "typer", "rich"),
)
# Distribution -> what it is for, and the extra that brings it.
OPTIONAL = {
    "silero-vad": ("the voice activity detector of batched mode and --vad", "vad"),
    "xformers": ("an attention back-end", "xformers"),
    "flash-attn": ("an attention back-end", "flash"),
    "matplotlib": ("the benchmark's plots", "plots"),
    "ray": ("archives on many machines", "ray"),
    "pyarrow": ("results and manifests of archives as parquet", "parquet"),
    "nvidia-ml-py": ("the benchmark's VRAM as the driver sees it", "bench"),
    "datasets": ("the benchmark on LibriSpeech", "bench"),
}
DTYPES = ("float32", "float16", "bfloat16")


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say what can run here, and what cannot and why.

    Device, versions, optional packages with the command that installs them, the packaged weights,
    and each attention back-end with its reasons. Exit code 1 if something needed is broken.

    \b
    Examples:
      whisper-flash doctor
      whisper-flash doctor --json
    """
    report = examine()
    print_report(report, as_json=as_json)
    if not report.usable:
        raise typer.Exit(EXIT_FAILED)


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact; `broken` if nothing works without it. `advice` says what to do, or is empty."""

    section: str
    name: str
    value: str
    advice: str = ""
    broken: bool = False


@dataclass(frozen=True, slots=True)
class AttentionFinding:
    """What runs one kind of attention on a device in a dtype, and each other's reasons not to."""

    device: str
    dtype: str
    case: str
    picked: str
    reasons: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Report:
    """All that `examine` found. `fallback_reasons`: for which calls Transformers' own loop runs."""

    findings: tuple[Finding, ...]
    attention: tuple[AttentionFinding, ...]
    fallback_reasons: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether everything that is needed works."""
        return not any(finding.broken for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes."""
        return {"usable": self.usable, **asdict(self)}


def examine() -> Report:
    """Look at this machine: nothing is changed, downloaded or run on a GPU."""
    required = tuple(_required())
    if any(finding.broken for finding in required):  # the rest needs these
        return Report((*_system(), *required), (), FALLBACK_REASONS)
    findings = (
        *_system(),
        *required,
        *_gpus(),
        *_engine(),
        *_optional(),
        *_weights(),
    )
    return Report(findings, tuple(_attention()), FALLBACK_REASONS)


def _system() -> Iterator[Finding]:
    yield Finding("system", "whisper-flash-attention", __version__)
    yield Finding("system", "python", platform.python_version())
    yield Finding("system", "platform", f"{platform.system()} {platform.release()}")
    yield Finding("system", "processor", f"{cpu_name()}, {os.cpu_count()} threads")


def _required() -> Iterator[Finding]:
    for name in REQUIRED:
        try:
            import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            advice = "pip install --force-reinstall whisper-flash-attention"
            yield Finding("packages", name, f"cannot be imported: {error}", advice, broken=True)
        else:
            yield Finding("packages", name, metadata.version(name))
    yield _transformers_promises()


def _transformers_promises() -> Finding:
    name = "transformers' internals"
    try:
        import_module("whisper_flash_attention.hf.compat").check()
    except ImportError as error:
        advice = "pip install 'transformers>=5.17,<5.25'"
        return Finding("packages", name, str(error), advice, broken=True)
    return Finding("packages", name, "as expected")


def _gpus() -> Iterator[Finding]:
    import torch

    build = torch.version.cuda
    yield Finding("gpu", "PyTorch is built for", f"CUDA {build}" if build else "CPUs only")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts = (
            f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        )
        yield Finding("gpu", f"cuda:{index}", facts)
    if driver := driver_version():
        yield Finding("gpu", "driver", driver)
    elif not torch.cuda.is_available():
        yield Finding("gpu", "driver", "no NVIDIA driver found; the CPU is used")


def _engine() -> Iterator[Finding]:
    """What runs the decode of `generate` on each device."""
    import torch

    from whisper_flash_attention.engine.layout import backend_name, why_no_kernels
    from whisper_flash_attention.engine.packing import describe_layouts

    for device in _devices():
        reason = why_no_kernels(torch.device(device))
        words = backend_name(torch.device(device))
        runs = f"{words}'s operations: {reason}" if reason else f"{words} in CUDA graphs"
        yield Finding("engine", f"decode on {device}", runs)
    yield Finding("engine", "weights on cpu", describe_layouts())
    yield _installed("engine", "triton", "kernels; comes with PyTorch's CUDA builds", "")


def _devices() -> list[str]:
    import torch

    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _optional() -> Iterator[Finding]:
    for name, (purpose, extra) in OPTIONAL.items():
        yield _installed("optional", name, purpose, PIP.format(extra))


def _installed(section: str, name: str, purpose: str, advice: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(section, name, f"not installed ({purpose})", advice)
    return Finding(section, name, version)


def _weights() -> Iterator[Finding]:
    from whisper_flash_attention.weights import packaged_source

    for name in ("tiny.en", "base"):
        try:
            packaged_source(name)
        except MissingPackage as error:
            yield Finding("weights", f"package:{name}", "not installed", str(error))
        except WeightsError as error:
            yield Finding("weights", f"package:{name}", "damaged", str(error))
        else:
            yield Finding("weights", f"package:{name}", "found, checksum right")


def _attention() -> Iterator[AttentionFinding]:
    import torch

    from whisper_flash_attention.flash_attention import survey

    for device in _devices():
        for dtype in DTYPES:
            for row in survey(device, getattr(torch, dtype)):
                yield AttentionFinding(device, dtype, row.case, row.picked, row.reasons)


def print_report(report: Report, *, as_json: bool = False) -> None:
    """Print to standard output, as tables or as JSON."""
    from rich.console import Console

    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    console = Console(highlight=False)
    _print_findings(report, console)
    for device in dict.fromkeys(row.device for row in report.attention):
        rows = [row for row in report.attention if row.device == device]
        _print_picks(device, rows, console)
        _print_reasons(device, rows, console)
    console.print("\ngenerate runs on Transformers' own decode loop where", style="bold")
    for reason in report.fallback_reasons:
        console.print(f"  {reason}", soft_wrap=True)
    verdict = "Ready to use." if report.usable else "Something that is needed is broken, see above."
    console.print(f"\n{verdict}", style="bold")


def _print_findings(report: Report, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    section = ""
    for finding in report.findings:
        if finding.section != section:
            section = finding.section
            table.add_row(f"[bold]{section}[/bold]")
        style = "red" if finding.broken else None
        table.add_row(f"  {escape(finding.name)}", escape(printable(finding.value)), style=style)
        if finding.advice:
            table.add_row("", f"[dim]{escape(printable(finding.advice))}[/dim]")
    console.print(table)


def _print_picks(device: str, rows: list[AttentionFinding], console: Console) -> None:
    from rich.table import Table

    table = Table(
        "", *DTYPES, title=f"Attention on {device}: what auto picks", title_justify="left"
    )
    for case in dict.fromkeys(row.case for row in rows):
        table.add_row(case, *(row.picked for row in rows if row.case == case))
    console.print("", table)


def _print_reasons(device: str, rows: list[AttentionFinding], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    title = f"Attention on {device}: of the {len(rows)} combinations above, how many each can run"
    table = Table("back-end", "can", "why not", title=title, title_justify="left")
    for name in rows[0].reasons:
        refusals = [row.reasons[name] for row in rows if row.reasons[name]]
        why = dict.fromkeys(reason for reasons in refusals for reason in reasons)
        table.add_row(name, str(len(rows) - len(refusals)), escape(printable("; ".join(why))))
    console.print("", table)
