"""`deploy/ray_serve.py` on a local Ray: two replicas on the CPU."""

from __future__ import annotations

import socket

import httpx
import pytest

from whisper_flash_attention.audio import BundledClip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_replicas(tiny_en: str, bundled_recordings: tuple[BundledClip, ...]) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)
    from ray import serve

    from deploy.ray_serve import app

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"model": tiny_en, "replicas": 2, "gpus": 0, "slots": 2}))
        url = f"http://127.0.0.1:{port}/v1"
        for _ in range(4):
            files = {"file": ("clip.wav", bundled_recordings[1].path.read_bytes())}
            response = httpx.post(f"{url}/audio/transcriptions", files=files, timeout=120)
            assert "young man" in response.json()["text"]
        assert httpx.get(f"{url}/models").json()["data"][0]["id"] == tiny_en
    finally:
        serve.shutdown()
        ray.shutdown()
