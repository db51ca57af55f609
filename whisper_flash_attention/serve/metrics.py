"""Metrics of the server for Prometheus: requests, latency, seconds of audio, queue and slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from whisper_flash_attention.serve.scheduler import Scheduler

SECONDS = (0.05, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """Counts of one server.

    Args:
        schedulers: whose queues are reported, by the names of their models.

    Attributes:
        requests: ended requests, by route, model and status.
        errors: by kind: `code` of the error.
        latency: seconds of a request from its first byte to its last, by route.
        first_segment: seconds until the first window was decoded.
        audio_seconds: transcribed, by model.
        in_progress: requests.
        sessions: open websockets.
    """

    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "whisper_flash_requests",
            "Requests that ended.",
            ("route", "model", "status"),
            registry=registry,
        )
        self.errors = Counter(
            "whisper_flash_errors", "Errors, by kind.", ("kind",), registry=registry
        )
        self.latency = Histogram(
            "whisper_flash_request_seconds",
            "Seconds of a request.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.first_segment = Histogram(
            "whisper_flash_first_window_seconds",
            "Seconds until the first window.",
            buckets=SECONDS,
            registry=registry,
        )
        self.audio_seconds = Counter(
            "whisper_flash_audio_seconds",
            "Seconds of audio transcribed.",
            ("model",),
            registry=registry,
        )
        self.in_progress = Gauge(
            "whisper_flash_requests_in_progress", "Requests in progress.", registry=registry
        )
        self.sessions = Gauge(
            "whisper_flash_realtime_sessions", "Open realtime sessions.", registry=registry
        )
        self.registry.register(_Queues(schedulers))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Queues(Collector):
    """Reads the queues of the schedulers when metrics are requested."""

    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        self._schedulers = schedulers

    def collect(self) -> Iterable[Metric]:
        rows: dict[str, tuple[str, Callable[[Scheduler], float]]] = {
            "queue": ("Recordings that wait for a turn.", lambda each: each.waiting),
            "slots": ("Windows that are decoded side by side at most.", lambda each: each.slots),
            "slots_in_use": ("Windows that are being decoded.", lambda each: each.in_slots),
            "model_loaded": ("Whether the model is in memory.", lambda each: each.is_loaded),
        }
        for name, (text, read) in rows.items():
            family = GaugeMetricFamily(f"whisper_flash_{name}", text, labels=["model"])
            for model, scheduler in self._schedulers.items():
                family.add_metric([model], read(scheduler))
            yield family
