"""The floor against the published one, and against reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.benchmark.random_weights import whisper_config
from whisper_flash_attention.benchmark.roofline import (
    Ceilings,
    Workload,
    encoder_phases,
    encoder_seconds,
    floor,
)
from whisper_flash_attention.benchmark.settings import DECODER_LAYERS, MODEL_SIZES, SETTINGS

H100 = Ceilings(bytes_per_second=3.02e12, flops_per_second=766e12)

# Seconds per call at these ceilings: default (projected), large (projected, absorbed).
PUBLISHED = [
    ("tiny", 4, 0.0006, 0.034, 0.021),
    ("tiny", 2, 0.0005, 0.019, 0.013),
    ("base", 6, 0.0011, 0.067, 0.042),
    ("base", 2, 0.0007, 0.028, 0.019),
    ("small", 12, 0.0033, 0.203, 0.128),
    ("small", 2, 0.0015, 0.051, 0.039),
    ("medium", 24, 0.0096, 0.557, 0.359),
    ("medium", 2, 0.0030, 0.098, 0.082),
]

works = st.builds(
    lambda name, batch, tokens: Workload(
        MODEL_SIZES[name], DECODER_LAYERS[name][0], batch, tokens, bytes_per_number=2
    ),
    st.sampled_from(list(MODEL_SIZES)),
    st.integers(1, 256),
    st.integers(1, 440),
)


def at(name: str, layers: int, setting: str) -> Workload:
    return Workload.of(MODEL_SIZES[name], layers, SETTINGS[setting], "float16")


@pytest.mark.parametrize(("name", "layers", "default", "projected", "absorbed"), PUBLISHED)
def test_floors_are_the_published_ones(
    name: str, layers: int, default: float, projected: float, absorbed: float
) -> None:
    # The published figures are rounded, 0.0005 to one digit.
    assert floor(at(name, layers, "default"), H100).projected == pytest.approx(default, rel=0.06)
    large = floor(at(name, layers, "large"), H100)
    assert large.projected == pytest.approx(projected, rel=0.03)
    assert large.absorbed == pytest.approx(absorbed, rel=0.03)


def test_the_row_gets_the_lower_of_both_forms() -> None:
    large = floor(at("medium", 24, "large"), H100)
    assert large.seconds == large.absorbed < large.projected
    default = floor(at("medium", 24, "default"), H100)
    assert default.seconds == default.projected < default.absorbed


@given(works)
def test_a_faster_machine_lowers_the_floor_in_proportion(work: Workload) -> None:
    twice = Ceilings(2 * H100.bytes_per_second, 2 * H100.flops_per_second)
    assert floor(work, twice).seconds == pytest.approx(floor(work, H100).seconds / 2)


@given(works)
def test_no_floor_is_below_reading_the_weights_once_per_token(work: Workload) -> None:
    d, layers = work.size.d_model, work.decoder_layers
    weights = layers * (6 * d * d + 2 * d * work.size.ffn) + work.size.vocabulary * d
    least = work.new_tokens * weights * work.bytes_per_number / H100.bytes_per_second
    assert floor(work, H100).projected > least
    assert floor(work, H100).absorbed > least


@given(works)
def test_wider_numbers_never_lower_the_floor(work: Workload) -> None:
    wide = Workload(work.size, work.decoder_layers, work.batch_size, work.new_tokens, 4)
    assert floor(wide, H100).seconds >= floor(work, H100).seconds


@pytest.mark.parametrize("name", list(MODEL_SIZES))
def test_the_encoder_has_the_operations_that_pytorch_counts(name: str) -> None:
    """PyTorch's counter runs over stock's encoder on tensors without storage."""
    size = MODEL_SIZES[name]
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(whisper_config(size, 1)).eval()
        model.set_attn_implementation("eager")
        features = torch.empty(2, size.mel_bins, 3000)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.get_encoder()(features)
    assert (
        sum(flops for _, flops in encoder_phases(Workload(size, 1, 2, 1, 2)))
        == counter.get_total_flops()
    )


@given(works)
def test_the_encoder_needs_the_time_of_its_operations_and_of_its_weights(work: Workload) -> None:
    seconds = encoder_seconds(work, H100)
    layer = 4 * work.size.d_model**2 + 2 * work.size.d_model * work.size.ffn
    weights = work.size.encoder_layers * layer * work.bytes_per_number
    # Sums of floats: the last digits differ.
    flops = sum(flops for _, flops in encoder_phases(work))
    assert seconds >= flops / H100.flops_per_second * (1 - 1e-9)
    assert seconds > weights / H100.bytes_per_second
    assert seconds <= floor(work, H100).seconds
