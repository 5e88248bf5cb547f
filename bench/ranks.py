"""Part of bench/train.py: the same training step by several Gloo processes on this machine's CPUs.

Tokens a second by number of ranks, and then the parts of a step, means over ranks: data, forward, backward, wait (until the
slowest rank has its gradients), communication, optimizer. In the steps that are split communication does not overlap with
updates. Numbers of ranks take turns round after round, as variants do there.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import statistics
import time
from typing import Any

PARTS = ("data", "forward", "backward", "wait", "communication", "optimizer")


def rank_worker(job: Any, rank: int, world_size: int, port: int, pipe: Any) -> None:
    """One rank: builds, then runs as many steps as it is asked for until asked for none. Rank 0 answers."""
    threads = job.threads or max(1, len(os.sched_getaffinity(0)) // world_size)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    from nanochat_model.distributed import process_group
    from nanochat_model.loop import frozen_garbage

    with process_group("cpu") as ranks, frozen_garbage() as garbage:
        stepper, batch_of, multipliers = make_stepper(job, ranks, threads)
        garbage.after_step(1)
        for k in range(2):
            stepper.step(batch_of(k), multipliers)
        while steps := pipe.recv():
            start = time.perf_counter()
            for k in range(steps):
                stepper.step(batch_of(k), multipliers)
            seconds = (time.perf_counter() - start) / steps
            parts = mean_over_ranks([split_step(stepper, batch_of, k, multipliers) for k in range(steps)], ranks.world_size)
            if ranks.is_main:
                pipe.send((seconds, parts))


def split_step(stepper: Any, batch_of: Any, k: int, multipliers: Any) -> dict[str, float]:
    """One step, and this rank's seconds in each of its PARTS."""
    import torch.distributed as dist

    seconds, last = dict.fromkeys(PARTS, 0.0), time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[part] += now - last
        last = now

    batch = batch_of(k)
    mark("data")
    loss_part = stepper.forward_backward(batch, mark)
    mark("backward")
    several = stepper.ranks.world_size > 1
    if several:
        dist.barrier()
        mark("wait")
    outcome = stepper.agree(loss_part)
    mark("communication" if several else "optimizer")
    stepper.apply(outcome, multipliers, mark if several else None)
    mark("optimizer")
    return seconds


def mean_over_ranks(steps: list[dict[str, float]], world_size: int) -> dict[str, float]:
    """Mean seconds of each part over steps and ranks, the same on every rank."""
    import torch

    from nanochat_model.distributed import all_sum

    own = torch.tensor([[step[part] for part in PARTS] for step in steps], dtype=torch.float64).mean(0)
    return dict(zip(PARTS, (all_sum(own) / world_size).tolist(), strict=True))


def make_stepper(job: Any, ranks: Any, threads: int) -> tuple[Any, Any, Any]:
    """Our stepper, this rank's part of global batch k as a function of k, and constant multipliers."""
    import torch
    from train import batch_rows, random_tokens

    from nanochat_model.config import GPTConfig, OptimizerConfig
    from nanochat_model.device import tune_process
    from nanochat_model.gpt import GPT
    from nanochat_model.loader import rank_rows
    from nanochat_model.loop import Batch, LossScale, Multipliers, Stepper
    from nanochat_model.optim import build_optimizer

    tune_process(threads)
    config = GPTConfig(
        depth=job.depth, model_dim=job.model_dim, num_heads=job.num_heads, num_kv_heads=job.num_heads,
        sequence_len=job.sequence_len, vocab_size=job.vocab_size, window_pattern=job.window_pattern,
    )  # fmt: skip
    model = GPT(config, compute_dtype=getattr(torch, job.dtype)).init_weights(0)
    device = torch.device("cpu")
    stepper = Stepper(
        model,
        build_optimizer(model, OptimizerConfig()),
        ranks=ranks,
        device=device,
        micro_batch_rows=job.micro_rows,
        loss_scale=LossScale.for_dtype(job.dtype),
    )
    tokens, share = random_tokens(job), slice(*rank_rows(job.rows, ranks.rank, ranks.world_size))

    def batch_of(k: int) -> Batch:
        own = batch_rows(job, tokens, k)[share]
        return Batch(inputs=own[:, :-1], targets=own[:, 1:], num_targets=job.rows * job.sequence_len)

    return stepper, batch_of, Multipliers(lr=1.0, momentum=0.95, weight_decay=0.5)


def measure_ranks(job: Any, world_sizes: list[int], rounds: int, steps: int) -> list[dict[str, Any]]:
    """One row a number of ranks: medians over rounds."""
    from nanochat_model.distributed import free_port

    context = mp.get_context("spawn")
    groups: dict[int, list[tuple[Any, Any]]] = {}
    for n in world_sizes:
        port, members = free_port(), []
        for rank in range(n):
            pipe, other = context.Pipe()
            process = context.Process(target=rank_worker, args=(job, rank, n, port, other), daemon=True)
            process.start()
            other.close()  # or a rank that died would be waited for
            members.append((pipe, process))
        groups[n] = members
    found: dict[int, list[Any]] = {n: [] for n in world_sizes}
    for _ in range(rounds):
        for n, members in groups.items():
            for pipe, _process in members:
                pipe.send(steps)
            found[n].append(members[0][0].recv())
    for members in groups.values():
        for pipe, process in members:
            pipe.send(0)
            process.join()
    return [_row(job, n, answers) for n, answers in found.items()]


def _row(job: Any, world_size: int, answers: list[Any]) -> dict[str, Any]:
    seconds = statistics.median(s for s, _ in answers)
    parts = {part: statistics.median(p[part] for _, p in answers) for part in answers[0][1]}
    return {
        "ranks": world_size,
        "tokens_per_second": job.rows * job.sequence_len / seconds,
        "step_seconds": seconds,
        "parts": parts,
        "communication_share": parts["communication"] / sum(parts.values()),
    }


def print_ranks(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="training by several processes (Gloo)")
    parts = list(rows[0]["parts"])
    for column in ("ranks", "tok/s", "× the first", "step ms", *(f"{p} ms" for p in parts), "communication share"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            str(r["ranks"]),
            f"{r['tokens_per_second']:,.0f}",
            f"{r['tokens_per_second'] / rows[0]['tokens_per_second']:.2f}",
            f"{1e3 * r['step_seconds']:.2f}",
            *(f"{1e3 * r['parts'][p]:.2f}" for p in parts),
            f"{r['communication_share']:.1%}",
        )
    Console(width=150).print(table)
