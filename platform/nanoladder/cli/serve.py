"""nanoladder serve: a checkpoint behind an OpenAI-compatible interface and a chat page."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from nanoladder.cli.common import Json, print_json

if TYPE_CHECKING:
    from nanoladder.serve.options import ListenOptions, ModelOptions


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a checkpoint: a chat page, and OpenAI's /v1/chat/completions for any client. Several people can talk at once.

    Example: nanoladder serve demo/sft/0123456789abcdef --port 8000
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint, or a run's folder (its newest intact checkpoint)."""
    port: int = 8000
    """0: any free one, printed."""
    host: str = "127.0.0.1"
    """Address to listen on. Another than loopback needs --allow-remote."""
    allow_remote: bool = False
    """Let other machines in."""
    allowed_host: tuple[str, ...] = ()
    """Further host names that a server on loopback answers to, such as a proxy's."""
    api_key: str = ""
    """Asked for as a bearer token; better given as NANOLADDER_API_KEY, which the list of processes does not show."""
    name: str = ""
    """Id of the model in the interface; left out: the run's name, or its folder's."""
    device: str = "auto"
    dtype: str = "auto"
    """float32, bfloat16, float16; auto: float32 on a CPU, bfloat16 on a GPU."""
    num_threads: int = 0
    """CPU threads; 0: as torch finds it."""
    max_rows: int = 0
    """Replies made at once; 0: what a quarter of the free memory holds, at most 32."""
    max_queue: int = 64
    """Requests that wait beyond these; more are refused with 429."""
    max_tokens: int = 0
    """Context, prompt and reply together; 0: the length that the model was trained on."""
    max_reply_tokens: int = 1024
    """Longest reply, whatever a request asks for."""
    ray: bool = False
    """Deploy the same application on Ray Serve (pip install 'ray[serve]'): replicas on one or many nodes behind one address."""
    replicas: int = 1
    """With --ray: copies of the model."""
    address: str = ""
    """With --ray: the cluster to join; left out: RAY_ADDRESS, else a new private one on this machine."""
    json: Json = False

    def run(self) -> int:
        from nanochat_model.errors import ConfigError
        from nanoladder.serve.options import ListenOptions, ModelOptions
        from nanoladder.serve.run import api_key, run_server

        model = ModelOptions(
            checkpoint=self.checkpoint,
            name=self.name,
            device=self.device,
            dtype=self.dtype,
            num_threads=self.num_threads,
            max_rows=self.max_rows,
            max_queue=self.max_queue,
            max_tokens=self.max_tokens,
            max_reply_tokens=self.max_reply_tokens,
        )
        listen = ListenOptions(
            host=self.host,
            port=self.port,
            allow_remote=self.allow_remote,
            api_key=api_key(self.api_key),
            allowed_hosts=self.allowed_host,
        )
        if self.ray:
            return self.run_replicas(model, listen)
        if self.replicas != 1 or self.address:
            raise ConfigError("--replicas and --address belong to Ray Serve; add --ray")
        return run_server(model, listen, ready=self.announce)

    def run_replicas(self, model: ModelOptions, listen: ListenOptions) -> int:
        from nanoladder.serve.replicas import run_replicas

        return run_replicas(model, listen, replicas=self.replicas, address=self.address or None, ready=self.announce)

    def announce(self, url: str, name: str) -> None:
        if self.json:
            print_json({"url": url, "api": f"{url}/v1", "model": name})
        else:
            print(f"{name} is served\n  page  {url}/\n  API   {url}/v1  (OpenAI's chat interface, model {name!r})\nCtrl-C ends it.")
        sys.stdout.flush()
