"""Processes that train one model together: start-up from torchrun's environment, and the few collectives the loop needs.

Gloo on CPU, NCCL on NVIDIA, RCCL on AMD (which answers to the name "nccl"). Gradients are averaged by the optimizer, not here.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nanochat_model.errors import ConfigError

T = TypeVar("T")
DEFAULT_TIMEOUT_SECONDS = 1800.0  # rank 0 may save a large checkpoint while the others wait


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train one model."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def current_ranks() -> Ranks:
    """Ranks of the initialised process group, or a single process.

    Raises ConfigError when the environment announces several processes but no group joins them: each would otherwise train
    a separate model in silence.
    """
    if dist.is_available() and dist.is_initialized():
        rank = dist.get_rank()
        return Ranks(rank=rank, world_size=dist.get_world_size(), local_rank=_local_rank(rank))
    world_size = _env_int("WORLD_SIZE", 1)
    if world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE {world_size} announces {world_size} processes, but no process group joins them; wrap the call in "
            "nanochat_model.distributed.process_group(), or unset WORLD_SIZE to train in one process"
        )
    return Ranks()


def _local_rank(rank: int) -> int:
    """This process's place on its machine, and so its GPU: LOCAL_RANK; without it ranks are taken to fill one machine after the
    other, a rank a GPU."""
    num_gpus = torch.cuda.device_count()
    return _env_int("LOCAL_RANK", rank % num_gpus if num_gpus else rank)


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} must be a whole number") from None


@contextmanager
def process_group(device_type: str = "", *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Iterator[Ranks]:
    """Join the processes that torchrun (or the same variables: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) started.

    `device_type` "cpu" takes Gloo, "cuda" takes NCCL or RCCL, "" whichever the machine has. With one process, or with a group
    that somebody initialised already, nothing is set up or torn down. Raises ConfigError when a variable is missing, or when
    there are more ranks on this machine than GPUs. An error ends the group at once: the other ranks are waiting in a collective,
    and to take leave of them in order would be to wait for them.
    """
    if dist.is_initialized() or _env_int("WORLD_SIZE", 1) == 1:
        yield current_ranks()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE {os.environ['WORLD_SIZE']} is set but {', '.join(missing)} is not; start the processes with torchrun"
        )
    on_gpu = device_type.startswith("cuda") or (not device_type and torch.cuda.is_available())
    device = None
    if on_gpu:
        local_rank, num_gpus = _local_rank(_env_int("RANK", 0)), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise ConfigError(f"LOCAL_RANK {local_rank}, but torch sees {num_gpus} GPUs; start at most one rank a GPU")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=device)
    try:
        yield current_ranks()
    except BaseException:
        if on_gpu:
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _group_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def all_max(values: Sequence[float]) -> list[float]:
    """Element-wise maximum over ranks, the same on every rank. `values` must have one length everywhere."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=_group_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over ranks as float64 on the CPU. Exact (and so independent of the number of ranks) when each element
    is non-zero on one rank only."""
    values = values.detach().to("cpu", torch.float64)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    moved = values.to(_group_device())
    dist.all_reduce(moved, op=dist.ReduceOp.SUM)
    return moved.cpu()


def broadcast(value: Any) -> Any:
    """Rank 0's `value` (plain data) on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_group_device())
    return box[0]


def first_text(text: str) -> tuple[str, int]:
    """The first rank's `text` that is not empty, and that rank; ("", -1) if there is none. The same on every rank."""
    texts = [text]
    if dist.is_initialized() and dist.get_world_size() > 1:
        texts = [""] * dist.get_world_size()
        dist.all_gather_object(texts, text)
    return next(((t, i) for i, t in enumerate(texts) if t), ("", -1))


def on_main(function: Callable[[], T]) -> T:
    """The result of `function`, which runs on rank 0 only. An error it raises is raised on every rank, so that none waits."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    if current_ranks().is_main:
        try:
            outcome = (function(), None)
        except Exception as e:
            outcome = (None, e)
    value, error = broadcast(outcome)
    if error is not None:
        raise error
    return value


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def free_port() -> int:
    """A TCP port that is free now, for a rendezvous on this machine."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
