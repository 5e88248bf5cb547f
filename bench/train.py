"""Training speed: tokens/s, where a step's time goes, MFU; and nanochat beside it when a checkout is given.

    python bench/train.py --preset small --nanochat ~/nanochat
    python bench/train.py --preset demo --ranks 1,2,3

Every variant is a process of its own. The processes take turns for a few steps each, round after round, so that all of them
see the same machine (on a GPU one comes after the other: each would hold all of its memory); medians over all steps are
reported, ratios are of medians. Batches are cut from one array of random tokens in memory. Prints a table and writes JSON. With
--ranks the same parts of a step are measured on several Gloo processes, where communication is one of them.

Presets: `small` (d2, width 64, V 1024, batch 2048, one thread) and `d4` (width 256, V 4096, micro-batch 16, batch 16,384) have
T 256 and are the CPU references; `demo` is about the demo's production run (d1, width 128, batch 2048);
`d12`, `d20`, `d24` (T 2048, V 32768, batch 2^19) are for GPUs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing as mp
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ranks import measure_ranks, print_ranks

PHASES = ("data", "forward", "backward", "communication", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every variant trains."""

    depth: int
    model_dim: int
    num_heads: int
    vocab_size: int
    sequence_len: int
    window_pattern: str = "SSSL"
    rows: int = 8  # of a batch
    micro_rows: int = 8
    dtype: str = "bfloat16"
    threads: int = 0
    device: str = "auto"
    fp8: str = "off"


PRESETS = {
    "small": Job(depth=2, model_dim=64, num_heads=4, vocab_size=1024, sequence_len=256, threads=1),
    "d4": Job(depth=4, model_dim=256, num_heads=4, vocab_size=4096, sequence_len=256, rows=64, micro_rows=16),
    "demo": Job(depth=1, model_dim=128, num_heads=8, vocab_size=1024, sequence_len=256, window_pattern="L", threads=1),
    **{
        f"d{d}": Job(depth=d, model_dim=64 * d, num_heads=d // 2, vocab_size=32768, sequence_len=2048, rows=256, micro_rows=32)
        for d in (12, 20, 24)
    },
}


def random_tokens(job: Job) -> Any:
    """What all batches are cut from: ids (2^20,) as token shards hold them."""
    import numpy as np

    return np.random.default_rng(0).integers(0, job.vocab_size, 1 << 20, dtype=np.uint16)


def batch_rows(job: Job, tokens: Any, k: int) -> Any:
    """Rows (rows, T + 1) of batch k, int64."""
    import numpy as np

    span = job.sequence_len + 1
    starts = (np.arange(job.rows) + k * job.rows) * 7919 % (len(tokens) - span)
    return np.stack([tokens[s : s + span] for s in starts]).astype(np.int64)


def batches(job: Job) -> Any:
    """Endless (inputs, targets) micro-batches of int64 arrays (micro_rows, T), a whole batch at a time."""
    tokens = random_tokens(job)
    for k in itertools.count():
        rows = batch_rows(job, tokens, k)
        yield [(rows[i : i + job.micro_rows, :-1], rows[i : i + job.micro_rows, 1:]) for i in range(0, job.rows, job.micro_rows)]


class Timer:
    """Seconds by phase; waits for the device at each mark."""

    def __init__(self, synchronize: Any) -> None:
        self.synchronize = synchronize
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


def our_step(job: Job, compiled: bool) -> Any:
    """A function that does one step under a Timer, and the device."""
    import torch

    from nanochat_model.config import GPTConfig, OptimizerConfig
    from nanochat_model.device import choose_device, tune_process
    from nanochat_model.gpt import GPT, compile_training
    from nanochat_model.native.products import weights_stay
    from nanochat_model.optim import build_optimizer

    tune_process(job.threads)
    device = choose_device(job.device)
    config = GPTConfig(
        depth=job.depth, model_dim=job.model_dim, num_heads=job.num_heads, num_kv_heads=job.num_heads,
        sequence_len=job.sequence_len, vocab_size=job.vocab_size, window_pattern=job.window_pattern,
    )  # fmt: skip
    model = GPT(config, compute_dtype=getattr(torch, job.dtype), fp8=job.fp8).init_weights(0).to(device)
    optimizer = build_optimizer(model, OptimizerConfig())
    if compiled:
        compile_training(model)
    source = batches(job)
    factor = 1.0 / (job.rows * job.sequence_len)

    def step(timer: Timer) -> None:
        micro = next(source)
        timer.mark("data")
        with weights_stay():  # as the training loop says it
            for x, y in micro:
                inputs, targets = (torch.from_numpy(a.copy()).to(device) for a in (x, y))
                timer.mark("data")
                loss = model.loss(inputs, targets, reduction="sum") * factor
                timer.mark("forward")
                loss.backward()
                timer.mark("backward")
        optimizer.step(1.0, 0.95, 0.5)
        optimizer.zero_grad()
        timer.mark("optimizer")

    return step, device


def nanochat_step(job: Job, compiled: bool, checkout: str) -> Any:
    """The same of nanochat's own model and optimizer (which it compiles in any case)."""
    os.environ["NANOCHAT_DTYPE"] = job.dtype
    sys.path.insert(0, checkout)
    import torch
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    if job.threads:
        torch.set_num_threads(job.threads)
    device = torch.device("cuda" if job.device != "cpu" and torch.cuda.is_available() else "cpu")
    config = GPTConfig(
        sequence_len=job.sequence_len, vocab_size=job.vocab_size, n_layer=job.depth, n_head=job.num_heads,
        n_kv_head=job.num_heads, n_embd=job.model_dim, window_pattern=job.window_pattern,
    )  # fmt: skip
    with torch.device(device):
        model = GPT(config)
    model.init_weights()
    optimizer = model.setup_optimizer(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, weight_decay=0.28)
    run = torch.compile(model, dynamic=False) if compiled else model
    source = batches(job)

    def step(timer: Timer) -> None:
        micro = next(source)
        timer.mark("data")
        for x, y in micro:
            inputs, targets = (torch.from_numpy(a.copy()).to(device) for a in (x, y))
            timer.mark("data")
            loss = run(inputs, targets) / len(micro)
            timer.mark("forward")
            loss.backward()
            timer.mark("backward")
        optimizer.step()
        model.zero_grad(set_to_none=True)
        timer.mark("optimizer")

    return step, device


def worker(variant: str, job: Job, checkout: str, pipe: Any) -> None:
    """Process of one variant: builds, then runs as many steps as it is asked for until asked for none."""
    start = time.perf_counter()
    if job.threads:
        os.environ["OMP_NUM_THREADS"] = str(job.threads)
    import torch

    make, mode = variant.rsplit("-", 1)
    compiled = mode == "compiled"
    step, device = nanochat_step(job, compiled, checkout) if make == "nanochat" else our_step(job, compiled)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    gc.freeze()
    gc.disable()  # as both programs do while they train
    for i in range(2):
        step(Timer(synchronize))
        if i == 0:
            first_step_seconds = time.perf_counter() - start
    from nanochat_model.device import device_name, matmul_flops, peak_flops

    pipe.send({"first_step_seconds": first_step_seconds, "device": device_name(device), "peak_flops": peak_flops(device)})
    while steps := pipe.recv():
        rows = []
        for _ in range(steps):
            timer = Timer(synchronize)
            step(timer)
            rows.append(timer.seconds)
        size = 8192 if device.type == "cuda" else 1024
        measured = matmul_flops(getattr(torch, job.dtype), size=size, repeats=3, device=device)
        peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        pipe.send({"steps": rows, "matmul_flops": measured, "peak_bytes": peak_bytes})


def run_all(variants: list[str], job: Job, checkout: str, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """What every variant says of its steps. On a CPU they take turns; on a GPU one is over before the next begins, because each
    would hold all of its memory."""
    import torch

    on_gpu = job.device != "cpu" and torch.cuda.is_available()
    results: dict[str, dict[str, Any]] = {}
    for together in [[v] for v in variants] if on_gpu else [variants]:
        results |= take_turns(together, job, checkout, rounds, steps)
    return results


def take_turns(variants: list[str], job: Job, checkout: str, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Start these variants, let them take turns, gather what they say."""
    context = mp.get_context("spawn")
    results: dict[str, dict[str, Any]] = {}
    pipes = {}
    for name in variants:
        pipe, other = context.Pipe()
        process = context.Process(target=worker, args=(name, job, checkout, other), daemon=True)
        process.start()
        other.close()
        print(f"building {name} …", end=" ", flush=True)
        results[name] = {**pipe.recv(), "steps": [], "matmul_flops": []}
        print(f"first step after {results[name]['first_step_seconds']:.1f} s", flush=True)
        pipes[name] = (pipe, process)
    for _ in range(rounds):
        for name, (pipe, _process) in pipes.items():
            pipe.send(steps)
            answer = pipe.recv()
            results[name]["steps"] += answer["steps"]
            results[name]["matmul_flops"].append(answer["matmul_flops"])
            results[name]["peak_bytes"] = answer["peak_bytes"]
    for pipe, process in pipes.values():
        pipe.send(0)
        process.join()
    return results


def summarize(job: Job, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: medians, ratio to the nanochat variant of the same mode, MFU against both peaks."""
    from nanochat_model.config import GPTConfig
    from nanochat_model.counts import flops_per_token
    from nanochat_model.device import model_flops_utilization

    config = GPTConfig(
        depth=job.depth, model_dim=job.model_dim, num_heads=job.num_heads, num_kv_heads=job.num_heads,
        sequence_len=job.sequence_len, vocab_size=job.vocab_size, window_pattern=job.window_pattern,
    )  # fmt: skip
    flops = flops_per_token(config)
    rows = []
    for name, r in results.items():
        seconds = statistics.median(sum(s.values()) for s in r["steps"])
        speed = job.rows * job.sequence_len / seconds
        measured = statistics.median(r["matmul_flops"])
        rows.append(
            {
                "variant": name,
                "tokens_per_second": speed,
                "step_seconds": seconds,
                "phases": {p: statistics.median(s[p] for s in r["steps"]) for p in PHASES},
                "mfu": model_flops_utilization(flops, speed, r["peak_flops"]),
                "peak_flops": r["peak_flops"],
                "matmul_flops": measured,
                "matmul_utilization": flops * speed / measured,
                "first_step_seconds": r["first_step_seconds"],
                "peak_bytes": r["peak_bytes"],
                "device": r["device"],
            }
        )
    by_name = {row["variant"]: row for row in rows}
    for row in rows:
        for mode in ("eager", "compiled"):
            base = by_name.get(f"nanochat-{mode}")
            row[f"ratio_to_nanochat_{mode}"] = row["tokens_per_second"] / base["tokens_per_second"] if base else None
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"training speed on {rows[0]['device']}")
    for column in (
        "variant",
        "tok/s",
        "step ms",
        *(f"{p} ms" for p in PHASES),
        "MFU",
        "of matmul",
        "× nc eager",
        "× nc compiled",
        "1st step s",
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for r in rows:
        ratios = [f"{v:.2f}" if (v := r[f"ratio_to_nanochat_{m}"]) else "" for m in ("eager", "compiled")]
        table.add_row(
            r["variant"],
            f"{r['tokens_per_second']:,.0f}",
            f"{1e3 * r['step_seconds']:.1f}",
            *(f"{1e3 * r['phases'][p]:.1f}" for p in PHASES),
            f"{r['mfu']:.1%} of {r['peak_flops'] / 1e12:.0f} TF" if r["mfu"] else "unknown peak",
            f"{r['matmul_utilization']:.0%} of {r['matmul_flops'] / 1e9:,.0f} GF",
            *ratios,
            f"{r['first_step_seconds']:.1f}",
        )
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--nanochat", default="", help="a nanochat checkout to measure beside ours")
    parser.add_argument("--modes", default="eager,compiled", help="eager, compiled, or both")
    parser.add_argument("--ranks", default="", help="numbers of Gloo processes to compare instead, say 1,2,3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="steps a turn (0: by preset)")
    parser.add_argument("--json", default="", help="file to write (default: bench/results/train-<preset>.json)")
    for name, kind in (
        ("dtype", str),
        ("threads", int),
        ("rows", int),
        ("micro-rows", int),
        ("window-pattern", str),
        ("device", str),
        ("fp8", str),
    ):
        parser.add_argument(f"--{name}", type=kind, default=None)
    args = parser.parse_args()
    fields = {
        k: v
        for k in ("dtype", "threads", "rows", "micro_rows", "window_pattern", "device", "fp8")
        if (v := getattr(args, k)) is not None
    }
    job = replace(PRESETS[args.preset], **fields)
    variants = [
        f"{make}-{mode}" for mode in args.modes.split(",") for make in (("ours", "nanochat") if args.nanochat else ("ours",))
    ]
    steps = args.steps or {"small": 20, "demo": 20, "d4": 3}.get(args.preset, 5)
    if args.ranks:
        rows = measure_ranks(job, [int(n) for n in args.ranks.split(",")], args.rounds, steps)
        print_ranks(rows)
    else:
        rows = summarize(job, run_all(variants, job, args.nanochat, args.rounds, steps))
        print_table(rows)
    import torch

    path = Path(args.json or Path(__file__).parent / "results" / f"train-{args.preset}{'-ranks' if args.ranks else ''}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"job": asdict(job), "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    path.write_text(json.dumps({**meta, "rows": rows}, indent=1), encoding="utf8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
