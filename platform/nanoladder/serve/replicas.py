"""The same application on Ray Serve: several copies of the model, on one or many nodes, behind one address.

Each replica is what `nanoladder serve` runs in one process: its own model, batch and queue. A conversation is carried by its
requests, so any replica may answer any of them. The checkpoint must be readable on every node.
"""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Callable
from typing import Any

from nanochat_model.checkpoint import resolve
from nanochat_model.errors import ConfigError
from nanoladder.serve.options import ListenOptions, ModelOptions
from nanoladder.serve.run import bind, url_of, warn_if_open

APP_NAME = "nanoladder"
DEFAULT_ONGOING = 96  # requests that Ray hands to one replica: 32 rows and 64 waiting; beyond, they wait in its proxy


def build_application(model: ModelOptions, listen: ListenOptions, *, replicas: int, use_gpu: bool) -> Any:
    """The Ray Serve application, for serve.run or a serve config file."""
    from ray import serve

    @serve.ingress()
    class Replica:
        """One copy of the model."""

        def __init__(self, model: ModelOptions, listen: ListenOptions) -> None:
            from nanoladder.serve.service import load_service

            self.service = load_service(model)
            self.listen = listen

        def __serve_build_asgi_app__(self) -> Any:
            from nanoladder.serve.app import create_app

            return create_app(self.service, api_key=self.listen.api_key, allowed_hosts=self.listen.hosts)

        def check_health(self) -> None:
            if not self.service.worker.alive:
                raise RuntimeError("the thread that runs the model has ended")

    ongoing = (model.max_rows + model.max_queue) if model.max_rows else DEFAULT_ONGOING
    deployment: Any = serve.deployment(
        name=APP_NAME,
        num_replicas=replicas,
        max_ongoing_requests=ongoing + 16,  # the page, the card and health as well
        ray_actor_options={"num_cpus": max(1, model.num_threads), "num_gpus": 1 if use_gpu else 0},
        graceful_shutdown_timeout_s=10,
    )(Replica)
    return deployment.bind(model, listen)


def run_replicas(
    model: ModelOptions, listen: ListenOptions, *, replicas: int, address: str | None, ready: Callable[[str, str], None]
) -> int:
    """Deploy and keep serving until SIGINT or SIGTERM, then take it down; returns 0. Raises ConfigError."""
    if replicas < 1:
        raise ConfigError(f"replicas {replicas} must be at least 1")
    if importlib.util.find_spec("ray.serve") is None or importlib.util.find_spec("watchfiles") is None:
        raise ConfigError("--ray needs Ray Serve, which is not installed; run: pip install 'ray[serve]'")
    resolve(model.checkpoint)  # what is wrong with it is told here, in one line, not by a replica
    warn_if_open(listen)
    port = free_port(listen)
    import torch
    from ray import serve

    from nanoladder.ray_init import ensure_ray, shutdown_ray

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    threads = max(1, model.num_threads)
    ensure_ray(num_cpus=replicas * threads + 1, address=address)  # one for Serve's controller and proxy
    try:
        serve.start(http_options={"host": listen.host, "port": port})
        use_gpu = model.device.startswith("cuda") or (model.device == "auto" and torch.cuda.is_available())
        serve.run(build_application(model, listen, replicas=replicas, use_gpu=use_gpu), name=APP_NAME, route_prefix="/")
        url = url_of(listen.host, port)
        ready(url, served_name(model))
        stop.wait()
        serve.shutdown()
    finally:
        shutdown_ray()
    return 0


def served_name(model: ModelOptions) -> str:
    from nanoladder.serve.card import model_card

    return str(model_card(resolve(model.checkpoint), name=model.name)["id"])


def free_port(listen: ListenOptions) -> int:
    """The port that is asked for if it can be had, or a free one for 0. Raises ConfigError."""
    with bind(listen) as sock:
        return int(sock.getsockname()[1])
