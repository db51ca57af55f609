"""`generate(num_beams=...)`: stock's answers, on the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from tests.hf.conftest import END, Agree, Counts, Twins, assert_same

ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture
def ends(twins: Twins, features: torch.Tensor) -> list[int]:
    """Tokens that, taken as ends, end beams early and at different places."""
    split = twins.splitting_token(features[:2], language="en", max_new_tokens=12)
    return [END, split]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_ids_scores_and_beams(
    agree: Agree,
    counts: Counts,
    logged: list[str],
    features: torch.Tensor,
    ends: list[int],
    num_beams: int,
    early_stopping: bool | str,
) -> None:
    found = agree(
        features[:2],
        language="en",
        num_beams=num_beams,
        num_return_sequences=num_beams,
        early_stopping=early_stopping,
        eos_token_id=ends,
        max_new_tokens=12,
        **ALL,
    )
    assert found["sequences"].shape[0] == 2 * num_beams
    assert found["beam_indices"].max() >= num_beams
    assert counts.decodes == 2
    assert not logged


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 2.0])
def test_length_penalty(
    agree: Agree, counts: Counts, features: torch.Tensor, ends: list[int], length_penalty: float
) -> None:
    found = agree(
        features[:2],
        language="en",
        num_beams=3,
        num_return_sequences=2,
        length_penalty=length_penalty,
        eos_token_id=ends,
        max_new_tokens=12,
        **ALL,
    )
    assert len(found["sequences_scores"]) == 4
    assert counts.decodes == 2


@pytest.mark.parametrize("num_return_sequences", [1, 2, 3])
def test_plain_ids(
    agree: Agree, counts: Counts, features: torch.Tensor, num_return_sequences: int
) -> None:
    found = agree(
        features[:2],
        language="en",
        num_beams=3,
        num_return_sequences=num_return_sequences,
        max_new_tokens=10,
    )
    assert found.shape[0] == 2 * num_return_sequences
    assert counts.decodes == 2


@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_that_are_drawn(
    twins: Twins, counts: Counts, features: torch.Tensor, ends: list[int], num_beams: int
) -> None:
    """Transformers' own `generate` draws beams; Whisper's takes `do_sample` for something else."""
    options: dict[str, Any] = {
        "decoder_input_ids": torch.tensor([[401, 402, 406, 409]] * 2),
        "num_beams": num_beams,
        "do_sample": True,
        "top_k": 40,
        "eos_token_id": ends,
        "max_new_tokens": 10,
        **ALL,
    }

    def drawn(model: Any, seed: int) -> Any:
        torch.manual_seed(seed)
        return GenerationMixin.generate(model, features[:2], **options)

    found = {seed: drawn(twins.ours, seed) for seed in (11, 12)}
    assert counts.decodes == 2
    for seed, answer in found.items():
        expected = drawn(twins.stock, seed)
        # Stock's are a view of a wider tensor; Whisper's own `generate` copies them.
        expected["beam_indices"] = expected["beam_indices"].contiguous()
        assert_same(answer, expected)
    assert not torch.equal(found[11]["sequences_scores"], found[12]["sequences_scores"])


def test_do_sample_means_to_whisper_what_it_means_to_stock(
    agree: Agree, counts: Counts, features: torch.Tensor
) -> None:
    agree(features[:2], language="en", num_beams=3, do_sample=True, max_new_tokens=8, **ALL)
    assert counts.decodes == 2


@pytest.mark.parametrize(
    "prompt",
    [
        {"language": "de", "task": "translate"},
        {"language": ["de", "fr"]},
        {"language": "en", "prompt_ids": torch.tensor([9, 10, 11])},
        {"decoder_input_ids": torch.tensor([[401, 402, 406, 409, 5, 6]] * 2)},
        {},
    ],
    ids=lambda prompt: "-".join(prompt) or "detected",
)
def test_prompts(
    agree: Agree, counts: Counts, logged: list[str], features: torch.Tensor, prompt: dict[str, Any]
) -> None:
    agree(features[:2], num_beams=3, max_new_tokens=6, **prompt)
    # Where the language is detected, that is a decode as well.
    assert counts.decodes == (2 if prompt else 3)
    assert not logged


def test_scores_are_given_only_where_they_are_asked_for(
    agree: Agree, features: torch.Tensor
) -> None:
    found = agree(
        features[:2], language="en", num_beams=2, max_new_tokens=4, return_dict_in_generate=True
    )
    assert "sequences_scores" not in found
