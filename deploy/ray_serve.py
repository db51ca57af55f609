"""The server on many GPUs: a replica of the application on each, behind Ray Serve.

    serve run deploy.ray_serve:app model=turbo replicas=8

Arguments: `model` (as of `whisper-flash serve`), `replicas`, `gpus` (of a replica, 1 if left out; 0
for a CPU), and every other option of `ServeOptions`. Websockets and events pass through.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from whisper_flash_attention.options import ModelOptions, ServeOptions
from whisper_flash_attention.serve.app import Server, create_app
from whisper_flash_attention.serve.scheduler import Scheduler


def app(arguments: dict[str, Any]) -> serve.Application:
    """Return the deployment of a model."""
    given = dict(arguments)
    model = ModelOptions(given.pop("model", "small"))
    replicas, gpus = int(given.pop("replicas", 1)), float(given.pop("gpus", 1))
    options = ServeOptions(**given)

    def build() -> Any:
        scheduler = Scheduler(
            model.source, model, slots=options.slots, idle_unload=options.idle_unload
        )
        return create_app(Server(options, {model.source: scheduler}))

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=options.max_requests,
        ray_actor_options={"num_gpus": gpus},
    )
    @serve.ingress(build)
    class Whisper:
        pass

    deployment: serve.Application = Whisper.bind()  # type: ignore[attr-defined]
    return deployment
