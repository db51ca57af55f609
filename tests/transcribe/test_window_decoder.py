"""Windows decoded again at higher temperatures, on an engine that results from a script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from tests.transcribe.test_segmentation import WORDS
from whisper_flash_attention.engine.request import DecodeOutput, Request
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.tokenizer import Vocabulary
from whisper_flash_attention.transcribe.window_decoder import (
    WindowDecoder,
    compression_ratio,
    has_words,
)

GOOD, REPEATS, UNLIKELY = 1, 2, 3


@dataclass
class ScriptedEngine:
    """Says by a window's first state what it decodes to, and records its requests.

    `script[kind]` holds, per temperature, the text's token and the mean log-probability.
    """

    script: dict[int, list[tuple[int, float]]]
    silence: float = 0.1
    requests: list[tuple[float, list[int]]] = field(default_factory=list)

    def decode(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        request: Request,
        meanwhile: Callable[[], None],
    ) -> DecodeOutput:
        meanwhile()
        kinds = states[:, 0, 0].int().tolist()
        probability = None
        if request.probe is not None:
            token, place = request.probe
            assert token == WORDS.no_speech and (prompt[:, place] == WORDS.start).all()
            probability = torch.full((len(kinds),), self.silence)
        self.requests.append((request.temperature if request.sample else 0.0, kinds))
        step = sum(1 for _, requests in self.requests[:-1] if set(requests) & set(kinds))
        rows, sums = [], []
        for kind in kinds:
            token, mean = self.script[kind][min(step, len(self.script[kind]) - 1)]
            rows.append([token] * 5 + [WORDS.end])
            sums.append(mean * 6)
        result = torch.tensor(rows)
        sequences = torch.cat([prompt, result], 1)
        return DecodeOutput(
            sequences, sum_logprobs=torch.tensor(sums), probe_probability=probability
        )


class Tokenizer:
    """Token 7 repeats itself, 8 describes a sound."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        if 7 in tokens:
            return " the same" * 40
        if 8 in tokens:
            return " [Music] (wind"
        return "words " + "".join(chr(65 + token % 26) for token in tokens)


def decoder(
    engine: ScriptedEngine, vocabulary: Vocabulary = WORDS, **options: Any
) -> WindowDecoder:
    return WindowDecoder(engine, vocabulary, Tokenizer(), DecodeOptions(**options))  # type: ignore[arg-type]


def states(*kinds: int) -> torch.Tensor:
    return torch.tensor(kinds).float()[:, None, None].expand(-1, 4, 8).contiguous()


SCRIPT = {
    GOOD: [(9, -0.2)],
    REPEATS: [(7, -0.2), (7, -0.3), (9, -0.4)],
    UNLIKELY: [(9, -2.0), (9, -1.5), (9, -0.5)],
}


def test_results_that_need_fallback_are_decoded_again_and_only_those() -> None:
    engine = ScriptedEngine(SCRIPT)
    prompt = WORDS.prompt("en", "transcribe")
    found = decoder(engine).decode(states(GOOD, REPEATS, UNLIKELY), [prompt] * 3)
    assert [result.temperature for result in found] == [0.0, 0.4, 0.4]
    assert [round(result.avg_logprob, 3) for result in found] == [-0.2, -0.4, -0.5]
    assert engine.requests == [
        (0.0, [GOOD, REPEATS, UNLIKELY]),
        (0.2, [REPEATS, UNLIKELY]),
        (0.4, [REPEATS, UNLIKELY]),
    ]
    assert found[0].tokens == (9,) * 5


@pytest.mark.parametrize(
    ("results", "best"),
    [
        ([(9, -2.0), (9, -1.5), (9, -3.0)], 0.2),
        ([(7, -0.1), (9, -2.5), (9, -1.8)], 0.8),
        ([(7, -0.3), (7, -0.1), (7, -0.2)], 0.2),
    ],
)
def test_where_all_results_need_fallback_the_likeliest_without_repetition_is_taken(
    results: list[tuple[int, float]], best: float
) -> None:
    windows = decoder(ScriptedEngine({REPEATS: results}), temperature=(0.0, 0.2, 0.8))
    [result] = windows.decode(states(REPEATS), [[WORDS.start]])
    assert result.temperature == best
    assert windows.needs_fallback(result)


@pytest.mark.parametrize("temperature", [0.0, (0.0, 0.5)])
def test_the_host_is_given_time_once(temperature: Any) -> None:
    windows = decoder(ScriptedEngine(SCRIPT), temperature=temperature)
    short, long = WORDS.prompt("en", "transcribe"), WORDS.prompt("en", "transcribe", [5, 6])
    calls: list[int] = []
    later = windows.decode_first(states(GOOD, REPEATS), [short, long], lambda: calls.append(1))
    assert calls == [1]
    assert [result.tokens for result in later()] == [(9,) * 5, (7,) * 5]


def test_thresholds_may_be_left_out() -> None:
    engine = ScriptedEngine(SCRIPT)
    options = {"compression_ratio_threshold": None, "logprob_threshold": None}
    found = decoder(engine, **options).decode(states(REPEATS, UNLIKELY), [[WORDS.start]] * 2)
    assert [result.temperature for result in found] == [0.0, 0.0]


def test_silence_is_not_decoded_again() -> None:
    engine = ScriptedEngine(SCRIPT, silence=0.9)
    windows = decoder(engine)
    results = windows.decode(states(UNLIKELY, GOOD), [[WORDS.start]] * 2)
    assert [result.temperature for result in results] == [0.0, 0.0]
    assert [windows.is_silent(result) for result in results] == [True, False]
    assert results[0].no_speech_prob == pytest.approx(0.9, abs=1e-3)


# Unlike `WORDS`, a vocabulary with descriptions of sounds, which are suppressed.
DESCRIBING = replace(WORDS, suppressed=(3, *WORDS.steering))
SOUND = 4
SOUNDS = SCRIPT | {SOUND: [(9, -2.0), (8, -0.5)], REPEATS: [(7, -0.2), (9, -0.3), (9, -0.4)]}


@pytest.mark.parametrize("temperature", [0.0, (0.0, 0.2, 0.4)])
def test_a_window_whose_result_is_doubtful_and_that_has_no_words_is_silent(
    temperature: Any,
) -> None:
    engine = ScriptedEngine(SOUNDS)
    windows = decoder(engine, DESCRIBING, temperature=temperature)
    prompt = WORDS.prompt("de", "transcribe", [5, 6])
    sound, speech, good = windows.decode(states(SOUND, REPEATS, GOOD), [prompt] * 3)
    assert [windows.is_silent(each) for each in (sound, speech, good)] == [True, False, False]
    asked_again, *others = engine.requests[1:]
    assert asked_again == (0.0, [SOUND, REPEATS])
    assert others == ([] if temperature == 0.0 else [(0.2, [REPEATS])])
    # What was written with descriptions is no result.
    assert speech.tokens == ((7,) * 5 if temperature == 0.0 else (9,) * 5)
    assert not windows.needs_fallback(sound)


@pytest.mark.parametrize(
    ("mean", "silence", "is_silent"),
    [(-0.2, 0.5, False), (-0.2, 0.7, True), (-2.0, 0.06, True), (-2.0, 0.04, False)],
)
def test_a_result_is_doubtful_by_one_threshold_unless_there_is_certainly_speech(
    mean: float, silence: float, is_silent: bool
) -> None:
    engine = ScriptedEngine({SOUND: [(9, mean), (8, -0.5)]}, silence=silence)
    windows = decoder(engine, DESCRIBING, temperature=0.0)
    [result] = windows.decode(states(SOUND), [[WORDS.start]])
    assert windows.is_silent(result) == is_silent
    assert len(engine.requests) == 1 + is_silent


def test_certain_speech_falls_back_without_being_checked() -> None:
    engine = ScriptedEngine(SOUNDS, silence=0.01)
    [result] = decoder(engine, DESCRIBING).decode(states(UNLIKELY), [[WORDS.start]])
    assert (result.temperature, len(engine.requests)) == (0.4, 3)


def test_descriptions_are_looked_for_in_english_without_context() -> None:
    prompts: list[list[int]] = []

    class Engine(ScriptedEngine):
        def decode(
            self, states: torch.Tensor, prompt: torch.Tensor, request: Request, meanwhile: Any
        ) -> DecodeOutput:
            prompts.append(prompt[0].tolist())
            suppressed = request.processors.kernel_processors
            assert suppressed is not None
            assert (3 in suppressed.suppress) == (len(prompts) == 1)
            return super().decode(states, prompt, request, meanwhile)

    first = WORDS.prompt("de", "translate", [5, 6])
    decoder(Engine(SOUNDS), DESCRIBING).decode(states(SOUND), [first])
    assert prompts == [first, WORDS.prompt("en", "transcribe")]


@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [
        (DESCRIBING, {"check_speech": False}),
        (DESCRIBING, {"suppress_tokens": ()}),
        (WORDS, {}),
        (DESCRIBING, {"no_speech_threshold": None}),
    ],
    ids=["off", "descriptions are wanted", "none are suppressed", "nothing is silence"],
)
def test_descriptions_are_not_always_looked_for(
    vocabulary: Vocabulary, options: dict[str, Any]
) -> None:
    engine = ScriptedEngine(SOUNDS)
    decoder(engine, vocabulary, temperature=0.0, **options).decode(states(SOUND), [[WORDS.start]])
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("[Music] (wind howling) ♪♪", False),
        ("[", False),
        ("(音楽) *sighs* [BLANK_AUDIO", False),
        ("[Music] Yes.", True),
        ("(speaking in foreign language)", True),
        ("[INAUDIBLE]", True),
        ("広州", True),
    ],
)
def test_descriptions_of_sounds_are_no_words(text: str, expected: bool) -> None:
    assert has_words(text) is expected


def test_windows_with_prompts_of_one_length_are_decoded_together() -> None:
    engine = ScriptedEngine(SCRIPT)
    short, long = WORDS.prompt("en", "transcribe"), WORDS.prompt("en", "transcribe", [5, 6])
    found = decoder(engine).decode(states(GOOD, GOOD, GOOD), [short, long, short])
    assert [len(kinds) for _, kinds in engine.requests] == [2, 1]
    assert all(result.tokens == (9,) * 5 for result in found)


def test_text_that_repeats_itself_compresses_well() -> None:
    assert compression_ratio("the same " * 30) > 2.4
    assert compression_ratio("No two of these words are alike, are they?") < 1.3
    assert compression_ratio("") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": ()}, "at least one"),
        ({"temperature": -0.1}, "from 0 to 2"),
        ({"no_speech_threshold": 1.5}, "probability"),
        ({"max_initial_timestamp": 31.0}, "seconds from 0 to 30"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "max_new_tokens 8"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: give a whole number, 1 to"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DecodeOptions(**options)
