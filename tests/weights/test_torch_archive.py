"""Archives of `torch.save`: one meaning to every reader, and never more memory than the file."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from tests.weights.bombs import BOMBS, archive
from tests.weights.mutations import INSTRUCTIONS
from tests.weights.writers import to_openai
from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.openai_reader import read_openai
from whisper_flash_attention.weights.torch_archive import StoredTensor, TorchArchive

MARGIN = 64 << 20


def saved(folder: Path, content: object, **options: Any) -> Path:
    path = folder / "a.pt"
    torch.save(content, path, **options)
    return path


def test_bombs_are_refused_in_little_memory_and_time(tmp_path: Path) -> None:
    paths = []
    for index, data in enumerate(BOMBS.values()):
        paths.append(tmp_path / f"{index}.pt")
        paths[-1].write_bytes(data)
    # In a process of its own, which a crash would end.
    done = subprocess.run(
        [sys.executable, "-m", "tests.weights.bombs", *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    largest = max(map(len, BOMBS.values()))
    for name, path, line in zip(BOMBS, paths, lines, strict=True):
        assert line["outcome"].startswith(str(path)), (name, line)
        assert line["grown"] < 2 * largest + MARGIN, (name, line)
        assert line["seconds"] < 5, (name, line)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_takes_at_most_twice_its_size(
    dtype: torch.dtype, smallest: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    content: Any = to_openai(smallest)
    state = content["model_state_dict"]
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    path = saved(tmp_path, {**content, "model_state_dict": state})
    tracemalloc.start()
    try:
        read_openai(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * path.stat().st_size + MARGIN


@settings(max_examples=100, deadline=None)
@given(program=st.lists(st.sampled_from(INSTRUCTIONS), max_size=200))
def test_any_program_is_read_or_refused_in_little_memory(
    program: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "program.pt"
    path.write_bytes(archive(("data.pkl", b"\x80\x02" + b"".join(program) + b".")))
    tracemalloc.start()
    try:
        with TorchArchive(path) as opened:
            _ = opened.content
    except WeightsError as error:
        assert str(path) in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MARGIN


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    module = torch.nn.Linear(2, 3)
    content = {
        "a": torch.ones(2, 3),
        "half": torch.zeros(3, dtype=torch.float16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(5),
        "view": shared[4:8],
        "same": shared,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "state": module.state_dict(),
        "numbers": [1, -1, 300, 70_000, 2**40, 1.5, True, None, (1, 2)],
        "ordered": OrderedDict(x=1),
        7: "text",
    }
    path = saved(tmp_path, content)
    with TorchArchive(path) as opened:
        found = opened.content
        assert found.keys() == content.keys()
        assert found["numbers"] == content["numbers"]
        assert found["ordered"] == {"x": 1}
        tensors = {key: value for key, value in content.items() if torch.is_tensor(value)}
        for key, expected in (tensors | {"weight": module.weight, "bias": module.bias}).items():
            stored = found["state"][key] if key in ("weight", "bias") else found[key]
            assert isinstance(stored, StoredTensor)
            assert torch.equal(opened.read(stored), expected.detach())
            assert opened.read(stored).dtype == expected.dtype


def test_the_legacy_format_is_refused_with_advice(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"PyTorch before 1\.6.*weights_only=True"):
        read_openai(path)
