from __future__ import annotations

import pytest

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.parity.cases import BOUNDS, MODES, ParityOptions


def test_no_modes_mean_all_and_repeated_ones_run_once() -> None:
    assert [mode.name for mode in ParityOptions().chosen_modes()] == list(MODES)
    chosen = ParityOptions(modes=("beams", "greedy", "beams")).chosen_modes()
    assert [mode.name for mode in chosen] == ["beams", "greedy"]


def test_a_tolerance_is_for_every_dtype() -> None:
    assert ParityOptions().bound("float16") == BOUNDS["float16"]
    assert ParityOptions(tolerance=0.0).bound("bfloat16") == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modes": ("fast",)}, "unknown mode 'fast'; possible: greedy, timestamps"),
        ({"batch_size": 0}, "batch size 0: give a whole number"),
        ({"limit": 0}, "limit 0: give a whole number"),
        ({"tolerance": -1.0}, "tolerance -1: give a gap"),
        ({"tolerance": float("nan")}, "tolerance nan: give a gap"),
        ({"seed": -1}, "seed -1: give a whole number"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ParityOptions(**values)
