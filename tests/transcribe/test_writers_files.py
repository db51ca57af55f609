"""Names that some file systems take for one are found before anything is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe import output
from whisper_flash_attention.transcribe.inputs import Input
from whisper_flash_attention.transcribe.output import Output
from whisper_flash_attention.transcribe.writers.files import colliding, distinguishes_names


def test_names_are_alike_in_case_and_unicode_form() -> None:
    assert colliding(["a", "b", "A", "é", "e\u0301", "c"]) == [("a", "A"), ("é", "e\u0301")]


def test_a_file_system_is_probed_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = os.path.normcase("A") != os.path.normcase("a")
    assert distinguishes_names(tmp_path) is expected or not expected
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "exists", lambda self: True)  # as one that ignores case
    assert not distinguishes_names(tmp_path)


def test_two_recordings_for_one_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [Input(name, Path(name), named=False) for name in ("Talk.wav", "talk.wav")]
    monkeypatch.setattr(output, "distinguishes_names", lambda folder: True)
    Output(folder=tmp_path).prepare(inputs)
    monkeypatch.setattr(output, "distinguishes_names", lambda folder: False)
    with pytest.raises(OptionError, match=r"Talk\.wav and talk\.wav would both be written to"):
        Output(folder=tmp_path).prepare(inputs)


def test_a_folder_that_is_too_deep_to_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be made"):
        Output(folder=tmp_path / Path(*["d"] * 1_500)).prepare([])
    with pytest.raises(OptionError, match="cannot be made"):
        Output(folder=tmp_path / ("x" * 5_000)).prepare([])
