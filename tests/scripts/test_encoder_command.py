"""`benchmarks/encoder.py`: the file that it writes, and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.scripts.loading import load_script
from whisper_flash_attention.benchmark.roofline import Ceilings
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, ModelSize

encoder: Any = load_script("encoder")
SMALL = ModelSize(d_model=64, heads=1, encoder_layers=1, decoder_layers=1, ffn=96)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "tiny" is smaller still, and the machine's ceilings are known."""
    monkeypatch.setitem(MODEL_SIZES, "tiny", SMALL)
    monkeypatch.setattr(encoder, "measure_ceilings", lambda *_: Ceilings(1e10, 1e11))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(encoder.app, ["--device", "cpu", *arguments])


def test_the_file_has_environment_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "encoder.json"
    sizes = ("--checkpoint", "tiny", "--batch", "2", "--repeats", "2")
    result = run(*sizes, "--commit", "abc", "--output", str(path))
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    assert document["environment"]["commit"] == "abc"
    found = [(row["checkpoint"], row["batch_size"], row["system"]) for row in document["rows"]]
    assert found == [("tiny", 2, system) for system in ("orig", "sdpa", "flash")]
    for row in document["rows"]:
        assert row["setting"] == "encoder" and row["batches"] == 2
        assert row["features"].startswith("bundled: ")
        assert row["states_error"] < 1e-5
        rate = row["flops"] / row["seconds_per_batch"]
        assert row["matmul_share"] == pytest.approx(rate / 1e11)
    assert "ours in float32 is" in result.output and "x vs sdpa" in result.output


def test_the_table_has_ratios_of_stocks_time() -> None:
    case = encoder.EncoderCase("tiny", SMALL, 8, "cuda", "float16", 3)
    measured: dict[str, dict[str, Any]] = {
        "orig": {"error": "out of memory"},
        "sdpa": {"seconds": [0.04]},
        "flash": {"seconds": [0.01, 0.02, 0.03]},
    }
    common = {"checkpoint": "tiny", "batch_size": 8, "dtype": "float16"}
    common |= {"environment": {"device_name": "GPU"}}
    rows = [
        common
        | encoder.with_ratios(case, Ceilings(1e10, 1e14), each)
        | {"system": name, "states_error": 1e-3, "activation_bytes": 5 * 10**6}
        for name, each in measured.items()
    ]
    tables: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "print_rows", lambda *table: tables.append(table))
        encoder.show_timings(rows)
    [(_, shown, columns)] = tables
    harness = load_script("_harness")
    cells = [{name: harness.cell(row, each) for name, each in columns.items()} for row in shown]
    assert cells[0]["error"] == "out of memory" and cells[0]["ms"] is None
    assert [row["ms"] for row in cells[1:]] == ["40.00", "20.00"]
    assert [row["x vs eager"] for row in cells[1:]] == [None, None]
    assert [row["x vs sdpa"] for row in cells[1:]] == ["1.00", "2.00"]
    assert [row["peak MB"] for row in cells[1:]] == ["5", "5"]


@pytest.mark.parametrize(
    "arguments", [("--checkpoint", "huge"), ("--dtype", "int8"), ("--repeats", "-1")]
)
def test_unknown_options_are_refused(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.slow
def test_real_weights_on_real_speech(tiny_en: str, tmp_path: Path) -> None:
    path = tmp_path / "fidelity.json"
    result = run("--repeats", "0", "--weights", tiny_en, "--output", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["dtype"] for row in rows[::2]] == ["float32", "float16", "bfloat16"]
    assert rows[1]["within_bound"]
    # In half precision chance decides about the few positions that make most of `states_error`.
    for stock, ours in zip(rows[2::2], rows[3::2], strict=True):
        assert ours["position_error"] <= 1.2 * stock["position_error"]
