"""The back-ends inside Transformers: a stock Whisper that uses them by their registered names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    EncoderDecoderCache,
    StaticCache,
    WhisperForConditionalGeneration,
)

from tests.random_whisper import perturbed, small_whisper_config
from whisper_flash_attention.errors import OptionError, UnsupportedAttention
from whisper_flash_attention.flash_attention import attend, attention_weights, backend_names
from whisper_flash_attention.flash_attention.problem import AttentionInputs
from whisper_flash_attention.hf.attention_registry import (
    attention_function,
    from_transformers_name,
    register_backends,
    to_transformers_name,
)
from whisper_flash_attention.hf.compat import CACHE

# A free-standing function: registered for attention, not for masks.
WITHOUT_MASK = "wfa_test_without_mask"
CPU_BACKENDS = ("auto", "reference", "sdpa_flash")
PROMPT = torch.tensor([[50258, 50259, 50359, 50363, 11, 12], [7, 7, 50258, 50259, 50359, 50363]])
# The second prompt is padded on the left.
PROMPT_MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    register_backends()
    torch.manual_seed(0)
    config = small_whisper_config()
    return perturbed(WhisperForConditionalGeneration._from_config(config), scale=0.1)


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits(model: WhisperForConditionalGeneration, features: Tensor) -> Callable[..., Tensor]:
    """Logits of the prompt with an attention implementation, by its name in Transformers."""

    def compute(implementation: str, **options: object) -> Tensor:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return model(
                input_features=features,
                decoder_input_ids=PROMPT,
                decoder_attention_mask=PROMPT_MASK,
                **options,
            ).logits

    return compute


def static_caches(model: WhisperForConditionalGeneration) -> EncoderDecoderCache:
    return EncoderDecoderCache(
        StaticCache(config=model.config, max_cache_len=32),
        StaticCache(config=model.config, max_cache_len=100),
    )


def test_names_go_there_and_back() -> None:
    for name in backend_names():
        theirs = to_transformers_name(name)
        assert from_transformers_name(theirs) == name
        assert not any(word in theirs for word in ("flash", "sdpa", "flex", "/", "eager", "paged"))
    assert from_transformers_name("sdpa") is None
    with pytest.raises(OptionError, match="sdpa_flash"):
        to_transformers_name("sdpa")


def test_registering_twice_changes_nothing() -> None:
    register_backends()
    once = [AttentionInterface()[to_transformers_name(name)] for name in backend_names()]
    register_backends()
    twice = [AttentionInterface()[to_transformers_name(name)] for name in backend_names()]
    assert all(one is other for one, other in zip(once, twice, strict=True))
    assert all(to_transformers_name(name) in AttentionMaskInterface() for name in backend_names())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_padded_prompt_gives_the_logits_of_eager_attention(
    backend: str, logits: Callable[..., Tensor]
) -> None:
    wanted, found = logits("eager"), logits(to_transformers_name(backend))
    spoken = PROMPT_MASK.bool()
    torch.testing.assert_close(found[spoken], wanted[spoken], atol=1e-4, rtol=1e-4)
    assert found.isfinite().all()


def test_without_a_registered_mask_the_padding_would_be_lost(
    logits: Callable[..., Tensor],
) -> None:
    AttentionInterface.register(WITHOUT_MASK, attention_function("reference"))
    wanted, found = logits("eager"), logits(WITHOUT_MASK)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)
    assert (found[1, 2:] - wanted[1, 2:]).abs().max() > 0.1


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_on_a_static_cache_equal_eager_without_one(
    backend: str, padded: bool, model: WhisperForConditionalGeneration, features: Tensor
) -> None:
    mask = PROMPT_MASK if padded else torch.ones_like(PROMPT_MASK)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        encoded = model.model.encoder(features)
        whole = model(
            encoder_outputs=encoded, decoder_input_ids=PROMPT, decoder_attention_mask=mask
        )
        model.set_attn_implementation(to_transformers_name(backend))
        cache = static_caches(model)
        steps = [
            model(
                encoder_outputs=encoded,
                decoder_input_ids=PROMPT[:, start:stop],
                decoder_attention_mask=mask[:, :stop],
                **{CACHE: cache},
            ).logits
            for start, stop in ((0, 4), (4, 5), (5, 6))
        ]
    found = torch.cat(steps, dim=1)
    spoken = mask.bool()
    torch.testing.assert_close(found[spoken], whole.logits[spoken], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generate_gives_the_tokens_of_eager_attention(
    backend: str,
    options: dict[str, object],
    model: WhisperForConditionalGeneration,
    features: Tensor,
) -> None:
    def generate(implementation: str) -> Tensor:
        model.set_attn_implementation(implementation)
        return model.generate(
            features,
            decoder_input_ids=PROMPT[:1, :4].expand(2, 4),
            max_new_tokens=12,
            min_new_tokens=12,
            **options,
        )

    assert torch.equal(generate(to_transformers_name(backend)), generate("eager"))


def test_output_attentions_gives_the_weights_of_eager_attention(
    model: WhisperForConditionalGeneration, features: Tensor
) -> None:
    def attentions(implementation: str) -> list[Tensor]:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            out = model(features, decoder_input_ids=PROMPT, output_attentions=True)
        return [*out.encoder_attentions, *out.decoder_attentions, *out.cross_attentions]

    wanted, found = attentions("eager"), attentions(to_transformers_name("sdpa_flash"))
    assert len(found) == 6
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_training_passes_the_gradients_of_eager_attention(
    model: WhisperForConditionalGeneration, features: Tensor
) -> None:
    def gradients(implementation: str) -> list[Tensor]:
        model.set_attn_implementation(implementation)
        loss = model(features, labels=PROMPT).loss
        return list(torch.autograd.grad(loss, list(model.model.decoder.parameters())))

    for one, other in zip(gradients(to_transformers_name("auto")), gradients("eager"), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


class Layer(torch.nn.Module):
    """As much of an attention layer as an attention function looks at."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def heads_first(q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(
        torch.randn(2, 3, length, 8, generator=generator) for length in (q_len, kv_len, kv_len)
    )


@pytest.mark.parametrize(
    ("is_causal", "override", "q_len", "masked", "causal"),
    [
        (True, None, 5, False, True),
        (False, None, 5, False, False),
        (False, True, 5, False, True),
        (True, False, 5, False, False),
        (True, None, 1, False, False),
        (True, None, 5, True, False),
    ],
)
def test_causal_exactly_when_nothing_else_says_what_to_see(
    is_causal: bool, override: bool | None, q_len: int, masked: bool, causal: bool
) -> None:
    q, k, v = heads_first(q_len, 5)
    mask = torch.ones(2, 1, q_len, 5, dtype=torch.bool) if masked else None
    out, weights = attention_function("auto")(
        Layer(is_causal), q, k, v, mask, scaling=0.5, is_causal=override
    )
    tokens_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    torch.testing.assert_close(out, attend(*tokens_first, causal=causal, scale=0.5))
    assert weights is None


def test_a_prompt_on_an_empty_static_cache_does_not_see_what_is_not_written() -> None:
    q, k, v = heads_first(4, 32)
    out, _ = attention_function("auto")(Layer(True), q, k, v, None)
    tokens_first = [tensor[:, :, :4].transpose(1, 2) for tensor in (q, k, v)]
    torch.testing.assert_close(out, attend(*tokens_first, causal=True))


def test_weights_asked_for_have_the_dtype_of_the_query() -> None:
    q, k, v = (tensor.half() for tensor in heads_first(4, 4))
    out, weights = attention_function("sdpa_flash")(
        Layer(True), q, k, v, None, output_attentions=True
    )
    tokens_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    assert weights is not None and weights.dtype is torch.float16
    assert torch.equal(weights, attention_weights(AttentionInputs(*tokens_first, causal=True)))
    torch.testing.assert_close(out, attend(*tokens_first, causal=True, backend="reference"))


@pytest.mark.parametrize("name", ["softcap", "position_bias", "cache", "s_aux"])
def test_what_no_back_end_computes_is_refused(name: str) -> None:
    function = attention_function("auto")
    q, k, v = heads_first(2, 2)
    with pytest.raises(UnsupportedAttention, match=f"'{name}'"):
        function(Layer(False), q, k, v, None, **{name: object()})
    function(Layer(False), q, k, v, None, **{name: None}, position_ids=object())


def test_a_back_end_that_cannot_says_so_inside_a_model(
    model: WhisperForConditionalGeneration, features: Tensor
) -> None:
    model.set_attn_implementation(to_transformers_name("sdpa_cudnn"))
    with pytest.raises(UnsupportedAttention, match="sdpa_cudnn cannot run"):
        model(features, decoder_input_ids=PROMPT)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_compiler_traces_it_without_a_break(backend: str) -> None:
    register_backends()
    torch.compiler.reset()
    function, layer = attention_function(backend), Layer(True)

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return function(layer, q, k, v, mask)[0]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for q_len in (1, 5, 7):
        q, k, v = heads_first(q_len, 9)
        mask = torch.ones(2, 1, q_len, 9, dtype=torch.bool).tril(9 - q_len)
        for given in (mask, None):
            torch.testing.assert_close(compiled(q, k, v, given), call(q, k, v, given))
