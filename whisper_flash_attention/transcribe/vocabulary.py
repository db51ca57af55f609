"""Whisper's special tokens, and the prompts that are made of them.

Multilingual models and English-only ones have other ids, and the latter no languages nor tasks.
A prompt is what was said before, then the start, then the language and the task: "Robust Speech
Recognition via Large-Scale Weak Supervision" (Radford et al., 2022), figure 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whisper_flash_attention.errors import WeightsError

# Seconds between two timestamps.
PRECISION = 0.02


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a model's special tokens.

    Args:
        start, end: <|startoftranscript|> and <|endoftext|>.
        no_timestamps: <|notimestamps|>; the timestamps are all ids behind it.
        languages: ids by code; empty for an English-only model.
        tasks: ids of "transcribe" and "translate"; empty likewise.
        suppressed: never said; at_begin: not as the first token.
        positions: tokens of a window at most, the prompt included.
    """

    start: int
    end: int
    no_timestamps: int
    languages: dict[str, int]
    tasks: dict[str, int]
    suppressed: tuple[int, ...]
    at_begin: tuple[int, ...]
    positions: int

    @classmethod
    def of(cls, model: Any) -> Vocabulary:
        """The ids that a model's generation config names.

        Raises:
            WeightsError: the config is too old to know timestamps or languages, or names no single
                token for the start, the end or <|notimestamps|>.
        """
        config = model.generation_config
        multilingual = getattr(config, "is_multilingual", None)
        if multilingual is None or not hasattr(config, "no_timestamps_token_id"):
            raise _too_old("is_multilingual or no_timestamps_token_id")
        languages = getattr(config, "lang_to_id", None) or {}
        if multilingual and not languages:
            raise _too_old("lang_to_id")
        for name in ("decoder_start_token_id", "eos_token_id", "no_timestamps_token_id"):
            if type(getattr(config, name, None)) is not int:
                raise WeightsError(
                    f"the model's generation config has {name} {getattr(config, name, None)!r}, "
                    "expected one token id"
                )
        tasks = dict(getattr(config, "task_to_id", None) or {}) if multilingual else {}
        if multilingual and not {"transcribe", "translate"} <= tasks.keys():
            raise _too_old("task_to_id")
        # The four ids before <|notimestamps|> are special, too, and the timestamps follow it.
        if not 4 <= config.no_timestamps_token_id < model.config.vocab_size - 1:
            raise WeightsError(
                f"the model's generation config has no_timestamps_token_id "
                f"{config.no_timestamps_token_id}, of {model.config.vocab_size} tokens"
            )
        codes = {token.strip("<|>"): number for token, number in languages.items()}
        return cls(
            start=config.decoder_start_token_id,
            end=config.eos_token_id,
            no_timestamps=config.no_timestamps_token_id,
            languages=codes if multilingual else {},
            tasks=tasks,
            suppressed=tuple(config.suppress_tokens or ()),
            at_begin=tuple(config.begin_suppress_tokens or ()),
            positions=model.config.max_target_positions,
        )

    @property
    def timestamp_begin(self) -> int:
        """The id of <|0.00|>."""
        return self.no_timestamps + 1

    @property
    def no_speech(self) -> int:
        """<|nospeech|> (<|nocaptions|> in older tokenizers)."""
        return self.no_timestamps - 1

    @property
    def previous(self) -> int:
        """<|startofprev|>."""
        return self.no_timestamps - 2

    @property
    def steering(self) -> tuple[int, ...]:
        """What is said to the model, and never by it: starts, tasks, <|nospeech|>."""
        language_model = self.no_timestamps - 3  # <|startoflm|>
        starts = (self.start, self.previous, language_model)
        return (*starts, *self.tasks.values(), self.no_speech)

    @property
    def room_before(self) -> int:
        """The most tokens of what was said before."""
        return self.positions // 2 - 1

    def prompt(
        self,
        language: str,
        task: str,
        before: Sequence[int] = (),
        *,
        without_timestamps: bool = False,
    ) -> list[int]:
        """The prompt of a window, with as much of what was said before as there is room for."""
        kept = list(before)[-self.room_before :] if before else []
        prompt = [self.previous, *kept] if kept else []
        prompt.append(self.start)
        if self.languages:
            prompt += [self.languages[language], self.tasks[task]]
        if without_timestamps:
            prompt.append(self.no_timestamps)
        return prompt

    def sample_begin(self, prompt: Sequence[int]) -> int:
        """Where in a prompt the result begins: what stands there is its prefix."""
        behind = list(prompt).index(self.start) + (3 if self.languages else 1)
        return behind + (list(prompt[behind : behind + 1]) == [self.no_timestamps])

    def seconds(self, timestamp: int) -> float:
        """The time that a timestamp's id says, from the beginning of its window."""
        return (timestamp - self.timestamp_begin) * PRECISION


def _too_old(missing: str) -> WeightsError:
    return WeightsError(
        f"the model's generation_config.json is too old: it lacks {missing}; take it from the "
        "openai/whisper-* model that it came from"
    )
