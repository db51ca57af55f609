"""The encoder's rows: their arithmetic, their fields, and that a wrong encoder shows in them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from tests.benchmark.rows import ENVIRONMENT
from tests.scripts.loading import load_script
from whisper_flash_attention.benchmark.environment import Environment
from whisper_flash_attention.benchmark.features import prepare_features
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.results import ResultRow
from whisper_flash_attention.benchmark.roofline import Ceilings, encoder_phases, encoder_seconds
from whisper_flash_attention.benchmark.settings import ModelSize
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration,
)

encoder: Any = load_script("encoder")

SMALL = ModelSize(d_model=64, heads=1, encoder_layers=2, decoder_layers=1, ffn=96)
CEILINGS = Ceilings(bytes_per_second=1e10, flops_per_second=1e11)
PLACE = Environment(**ENVIRONMENT)


def case_of(dtype: str = "float32", repeats: int = 3) -> encoder.EncoderCase:
    return encoder.EncoderCase("small", SMALL, 1, "cpu", dtype, repeats)


def measure(case: encoder.EncoderCase, features: torch.Tensor) -> list[dict[str, Any]]:
    return encoder.measure_case(case, encoder.Speech(features, "speech"), PLACE, CEILINGS)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    path = tmp_path_factory.mktemp("features") / "features.npy"
    return torch.from_numpy(np.load(prepare_features("bundled", 80, 1, path).path))


@pytest.fixture(scope="module")
def rows(features: torch.Tensor) -> list[dict[str, Any]]:
    return measure(case_of(), features)


def test_every_system_has_a_row_of_timed_calls(rows: list[dict[str, Any]]) -> None:
    assert [row["system"] for row in rows] == ["orig", "sdpa", "flash"]
    for row in rows:
        assert row["status"] == "ok" and row["error"] is None
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
        assert row["activation_bytes"] is None
        assert (row["encoder_layers"], row["dtype"], row["device"]) == (2, "float32", "cpu")
    assert [row["attention"]["encoder self-attention"] for row in rows[:2]] == ["eager", "sdpa"]
    assert rows[2]["attention"]["encoder self-attention"] not in ("auto", "eager", "sdpa")


def test_fields_that_whole_calls_have_too_have_the_same_names(
    rows: list[dict[str, Any]],
) -> None:
    own = {"encoder_layers", "seconds_min", "seconds_max", "activation_bytes", "flops"}
    own |= {"states_error", "states_error_float32", "tflops_per_second"}
    own |= {"matmul_share", "roofline_share"}
    assert set(rows[0]) - {each.name for each in fields(ResultRow)} == own
    assert rows[0]["environment"] == ENVIRONMENT


def test_the_numbers_of_a_row_follow_from_its_times(rows: list[dict[str, Any]]) -> None:
    case, ceilings = case_of(), Ceilings(CEILINGS.bytes_per_second, 1e13)
    found = encoder.with_ratios(case, ceilings, rows[0] | {"seconds": [0.4, 0.1, 0.2]})
    times = [found[name] for name in ("seconds_min", "seconds_per_batch", "seconds_max")]
    assert times == [0.1, 0.2, 0.4]
    assert found["batches"] == 3
    assert found["tflops_per_second"] == pytest.approx(rows[0]["flops"] / 0.2 / 1e12)
    assert found["matmul_share"] == pytest.approx(rows[0]["flops"] / 0.2 / 1e13)
    floor = encoder_seconds(case.work, ceilings)
    assert found["roofline_share"] == pytest.approx(floor / 0.2)


def test_operations_floor_and_parameters_are_the_encoders(rows: list[dict[str, Any]]) -> None:
    work = case_of().work
    layer = 4 * 64 * 64 + 3 * 64 + 2 * 64 * 96 + 64 + 96 + 2 * 2 * 64
    convolutions = 3 * 80 * 64 + 64 + 3 * 64 * 64 + 64
    for row in rows:
        assert row["flops"] == sum(flops for _, flops in encoder_phases(work))
        assert row["roofline_seconds_per_batch"] == encoder_seconds(work, CEILINGS)
        assert row["parameters"] == convolutions + 1500 * 64 + 2 * layer + 2 * 64


def test_errors_in_float32_and_in_half_precision(
    rows: list[dict[str, Any]], features: torch.Tensor
) -> None:
    orig, sdpa, flash = rows
    assert orig["states_error"] == 0
    assert 0 < sdpa["states_error"] < 1e-5
    assert 0 < flash["states_error"] < 1e-5
    assert flash["states_error_float32"] == pytest.approx(flash["states_error"], rel=0.5)
    assert orig["states_error_float32"] is None
    halves = measure(case_of("bfloat16", repeats=1), features)
    for row in halves:
        assert row["status"] == "ok" and 1e-3 < row["states_error"] < 0.1
    assert halves[2]["states_error_float32"] < 1e-5


def test_a_wrong_encoder_shows(features: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = encoder.our_encoder

    def wrong(model: Any) -> encoder.Encode:
        return lambda inputs: ours(model)(inputs) * 1.01

    monkeypatch.setattr(encoder, "our_encoder", wrong)
    *_, flash = measure(case_of(repeats=1), features)
    assert flash["states_error"] == pytest.approx(0.01, rel=1e-2)
    assert flash["states_error_float32"] == pytest.approx(0.01, rel=1e-2)


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders that do nothing, so that only the order of the calls is seen."""

    def build(case: encoder.EncoderCase, name: str) -> encoder.Encoder:
        return encoder.Encoder(name, torch.nn.Linear(1, 1), lambda inputs: inputs, "none")

    monkeypatch.setattr(torch.nn.Linear, "get_encoder", lambda self: self, raising=False)
    monkeypatch.setattr(encoder, "build_encoder", build)
    monkeypatch.setattr(encoder, "reference_states", lambda case, inputs: inputs)
    monkeypatch.setattr(encoder, "float32_error", lambda case, inputs, expected: 0.0)


@pytest.mark.usefixtures("no_models")
def test_systems_take_turns_and_warm_up_is_not_timed(
    features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def scripted(encode: Any, inputs: torch.Tensor, device: Any) -> tuple[float, torch.Tensor]:
        calls.append(encode)
        return float(len(calls)), inputs

    monkeypatch.setattr(encoder, "timed_call", scripted)
    found = measure(case_of(repeats=2), features)
    assert len(calls) == 3 * (1 + encoder.CPU_WARM_UP + 2)
    assert all(call is calls[place % 3] for place, call in enumerate(calls))
    assert len(set(map(id, calls))) == 3
    before = 3 * (1 + encoder.CPU_WARM_UP)
    assert [row["first_call_seconds"] for row in found] == [1, 2, 3]
    assert [row["seconds"] for row in found] == [
        [before + place, before + 3 + place] for place in (1, 2, 3)
    ]


@pytest.mark.usefixtures("no_models")
def test_what_does_not_fit_is_reported(
    features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any) -> list[dict[str, Any]]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(encoder, "measure_group", too_large)
    for row in measure(case_of(), features):
        assert (row["status"], row["error"]) == ("failed", "out of memory")
        assert row["matmul_share"] is None and row["seconds_min"] is None


def test_the_error_is_relative_over_all_elements() -> None:
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert (
        encoder.relative_error(expected + torch.tensor([[0.0, 3.0], [4.0, 0.0]]), expected) == 1.0
    )
    assert encoder.relative_error(expected.half(), expected) == 0.0


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """Stock and ours with the same weights, in float32."""
    kinds = (WhisperForConditionalGeneration, WhisperFlashAttentionForConditionalGeneration)
    stock, ours = (build_model(kind, SMALL, 1) for kind in kinds)
    return stock, ours


def test_a_checkpoints_errors_are_within_their_bounds(
    pair: tuple[Any, Any], features: torch.Tensor
) -> None:
    rows = encoder.measure_fidelity("random", *pair, encoder.Speech(features, "speech"), PLACE)
    assert [(row["dtype"], row["system"]) for row in rows] == [
        (dtype, system)
        for dtype in ("float32", "float16", "bfloat16")
        for system in ("sdpa", "flash")
    ]
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        half = ours["dtype"] != "float32"
        assert ours["states_bound"] == (1.2 * stock["states_error"] if half else 1e-5)
        assert ours["within_bound"] and ours["within_bound"] is True
        assert stock["within_bound"] is None
        assert (ours["clips"], ours["encoder_layers"], ours["setting"]) == (
            1,
            2,
            "encoder-fidelity",
        )
    assert rows[1]["states_error"] < rows[3]["states_error"] < rows[5]["states_error"]
    assert {model.dtype for model in pair} == {torch.float32}


def test_a_checkpoint_that_is_encoded_wrongly_is_beyond_its_bound(
    pair: tuple[Any, Any], features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = encoder.our_encoder
    monkeypatch.setattr(encoder, "our_encoder", lambda model: lambda x: ours(model)(x) * 1.0001)
    speech = encoder.Speech(features, "speech")
    _, flash = encoder.measure_fidelity("random", *pair, speech, PLACE, dtypes=("float32",))
    assert flash["within_bound"] is False
    assert flash["states_error"] == pytest.approx(1e-4, rel=0.05)
    assert flash["position_error"] == pytest.approx(1e-4, rel=0.05)


def test_one_bad_position_does_not_change_the_median(
    pair: tuple[Any, Any], features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = encoder.our_encoder

    def wrong(model: Any) -> encoder.Encode:
        def encode(inputs: torch.Tensor) -> torch.Tensor:
            states = ours(model)(inputs)
            states[:, 700] *= 2
            return states

        return encode

    monkeypatch.setattr(encoder, "our_encoder", wrong)
    speech = encoder.Speech(features, "speech")
    _, flash = encoder.measure_fidelity("random", *pair, speech, PLACE, dtypes=("float32",))
    assert flash["states_error"] == pytest.approx(1500**-0.5, rel=0.5)
    assert flash["position_error"] < 1e-5
