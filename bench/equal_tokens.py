"""Loss at equal tokens: our training beside nanochat's own model and optimizer, same recipe, same batches, several seeds.

    nanoladder data --source stdlib --storage runs --vocab-size 1024
    python bench/equal_tokens.py runs/shards --nanochat ~/nanochat --seeds 0 1 2

Each run initializes its own model by its own rules. Both take batch k of the same shards, the rates, decays and schedules that
our recipe resolves (nanochat's rules), and are evaluated by their own code on the same validation rows. Each run is a process of
its own, and its result is kept in the JSON file at once: the same command again does only what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

MAKERS = ("ours", "nanochat")
T_90 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 8: 1.860, 10: 1.812}  # two-sided 90% points of Student's t


def train_config(args: argparse.Namespace, seed: int) -> Any:
    """nanochat's recipe at this size and horizon."""
    from nanochat_model.config import GPTConfig
    from nanochat_model.horizon import Horizon
    from nanochat_model.recipe import NANOCHAT
    from nanochat_model.shard_set import ShardSet

    shards = ShardSet.open(args.shards)
    heads = args.model_dim // args.head_dim
    model = GPTConfig(
        depth=args.depth, model_dim=args.model_dim, num_heads=heads, num_kv_heads=heads, sequence_len=args.sequence_len,
        vocab_size=len(shards.token_bytes), window_pattern="L",
    )  # fmt: skip
    recipe = replace(NANOCHAT, eval=replace(NANOCHAT.eval, num_tokens=args.eval_tokens, every_steps=0), compute_dtype=args.dtype)
    early = {"batch_tokens": args.batch_tokens} if args.batch_tokens else {}
    return recipe.resolve(model, Horizon(num_tokens=args.tokens), data=shards.data_config("best_fit"), seed=seed, overrides=early)


def run_ours(config: Any, args: argparse.Namespace) -> float:
    from nanochat_model.config import RuntimeConfig
    from nanochat_model.train import pretrain

    runtime = RuntimeConfig(device="cpu", num_threads=args.threads, keep_last=0)
    with tempfile.TemporaryDirectory() as folder:
        record = pretrain(config, runtime, run_dir=folder)
    assert record.val_bpb is not None, record.error
    return record.val_bpb


def run_nanochat(config: Any, args: argparse.Namespace) -> float:
    """nanochat's model, optimizer and evaluation from the checkout, driven by our schedules and batches."""
    os.environ["NANOCHAT_DTYPE"] = args.dtype
    sys.path.insert(0, args.nanochat)
    import torch
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]
    from nanochat.loss_eval import evaluate_bpb  # type: ignore[import-not-found]

    from nanochat_model.loader import Loader
    from nanochat_model.resume import multipliers_at
    from nanochat_model.shard_set import ShardSet

    torch.set_num_threads(args.threads)
    torch.manual_seed(config.seed)
    m, o, shards = config.model, config.optimizer, ShardSet.open(args.shards)
    model = GPT(
        GPTConfig(
            sequence_len=m.sequence_len, vocab_size=m.vocab_size, n_layer=m.depth, n_head=m.num_heads, n_kv_head=m.num_kv_heads,
            n_embd=m.model_dim, window_pattern=m.window_pattern,
        )
    )  # fmt: skip
    model.init_weights()
    optimizer = model.setup_optimizer(
        unembedding_lr=o.unembedding_lr, embedding_lr=o.embedding_lr, matrix_lr=o.matrix_lr, weight_decay=o.weight_decay,
        scalar_lr=o.scalar_lr,
    )  # fmt: skip
    loader = Loader(
        shards, "train", "best_fit", sequence_len=m.sequence_len, rows_per_batch=config.rows_per_batch, seed=config.seed
    )
    rows = min(16, config.rows_per_batch)
    parts = config.rows_per_batch // rows
    for step in range(config.num_steps):
        inputs, targets = (torch.from_numpy(a).split(rows) for a in loader.batch(step))
        for x, y in zip(inputs, targets, strict=True):
            (model(x, y) / parts).backward()
        now = multipliers_at(config, step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * now.lr
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = now.momentum, o.weight_decay * now.weight_decay
        optimizer.step()
        model.zero_grad(set_to_none=True)
    val_x, val_y = (torch.from_numpy(a).split(16) for a in loader.validation(config.eval.num_tokens))
    token_bytes = torch.from_numpy(shards.token_bytes.astype("int64"))
    return float(evaluate_bpb(model, zip(val_x, val_y, strict=True), len(val_x), token_bytes))


def one_run(maker: str, seed: int, args: argparse.Namespace) -> None:
    """Train in this process and print the result as JSON, the last line."""
    config = train_config(args, seed)
    start = time.perf_counter()
    bpb = run_ours(config, args) if maker == "ours" else run_nanochat(config, args)
    print(json.dumps({"val_bpb": bpb, "seconds": time.perf_counter() - start, "num_tokens": config.num_tokens}))


def welch(a: list[float], b: list[float]) -> tuple[float, float]:
    """Difference of means and the half width of its 90% interval, variances unequal (Welch; degrees rounded down)."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    degrees = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    t = T_90[max(k for k in T_90 if k <= max(1, int(degrees)))]
    return statistics.mean(a) - statistics.mean(b), t * math.sqrt(va + vb)


def report(results: dict[str, Any]) -> None:
    found = {maker: [r["val_bpb"] for k, r in sorted(results.items()) if k.startswith(maker + ":")] for maker in MAKERS}
    for maker, values in found.items():
        print(f"{maker:9s} " + "  ".join(f"{v:.4f}" for v in values))
    if all(len(values) > 1 for values in found.values()):
        gap, half = welch(found["ours"], found["nanochat"])
        print(f"ours − nanochat: {gap:+.4f} bpb, 90% interval {gap - half:+.4f} to {gap + half:+.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="folder of token shards")
    parser.add_argument("--nanochat", required=True, help="a nanochat checkout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=float, default=1e6)
    parser.add_argument("--batch-tokens", type=int, default=0, help="0: by the rule")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--model-dim", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--sequence-len", type=int, default=256)
    parser.add_argument("--eval-tokens", type=int, default=131_072)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default=str(Path(__file__).parent / "results" / "equal_tokens.json"))
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # maker:seed, in a process of its own
    args = parser.parse_args()
    if args.one:
        maker, _, seed = args.one.partition(":")
        one_run(maker, int(seed), args)
        return
    path = Path(args.json)
    job = {k: v for k, v in vars(args).items() if k not in ("json", "one", "seeds", "nanochat", "shards")}
    kept = json.loads(path.read_text()) if path.exists() else {}
    results = kept.get("results", {}) if kept.get("job") == job else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for key in [f"{maker}:{seed}" for seed in args.seeds for maker in MAKERS]:
        if key in results:
            continue
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", key], stdout=subprocess.PIPE, text=True, check=True
        )
        results[key] = json.loads(done.stdout.splitlines()[-1])
        print(f"{key}: {results[key]['val_bpb']:.4f} bpb, {results[key]['seconds']:.0f} s", flush=True)
        path.write_text(json.dumps({"job": job, "results": results}, indent=1), encoding="utf8")
    report(results)


if __name__ == "__main__":
    main()
