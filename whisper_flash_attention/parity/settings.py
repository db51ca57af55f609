"""What is compared, and how near a tie must be to explain a difference.

Nothing here imports PyTorch or Transformers, so that `--help` and refusals are quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whisper_flash_attention.errors import OptionError

TEMPERATURE = 0.7
BEAMS = 5

BOUNDS: Mapping[str, float] = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.7}
"""Largest gap, in logits, that explains a difference, by dtype.

Measured on tiny.en and 524 positions of speech, with stock's eager float32 logits as the truth, as
the error in the distance between the likeliest token and the nine after it: stock float16 is off
by up to 0.045, stock bfloat16 by up to 0.36, our float32 by up to 5e-5. Where two tokens change
places both sides can be off, so that half precision gets twice its error. Float32 gets 20 times
its error, for models of more layers.
"""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of decoding: the options that both models' `generate` gets."""

    name: str
    summary: str
    options: Mapping[str, Any]

    @property
    def beams(self) -> int:
        """Beams per recording; 1 for other ways."""
        return int(self.options["num_beams"])

    @property
    def has_timestamps(self) -> bool:
        """Whether timestamp tokens may come out."""
        return bool(self.options["return_timestamps"])


MODES: Mapping[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            "greedy",
            "the likeliest token at every step",
            {"return_timestamps": False, "num_beams": 1},
        ),
        Mode(
            "timestamps",
            "greedy, with timestamps, one window",
            {"return_timestamps": True, "num_beams": 1, "force_unique_generate_call": True},
        ),
        Mode("beams", f"{BEAMS} beams", {"return_timestamps": False, "num_beams": BEAMS}),
        Mode(
            "sampled",
            f"sampled at temperature {TEMPERATURE} with a seed, one recording at a time",
            {"return_timestamps": False, "num_beams": 1, "temperature": TEMPERATURE},
        ),
    )
}


@dataclass(frozen=True, slots=True)
class ParityOptions:
    """What to compare.

    Args:
        modes: names in `MODES`, in the order in which they are run; none means all.
        batch_size: recordings per call; sampling always takes one.
        limit: at most so many recordings; None takes all.
        language: code or name of the language spoken, for multilingual models; "auto" has stock
            detect it, compares that detection, and gives the same language to both models.
        tolerance: gap in logits that explains a difference; None takes that of the dtype.
        seed: of the random numbers of the sampled mode.

    Raises:
        OptionError: a value is unknown or impossible.
    """

    modes: Sequence[str] = ()
    batch_size: int = 8
    limit: int | None = None
    language: str = "auto"
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.modes:
            if name not in MODES:
                raise OptionError(f"unknown mode {name!r}; possible: {', '.join(MODES)}")
        for what, value in (("batch size", self.batch_size), ("limit", self.limit)):
            if value is not None and value < 1:
                raise OptionError(f"{what} {value}: give a whole number from 1 on")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise OptionError(f"tolerance {self.tolerance:g}: give a gap in logits, from 0 on")
        if self.seed < 0:
            raise OptionError(f"seed {self.seed}: give a whole number from 0 on")

    def chosen_modes(self) -> tuple[Mode, ...]:
        """The modes to run, each once."""
        return tuple(MODES[name] for name in dict.fromkeys(self.modes or MODES))

    def bound(self, dtype: str) -> float:
        """The gap in logits that explains a difference in this dtype ("float16")."""
        return BOUNDS[dtype] if self.tolerance is None else self.tolerance
