from __future__ import annotations

import logging
import warnings

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as messages

from whisper_flash_attention.terminal import quiet_transformers, report_warnings


def test_transformers_is_quiet_inside_and_as_before_afterwards() -> None:
    before = messages.get_verbosity(), messages.is_progress_bar_enabled()
    with quiet_transformers():
        assert messages.get_verbosity() == logging.ERROR
        assert not messages.is_progress_bar_enabled()
        assert are_progress_bars_disabled()
        warnings.warn("nobody hears this, not even pytest", UserWarning, stacklevel=1)
    assert (messages.get_verbosity(), messages.is_progress_bar_enabled()) == before


def test_bars_that_were_off_stay_off() -> None:
    with quiet_transformers():
        with quiet_transformers():
            pass
        assert not messages.is_progress_bar_enabled()
        assert messages.get_verbosity() == logging.ERROR


def test_our_warnings_are_told_only_inside(caplog: pytest.LogCaptureFixture) -> None:
    messages: list[str] = []
    logger = logging.getLogger("whisper_flash_attention.audio.audio_source")
    with report_warnings(messages.append):
        logger.warning("%s: is cut off", "a.wav")
        logger.info("nothing to see")
    logger.warning("too late")
    assert messages == ["warning: a.wav: is cut off"]
