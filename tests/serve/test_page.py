"""The page at `/`, driven in Chromium by its own protocol: upload, text, words, download."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from tests.serve.live_server import Live
from whisper_flash_attention.audio import BundledClip

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Tab:
    """A page of a browser."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            found = json.loads(self._socket.recv(60))
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]

    def evaluate(self, script: str) -> Any:
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str, value: Any, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while (found := self.evaluate(script)) != value:
            assert time.monotonic() < end, f"{script} is {found!r}, not {value!r}"
            time.sleep(0.1)


@contextmanager
def browser(url: str, folder: Path, microphone: Path) -> Iterator[Tab]:
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}"),
        *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
        f"--use-file-for-fake-audio-capture={microphone}%noloop",
        "about:blank",
    ]
    port_file = folder / "profile" / "DevToolsActivePort"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                if port_file.is_file() and port_file.read_text().count("\n"):
                    break
                time.sleep(0.1)
            port = port_file.read_text().split("\n")[0]
            page = httpx.put(f"http://127.0.0.1:{port}/json/new?{url}", timeout=30).json()
            with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
                tab = Tab(socket)
                tab.wait_for("document.readyState", "complete")
                yield tab
        finally:
            process.terminate()


def choose_file(tab: Tab, path: Path) -> None:
    root = tab.call("DOM.getDocument")["root"]["nodeId"]
    node = tab.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    tab.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)


@needs_browser
@pytest.mark.slow
def test_a_file_is_transcribed_and_its_text_downloaded(
    live: Live, bundled_recordings: tuple[BundledClip, ...], tmp_path: Path
) -> None:
    path = bundled_recordings[1].path
    with browser(live.url, tmp_path, path) as tab:
        tab.wait_for("document.querySelector('#model')?.value", "tiny.en")
        choose_file(tab, path)
        tab.wait_for("document.querySelector('#status').textContent", "Done.")
        text = tab.evaluate("document.querySelector('#text').innerText.trim()")
        assert text.endswith("young man.")
        last = tab.evaluate("[...document.querySelectorAll('#text button')].at(-1).dataset.start")
        tab.evaluate("[...document.querySelectorAll('#text button')].at(-1).click()")
        assert tab.evaluate("document.querySelector('#player').currentTime") == pytest.approx(
            float(last), abs=0.3
        )
        tab.call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "down")
        )
        tab.evaluate("document.querySelector('#format').value = 'srt'")
        tab.evaluate("document.querySelector('#download').click()")
        file = tmp_path / "down" / "austen_0880.srt"
        for _ in range(100):
            if file.is_file():
                break
            time.sleep(0.1)
        assert file.read_text().startswith("1\n00:00:00,000 --> ")

        # What is no recording is reported where the text would be.
        choose_file(tab, Path(__file__))
        tab.wait_for("document.querySelector('#status').className", "error")


@needs_browser
@pytest.mark.slow
def test_the_microphone_is_transcribed(
    live: Live, bundled_recordings: tuple[BundledClip, ...], tmp_path: Path
) -> None:
    path = bundled_recordings[1].path
    with browser(live.url, tmp_path, path) as tab:
        tab.wait_for("document.querySelector('#model')?.value", "tiny.en")
        tab.evaluate("document.querySelector('#record').click()")
        tab.wait_for("document.querySelector('#status').textContent", "Recording…")
        time.sleep(4)
        tab.evaluate("document.querySelector('#record').click()")
        tab.wait_for("document.querySelector('#status').textContent", "Done.")
        assert "man" in tab.evaluate("document.querySelector('#text').innerText")


def test_the_page_names_no_other_host(live: Live) -> None:
    response = httpx.get(live.url)
    assert response.headers["content-type"].startswith("text/html")
    assert "http:" not in response.text and "https:" not in response.text
    for each in ('role="status"', 'aria-live="polite"', "color-scheme: light dark", "<label"):
        assert each in response.text
