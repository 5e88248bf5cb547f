"""How fast ranks exchange data: an all-reduce, timed. `measure_here` starts the ranks on this machine, each a process.

`python -m nanoladder.collective_probe BACKEND` is one rank; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

NUM_FLOATS = 8 * 2**20  # 32 MiB, about the gradients of a small model's layer
REPEATS = 5
TIMEOUT_SECONDS = 180.0  # most of them to import torch, on a slow disk


def measure_here(backend: str, num_ranks: int) -> dict[str, Any]:
    """Start `num_ranks` ranks on this machine and return what rank 0 measured. Raises RuntimeError with what they said."""
    ranks = [start_rank(backend, rank, num_ranks, "127.0.0.1", port) for port in [free_port()] for rank in range(num_ranks)]
    return collect(ranks)


def start_rank(backend: str, rank: int, num_ranks: int, address: str, port: int) -> subprocess.Popen[str]:
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": address}
    env = (
        os.environ
        | places
        | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    )
    command = [sys.executable, "-m", "nanoladder.collective_probe", backend]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def collect(ranks: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """The result of rank 0, which is the first; all are ended."""
    try:
        said = [rank.communicate(timeout=TIMEOUT_SECONDS) for rank in ranks]
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"{len(ranks)} ranks did not find each other in {TIMEOUT_SECONDS:.0f} s; is a firewall between?"
        ) from None
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, err) in zip(ranks, said, strict=True):
        if rank.returncode:
            raise RuntimeError(err.strip().splitlines()[-1] if err.strip() else f"a rank ended with status {rank.returncode}")
    return dict(json.loads(said[0][0])) if said[0][0].strip() else {}


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as s:
        s.bind((address, 0))
        return int(s.getsockname()[1])


def measure(backend: str, environ: Mapping[str, str] = os.environ) -> dict[str, float]:
    """One rank's part. Bytes per second are those of the tensor over the time (algorithm bandwidth), the best of some tries."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS))
    try:
        large = _best_seconds(torch.ones(NUM_FLOATS, device=device))
        small = _best_seconds(torch.ones(2, device=device))
    finally:
        dist.destroy_process_group()
    return {"num_bytes": 4 * NUM_FLOATS, "bytes_per_second": 4 * NUM_FLOATS / large, "seconds_small": small}


def _best_seconds(tensor: Any) -> float:
    import torch
    import torch.distributed as dist

    best = float("inf")
    for attempt in range(REPEATS + 1):  # the first one also connects
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    result = measure(sys.argv[1])
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
