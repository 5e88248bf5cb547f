"""A tiny checkpoint that never stops by itself, and a server of it in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import reference_model as ref
import torch
from tiny_run import VOCAB_SIZE, tiny_shards

from nanochat_model.batching import Event
from nanochat_model.checkpoint import CheckpointState, save_checkpoint
from nanochat_model.interop import config_from_nanochat
from nanoladder.serve.app import create_app
from nanoladder.serve.options import ModelOptions
from nanoladder.serve.service import Service, load_service
from nanoladder.serve.worker import Worker

CONTEXT = 512


def write_checkpoint(folder: Path, *, context: int = CONTEXT) -> Path:
    """A run folder with random weights; special tokens have logit 0, and more than fifty others are always likelier."""
    config = ref.model_config(depth=2, dim=32, heads=2, kv_heads=1, T=context, vocab=VOCAB_SIZE, pattern="SL")
    weights = ref.random_weights(config)
    tokenizer = tiny_shards().tokenizer
    weights["lm_head.weight"][tokenizer.bos_id :] = 0.0
    tokenizer.save(folder / "tokenizer")
    save_checkpoint(folder / "checkpoints", CheckpointState(kind="sft", step=3, model=config_from_nanochat(config)), weights)
    return folder


@contextmanager
def serving(checkpoint: Path, *, api_key: str = "", **options: Any) -> Iterator[tuple[str, Service]]:
    """Address and service of a server on a free port of loopback."""
    import uvicorn

    torch.set_num_threads(1)
    service = load_service(ModelOptions(checkpoint=str(checkpoint), device="cpu", num_threads=1, **options))
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service, api_key=api_key), log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive() and not service.worker.alive


@contextmanager
def slowed(worker: Worker, step_seconds: float = 0.05) -> Iterator[None]:
    """Each token takes so long at least: a long reply is under way until somebody ends it, however fast this machine is, and
    however late whoever looks at it comes."""
    batcher = worker._batcher
    real = batcher.step

    def step() -> list[Event]:
        time.sleep(step_seconds)
        return real()

    batcher.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        batcher.step = real  # type: ignore[method-assign]


def wait_until(condition: Callable[[], Any], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)
