"""The command: what it prints, its end by SIGTERM after the requests under way, its errors."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from whisper_flash_attention.cli import app
from whisper_flash_attention.cli.serve import _named
from whisper_flash_attention.options import API_KEY_VARIABLE, ServeOptions


def test_sigterm_ends_the_server_after_the_requests_under_way(tiny_en: str, clip: bytes) -> None:
    command = [sys.executable, "-m", "whisper_flash_attention", "serve", "--port", "0"]
    command += ["--model", f"whisper-1={tiny_en}", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline()
            found = re.fullmatch(r"(http://127\.0\.0\.1:\d+): loading whisper-1\n", first)
            assert found is not None, first + process.stderr.read()
            url = found[1]
            while (response := httpx.get(f"{url}/health")).status_code == 503:
                time.sleep(0.1)
            assert response.json() == {"status": "ok", "loaded": ["whisper-1"]}
            answers: list[httpx.Response] = []

            def request() -> None:
                files = {"file": ("clip.wav", clip)}
                answers.append(
                    httpx.post(f"{url}/v1/audio/transcriptions", files=files, timeout=60)
                )

            thread = threading.Thread(target=request)
            thread.start()
            while "requests_in_progress 1.0" not in httpx.get(f"{url}/metrics").text:
                time.sleep(0.01)
                if answers:  # it was quicker than that
                    break
            process.send_signal(signal.SIGTERM)
            thread.join()
            assert "young man" in answers[0].json()["text"]
            assert process.wait(30) == 0
            printed = process.stderr.read()
            assert "whisper-1: decode engine" in printed and "ready after" in printed
        finally:
            process.kill()


def test_a_model_that_cannot_be_loaded_ends_the_command(tmp_path: Any) -> None:
    missing = str(tmp_path / "missing.pt")
    result = CliRunner().invoke(app, ["serve", "--model", missing, "--port", "0"])
    assert result.exit_code == 2
    assert "missing.pt" in result.output


def test_names_of_models() -> None:
    assert _named("tiny.en") == ("tiny.en", "tiny.en")
    assert _named("whisper-1=small") == ("whisper-1", "small")
    assert _named("/models/a=b.pt") == ("/models/a=b.pt", "/models/a=b.pt")


def test_the_key_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert ServeOptions().api_key is None
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    assert ServeOptions().api_key == "secret"
    assert ServeOptions(api_key="other").api_key == "other"
