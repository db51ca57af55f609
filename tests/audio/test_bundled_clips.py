from __future__ import annotations

import hashlib
import wave

from whisper_flash_attention.audio import bundled_recordings


def test_every_recording_is_the_file_that_the_index_describes() -> None:
    recordings = bundled_recordings()
    assert len(recordings) == 5
    for recording in recordings:
        assert hashlib.sha256(recording.path.read_bytes()).hexdigest() == recording.sha256
        with wave.open(str(recording.path)) as file:
            assert file.getparams()[:3] == (1, 2, 16_000)
            assert file.getnframes() / 16_000 == recording.seconds


def test_every_clip_has_a_transcript_and_a_licence() -> None:
    for recording in bundled_recordings():
        assert recording.transcript[-1] in ".,"
        assert "LibriVox" in recording.source
        assert "Public domain" in recording.licence


def test_the_notice_lies_beside_the_recordings() -> None:
    notice = bundled_recordings()[0].path.with_name("NOTICE.md").read_text(encoding="utf-8")
    assert "LibriVox" in notice
    assert "Redistribution and use in source and binary forms" in notice
