"""A small random Whisper with a multilingual configuration, in the stock class and in ours."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers import WhisperForConditionalGeneration as Stock

from tests.random_whisper import perturbed, small_whisper_config
from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.hf import fallback, fast_path

# In the order of the multilingual models: text, end, start, languages, tasks, <|startofprev|>,
# <|nospeech|>, <|notimestamps|>, timestamps.
END, START, ENGLISH, GERMAN, FRENCH, TRANSLATE, TRANSCRIBE, PREVIOUS = range(400, 408)
NO_SPEECH, NO_TIMESTAMPS, FIRST_TIMESTAMP, VOCABULARY = 408, 409, 410, 510
# Of random weights whose answers repeat little.
SEED, SCALE = 1, 0.15
SPECIAL = [1, 2, 7, *range(START, NO_SPEECH + 1)]


def small_generation_config(**changes: Any) -> GenerationConfig:
    """As openai/whisper-base has it, over 510 tokens; random weights would say timestamps, too."""
    options: dict[str, Any] = {
        "decoder_start_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
        "bos_token_id": END,
        "max_length": 16,
        "suppress_tokens": [*SPECIAL, *range(FIRST_TIMESTAMP, VOCABULARY)],
        "begin_suppress_tokens": [220, END],
        "no_timestamps_token_id": NO_TIMESTAMPS,
        "prev_sot_token_id": PREVIOUS,
        "is_multilingual": True,
        "return_timestamps": False,
        "max_initial_timestamp_index": 50,
        "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN, "<|fr|>": FRENCH},
        "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
    }
    return GenerationConfig(**(options | changes))


@dataclass
class Twins:
    """The same weights and configuration in the stock class (eager) and in ours."""

    stock: Stock
    ours: Ours

    def configure(self, **changes: Any) -> None:
        """Give both the small configuration, changed."""
        for model in (self.stock, self.ours):
            model.generation_config = small_generation_config(**changes)

    def splitting_token(self, features: torch.Tensor, **options: Any) -> int:
        """A token that, taken as the end, ends the rows of a greedy answer at different places."""
        rows = self.stock.generate(features, **options).tolist()

        def places(token: int) -> set[int]:
            return {row.index(token) if token in row else len(row) for row in rows}

        tokens = sorted(set(itertools.chain(*rows)))
        token = max(tokens, key=lambda each: (min(places(each)) > 0, len(places(each))))
        assert min(places(token)) > 0
        assert len(places(token)) > 1
        return int(token)


def make_twins(**changes: Any) -> Twins:
    tokens = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END}
    config = small_whisper_config(
        vocab_size=VOCABULARY,
        max_source_positions=40,
        max_target_positions=64,
        decoder_start_token_id=START,
        **tokens,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        ours = perturbed(Ours(copy.deepcopy(config)), scale=SCALE)
    stock = Stock._from_config(copy.deepcopy(config), attn_implementation="eager")
    stock.load_state_dict(ours.state_dict())
    twins = Twins(stock.eval(), ours)
    twins.configure()
    return twins


@pytest.fixture(scope="session")
def _twins() -> Twins:
    return make_twins()


@pytest.fixture
def twins(_twins: Twins) -> Iterator[Twins]:
    _twins.configure()
    fast_path.forget(_twins.ours)
    yield _twins
    _twins.ours.set_attn_implementation("auto")
    _twins.ours.cross_attention = "auto"


@pytest.fixture
def features() -> torch.Tensor:
    """Log-mel features of three clips of one window each."""
    return torch.randn(3, 80, 80, generator=torch.Generator().manual_seed(3))


@dataclass
class Counts:
    """Decodes and encodes that the engine finished, and calls that tried the short way."""

    decodes: int = 0
    encodes: int = 0
    short: int = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    found = Counts()

    def counted(owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if name == "short":
                found.short += 1
                return original(*args, **kwargs)
            result = original(*args, **kwargs)
            setattr(found, name, getattr(found, name) + 1)
            return result

        monkeypatch.setattr(owner, method, wrapper)

    counted(Engine, "decode", "decodes")
    counted(Engine, "encode", "encodes")
    counted(fast_path.PreparedCall, "run", "short")
    return found


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sentences that this test logs, each once."""
    sentences: list[str] = []
    monkeypatch.setattr(fallback, "_logged", set())
    monkeypatch.setattr(
        fallback.logger, "log", lambda level, text, reason: sentences.append(reason)
    )
    return sentences


Agree = Callable[..., Any]


@pytest.fixture
def agree(twins: Twins) -> Agree:
    """Call both classes alike, ours twice, and require equal outputs; returns stock's."""

    def check(*args: Any, seed: int = 11, **options: Any) -> Any:
        torch.manual_seed(seed)
        expected = twins.stock.generate(*args, **options)
        for _ in range(2):
            torch.manual_seed(seed)
            assert_same(twins.ours.generate(*args, **options), expected)
        return expected

    return check


def assert_same(found: Any, expected: Any) -> None:
    """Equal in type, shape, dtype and value; scores within 1e-4."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is type(expected)
        assert (found.dtype, found.shape, found.device) == (
            expected.dtype,
            expected.shape,
            expected.device,
        )
        assert found.is_contiguous() == expected.is_contiguous()
        if expected.dtype.is_floating_point:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert type(found) is type(expected)
        assert list(found.keys()) == list(expected.keys())
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif hasattr(expected, "self_attention_cache"):
        assert_same_cache(found, expected)
    else:
        assert found == expected


def assert_same_cache(found: Any, expected: Any) -> None:
    assert isinstance(found, type(expected))
    assert len(found) == len(expected)
    for name in ("self_attention_cache", "cross_attention_cache"):
        layers = zip(getattr(found, name).layers, getattr(expected, name).layers, strict=True)
        for one, other in layers:
            torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)
