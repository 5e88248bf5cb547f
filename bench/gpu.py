"""What a GPU makes of training, in one command: speed, MFU and memory by depth, windows and precision, and a loss curve.

    python bench/gpu.py                              one GPU, within ten minutes
    python bench/gpu.py --gpus 8                     the same on eight GPUs of this machine
    python bench/gpu.py --preset tiny --device cpu   tries the script itself

Needs no Ray. Each row is a process of its own that takes whole training steps (gradient accumulation, agreement, optimizer; the
schedules move) on random tokens at T 2048, V 32768 and 2^19 tokens a step, halving its micro-batch where memory ends. The curve is
two minutes of pretraining at depth 12 on text found on this machine (Python's library and installed packages), which is tokenized
meanwhile. The most telling rows come first; what --seconds has no room for is done by the same command given again. Prints
Markdown and writes JSON after each row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

GOALS = {12: 0.45, 20: 0.52, 24: 0.55}  # MFU on one H200, windows SSSL, bf16
WARM_STEPS = 2  # after the first, which compiles
ROW_SECONDS = 75.0  # what a row is expected to take at least: a cold compilation and its steps
GRACE_SECONDS = 20.0  # for a process to build before its curve or after it
PACKAGES = ("kernels", "flash_attn", "triton", "pytorch-triton-rocm", "torchao")  # whose versions matter


class TooManyRows(Exception):
    """Memory ran out with a micro-batch of so many rows."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table, or (kind "curve") the loss curve."""

    kind: str = "speed"
    depth: int
    window_pattern: str = "SSSL"
    fp8: str = "off"
    dtype: str = "bfloat16"
    sequence_len: int = 2048
    vocab_size: int = 32768
    head_dim: int = 128
    batch_tokens: int = 1 << 19
    micro_rows: int = 0  # 0: chosen by the device
    steps: int = 5
    seconds: float = 120.0  # of the curve

    @property
    def key(self) -> str:
        precision = self.dtype if self.fp8 == "off" else f"fp8 {self.fp8}"
        return f"d{self.depth} {self.window_pattern} {precision}" if self.kind == "speed" else f"d{self.depth} curve"


TINY = {"sequence_len": 128, "vocab_size": 1024, "head_dim": 32, "batch_tokens": 2048, "steps": 2}
PRESETS = {
    "full": (
        Case(depth=24),
        Case(depth=24, fp8="tensorwise"),
        Case(depth=12),
        Case(kind="curve", depth=12),
        Case(depth=20),
        Case(depth=24, window_pattern="L"),
        Case(depth=12, window_pattern="L"),
        Case(depth=20, window_pattern="L"),
        Case(depth=24, fp8="rowwise"),
    ),
    "tiny": (
        Case(depth=2, **TINY),
        Case(depth=2, fp8="tensorwise", **TINY),
        Case(kind="curve", depth=2, seconds=5.0, **TINY),
    ),
}


def model_config(case: Case) -> Any:
    from nanochat_model.config import GPTConfig

    return GPTConfig.from_depth(
        case.depth,
        aspect_ratio=case.head_dim // 2,
        head_dim=case.head_dim,
        sequence_len=case.sequence_len,
        vocab_size=case.vocab_size,
        window_pattern=case.window_pattern,
    )


def random_batches(case: Case, ranks: Any) -> Any:
    """This rank's part of global batch k as a function of k; four different ones."""
    import numpy as np

    from nanochat_model.loader import rank_rows
    from nanochat_model.loop import Batch

    rows = case.batch_tokens // case.sequence_len
    own = slice(*rank_rows(rows, ranks.rank, ranks.world_size))
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, case.vocab_size, (rows, case.sequence_len + 1))[own] for _ in range(4)]
    made = [Batch(inputs=a[:, :-1], targets=a[:, 1:], num_targets=case.batch_tokens) for a in ids]
    return lambda k: made[k % len(made)]


def measure_speed(case: Case, device_name: str, started: float) -> dict[str, Any]:
    """Whole steps, timed together; then one step split into its parts."""
    import torch

    from nanochat_model import device as devices
    from nanochat_model.config import RuntimeConfig, TrainConfig
    from nanochat_model.counts import flops_per_token
    from nanochat_model.distributed import process_group
    from nanochat_model.loop import frozen_garbage
    from nanochat_model.out_of_memory import is_out_of_memory
    from nanochat_model.resume import multipliers_at
    from nanochat_model.session import build_stepper
    from nanochat_model.step_times import timed_step

    runtime = RuntimeConfig(device=device_name, micro_batch_rows=case.micro_rows)
    with process_group(device_name.replace("auto", "")) as ranks, frozen_garbage() as garbage:
        config = TrainConfig(
            model=model_config(case), batch_tokens=case.batch_tokens, num_steps=1000, compute_dtype=case.dtype, fp8=case.fp8
        )  # fmt: skip
        model, _, stepper, device = build_stepper(config, runtime, ranks)
        batch_of = random_batches(case, ranks)
        wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

        def steps(first: int, count: int) -> float:
            wait()
            start = time.perf_counter()
            outcomes = [stepper.step(batch_of(k), multipliers_at(config, k)) for k in range(first, first + count)]
            wait()
            assert not any(o.skipped for o in outcomes), "a loss or gradient is not finite"
            return time.perf_counter() - start

        try:
            steps(0, 1)
        except Exception as e:
            if is_out_of_memory(e):
                raise TooManyRows(stepper.micro_batch_rows) from e
            raise
        first_step_seconds = time.time() - started
        garbage.after_step(1)
        steps(1, WARM_STEPS)
        graphs = num_graphs()
        seconds = steps(1 + WARM_STEPS, case.steps) / case.steps
        new_graphs = num_graphs() - graphs
        parts, _ = timed_step(stepper, batch_of, 0, multipliers_at(config, 0))
        peak, speed = devices.peak_flops(device), case.batch_tokens / seconds
        flops = flops_per_token(config.model)
        matmul = devices.matmul_flops(torch.bfloat16, size=8192 if device.type == "cuda" else 512, device=device)
        return {
            "attention": model.choose_attention(device),
            "micro_batch_rows": stepper.micro_batch_rows,
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "mfu": devices.model_flops_utilization(flops, speed, peak, ranks.world_size),
            "peak_flops": peak,
            "matmul_flops": matmul,
            "matmul_share": flops * speed / (matmul * ranks.world_size),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "first_step_seconds": first_step_seconds,
            "parts": parts,
            "compiled_while_timed": new_graphs,
            "device": devices.device_name(device),
        }


def num_graphs() -> int:
    import torch

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def prepare_text(case: Case, folder: Path) -> dict[str, Any]:
    """Corpus, tokenizer and shards of text that every machine with Python has."""
    from nanochat_model.corpus import build_corpus, training_texts
    from nanochat_model.shards import build_shards
    from nanochat_model.tokenizer import Tokenizer

    small = case.vocab_size <= 8192
    corpus = build_corpus("stdlib" if small else "site-packages", folder / "corpus", val_fraction=0.01)
    tokenizer = Tokenizer.train(training_texts(corpus, max_bytes=(2 if small else 64) << 20), case.vocab_size)
    shards = build_shards(folder / "corpus", tokenizer, folder / "shards", num_workers=max(1, (os.cpu_count() or 2) // 2))
    return {"num_bytes": corpus.num_bytes, "num_tokens": shards.num_tokens("train")}


def measure_curve(case: Case, device_name: str, folder: Path, run_dir: str, tokens_per_second: float) -> dict[str, Any]:
    """A pretraining by the recipe whose horizon is what the device does in the case's seconds; its loss over time."""
    from nanochat_model.callbacks import Callback, StepInfo, StopTraining
    from nanochat_model.config import EvalConfig, RuntimeConfig
    from nanochat_model.distributed import process_group
    from nanochat_model.horizon import Horizon
    from nanochat_model.recipe import NANOCHAT
    from nanochat_model.shard_set import ShardSet
    from nanochat_model.train import pretrain

    shards = ShardSet.open(folder / "shards")
    model = replace(model_config(case), vocab_size=len(shards.token_bytes))
    recipe = replace(NANOCHAT, eval=EvalConfig(num_tokens=2 * case.batch_tokens, every_steps=0))
    config = recipe.resolve(
        model, Horizon(num_tokens=tokens_per_second * case.seconds), data=shards.data_config("best_fit"),
        overrides={"batch_tokens": case.batch_tokens // 4},
    )  # fmt: skip
    points: list[tuple[int, float, float]] = []

    class Curve(Callback):
        def on_step(self, info: StepInfo) -> None:
            points.append((info.step, round(info.seconds, 2), round(info.smooth_train_loss, 4)))
            if info.seconds > 1.25 * case.seconds:
                raise StopTraining("the time is over")

    runtime = RuntimeConfig(device=device_name, keep_last=0, log_every_steps=max(1, config.num_steps // 24))
    with process_group(device_name.replace("auto", "")):
        record = pretrain(config, runtime, run_dir=run_dir, callbacks=[Curve()])
    return {
        "status": record.status,
        "val_bpb": record.val_bpb,
        "num_tokens": record.num_tokens,
        "train_seconds": record.train_seconds,
        "tokens_per_second": record.tokens_per_second,
        "mfu": record.mfu,
        "startup_seconds": record.startup_seconds,
        "points": points,
        "device": record.device,
    }


def work(task: dict[str, Any], out: Path) -> None:
    """What a process of its own does; its first rank leaves the result, or that memory ran out, in `out`."""
    from nanochat_model.errors import ConfigError
    from nanochat_model.identity import write_atomic

    case, started = Case(**task["case"]), task["started"]
    try:
        if task["do"] == "text":
            result = prepare_text(case, Path(task["folder"]))
        elif case.kind == "curve":
            result = measure_curve(case, task["device"], Path(task["folder"]), task["run_dir"], task["tokens_per_second"])
        else:
            result = measure_speed(case, task["device"], started)
    except ConfigError as e:
        result = {"refused": str(e)}
    except TooManyRows as e:
        write_atomic(out, json.dumps({"out_of_memory": e.args[0]}))  # on whichever rank
        raise SystemExit(1) from None
    if os.environ.get("RANK", "0") == "0":
        write_atomic(out, json.dumps(result))


def start(task: dict[str, Any], out: Path, *, gpus: int = 1, nice: int = 0) -> subprocess.Popen[bytes]:
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *ranks, __file__, "--work", json.dumps(task | {"started": time.time()}), "--out", str(out)]
    return subprocess.Popen((["nice", "-n", str(nice)] if nice else []) + command, start_new_session=True)


def finish(process: subprocess.Popen[bytes], out: Path, seconds: float) -> dict[str, Any]:
    """What the process left in `out`; past `seconds` it is ended, with all it started."""
    try:
        process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return json.loads(out.read_text()) if out.is_file() else {"failed": f"ended with status {process.returncode}, see above"}


def measure(case: Case, args: argparse.Namespace, folder: Path, results: dict[str, Any], end: float) -> dict[str, Any]:
    """One case in processes of its own, with half the micro-batch where memory ran out."""
    like = [r["tokens_per_second"] for k, r in results.items() if k.startswith(f"d{case.depth} SSSL") and "tokens_per_second" in r]
    rate = like[0] if like else 2e5 * args.gpus
    task = {"do": case.kind, "device": args.device, "folder": str(folder), "tokens_per_second": rate}
    while True:
        with tempfile.TemporaryDirectory() as place:
            out, task = Path(place) / "result.json", task | {"case": asdict(case), "run_dir": str(Path(place) / "run")}
            result = finish(start(task, out, gpus=args.gpus), out, end - time.monotonic())
        rows = result.get("out_of_memory", 1)
        if rows == 1:
            return result
        case = replace(case, micro_rows=rows // 2)
        print(f"{case.key}: out of memory with {rows} rows, again with {rows // 2}", file=sys.stderr, flush=True)


def markdown(results: dict[str, Any], meta: dict[str, Any]) -> str:
    """The table and the curve, to be pasted."""
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items())
    device = next((r["device"] for r in results.values() if "device" in r), meta["job"]["device"])
    lines = [f"{meta['date']}, {meta['job']['gpus']} × {device}, {versions}", ""]
    lines += ["| | tok/s | step s | MFU | of a matmul measured | peak GB | micro-batch | attention | first step s | goal |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    lines += [speed_row(key, r) for key, r in results.items() if "curve" not in key]
    plain, fast = (results.get(f"d24 SSSL {p}", {}).get("tokens_per_second") for p in ("bfloat16", "fp8 tensorwise"))
    if plain and fast:
        lines += ["", f"fp8 (tensorwise) at d24: {fast / plain:.2f} × bf16."]
    for key, r in results.items():
        if "points" in r:
            text = " · ".join(f"{seconds:.0f} s {loss:.3f}" for _, seconds, loss in r["points"])
            bpb = "" if r["val_bpb"] is None else f", {r['val_bpb']:.4f} bits per byte at the end"
            lines += ["", f"{key}: {r['num_tokens'] / 1e6:.1f}M tokens in {r['train_seconds']:.0f} s{bpb}. Loss: {text}"]
    return "\n".join(lines)


def speed_row(key: str, r: dict[str, Any]) -> str:
    if "tokens_per_second" not in r:
        return f"| {key} | " + next(f"{k.replace('_', ' ')}: {v}" for k, v in r.items()) + " |" * 9
    goal = GOALS.get(int(key.split()[0][1:])) if key.endswith("SSSL bfloat16") and r["mfu"] else None
    memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.1f}"
    again = f", {r['compiled_while_timed']} graphs compiled while timed" if r["compiled_while_timed"] else ""
    cells = [
        key,
        f"{r['tokens_per_second']:,.0f}",
        f"{r['step_seconds']:.3g}{again}",
        f"{r['mfu']:.1%} of {r['peak_flops'] / 1e12:.0f} TF" if r["mfu"] else "unknown peak",
        f"{r['matmul_share']:.0%} of {r['matmul_flops'] / 1e12:.3g} TF",
        memory,
        str(r["micro_batch_rows"]),
        r["attention"],
        f"{r['first_step_seconds']:.0f}",
        "" if goal is None else f"{goal:.0%}: {'reached' if r['mfu'] >= goal else 'missed'}",
    ]
    return "| " + " | ".join(cells) + " |"


def versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what `args.json` does not hold yet, until the time is over."""
    end, path = time.monotonic() + args.seconds, Path(args.json)
    job = {"preset": args.preset, "device": args.device, "gpus": args.gpus}
    kept = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    results: dict[str, Any] = kept.get("results", {}) if kept.get("job") == job else {}
    results = {k: r for k, r in results.items() if "tokens_per_second" in r or "refused" in r}
    meta = {"job": job, "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(args.data or Path(tempfile.gettempdir()) / f"nanoladder-bench-text-{args.preset}")
    cases = [c for c in PRESETS[args.preset] if c.key not in results]
    curve = next((c for c in cases if c.kind == "curve"), None)
    text_out = Path(tempfile.mkdtemp()) / "text.json"
    text = curve and start({"do": "text", "case": asdict(curve), "folder": str(folder)}, text_out, nice=10)
    for case in cases:
        need = ROW_SECONDS if case.kind == "speed" else case.seconds + GRACE_SECONDS
        if args.preset == "full" and time.monotonic() + need > end:
            print(f"{case.key}: no time left; the same command again goes on", file=sys.stderr)
            continue
        if case.kind == "curve" and text:
            found = finish(text, text_out, end - time.monotonic() - need)
            if "num_tokens" not in found:
                results[case.key] = found
                continue
        results[case.key] = measure(case, args, folder, results, end)
        print(speed_row(case.key, results[case.key]) if case.kind == "speed" else f"{case.key}: done", flush=True)
        path.write_text(json.dumps({**meta, "results": results}, indent=1), encoding="utf8")
    if text:
        finish(text, text_out, 1.0)
    print("\n" + markdown(results, meta) + f"\n\nwrote {path}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=570.0, help="time for all of it")
    parser.add_argument("--data", default="", help="folder for the curve's text, kept (default: in the temporary folder)")
    parser.add_argument("--json", default=str(Path(__file__).parent / "results" / "gpu.json"))
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)  # a process of its own: what to do
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work), Path(args.out))
    else:
        run(args)


if __name__ == "__main__":
    main()
