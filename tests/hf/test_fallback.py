"""Reasons are logged once, in words, and can be listed."""

from __future__ import annotations

import logging

import pytest

from whisper_flash_attention.hf import fallback
from whisper_flash_attention.hf.fallback import FALLBACK_REASONS, Fallback, FallbackReason, log_once


def test_a_reason_is_logged_once(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_logged", set())
    with caplog.at_level(logging.INFO, logger="whisper_flash_attention"):
        for found in ("TopHLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper"):
            log_once(Fallback(FallbackReason.PROCESSOR, found))
        log_once(Fallback(FallbackReason.MODULES, "a hook on model.encoder"))
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
    assert len(FALLBACK_REASONS) == len(set(FALLBACK_REASONS)) == len(FallbackReason)
    assert all(reason[0].islower() and not reason.endswith(".") for reason in FALLBACK_REASONS)
