"""What Transformers must keep promising: names, signatures and the behaviour behind them."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, GenerationMixin, WhisperConfig
from transformers import WhisperForConditionalGeneration as Stock

from tests.random_whisper import perturbed
from whisper_flash_attention.errors import IncompatibleTransformers
from whisper_flash_attention.hf import compat

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_private_name_has_the_parameters_we_use() -> None:
    compat.check()


def test_a_lost_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: object) -> None: ...

    monkeypatch.setitem(
        compat.REQUIRED_PARAMETERS, "somewhere.changed", (changed, ("self", "gone"))
    )
    with pytest.raises(IncompatibleTransformers, match=r"somewhere\.changed has no parameter gone"):
        compat.check()


def test_the_supported_range_is_the_same_everywhere() -> None:
    requirement = f"transformers{compat.SUPPORTED}"
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert requirement in declared
    for path in ("tools/matrix.py", "whisper_flash_attention/cli/doctor.py"):
        assert requirement in (REPOSITORY / path).read_text()


def test_a_lost_encoder_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "ENCODER_STEPS", ("_of_another_name",))
    with pytest.raises(IncompatibleTransformers, match="has no step _of_another_name"):
        compat.check()


def test_the_cache_has_one_name_everywhere(small_config: WhisperConfig) -> None:
    """In forward methods, their outputs, and what `generate` hands to its loops and returns."""
    model = Stock(small_config).eval()
    with torch.no_grad():
        output = model(torch.zeros(1, 80, 200), decoder_input_ids=torch.tensor([[1, 2]]))
    assert compat.CACHE in output.keys()  # noqa: SIM118 - a mapping that also knows older names
    made = model.generate(torch.zeros(1, 80, 200), max_new_tokens=2, return_dict_in_generate=True)
    assert {compat.CACHE} == {"cache", "past_key_values"} & set(made.keys())


@pytest.mark.parametrize("sampled", [True, False])
def test_beams_are_ranked_as_the_release_does(sampled: bool, small_config: WhisperConfig) -> None:
    model = Stock(small_config)
    torch.manual_seed(0)
    scores, *_ = model._get_top_k_continuations(
        accumulated_log_probs=torch.zeros(1, 60).uniform_(-1, 0),
        running_sequences=torch.zeros(1, 2, 4, dtype=torch.int64),
        running_beam_indices=torch.zeros(1, 2, 4, dtype=torch.int64),
        cur_len=1,
        decoder_prompt_len=1,
        do_sample=sampled,
        beams_to_keep=20,
        num_beams=2,
        vocab_size=30,  # an argument of older releases
        batch_size=1,
    )
    ranked = torch.equal(scores, scores.sort(dim=-1, descending=True).values)
    assert ranked == (compat.SORTS_SAMPLED_BEAMS or not sampled)


def test_the_decode_seam_has_the_signature_we_read() -> None:
    parameters = inspect.signature(GenerationMixin._sample).parameters
    assert list(parameters)[:5] == [
        "self",
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
    ]


def test_the_encoder_step_of_generate_has_one_of_its_names() -> None:
    assert any(hasattr(GenerationMixin, name) for name in compat.ENCODER_STEPS)


def test_generate_hands_the_decode_loop_what_the_engine_translates(
    small_config: WhisperConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact types of processors and criteria, the encoder's output, and a cache by name."""
    calls = []

    def note(self, input_ids, logits_processor, stopping_criteria, generation_config, **more):
        calls.append((logits_processor, stopping_criteria, generation_config, more))
        return torch.cat([input_ids, input_ids[:, -1:]], dim=-1)

    monkeypatch.setattr(Stock, "_sample", note)
    model = Stock(small_config).eval()
    model.generation_config.update(suppress_tokens=[1], begin_suppress_tokens=[2])
    model.generation_config.no_timestamps_token_id = 50363
    model.generate(
        torch.zeros(1, 80, 200),
        return_timestamps=True,
        force_unique_generate_call=True,
        min_new_tokens=2,
        max_new_tokens=4,
    )
    processors, criteria, config, more = calls[0]
    assert [type(each) for each in processors] == [
        compat.MinLengthLogitsProcessor,
        compat.MinNewTokensLengthLogitsProcessor,
        compat.SuppressTokensAtBeginLogitsProcessor,
        compat.SuppressTokensLogitsProcessor,
        compat.WhisperTimeStampLogitsProcessor,
    ]
    assert {type(each) for each in criteria} == {
        compat.MaxLengthCriteria,
        compat.EosTokenCriteria,
    }
    assert isinstance(more["encoder_outputs"], compat.BaseModelOutput)
    assert more["use_cache"] is True
    assert int(config._pad_token_tensor) == config.pad_token_id


def test_whisper_calls_attention_as_the_contract_says(small_config: WhisperConfig) -> None:
    """q, k, v come as [B, H, L, D], q already scaled; `output_attentions` reaches the function."""
    calls = []

    def note(module, query, key, value, attention_mask, **options):
        calls.append((module.is_causal, query.shape, key.shape, options))
        weights = torch.softmax(query @ key.transpose(2, 3), dim=-1)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("contract_probe", note)
    model = perturbed(Stock._from_config(small_config, attn_implementation="contract_probe"))
    with torch.no_grad():
        output = model(
            torch.randn(1, 80, 200),
            decoder_input_ids=torch.tensor([[1, 2, 3]]),
            output_attentions=True,
        )
    assert {causal for causal, *_ in calls} == {True, False}
    assert all(options["scaling"] == 1.0 for *_, options in calls)
    assert all(options["output_attentions"] for *_, options in calls)
    assert calls[0][1] == (1, 2, 100, 64)
    assert len(output.cross_attentions) == small_config.decoder_layers


def test_word_timestamps_still_leave_stock_on_eager_attention(small_config: WhisperConfig) -> None:
    """Why `generate` restores the back-end: should this fail, our restoring can go."""
    source = inspect.getsource(compat.WhisperGenerationMixin.generate)
    assert 'config._attn_implementation = "eager"' in source
