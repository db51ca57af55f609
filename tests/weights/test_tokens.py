"""Special tokens, suppress lists and alignment heads, against independent sources."""

from __future__ import annotations

import base64
import gzip
import json

import numpy as np
import pytest
from transformers import WhisperTokenizer

from whisper_flash_attention.weights import load_processor, packaged_source
from whisper_flash_attention.weights.tokens import (
    SpecialTokens,
    known_alignment_heads,
    timestamp_names,
)

VOCABULARIES = {"tiny.en": 51864, "base": 51865}


@pytest.fixture(params=VOCABULARIES)
def packaged(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokens(packaged: str) -> SpecialTokens:
    found = SpecialTokens.of_vocabulary(VOCABULARIES[packaged])
    assert found is not None
    return found


@pytest.fixture
def tokenizer(packaged: str) -> WhisperTokenizer:
    return load_processor(f"package:{packaged}").tokenizer


def test_ids_are_those_of_real_tokenizers(
    tokens: SpecialTokens, tokenizer: WhisperTokenizer
) -> None:
    no_speech = {tokenizer.convert_tokens_to_ids(n) for n in ("<|nospeech|>", "<|nocaptions|>")}
    assert tokens.no_speech in no_speech
    assert tokenizer.convert_ids_to_tokens(
        [
            tokens.end_of_text,
            tokens.start_of_transcript,
            tokens.translate,
            tokens.transcribe,
            tokens.start_of_lm,
            tokens.start_of_previous,
            tokens.no_timestamps,
            tokens.first_timestamp,
        ]
    ) == [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|notimestamps|>",
        "<|0.00|>",
    ]


def test_languages_are_those_of_the_multilingual_tokenizer() -> None:
    tokens = SpecialTokens.of_vocabulary(51865)
    assert tokens is not None
    tokenizer = load_processor("package:base").tokenizer
    names = list(tokens.language_ids)
    assert tokenizer.convert_tokens_to_ids(names) == list(tokens.language_ids.values())


def test_suppress_lists_are_those_that_real_checkpoints_carry(
    packaged: str, tokens: SpecialTokens
) -> None:
    config = json.loads((packaged_source(packaged).folder / "config.json").read_text())
    assert list(tokens.suppressed) == config["suppress_ids"]
    assert list(tokens.suppressed_at_begin) == config["suppress_ids_begin"]


def test_suppress_lists_follow_from_the_tokenizer_by_openais_rule(
    tokens: SpecialTokens, tokenizer: WhisperTokenizer
) -> None:
    def encode(string: str) -> list[int]:
        return tokenizer.encode(string, add_special_tokens=False)

    symbols = [*'"#()*+/:;<=>@[\\]^_`{|}~「」『』']
    symbols += ["<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))"]
    symbols += ["(((", ")))", "[[", "]]", "{{", "}}", "♪♪", "♪♪♪"]
    notes = [*"♩♪♫♬♭♮♯"]
    expected = {encode(" -")[0], encode(" '")[0]}
    for symbol in symbols + notes:
        for ids in (encode(symbol), encode(" " + symbol)):
            if len(ids) == 1 or symbol in notes:
                expected.add(ids[0])
    text = {token for token in tokens.suppressed if token < tokens.end_of_text}
    assert text == expected


def test_large_v3_has_cantonese_and_moves_what_follows() -> None:
    tokens = SpecialTokens.of_vocabulary(51866)
    assert tokens is not None
    assert len(tokens.languages) == 100
    assert tokens.language_ids["<|yue|>"] == 50358
    assert (tokens.translate, tokens.transcribe, tokens.no_timestamps) == (50359, 50360, 50364)


@pytest.mark.parametrize("vocabulary", [51864, 51865, 51866])
def test_timestamps_fill_the_vocabulary(vocabulary: int) -> None:
    tokens = SpecialTokens.of_vocabulary(vocabulary)
    assert tokens is not None
    assert tokens.first_timestamp + len(timestamp_names()) == vocabulary


def test_other_vocabularies_have_no_known_tokens() -> None:
    assert SpecialTokens.of_vocabulary(50257) is None


def test_timestamps_run_to_thirty_seconds() -> None:
    names = timestamp_names()
    assert (names[0], names[1], names[-1]) == ("<|0.00|>", "<|0.02|>", "<|30.00|>")


# OpenAI's own encoding: base85 of gzip of a boolean [decoder layers, heads].
OPENAI_HEADS = {
    (4, 4, 6, 51864): b"ABzY8J1N>@0{>%R00Bk>$p{7v037`oCl~+#00",
    (4, 4, 6, 51865): b"ABzY8bu8Lr0{>%RKn9Fp%m@SkK7Kt=7ytkO",
    (6, 6, 8, 51864): b"ABzY8;40c<0{>%RzzG;p*o+Vo09|#PsxSZm00",
    (6, 6, 8, 51865): b"ABzY8KQ!870{>%RzyTQH3`Q^yNP!>##QT-<FaQ7m",
    (12, 12, 12, 51864): b"ABzY8>?_)10{>%RpeA61k&I|OI3I$65C{;;pbCHh0B{qLQ;+}v00",
    (12, 12, 12, 51865): b"ABzY8DmU6=0{>%Rpa?J`kvJ6qF(V^F86#Xh7JUGMK}P<N0000",
    (24, 24, 16, 51864): b"ABzY8usPae0{>%R7<zz_OvQ{)4kMa0BMw6u5rT}kRKX;$NfYBv00*Hl@qhsU00",
    (24, 24, 16, 51865): b"ABzY8B0Jh+0{>%R7}kK1fFL7w6%<-Pf*t^=N)Qr&0RR9",
    (32, 32, 20, 51866): b"ABzY8gWO1E0{>%R7(9S+Kn!D~%ngiGaR?*L!iJG9p-nab0JQ=-{D1-g00",
    (32, 4, 20, 51866): b"ABzY8j^C+e0{>%RARaKHP%t(lGR*)0g!tONPyhe`",
}


@pytest.mark.parametrize("dimensions", OPENAI_HEADS, ids=str)
def test_alignment_heads_are_openais(dimensions: tuple[int, int, int, int]) -> None:
    encoder_layers, decoder_layers, heads, vocabulary = dimensions
    mask = gzip.decompress(base64.b85decode(OPENAI_HEADS[dimensions]))
    expected = np.argwhere(np.frombuffer(mask, dtype=bool).reshape(decoder_layers, heads))
    found = known_alignment_heads(encoder_layers, decoder_layers, heads, vocabulary)
    assert found == tuple((int(layer), int(head)) for layer, head in expected)


@pytest.mark.parametrize(
    "dimensions",
    [(32, 32, 20, 51865), (32, 2, 20, 51866), (4, 4, 8, 51864), (5, 4, 6, 51864)],
    ids=["large v1 or v2", "distilled", "other heads", "other layers"],
)
def test_ambiguous_or_unknown_dimensions_have_no_alignment_heads(
    dimensions: tuple[int, int, int, int],
) -> None:
    assert known_alignment_heads(*dimensions) is None
