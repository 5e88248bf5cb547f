"""A server in this process: bind, say where, serve until a signal, leave nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable

from nanochat_model.errors import ConfigError
from nanoladder.serve.options import ListenOptions, ModelOptions

API_KEY_ENV = "NANOLADDER_API_KEY"
SHUTDOWN_SECONDS = 5  # that replies under way have to end
BACKLOG = 256


def run_server(model: ModelOptions, listen: ListenOptions, *, ready: Callable[[str, str], None]) -> int:
    """Serve until SIGINT or SIGTERM; returns 0. `ready(url, model name)` is called when connections are taken.

    Raises ConfigError where the checkpoint or the address cannot be used.
    """
    import uvicorn

    from nanoladder.serve.app import create_app
    from nanoladder.serve.service import load_service

    warn_if_open(listen)
    sock = bind(listen)  # before the model is loaded: a port in use is told at once
    try:
        service = load_service(model)
        app = create_app(service, api_key=listen.api_key, allowed_hosts=listen.hosts)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            lifespan="on",
        )
        server = uvicorn.Server(config)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn handles both, and raises them again when it has ended
            signal.signal(number, lambda *_: None)
        sock.listen(BACKLOG)
        ready(url_of(listen.host, sock.getsockname()[1]), service.name)
        server.run(sockets=[sock])
        return 0 if server.started else 1
    finally:
        sock.close()


def bind(listen: ListenOptions) -> socket.socket:
    """A bound socket, not listening yet."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((listen.host, listen.port))
    except (OSError, OverflowError) as e:
        sock.close()
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise ConfigError(f"cannot listen on {listen.host} port {listen.port} ({reason}); give another --port, or 0") from None
    return sock


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def warn_if_open(listen: ListenOptions) -> None:
    if listen.is_loopback:
        return
    key = "with an API key" if listen.api_key else "WITHOUT an API key: whoever reaches this port can use the model"
    print(
        f"nanoladder serve: warning: listening on {listen.host} for other machines, {key}; traffic is not encrypted",
        file=sys.stderr,
    )


def api_key(given: str) -> str:
    """The key of the command line, else of the environment (which other users of the machine cannot read)."""
    return given or os.environ.get(API_KEY_ENV, "")
