"""What a server is told: which model, where it runs, and how much it gives to whom."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanochat_model.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model of one server process, and its limits."""

    checkpoint: str
    name: str = ""  # id of the model in the interface; "": the run's name, else its folder's
    device: str = "auto"
    dtype: str = "auto"  # float32 on a CPU, bfloat16 on a GPU that has it
    num_threads: int = 0  # CPU threads; 0: as torch finds it
    max_rows: int = 0  # replies made at once; 0: what a quarter of the free memory holds, at most 32
    max_queue: int = 64  # requests that wait for a row; beyond it they are refused with 429
    max_tokens: int = 0  # of prompt and reply together; 0: the length that the model was trained on
    max_reply_tokens: int = 1024  # of one reply, whatever is asked for
    max_body_bytes: int = 1 << 20  # of one request

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not known; choose {', '.join(DTYPES)}")
        for name in ("max_rows", "max_queue", "max_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} must be 0 or more")
        for name in ("max_reply_tokens", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where a server listens, and who may come."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    allow_remote: bool = False
    api_key: str = field(default="", repr=False)  # a replica that does not start is logged with what it was given
    allowed_hosts: tuple[str, ...] = ()  # further names under which a server on loopback answers (a proxy's)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} must lie in 0..65535")
        if not self.is_loopback and not self.allow_remote:
            raise ConfigError(
                f"host {self.host!r} lets other machines in; add --allow-remote (and an API key) if meant, or keep 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names in a request's Host header that are answered; empty: all. On loopback only its own: a page of another site that
        points its name here (DNS rebinding) is refused."""
        return (*LOOPBACK, "[::1]", *self.allowed_hosts) if self.is_loopback else ()  # a Host header has it in brackets
