"""The built wheel is pure Python, and works in an environment that holds nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY
from whisper_flash_attention import __version__


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
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


def link_requirements(of: metadata.Distribution, extras: set[str], folder: Path) -> None:
    """Link what a distribution requires here, and what that requires, from what is installed."""
    for line in of.requires or ():
        required = Requirement(line)
        if required.marker and not any(
            required.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        ):
            continue
        found = metadata.distribution(required.name)
        parts = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "/")}
        new = [part for part in parts if not (folder / part).exists()]
        for part in new:
            (folder / part).symlink_to(Path(str(found.locate_file(part))))
        if new:
            link_requirements(found, required.extras, folder)


def test_the_wheel_runs_on_its_requirements_alone(wheel: Path, tmp_path: Path) -> None:
    """As in an empty environment, without the time that it takes to install one."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    (built,) = (tmp_path / "wheel").glob("*.dist-info")
    (tmp_path / "required").mkdir()
    link_requirements(metadata.PathDistribution(built), set(), tmp_path / "required")
    places = f"{tmp_path / 'wheel'}{os.pathsep}{tmp_path / 'required'}"
    # -S: without what is installed.
    python = [sys.executable, "-S", "-P"]
    shown = "import whisper_flash_attention as w, importlib.util as u;print(w.__file__, u.find_spec"
    found = run(*python, "-c", f"{shown}('pytest'))", cwd=tmp_path, PYTHONPATH=places).split()
    assert found == [str(tmp_path / "wheel" / "whisper_flash_attention" / "__init__.py"), "None"]
    command = [*python, "-m", "whisper_flash_attention"]
    report = json.loads(run(*command, "doctor", "--json", cwd=tmp_path, PYTHONPATH=places))
    assert "sdpa_flash" in json.dumps(report)


@pytest.mark.slow
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
        "from whisper_flash_attention.audio.bundled_clips import bundled_recordings as b;"
        "print(len([r for r in b() if r.path.is_file()]))",
        cwd=tmp_path,
    )
    assert recordings.strip() == "5"
