"""The built wheel is pure Python, and works in an environment that holds nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from whisper_flash_attention import __version__


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    run(*build, REPOSITORY, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_is_pure_python_and_carries_its_data(wheel: Path) -> None:
    assert wheel.name == f"whisper_flash_attention-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "whisper_flash_attention/py.typed" in names
    assert "whisper_flash_attention/data/recordings/index.json" in names
    assert sum(name.endswith(".wav") for name in names) == 5
    assert not any(name.endswith((".so", ".pyd", ".dll")) for name in names)
    assert not any(name.startswith(("tests/", "docs/")) for name in names)


def test_the_wheel_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # The release with a CPU build first: the requirement of the wheel alone would fetch CUDA.
    run(*install, "torch==2.13.0", cwd=tmp_path)
    run(*install, wheel, cwd=tmp_path)
    command = tmp_path / "empty" / "bin" / "whisper-flash"
    assert "transcribe" in run(command, "--help", cwd=tmp_path)
    report = json.loads(run(command, "doctor", "--json", cwd=tmp_path))
    assert "sdpa_flash" in json.dumps(report)
    recordings = run(
        python,
        "-c",
        "from whisper_flash_attention.audio.recordings import bundled_recordings as b;"
        "print(len([r for r in b() if r.path.is_file()]))",
        cwd=tmp_path,
    )
    assert recordings.strip() == "5"
