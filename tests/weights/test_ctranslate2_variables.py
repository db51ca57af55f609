"""The reader of `model.bin`: every version, and files that lie."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from tests.weights.writers import DTYPES, model_bin, text, variable
from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.ctranslate2_reader import VariableReader
from whisper_flash_attention.weights.files import JoinedFiles

MATRIX = torch.arange(6, dtype=torch.float32).reshape(2, 3)


def read(folder: Path, *parts: bytes) -> dict[str, torch.Tensor]:
    """All variables of a file that lies in one or several parts."""
    paths = []
    for index, part in enumerate(parts):
        paths.append(folder / f"model.bin.{index}")
        paths[-1].write_bytes(part)
    with JoinedFiles(paths) as file:
        reader = VariableReader(file)
        return {name: reader.tensor(name) for name in reader.variables}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(5, dtype=dtype), "cube": MATRIX.reshape(1, 2, 3).to(dtype)}
    found = read(tmp_path, model_bin(tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("version", range(1, 7))
def test_every_version_is_read(version: int, tmp_path: Path) -> None:
    tensors = {"f": MATRIX, "h": MATRIX.to(torch.int16), "b": MATRIX.to(torch.int8)}
    aliases = {"g": "f"} if version >= 3 else {}
    found = read(tmp_path, model_bin(tensors, aliases, version))
    assert found.keys() == {*tensors, *aliases}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_an_alias_is_what_it_stands_for_and_may_be_stood_for(tmp_path: Path) -> None:
    found = read(tmp_path, model_bin({"a": MATRIX}, {"b": "a", "c": "b"}))
    assert torch.equal(found["c"], MATRIX)


def test_parts_are_read_as_one_wherever_they_are_cut(tmp_path: Path) -> None:
    whole = model_bin({"a": MATRIX, "b": MATRIX + 1}, {"c": "a"})
    for cut in range(len(whole) + 1):
        found = read(tmp_path, whole[:cut], whole[cut:])
        assert torch.equal(found["b"], MATRIX + 1)


def test_tensors_own_aligned_memory_that_can_be_written(tmp_path: Path) -> None:
    found = read(tmp_path, model_bin({"odd": MATRIX.to(torch.int8), "a": MATRIX}))["a"]
    assert found.data_ptr() % 4 == 0
    found += 1
    assert torch.equal(found, MATRIX + 1)


HEAD = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<I", 3)
ONE = HEAD + struct.pack("<I", 1)
NONE = struct.pack("<I", 0)


def claim(name: bytes, rank: int, dims: tuple[int, ...], dtype: int, size: int) -> bytes:
    return name + struct.pack(f"<B{len(dims)}IBI", rank, *dims, dtype, size)


LIES = {
    "empty": (b"", "the version takes 4 bytes, 0 are left"),
    "version 0": (struct.pack("<I", 0), "binary version 0, expected 1 to 6"),
    "a future version": (struct.pack("<I", 7), "binary version 7, expected 1 to 6"),
    "not the format": (b"PK\x03\x04" + bytes(100), "binary version 67324752"),
    "another model": (
        model_bin({}, spec="TransformerSpec"),
        "a model of kind 'TransformerSpec', expected 'WhisperSpec'",
    ),
    "another revision": (model_bin({}, revision=2), "revision 2 of WhisperSpec, expected 3"),
    "more variables than fit": (
        HEAD + struct.pack("<I", 2**32 - 1),
        "4294967295 variables do not fit into the 0 bytes left",
    ),
    "more aliases than fit": (
        HEAD + NONE + struct.pack("<I", 2**32 - 1),
        "4294967295 aliases do not fit",
    ),
    "a name without a NUL": (ONE + b"\x03\x00abc" + bytes(20), "not a text that ends with a NUL"),
    "a name with a NUL inside": (ONE + b"\x03\x00\0b\0" + bytes(20), "not a text that ends"),
    "an empty name": (ONE + b"\x01\x00\0" + bytes(20), "not a text that ends with a NUL"),
    "a name that is no text": (ONE + b"\x02\x00\xff\0" + bytes(20), "variable 0 is not UTF-8"),
    "a name longer than the file": (ONE + b"\xff\xff" + bytes(20), "truncated: the name of"),
    "an absurd rank": (ONE + claim(text("a"), 255, (), 0, 0), "a has rank 255, expected at most 3"),
    "absurd dimensions": (
        ONE + claim(text("a"), 3, (2**32 - 1,) * 3, 0, 2**32 - 4),
        "takes 316912649835696421541200789500 bytes, not 4294967292",
    ),
    "data longer than the file": (
        ONE + claim(text("a"), 1, (2**30 - 1,), 0, 2**32 - 4),
        "truncated: variable a takes 4294967292 bytes, 0 are left",
    ),
    "a size that is not the shape's": (
        ONE + claim(text("a"), 1, (2,), 0, 4) + bytes(4),
        r"variable a of shape \[2\] takes 8 bytes, not 4",
    ),
    "an unknown dtype": (ONE + claim(text("a"), 1, (1,), 6, 4) + bytes(4), "has unknown type 6"),
    "an unknown item size": (
        struct.pack("<I", 3) + HEAD[4:] + struct.pack("<I", 1) + claim(text("a"), 1, (1,), 8, 1),
        "has unknown type 8",
    ),
    "a name twice": (
        HEAD + struct.pack("<I", 2) + 2 * variable("a", MATRIX) + NONE,
        "variable a is there twice",
    ),
    "an alias of nothing": (model_bin({"a": MATRIX}, {"b": "c"}), "b stands for c, which is miss"),
    "an alias of itself": (model_bin({"a": MATRIX}, {"b": "b"}), "b stands for b, which is miss"),
    "an alias that is a variable": (model_bin({"a": MATRIX}, {"a": "a"}), "alias a is there twice"),
    "something after the end": (model_bin({"a": MATRIX}) + b"\0", "1 bytes are left over"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    content, message = LIES[name]
    with pytest.raises(WeightsError, match=message) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "model.bin.0"))
    assert "at byte" in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = model_bin({"a": MATRIX, "b": MATRIX.to(torch.int8)}, {"c": "a"})
    for length in range(len(whole)):
        with pytest.raises(WeightsError):
            read(tmp_path, whole[:length])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(WeightsError, match="nowhere: cannot be opened"),
        JoinedFiles([tmp_path / "nowhere"]),
    ):
        pass


def test_nothing_is_allocated_for_what_the_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"1234")
    with JoinedFiles([path]) as file:
        assert file.read(1, 3) == b"234"
        with pytest.raises(WeightsError, match="truncated: 1099511627776 bytes are needed"):
            file.read(0, 1 << 40)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_bin({"a": torch.zeros(100_000)}))
    with JoinedFiles([path]) as file:
        reader = VariableReader(file)
        with path.open("r+b") as shrinking:
            shrinking.truncate(1000)
        with pytest.raises(WeightsError, match="became shorter while it was read"):
            reader.tensor("a")
