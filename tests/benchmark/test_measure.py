"""A row measured in this process, on a model small enough for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.benchmark import children
from whisper_flash_attention.benchmark.features import FeatureFile
from whisper_flash_attention.benchmark.measure import Measurement, check_tokens, measure
from whisper_flash_attention.benchmark.processes import start_workers
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, Job, ModelSize, Row, Setting
from whisper_flash_attention.benchmark.systems import SYSTEMS, Loaded, System
from whisper_flash_attention.errors import BenchmarkError, OptionError

SMALL = ModelSize(d_model=64, heads=1, encoder_layers=1, decoder_layers=1, ffn=128)
CLIPS = 5


@dataclass(frozen=True)
class ScriptedSystem(System):
    """Gives ids of any length, and keeps the features that it got."""

    name: str = "scripted"
    summary: str = "for tests"
    attention: str = "none"
    extra: int = 0
    reason: str | None = None
    received: list[torch.Tensor] = field(default_factory=list)

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.reason

    def load(
        self,
        size: ModelSize,
        decoder_layers: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Loaded:
        def generate(features: torch.Tensor, new_tokens: int) -> torch.Tensor:
            self.received.append(features)
            return torch.zeros(len(features), new_tokens + self.extra, dtype=torch.int64)

        return Loaded(generate, {"all": "none"})


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_SIZES, "toy", SMALL)


@pytest.fixture
def features(tmp_path: Path) -> FeatureFile:
    path = tmp_path / "features.npy"
    np.save(path, np.random.default_rng(0).normal(size=(CLIPS, 80, 3000)).astype(np.float32))
    return FeatureFile(path, "noise")


def make_job(system: str, dtype: str = "float32") -> Job:
    setting = Setting("small", batch_size=2, new_tokens=4, batches=3)
    return Job(setting, 3, Row("toy", 1), system, "cpu", dtype)


def run(system: str, features: FeatureFile, dtype: str = "float32") -> Measurement:
    return measure(make_job(system, dtype), features, lambda done: None)


def test_every_system_gives_the_ids_of_orig_in_float32(features: FeatureFile) -> None:
    orig = run("orig", features)
    assert len({token for row in orig.tokens for token in row}) > 1
    for system in ("sdpa", "static", "flash", "flash:reference"):
        assert run(system, features).tokens == orig.tokens, system


def test_a_row_counts_calls_and_tokens(features: FeatureFile) -> None:
    received: list[int] = []
    found = measure(make_job("flash"), features, received.append)
    assert received == [1, 2, 3]
    assert len(found.seconds) == 3
    assert min(found.seconds) > 0
    assert found.first_call_seconds > 0
    assert found.tokens_checked == 3 * 2 * 4
    assert [len(row) for row in found.tokens] == [4, 4]


def test_a_cpu_row_has_rss_and_no_vram(features: FeatureFile) -> None:
    found = run("orig", features)
    assert 0.05 < found.rss_peak_gb < 100
    assert found.vram_driver_gb is None
    assert found.vram_allocated_gb is None


def test_a_row_names_the_attention_that_ran(features: FeatureFile) -> None:
    assert run("orig", features).attention == {"all": "eager"}
    assert run("flash:reference", features).attention == {"all": "reference"}
    auto = run("flash", features).attention
    assert auto["cross-attention"] == "PyTorch, projected"
    assert len(auto) > 1
    assert "auto" not in auto.values()


def test_half_precision_reaches_the_model(features: FeatureFile) -> None:
    assert run("flash", features, "bfloat16").tokens_checked == 24


def test_warm_up_calls_are_not_timed_and_batches_rotate_through_the_clips(
    features: FeatureFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = ScriptedSystem()
    monkeypatch.setitem(SYSTEMS, "scripted", system)
    found = run("scripted", features)
    assert len(found.seconds) == 3
    clips = torch.from_numpy(np.load(features.path))
    expected = [(0, 1), (2, 3), (0, 1), (2, 3), (4, 0)]
    assert len(system.received) == len(expected)
    for batch, indices in zip(system.received, expected, strict=True):
        assert torch.equal(batch, clips[list(indices)])


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_system_with_another_number_of_tokens_fails(
    extra: int, features: FeatureFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SYSTEMS, "scripted", ScriptedSystem(extra=extra))
    with pytest.raises(BenchmarkError, match=rf"wanted \(2, 4\) new tokens.*\(2, {4 + extra}\)"):
        run("scripted", features)


def test_a_system_that_cannot_run_here_is_skipped_with_its_reason(
    features: FeatureFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SYSTEMS, "scripted", ScriptedSystem(reason="needs a GPU"))
    assert run("scripted", features) == Measurement(skipped="needs a GPU")


@pytest.mark.parametrize(
    "ids", [torch.zeros(2, 4), torch.full((2, 4), -1), torch.full((2, 4), SMALL.vocabulary)]
)
def test_ids_outside_the_vocabulary_fail(ids: torch.Tensor) -> None:
    with pytest.raises(BenchmarkError, match="wanted ids below 51865"):
        check_tokens(ids, make_job("orig"))


def test_an_unknown_system_is_refused_with_those_that_exist(features: FeatureFile) -> None:
    with pytest.raises(OptionError, match="give orig, sdpa, static, flash, flash:reference"):
        run("fast", features)


def test_peak_rss_grows_by_what_was_held() -> None:
    growth = start_workers("cpu").call(children.peak_rss_growth, 200_000_000, timeout=60)
    assert 0.15 < growth < 0.3
