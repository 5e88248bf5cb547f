"""The same application on Ray Serve: several copies of the model, on one or many nodes, behind one address.

Each replica is what `nanoladder serve` runs in one process: its own model, batch and queue. A conversation is carried by its
requests, so any replica may answer any of them. The checkpoint must be readable on every node. Ray's proxy listens on the head
node alone, so that is where the command runs.
"""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
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
            from nanoladder.own_devices import see_own_devices
            from nanoladder.serve.service import load_service

            see_own_devices()
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
    # What is wrong with the checkpoint is told here, in one line, not by a replica; and all replicas, those that Ray starts again
    # later too, load this very one, even when the run has written a newer one meanwhile.
    model = replace(model, checkpoint=str(resolve(model.checkpoint).absolute()))
    warn_if_open(listen)
    free_port(listen)  # one that is in use is told at once
    from nanoladder.ray_init import ensure_ray, shutdown_ray

    threads = max(1, model.num_threads)
    session = ensure_ray(num_cpus=replicas * threads + 1, address=address)  # one for Serve's controller and proxy
    use_gpu = model.device.startswith("cuda") or (model.device == "auto" and session.num_gpus > 0)
    try:
        if replicas * threads > session.num_cpus or (use_gpu and replicas > session.num_gpus):
            raise ConfigError(
                f"{replicas} replicas need {replicas * threads} CPUs{f' and {replicas} GPUs' * use_gpu}, but this Ray has "
                f"{session.num_cpus:g} CPUs and {session.num_gpus:g} GPUs; take fewer --replicas or --num-threads"
            )
        if not session.started_here:
            _check_cluster()
        _serve(build_application(model, listen, replicas=replicas, use_gpu=use_gpu), listen, ready, served_name(model))
    finally:
        shutdown_ray()
    return 0


def _serve(application: Any, listen: ListenOptions, ready: Callable[[str, str], None], name: str) -> None:
    """Deploy on the connected Ray, wait for a signal, take Serve down again."""
    from ray import serve

    port = free_port(listen)  # for port 0 only now: the processes that Ray has started meanwhile take dozens
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": listen.host, "port": port})
        serve.run(application, name=APP_NAME, route_prefix="/")
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which puts a handler of its own for SIGTERM
            signal.signal(number, lambda *_: stop.set())
        ready(url_of(listen.host, port), name)
        stop.wait()
    finally:
        serve.shutdown()


def _check_cluster() -> None:
    """ConfigError where the joined cluster serves already (it has one address, and we would end what others run), or where the
    command is not on the head node (the address that it names would be another machine's)."""
    import ray
    from ray import serve

    running = serve.status()
    if running.proxies or running.applications:
        apps = ", ".join(running.applications) or "no application"
        raise ConfigError(
            f"Ray Serve runs on this cluster already ({apps}); end it with `serve shutdown`, or serve without --address"
        )
    here = ray.get_runtime_context().get_node_id()
    if not any(n["NodeID"] == here and "node:__internal_head__" in n["Resources"] for n in ray.nodes()):
        raise ConfigError("Ray's proxy listens on the head node; run nanoladder serve --ray there")


def served_name(model: ModelOptions) -> str:
    from nanoladder.serve.card import model_card

    return str(model_card(resolve(model.checkpoint), name=model.name)["id"])


def free_port(listen: ListenOptions) -> int:
    """The port that is asked for if it can be had, or a free one for 0. Raises ConfigError."""
    with bind(listen) as sock:
        return int(sock.getsockname()[1])
