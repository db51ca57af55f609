"""What works with the stock class works with ours, by the same names."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, WhisperConfig, pipeline
from transformers import WhisperForConditionalGeneration as Stock

from tests.modeling.conftest import read_wave
from tests.random_whisper import perturbed, small_whisper_config
from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
from whisper_flash_attention.errors import UnsupportedAttention, WeightsError

FIVE_TOKENS = {"max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture
def model(small_config: WhisperConfig) -> Ours:
    return perturbed(Ours(small_config))


@pytest.fixture
def features(small_config: WhisperConfig) -> torch.Tensor:
    return torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(5))


def stock_twin(model: Ours, attention: str = "eager") -> Stock:
    config = WhisperConfig(**model.config.to_dict())
    twin = Stock._from_config(config, attn_implementation=attention)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def test_parameters_have_the_stock_names_and_shapes(model: Ours) -> None:
    twin = stock_twin(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in twin.state_dict().items()
    }
    assert isinstance(model, Stock)


def test_the_default_config_makes_a_model_with_automatic_attention() -> None:
    with torch.device("meta"):
        model = Ours(WhisperConfig())
    assert model.attention_backend == "auto"


@pytest.mark.parametrize("source", ["stock", "ours"])
def test_saved_folders_load_in_both_classes(model, features, tmp_path: Path, source: str) -> None:
    (stock_twin(model) if source == "stock" else model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "WhisperForConditionalGeneration"
    ]
    expected = model.generate(features, **FIVE_TOKENS)
    for loader in (Stock, Ours, AutoModelForSpeechSeq2Seq):
        loaded = loader.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded.generate(features, **FIVE_TOKENS), expected)
    assert type(loaded) is Stock
    assert "wfa" not in (tmp_path / "config.json").read_text()


def test_a_small_vocabulary_keeps_the_default_ids(features, tmp_path: Path) -> None:
    """Stock saves and loads ids beyond the vocabulary if they are those of its configuration."""
    config = small_whisper_config(
        vocab_size=510, pad_token_id=0, decoder_start_token_id=2, suppress_tokens=[7, 51_000]
    )
    assert max(config.begin_suppress_tokens) >= 510
    stock = perturbed(Stock(config))
    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] >= 510
    loaded = Ours.from_pretrained(tmp_path).eval()
    expected = stock.generate(features, **FIVE_TOKENS)
    assert torch.equal(loaded.generate(features, **FIVE_TOKENS), expected)


def test_a_back_end_is_chosen_at_load_and_switched_later(model, features, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = Ours.from_pretrained(tmp_path, attn_implementation="sdpa_flash").eval()
    assert loaded.attention_backend == "sdpa_flash"
    expected = loaded.generate(features, **FIVE_TOKENS)
    for name in ("reference", "auto", "eager", "sdpa"):
        loaded.set_attn_implementation(name)
        assert loaded.attention_backend == name
        assert torch.equal(loaded.generate(features, **FIVE_TOKENS), expected)


def test_an_unknown_back_end_is_refused(model: Ours) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")
    assert model.attention_backend == "auto"


def test_a_back_end_that_cannot_run_here_says_why(model, features) -> None:
    model.set_attn_implementation("xformers")
    with pytest.raises(UnsupportedAttention, match="xformers"):
        model.generate(features, **FIVE_TOKENS)


def test_training_gives_stock_gradients(model, features) -> None:
    twin = stock_twin(model)
    labels = torch.randint(100, 50000, (2, 6), generator=torch.Generator().manual_seed(6))
    for each in (model, twin):
        each.train()
        each(features, labels=labels).loss.backward()
    for (name, ours), (_, stock) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, stock.grad, atol=2e-4, rtol=2e-3, msg=name)


def test_training_with_attention_dropout_and_checkpointing(features) -> None:
    model = perturbed(Ours(small_whisper_config(attention_dropout=0.2))).train()
    new_name, old_name = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new_name if hasattr(model, new_name) else old_name)()
    labels = torch.randint(100, 50000, (2, 6), generator=torch.Generator().manual_seed(6))
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = model(features, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    torch.manual_seed(1)
    assert model(features, labels=labels, use_cache=False).loss.item() != losses[0]
    assert all(
        parameter.grad.isfinite().all()
        for parameter in model.parameters()
        if parameter.grad is not None
    )


def test_output_attentions_are_the_eager_ones_and_leave_the_back_end(model, features) -> None:
    twin = stock_twin(model)
    options = {
        "output_attentions": True,
        "output_hidden_states": True,
        "decoder_input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
    }
    with torch.no_grad():
        found, expected = model(features, **options), twin(features, **options)
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(found[kind]) == len(expected[kind]) == 2
        for ours, stock in zip(found[kind], expected[kind], strict=True):
            torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
    assert model.attention_backend == "auto"


def test_generate_returns_the_stock_dictionary(model, features) -> None:
    twin = stock_twin(model)
    options = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_attentions": True,
        "num_beams": 2,
        **FIVE_TOKENS,
    }
    found, expected = model.generate(features, **options), twin.generate(features, **options)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores)
    assert len(found.cross_attentions) == len(expected.cross_attentions)
    assert model.attention_backend == "auto"


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
        {"num_beams": 3, "do_sample": True},
        {"use_cache": False},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
        {"suppress_tokens": list(range(200)), "begin_suppress_tokens": [220]},
    ],
    ids=lambda options: "-".join(options),
)
def test_generate_takes_the_stock_options(model, features, options) -> None:
    twin = stock_twin(model)
    results = []
    for each in (twin, model):
        torch.manual_seed(11)
        results.append(each.generate(features, **FIVE_TOKENS, **options))
    assert torch.equal(*results)


def test_assisted_generation(model, features) -> None:
    assistant = perturbed(Ours(small_whisper_config(decoder_layers=1)), seed=2)
    twin = stock_twin(model)
    one = features[:1]
    expected = twin.generate(one, **FIVE_TOKENS)
    assert torch.equal(model.generate(one, assistant_model=assistant, **FIVE_TOKENS), expected)


def test_half_to_copy_and_pickle(model, features) -> None:
    expected = model.generate(features, **FIVE_TOKENS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.attention_backend == "auto"
        assert torch.equal(twin.generate(features, **FIVE_TOKENS), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.generate(features.to(torch.bfloat16), **FIVE_TOKENS).shape == expected.shape
    assert copy.deepcopy(model).half().dtype == torch.float16


def test_missing_and_wrong_sources_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing\.pt"):
        Ours.from_pretrained(str(tmp_path / "missing.pt"))
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match=r"broken\.pt"):
        Ours.from_pretrained(str(tmp_path / "broken.pt"))


def test_converted_checkpoints_load_in_the_dtype_that_is_asked_for(tiny_en: str) -> None:
    assert Ours.from_pretrained(tiny_en).dtype == torch.float32
    assert Ours.from_pretrained(tiny_en, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert Ours.from_pretrained(tiny_en, dtype="auto").dtype == torch.float16


def test_loading_info_is_stock(tiny_en: str) -> None:
    model, info = Ours.from_pretrained(tiny_en, output_loading_info=True)
    assert isinstance(model, Ours)
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) <= {"proj_out.weight"}


def test_the_pipeline_takes_our_model(tiny_en: str, bundled_recordings) -> None:
    from whisper_flash_attention import load_processor

    processor = load_processor(tiny_en)
    recognize = pipeline(
        "automatic-speech-recognition",
        model=Ours.from_pretrained(tiny_en),
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    recording = bundled_recordings[0]
    result = recognize(read_wave(str(recording.path)), return_timestamps="word")
    assert len(result["chunks"]) > 3
    assert "Dashwood" in result["text"]
