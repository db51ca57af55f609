"""Random weights on which every part of Whisper matters.

Default initialisation hides mistakes: its attention is almost uniform, its biases are zero, and
the tied embedding makes a model repeat its last token for any audio. Here attention selects a few
keys, biases and norms are not trivial, and the layers outweigh the embedding, so that the tokens
depend on the audio, the position and the cache.

Every tensor is drawn with a seed from its name, so that two classes with the same parameters get
the same weights in any order.

`random_processor` and `talking_config` make such a model transcribe: words of random letters, and
no timestamp but <|0.00|>, so that every window is one segment of a given number of tokens.
`recite_` makes it say one text of a given length, whatever it hears, and be sure of it;
`keep_to_text_` keeps it from any token but text, for systems that suppress no more than users do.
"""

from __future__ import annotations

import random
from functools import cache
from typing import TYPE_CHECKING, TypeVar
from zlib import crc32

import torch
from transformers import (
    AddedToken,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.configuration_whisper import NON_SPEECH_TOKENS_MULTI

from whisper_flash_attention.benchmark.settings import DECODER_POSITIONS, ModelSize
from whisper_flash_attention.weights.tokens import (
    SpecialTokens,
    generation_values,
    known_alignment_heads,
    timestamp_names,
)

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

    Model = TypeVar("Model", bound=WhisperForConditionalGeneration)


# Standard deviations, in units of 1 / sqrt(inputs) for matrices. 1.5 for queries and keys makes
# attention scores spread by 2.25, so that of 1,500 keys about ten share the weight.
QUERY_KEY_GAIN = 1.5
VALUE_GAIN = 2.0
CONVOLUTION_GAIN = 2.0
BIAS = 0.1
NORM = 0.2
TOKEN_EMBEDDING = 0.05
POSITION_EMBEDDING = 1.5

END = 50257


def whisper_config(size: ModelSize, decoder_layers: int) -> WhisperConfig:
    """Configuration of a multilingual checkpoint of this size, its decoder cut to this depth."""
    return WhisperConfig(
        vocab_size=size.vocabulary,
        num_mel_bins=size.mel_bins,
        d_model=size.d_model,
        encoder_layers=size.encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=size.ffn,
        decoder_ffn_dim=size.ffn,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=END + 1,
        begin_suppress_tokens=(220, END),
    )


def generation_config(vocabulary: int) -> GenerationConfig:
    """English transcription without timestamps, as the multilingual checkpoints define it.

    Special and timestamp tokens are suppressed as well: random weights would generate them, and
    `generate` cuts its output at timestamps.
    """
    extra = vocabulary - 51865  # large-v3 has one more language, which moves what follows
    special = range(END + 1, vocabulary)
    return GenerationConfig.from_dict(
        {
            "decoder_start_token_id": END + 1,
            "pad_token_id": END,
            "bos_token_id": END,
            "eos_token_id": END,
            "is_multilingual": True,
            "language": "en",
            "task": "transcribe",
            "lang_to_id": {"<|en|>": 50259},
            "task_to_id": {"translate": 50358 + extra, "transcribe": 50359 + extra},
            "no_timestamps_token_id": 50363 + extra,
            "return_timestamps": False,
            "suppress_tokens": sorted({*NON_SPEECH_TOKENS_MULTI, *special}),
            "begin_suppress_tokens": [220, END],
        }
    )


def perturb_(model: torch.nn.Module, seed: int = 0) -> None:
    """Redraw every weight of a Whisper model in place; the module's docstring has the purpose.

    The encoder's sinusoidal positions stay. Values depend on the parameter's name, shape, device
    and `seed` alone; they are drawn in float32 and rounded to the parameter's dtype.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("encoder.embed_positions.weight"):
                continue
            generator = torch.Generator(parameter.device)
            generator.manual_seed(crc32(name.encode()) ^ seed)
            noise = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
            mean, deviation = _distribution(name, parameter)
            parameter.copy_(noise.normal_(mean, deviation, generator=generator))


def _distribution(name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the parameter of this name."""
    *_, module, kind = name.split(".")
    if kind == "bias":
        return 0.0, BIAS
    if module.endswith("layer_norm"):
        return 1.0, NORM
    if module == "embed_positions":
        return 0.0, POSITION_EMBEDDING
    if module in ("embed_tokens", "proj_out"):
        return 0.0, TOKEN_EMBEDDING
    inputs = parameter[0].numel()
    gain = 1.0
    if module in ("q_proj", "k_proj"):
        gain = QUERY_KEY_GAIN
    elif module == "v_proj":
        gain = VALUE_GAIN
    elif module.startswith("conv"):
        gain = CONVOLUTION_GAIN
    return 0.0, gain / inputs**0.5


def build_model(
    model_class: type[Model],
    size: ModelSize,
    decoder_layers: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Model:
    """A model in evaluation mode with `perturb_`-ed weights, made on the device.

    Args:
        model_class: `WhisperForConditionalGeneration` or a class with the same parameters.
        size: dimensions; the encoder has its full depth.
        decoder_layers: depth of the decoder.
        device: where the weights are made.
        dtype: what the weights, drawn in float32, are rounded to.
        seed: another seed gives other weights.
    """
    with torch.device(device):
        model: Model = model_class(whisper_config(size, decoder_layers))
    model.generation_config = generation_config(size.vocabulary)
    perturb_(model, seed)
    torch.nn.Module.to(model, dtype)  # as `model.to`, whose wrapper has lost its types
    model.train(False)
    if torch.device(device).type == "cuda":
        _close_holes(model)
    return model


def _close_holes(model: torch.nn.Module) -> None:
    """Place the weights one after another, as loading does: they lie where float32 ones were.

    The holes between would be memory that the driver counts, and that some systems fill.
    """
    placed = [(parameter, parameter.device) for parameter in model.parameters()]
    for parameter, _ in placed:
        parameter.data = parameter.data.cpu()
    torch.cuda.empty_cache()
    for parameter, device in placed:
        parameter.data = parameter.data.to(device)


LETTERS = "etaoinshrdlucmfwygpbvkxqjz"
BLANK = "Ġ"  # as GPT-2's vocabulary writes it


def random_processor(size: ModelSize) -> WhisperProcessor:
    """A processor whose tokenizer has the ids of a multilingual checkpoint of this size."""
    tokens = special_tokens(size)
    names = text_names(tokens.end_of_text)
    tokenizer = WhisperTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[])
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *tokens.language_ids,
        *("<|translate|>", "<|transcribe|>", "<|startoflm|>"),
        *("<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
    ]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(name, special=False) for name in timestamp_names()])
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=size.mel_bins), tokenizer)


def special_tokens(size: ModelSize) -> SpecialTokens:
    """The ids of the special tokens of a vocabulary of this size."""
    tokens = SpecialTokens.of_vocabulary(size.vocabulary)
    assert tokens is not None
    return tokens


@cache
def text_names(count: int) -> tuple[str, ...]:
    """Distinct names of `count` text tokens: letters, and words of two to eight of them."""
    draw = random.Random(0)
    names = dict.fromkeys(LETTERS)
    while len(names) < count:
        word = "".join(draw.choices(LETTERS, k=draw.randint(2, 8)))
        names.setdefault(BLANK + word if draw.random() < 0.7 else word)
    return tuple(names)


def talking_config(size: ModelSize, decoder_layers: int) -> GenerationConfig:
    """The generation config of a checkpoint of this size, whose only timestamp is <|0.00|>."""
    tokens = special_tokens(size)
    beyond = range(tokens.first_timestamp + 1, size.vocabulary)
    values = generation_values(
        tokens,
        max_length=DECODER_POSITIONS,
        suppress=sorted({*tokens.suppressed, *beyond}),
        alignment_heads=known_alignment_heads(
            size.encoder_layers, decoder_layers, size.heads, size.vocabulary
        ),
    )
    return GenerationConfig(**values)


# How much less likely tokens beyond text are, in logits; <|0.00|> half as much.
BEYOND_TEXT = 100.0


def keep_to_text_(model: WhisperForConditionalGeneration) -> None:
    """Make a random model choose text tokens, and the timestamp <|0.00|> where one must be.

    Suppressing the others costs time that checkpoints of users do not take: CTranslate2 sorts the
    suppressed tokens of all rows anew in every step, in time that grows with the square of their
    number. So here one feature of the last norm is the same everywhere, and counts against them.
    """
    tokens = SpecialTokens.of_vocabulary(model.config.vocab_size)
    assert tokens is not None
    decoder = model.model.decoder
    with torch.no_grad():
        decoder.layer_norm.weight[0], decoder.layer_norm.bias[0] = 0.0, BEYOND_TEXT
        share = decoder.embed_tokens.weight[:, 0]
        share[:END], share[END:], share[tokens.first_timestamp] = 0.0, -1.0, -0.5


# What the last norm is multiplied with, so that a token has most of the probability.
CERTAINTY = 8.0
# Length of the position at which the end follows, beside which layers add little.
END_LENGTH = 1000.0


def recite_(model: WhisperForConditionalGeneration, tokens: int) -> None:
    """Make a random model end every window after the same `tokens` tokens, without fallback.

    Requests then need no limits of their own, and two passes over live sound agree. Every product
    is computed as before: the decoder multiplies what it takes from the encoder by zero.

    Args:
        tokens: of a window whose prompt has no text.
    """
    decoder = model.model.decoder
    with torch.no_grad():
        for layer in decoder.layers:
            layer.encoder_attn.out_proj.weight.zero_()
            layer.encoder_attn.out_proj.bias.zero_()
        decoder.layer_norm.weight.mul_(CERTAINTY)
        end = decoder.embed_tokens.weight[END]
        # The token after position 2, the last of the prompt, is the first.
        decoder.embed_positions.weight[2 + tokens] = end / end.norm() * END_LENGTH
