"""Plain calls: the second one of a kind goes the short way and returns what stock returns."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.hf.conftest import (
    END,
    FIRST_TIMESTAMP,
    PREVIOUS,
    SPECIAL,
    VOCABULARY,
    Agree,
    Counts,
    Twins,
    make_twins,
)
from whisper_flash_attention.hf import fast_path

STAMPED: dict[str, Any] = {"return_timestamps": True, "suppress_tokens": SPECIAL}
PLAIN: dict[str, dict[str, Any]] = {
    "defaults": {},
    "language": {"language": "en"},
    "languages": {"language": ["de", "en", "fr"]},
    "task": {"language": "de", "task": "translate"},
    "lengths": {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False},
    "max-length": {"max_length": 12},
    "min-length": {"min_length": 9, "max_new_tokens": 9},
    "temperature": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "do_sample": True, "top_k": 20},
    "nucleus": {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
    "rows": {"do_sample": True, "temperature": 1.2, "num_return_sequences": 3, "language": "de"},
    "rows-detected": {"do_sample": True, "temperature": 0.5, "num_return_sequences": 2},
    "suppress": {"suppress_tokens": [*range(50), *range(END, VOCABULARY)]},
    "begin-suppress": {"begin_suppress_tokens": list(range(0, 400, 2))},
    "repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "one-window": {"force_unique_generate_call": True},
    "timestamps": {"force_unique_generate_call": True, **STAMPED},
    "prompt": {"prompt_ids": torch.tensor([PREVIOUS, 33, 44]), "language": "en"},
    "prompt-detected": {"prompt_ids": torch.tensor([PREVIOUS, 33, 44])},
    "mask": {"attention_mask": torch.ones(3, 80, dtype=torch.int64)},
    "dictionary": {"return_dict_in_generate": True},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "one-window-scores": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "force_unique_generate_call": True,
        **STAMPED,
    },
    "config": {"generation_config": GenerationConfig(max_new_tokens=4)},
    "none": {"language": None, "task": None, "temperature": None, "return_timestamps": None},
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_second_call_goes_the_short_way_and_is_stock(
    agree: Agree, features, counts: Counts, name: str
) -> None:
    agree(features, **PLAIN[name])
    assert counts.short == 1


@pytest.mark.parametrize("name", ["defaults", "dictionary", "sampled", "one-window", "rows"])
@pytest.mark.parametrize("pad", ["end", "other"])
def test_rows_that_end_at_different_places(
    twins: Twins, agree: Agree, features, counts: Counts, name: str, pad: str
) -> None:
    end = twins.splitting_token(features, language="en")
    twins.configure(eos_token_id=end, pad_token_id=end if pad == "end" else 9)
    options = PLAIN[name] | {"language": "en"}
    if "temperature" in options:
        options["temperature"] = 0.05
    sequences = agree(features, **options)
    ids = sequences if isinstance(sequences, torch.Tensor) else sequences["sequences"]
    assert (ids == twins.ours.generation_config.pad_token_id).any()
    assert counts.short == 1


def test_one_clip_given_by_name(agree: Agree, features, counts: Counts) -> None:
    agree(input_features=features[:1], language="en")
    assert counts.short == 1


def test_other_audio_of_the_same_kind(twins: Twins, features, counts: Counts) -> None:
    """Languages are detected anew, ends fall elsewhere, and a second window is left to stock."""
    end = twins.splitting_token(features)
    languages = {f"<|{token}|>": token for token in range(100, 160)}
    twins.configure(eos_token_id=end, pad_token_id=end, lang_to_id=languages)
    detected = set()
    for seed in range(8):
        other = torch.randn(3, 80, 80, generator=torch.Generator().manual_seed(seed)) * 2
        found, expected = twins.ours.generate(other), twins.stock.generate(other)
        assert torch.equal(found, expected)
        detected |= set(twins.stock.detect_language(other).tolist())
    assert len(detected) > 1
    assert counts.short >= 6


def test_a_second_window_is_left_to_stock(twins: Twins, agree: Agree, features, counts) -> None:
    """Timestamps that are not suppressed may come in pairs: stock then decodes another window."""
    options = {"language": "en", "suppress_tokens": all_but(*LATE_STAMPS), "max_new_tokens": 8}
    assert count_windows(twins, features, options) > 1
    agree(features, **options)
    agree(features, temperature=1.0, **options)


# Stamps of 0.3 s and later in a window of 0.8 s, so that stock's loop is at its end soon.
LATE_STAMPS = range(FIRST_TIMESTAMP + 15, FIRST_TIMESTAMP + 21)


def all_but(*tokens: int) -> list[int]:
    return [token for token in range(VOCABULARY) if token not in tokens]


def count_windows(twins: Twins, features: torch.Tensor, options: dict[str, Any]) -> int:
    windows = []
    twins.stock.generate(features, monitor_progress=windows.append, **options)
    return len(windows)


def test_a_prepared_call_meets_a_second_window(twins: Twins, features, counts: Counts) -> None:
    """The kind of call is prepared with audio of one window; other audio needs a second one."""
    allowed = all_but(300, 301, 302, *LATE_STAMPS)
    options = {"language": "en", "suppress_tokens": allowed, "max_new_tokens": 2}
    outcomes = set()
    for seed, sampled in itertools.product(range(10), (False, True)):
        clip = torch.randn(1, 80, 80, generator=torch.Generator().manual_seed(seed)) * 3
        more = {"temperature": 3.0} if sampled else {}
        torch.manual_seed(seed)
        windows = []
        expected = twins.stock.generate(clip, monitor_progress=windows.append, **options, **more)
        before = counts.short
        torch.manual_seed(seed)
        assert torch.equal(twins.ours.generate(clip, **options, **more), expected)
        outcomes.add((len(windows) > 1, counts.short > before))
    assert (True, True) in outcomes


@pytest.mark.parametrize(
    "options",
    [
        {"return_timestamps": True},
        {"return_segments": True, "return_timestamps": True},
        {"temperature": (0.0, 0.4)},
        {"max_time": 100.0},
        {"logprob_threshold": -1.0, "temperature": 0.0},
        {"bad_words_ids": [[3]]},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_calls_go_through_transformers(agree, features, counts, options) -> None:
    agree(features, language="en", max_new_tokens=5, **options)
    assert counts.short == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"language": "klingon"},
        {"language": ["en"]},
        {"language": 7},
        {"task": "sing"},
        {"max_new_tokens": 1000},
        {"max_new_tokens": -3},
        {"temperature": -1.0, "do_sample": True},
        {"top_p": 3.0, "temperature": 1.0},
        {"repetition_penalty": -2.0},
        {"nonsense": True},
        {"prompt_ids": [1, 2]},
        {"return_segments": 3, "return_token_timestamps": True},
        {"min_new_tokens": "four"},
        {"num_return_sequences": 0},
        {"num_return_sequences": 2, "temperature": 0.0, "num_beams": 1, "do_sample": False},
    ],
    ids=str,
)
def test_bad_options_fail_as_in_stock(twins: Twins, features, wrong: dict[str, Any]) -> None:
    outcomes = []
    for model in (twins.stock, twins.ours, twins.ours):
        torch.manual_seed(0)
        try:
            outcomes.append((None, model.generate(features, **wrong).tolist()))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(1, 80, 79),
        torch.zeros(1, 80, 40),
        torch.zeros(1, 81, 80),
        torch.zeros(80, 80),
        torch.zeros(1, 80, 80, dtype=torch.float64),
        torch.zeros(1, 80, 80, dtype=torch.int64),
        torch.zeros(0, 80, 80),
        None,
        "audio",
    ],
    ids=lambda inputs: str(getattr(inputs, "shape", inputs)) + str(getattr(inputs, "dtype", "")),
)
def test_odd_features_end_as_in_stock(twins: Twins, inputs: Any) -> None:
    outcomes = []
    for model in (twins.stock, twins.ours, twins.ours):
        try:
            outcomes.append(model.generate(inputs, language="en", max_new_tokens=3).tolist())
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_changed_configuration_is_another_kind(twins: Twins, features, counts: Counts) -> None:
    def both() -> torch.Tensor:
        found = twins.ours.generate(features)
        assert torch.equal(found, twins.stock.generate(features))
        return found

    both(), both()
    assert counts.short == 1
    for change in (
        {"language": "de"},
        {"suppress_tokens": [3, *range(END, VOCABULARY)]},
        {"max_length": 5},
    ):
        for model in (twins.stock, twins.ours):
            for name, value in change.items():
                setattr(model.generation_config, name, copy.copy(value))
        both()
    assert counts.short == 1
    for model in (twins.stock, twins.ours):
        model.generation_config.suppress_tokens += [5, 6]
    both()
    assert counts.short == 1
    both()
    assert counts.short == 2


def test_truth_and_one_are_not_the_same_option(twins: Twins, features) -> None:
    """`return_timestamps=1` adds no timestamp processor in stock, `True` does."""
    options = {"language": "en", "force_unique_generate_call": True}
    for value in (True, 1, True, 1):
        expected = twins.stock.generate(features, return_timestamps=value, **options)
        found = twins.ours.generate(features, return_timestamps=value, **options)
        assert torch.equal(found, expected)


def test_a_model_configuration_that_controls_generation_is_refused(features) -> None:
    twins = make_twins()
    twins.ours.generate(features, language="en")
    twins.ours.config.max_length = 5
    with pytest.raises(ValueError, match="modified the pretrained model configuration"):
        twins.ours.generate(features, language="en")


def test_changed_weights_are_seen(features) -> None:
    twins = make_twins()
    for _ in range(2):
        twins.ours.generate(features, language="en")
    with torch.no_grad():
        for model in (twins.stock, twins.ours):
            model.model.decoder.layers[0].fc1.weight.mul_(-1)
    expected = twins.stock.generate(features, language="en")
    assert torch.equal(twins.ours.generate(features, language="en"), expected)
    for model in (twins.stock, twins.ours):
        fresh = torch.nn.Linear(128, 256)
        fresh.load_state_dict(
            {k: v.flip(0) for k, v in model.model.decoder.layers[1].fc1.state_dict().items()}
        )
        model.model.decoder.layers[1].fc1 = fresh
    expected = twins.stock.generate(features, language="en")
    assert torch.equal(twins.ours.generate(features, language="en"), expected)


def test_a_subclass_that_changes_stock_methods_goes_the_long_way(features, counts) -> None:
    twins = make_twins()

    class Always(type(twins.ours)):
        def _retrieve_init_tokens(self, *args, **kwargs):
            return super()._retrieve_init_tokens(*args, **kwargs)

    class Named(type(twins.ours)):
        def shout(self):
            return "!"

    for subclass, short in ((Always, 0), (Named, 1)):
        twins.ours.__class__ = subclass
        counts.short = 0
        for _ in range(2):
            twins.ours.generate(features, language="en")
        assert counts.short == short


def test_transformers_notes_on_options_come_with_the_first_call(
    twins, features, monkeypatch
) -> None:
    notes: list[str] = []
    logger = logging.getLogger("transformers.generation.utils")
    monkeypatch.setattr(logger, "warning", lambda message, *_: notes.append(message))
    for _ in range(3):
        twins.ours.generate(features, language="en", max_new_tokens=7)
    assert "".join(notes).count("`max_new_tokens` will take precedence") == 1


def test_warnings_about_lengths_come_with_every_call(twins: Twins, features) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="Unfeasible length constraints"):
            twins.ours.generate(features, language="en", max_length=5, min_length=40)


def test_kept_calls_do_not_grow_without_bound(twins: Twins, features, monkeypatch) -> None:
    monkeypatch.setattr(fast_path, "MAX_PREPARED_CALLS", 4)
    for length in range(2, 9):
        twins.ours.generate(features, language="en", max_new_tokens=length)
    assert 0 < len(fast_path._prepared[twins.ours]) <= 4


def test_language_detection_encodes_once(twins: Twins, features, counts: Counts) -> None:
    for calls in (1, 2):
        found = twins.ours.generate(features)
        assert counts.encodes == calls
    assert torch.equal(found, twins.stock.generate(features))
