"""Reasons are said once, in words, and can be listed."""

from __future__ import annotations

import logging

import pytest

import whisper_flash_attention.hf as module
from whisper_flash_attention.hf import HANDOVERS, Handover, Reason, say


def test_a_reason_is_logged_once(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_said", set())
    with caplog.at_level(logging.INFO, logger="whisper_flash_attention"):
        for found in ("TopHLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper"):
            say(Handover(Reason.PROCESSOR, found))
        say(Handover(Reason.MODULES, "a hook on model.encoder"))
    assert [record.levelno for record in caplog.records] == [
        logging.INFO,
        logging.INFO,
        logging.WARNING,
    ]
    assert caplog.messages[0] == (
        "generate runs on Transformers' own decode loop: a logits processor has no counterpart in "
        "the engine (TopHLogitsWarper)"
    )


def test_all_reasons_are_listed() -> None:
    assert len(HANDOVERS) == len(set(HANDOVERS)) == len(Reason)
    assert all(reason[0].islower() and not reason.endswith(".") for reason in HANDOVERS)
