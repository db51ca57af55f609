"""What a command line selects, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.benchmark.random_weights import whisper_config
from whisper_flash_attention.benchmark.settings import (
    DECODER_LAYERS,
    DECODER_POSITIONS,
    MODEL_SIZES,
    PROMPT_TOKENS,
    Row,
    Setting,
    default_settings,
    plan_jobs,
    select_rows,
    select_settings,
)
from whisper_flash_attention.errors import OptionError


def test_the_published_settings_are_the_published_ones() -> None:
    default, large = select_settings(default_settings("cuda"))
    assert (default.batch_size, default.new_tokens, default.batches) == (1, 25, 100)
    assert (large.batch_size, large.new_tokens, large.batches) == (32, 256, 10)


def test_a_cpu_gets_the_small_setting() -> None:
    assert default_settings("cpu") == ("small",)


def test_all_rows_are_the_thirteen_of_the_table() -> None:
    rows = [(row.checkpoint, row.decoder_layers) for row in select_rows()]
    assert rows == [
        *[("tiny", 4), ("tiny", 2)],
        *[("base", 6), ("base", 4), ("base", 2)],
        *[("small", 12), ("small", 6), ("small", 4), ("small", 2)],
        *[("medium", 24), ("medium", 6), ("medium", 4), ("medium", 2)],
    ]


def test_large_checkpoints_are_there_when_named() -> None:
    assert select_rows(["large-v3-turbo", "large-v3"]) == [
        Row("large-v3", 32),
        Row("large-v3-turbo", 4),
    ]


def test_decoder_layers_narrow_the_rows() -> None:
    assert select_rows(["base", "tiny"], [2]) == [Row("tiny", 2), Row("base", 2)]
    assert select_rows((), [24, 12]) == [Row("small", 12), Row("medium", 24)]


def test_an_unknown_checkpoint_is_refused_with_those_that_exist() -> None:
    with pytest.raises(OptionError, match="checkpoint is 'huge': give tiny, base, small"):
        select_rows(["huge"])


@pytest.mark.parametrize(
    ("checkpoints", "layers", "blamed"),
    [
        (["tiny"], [24], "nothing to measure for tiny, 24 layers"),
        (["tiny", "base"], [6], "nothing to measure for tiny"),
        (["base"], [6, 5], "nothing to measure for 5 layers"),
        ([], [32], "nothing to measure for 32 layers"),
    ],
)
def test_an_impossible_selection_is_refused_with_what_exists(
    checkpoints: list[str], layers: list[int], blamed: str
) -> None:
    with pytest.raises(OptionError) as caught:
        select_rows(checkpoints, layers)
    message = str(caught.value)
    assert blamed in message
    assert "tiny 4, 2; base 6, 4, 2; small 12, 6, 4, 2; medium 24, 6, 4, 2" in message


@given(st.lists(st.sampled_from(list(DECODER_LAYERS))), st.lists(st.integers(-1, 40)))
def test_a_selection_is_either_refused_or_serves_everything_named(
    checkpoints: list[str], layers: list[int]
) -> None:
    try:
        rows = select_rows(checkpoints, layers)
    except OptionError:
        return
    assert rows
    assert len(set(rows)) == len(rows)
    assert {row.checkpoint for row in rows} >= set(checkpoints)
    assert {row.decoder_layers for row in rows} >= set(layers)
    assert all(row.decoder_layers in DECODER_LAYERS[row.checkpoint] for row in rows)


@given(st.integers(), st.integers(), st.integers())
def test_a_setting_has_possible_sizes_or_is_not_made(
    batch_size: int, new_tokens: int, batches: int
) -> None:
    possible = (
        batch_size >= 1 and batches >= 1 and 1 <= new_tokens <= DECODER_POSITIONS - PROMPT_TOKENS
    )
    try:
        Setting("default", batch_size, new_tokens, batches)
    except OptionError:
        assert not possible
    else:
        assert possible


def test_sizes_given_replace_the_settings_own() -> None:
    (setting,) = select_settings(["large"], batches=3, new_tokens=9)
    assert setting == Setting("large", batch_size=32, new_tokens=9, batches=3)


def test_an_unknown_setting_is_refused_with_those_that_exist() -> None:
    with pytest.raises(OptionError, match="setting is 'huge': give default, large or small"):
        select_settings(["huge"])


def test_jobs_keep_what_the_setting_prescribes_beside_what_is_run() -> None:
    jobs = plan_jobs(
        select_settings(["default"], batches=7),
        select_rows(["tiny"]),
        ["orig", "flash", "orig"],
        device="cpu",
        dtype="float32",
    )
    assert [(job.row.decoder_layers, job.system) for job in jobs] == [
        *[(4, "orig"), (4, "flash")],
        *[(2, "orig"), (2, "flash")],
    ]
    assert {(job.setting.batches, job.setting_batches) for job in jobs} == {(7, 100)}


def test_an_unknown_dtype_is_refused_with_those_that_exist() -> None:
    with pytest.raises(OptionError, match="dtype is 'int8': give float16, bfloat16 or float32"):
        plan_jobs(select_settings(["small"]), select_rows(), ["orig"], device="cpu", dtype="int8")


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_parameters_are_those_of_the_stock_model(name: str) -> None:
    import torch

    size = MODEL_SIZES[name]
    for layers in DECODER_LAYERS[name]:
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(whisper_config(size, layers))
        assert size.parameters(layers) == sum(weight.numel() for weight in model.parameters())
