"""Perturbed random weights: every size, and the mistakes that default weights would hide."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, WhisperConfig
from transformers import WhisperForConditionalGeneration as Stock

from tests.random_whisper import perturbed, small_whisper_config
from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
from whisper_flash_attention.hf.compat import CACHE, DynamicLayer
from whisper_flash_attention.hf.kv_cache import BucketedLayer, StoredOnceLayer

# d_model, heads, mel bins, vocabulary; with the full depth in the slow test.
SIZES = {
    "tiny": (384, 6, 80, 51865, 4, 4),
    "base": (512, 8, 80, 51865, 6, 6),
    "small": (768, 12, 80, 51865, 12, 12),
    "medium": (1024, 16, 80, 51865, 24, 24),
    "large-v3": (1280, 20, 128, 51866, 32, 32),
    "large-v3-turbo": (1280, 20, 128, 51866, 32, 4),
}


def config_of(
    size: str, encoder_layers: int, decoder_layers: int, positions: int = 1500
) -> WhisperConfig:
    width, heads, bins, vocabulary, _, _ = SIZES[size]
    return WhisperConfig(
        max_source_positions=positions,
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=bins,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )


def pair_of(config: WhisperConfig, seed: int = 0, scale: float = 0.08) -> tuple[Stock, Ours]:
    stock = perturbed(
        Stock._from_config(WhisperConfig(**config.to_dict()), attn_implementation="eager"),
        seed,
        scale,
    )
    with torch.device("meta"):
        ours = Ours(WhisperConfig(**config.to_dict())).eval()
    ours.load_state_dict(stock.state_dict(), assign=True)
    ours.tie_weights()
    return stock, ours


def features_of(config: WhisperConfig, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    frames = 2 * config.max_source_positions
    return torch.randn(batch, config.num_mel_bins, frames, generator=generator)


def assert_same_generation(stock: Stock, ours: Ours, features: torch.Tensor, tokens: int) -> None:
    options = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected, found = (model.generate(features, **options) for model in (stock, ours))
    assert torch.equal(found.sequences, expected.sequences)
    for ours_step, stock_step in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours_step, stock_step, atol=2e-3, rtol=1e-3)


# Large-v3-turbo is large-v3 with fewer layers.
@pytest.mark.parametrize(
    "size",
    [pytest.param(size, marks=[pytest.mark.slow] * (size == "large-v3")) for size in [*SIZES][:-1]],
)
def test_every_width_gives_the_same_ids(size: str) -> None:
    config = config_of(size, encoder_layers=1, decoder_layers=2, positions=200)
    stock, ours = pair_of(config, scale=0.03)
    assert_same_generation(stock, ours, features_of(config, batch=1), tokens=6)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_size_at_full_depth_gives_the_same_ids(size: str) -> None:
    config = config_of(size, *SIZES[size][4:])
    stock, ours = pair_of(config, scale=0.02)
    assert_same_generation(stock, ours, features_of(config, batch=2), tokens=12)


@pytest.fixture
def pair() -> tuple[Stock, Ours]:
    return pair_of(small_whisper_config())


def test_a_cached_one_token_query_sees_the_whole_past(pair) -> None:
    """A lower-triangular mask aligned top-left would let it see only the first key."""
    stock, ours = pair
    features = features_of(ours.config)
    ids = torch.randint(100, 50000, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        encoded = ours.model.encoder(features)
        whole = ours(encoder_outputs=encoded, decoder_input_ids=ids).logits
        expected = stock(encoder_outputs=encoded, decoder_input_ids=ids).logits
        past, steps = None, []
        for position in range(ids.shape[1]):
            output = ours(
                encoder_outputs=encoded,
                decoder_input_ids=ids[:, position : position + 1],
                use_cache=True,
                **{CACHE: past},
            )
            past = output[CACHE]
            steps.append(output.logits)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_cross_keys_and_values_are_projected_once_per_call(pair) -> None:
    """The predecessor compared the wrong axis of its cache and projected them at every step."""
    _, ours = pair
    calls = []
    for layer in ours.model.decoder.layers:
        for projection in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
            projection.register_forward_hook(lambda *_: calls.append(1))
    ours.generate(features_of(ours.config), max_new_tokens=12, min_new_tokens=12)
    assert len(calls) == 2 * ours.config.decoder_layers


def test_generate_keeps_its_past_in_place(pair) -> None:
    """The predecessor grew the self-attention cache with `torch.cat` at every step."""
    _, ours = pair
    addresses, caches = set(), []
    layer = ours.model.decoder.layers[0].self_attn

    def note(_module, _args, kwargs, _output) -> None:
        caches.append(kwargs[CACHE])
        addresses.add(caches[-1].self_attention_cache.layers[0].keys.data_ptr())

    layer.register_forward_hook(note, with_kwargs=True)
    ours.generate(features_of(ours.config), max_new_tokens=40, min_new_tokens=40)
    assert len(addresses) == 1
    (cache,) = {id(each): each for each in caches}.values()
    assert {type(layer) for layer in cache.self_attention_cache.layers} == {BucketedLayer}
    assert {type(layer) for layer in cache.cross_attention_cache.layers} == {StoredOnceLayer}


def test_padded_prompts_are_masked(pair) -> None:
    stock, ours = pair
    features = features_of(ours.config)
    ids = torch.randint(100, 50000, (2, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        found, expected = (
            model(features, decoder_input_ids=ids, decoder_attention_mask=mask).logits
            for model in (ours, stock)
        )
    kept = mask.bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=1e-4)


def test_a_static_cache_gives_the_same_ids(pair) -> None:
    stock, ours = pair
    features = features_of(ours.config)
    options = {"max_new_tokens": 20, "min_new_tokens": 20}
    expected = stock.generate(features, **options)
    found = ours.generate(features, cache_implementation="static", **options)
    assert torch.equal(found, expected)


def test_a_users_own_cache_is_left_alone(pair) -> None:
    _, ours = pair
    mine = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ours.generate(features_of(ours.config), max_new_tokens=5, **{CACHE: mine})
    assert mine.get_seq_length() == 5
    assert {type(layer) for layer in mine.self_attention_cache.layers} == {DynamicLayer}
