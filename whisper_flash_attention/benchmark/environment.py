"""What a result depends on: code, versions, hardware.

Nothing here names the computer or its folders: results are meant to be published.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_flash_attention._version import __version__

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """What a result depends on. `source` is a digest of this package's Python files."""

    commit: str
    source: str
    device_name: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    transformers: str
    python: str
    os: str
    cpu: str
    threads: int
    date: str

    def as_json(self) -> dict[str, str | int | None]:
        """As a plain dictionary."""
        return asdict(self)


def describe_environment(device_name: str, commit_given: str | None = None) -> Environment:
    """The environment of this process, with a device ("cpu", "cuda:1").

    `commit_given` is recorded unchecked; the digest `source` identifies the code.
    """
    import torch
    import transformers

    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    return Environment(
        commit=commit(commit_given),
        source=source_digest(),
        device_name=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        driver=driver_version() if on_gpu else None,
        cuda=torch.version.cuda,
        torch=torch.__version__,
        triton=package_version("triton"),
        transformers=transformers.__version__,
        python=platform.python_version(),
        os=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def commit(given: str | None = None) -> str:
    """`given`, else `git describe` of this package's checkout, else its version.

    "-dirty" means that files of the package differ from the commit.
    """
    if given:
        return given
    root = PACKAGE.parent
    described = None
    if (root / ".git").exists():
        described = _git(root, "describe", "--always", "--abbrev=12")
    if described is None:
        return f"{__version__} (no git checkout)"
    changed = _git(root, "status", "--porcelain", "--", PACKAGE.name)
    return f"{described}-dirty" if changed else described


def source_digest() -> str:
    """Twelve hexadecimal digits that change with any Python file of this package."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def package_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model, as far as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The NVIDIA driver's version; None without nvidia-ml-py and without its kernel module."""
    try:
        import pynvml
    except ImportError:
        module = Path("/sys/module/nvidia/version")
        return module.read_text().strip() if module.is_file() else None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def driver_memory(device: torch.device) -> tuple[float | None, str | None]:
    """GPU memory in use as the driver counts it, in units of 1e9 bytes, and its scope.

    It includes the CUDA context and all memory that PyTorch's allocator has reserved, so at the end
    of a run it is the run's peak. The scope is this process where the driver reports it (not inside
    most containers), else the whole device; (None, None) without a GPU.
    """
    from whisper_flash_attention.engine.device_memory import used_bytes

    if device.type != "cuda":
        return None, None
    used, is_own = used_bytes(device)
    return used / 1e9, "process (NVML)" if is_own else "whole device (CUDA driver)"


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command; None if git is missing or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
