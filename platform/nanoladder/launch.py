"""From a plan to a run on Ray Train, and its verdict: prediction against result."""

from __future__ import annotations

import json
from typing import Any

from nanochat_model.config import RuntimeConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import run_id, write_atomic
from nanochat_model.record import RunRecord
from nanoladder.outcomes import PREDICTION_FILE, PRODUCTION, prediction_facts
from nanoladder.plan import LaunchPlan, LossPrediction
from nanoladder.workspace import Workspace

VERDICT_FILE = "verdict.json"
CHECKPOINT_SECONDS = 900.0  # between checkpoints of a long run: what a crash may cost


def launch(plan: LaunchPlan, workspace: Workspace, *, address: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Run `plan` on Ray Train and return the verdict.

    The prediction is written into the run's folder before the run starts, and kept if it is there already: what was said
    first counts. Raises ConfigError when the plan is blocked by a bad law or has no data, and what the training raised.
    """
    if plan.blocking:
        raise ConfigError("; ".join(plan.blocking))
    if not plan.config.data.manifest_hash:
        raise ConfigError(f"no token shards under {workspace.root}; build them with: nanoladder data --storage {workspace.root}")
    from nanoladder.ray_init import ensure_ray, shutdown_ray
    from nanoladder.train_backend import run_training_on_ray_train

    folder = workspace.run_dir(run_id(plan.config))
    said = folder / PREDICTION_FILE
    if not said.exists():
        write_atomic(said, json.dumps(prediction_facts(plan.config, plan.prediction, plan.uses), indent=1))
    on_cpu = plan.throughput.peak_flops_per_device is None
    ensure_ray(workspace, num_cpus=plan.target.num_devices if on_cpu else None, address=address)
    try:
        record = run_training_on_ray_train(
            plan.config,
            launch_runtime(plan),
            workspace=workspace,
            num_workers=plan.target.num_devices,
            use_gpu=not on_cpu,
            name=PRODUCTION,
            sweep=PRODUCTION,
            stage=PRODUCTION,
            tags={"purpose": PRODUCTION},
            progress=None if quiet else lambda event: print_event(event, plan),
        )
    finally:
        shutdown_ray()
    verdict = judge(record, plan.prediction)
    write_atomic(folder / VERDICT_FILE, json.dumps(verdict, indent=1))
    if not quiet:
        print(verdict["text"])
    return verdict


def launch_runtime(plan: LaunchPlan) -> RuntimeConfig:
    """How the plan's processes run: its micro-batch on a known card, the device's own choice on a CPU."""
    return RuntimeConfig(
        device="auto" if plan.memory_known else "cpu",
        micro_batch_rows=plan.micro_batch_rows if plan.memory_known else 0,
        num_threads=0 if plan.memory_known else 1,
        checkpoint_every_seconds=CHECKPOINT_SECONDS,
        price_per_device_hour=plan.target.price_per_device_hour or 0.0,
    )


def judge(record: RunRecord, prediction: LossPrediction | None) -> dict[str, Any]:
    """Prediction against result: inside the interval, or by how much outside, and what that says about the laws."""
    facts: dict[str, Any] = {
        "run_id": record.run_id,
        "status": record.status,
        "measured": record.val_bpb,
        "predicted": prediction.val_bpb if prediction else None,
        "low": prediction.low if prediction else None,
        "high": prediction.high if prediction else None,
        "error": None,
        "inside": None,
    }
    if record.status != "complete" or record.val_bpb is None:
        return {**facts, "text": f"run {record.run_id} ended as {record.status}: {record.error or 'no loss was measured'}"}
    measured = f"measured {record.val_bpb:.4f} bpb"
    if prediction is None:
        return {**facts, "text": f"{measured}; nothing was predicted"}
    error = record.val_bpb / prediction.val_bpb - 1
    text = f"predicted {prediction.val_bpb:.4f}, {measured} ({error:+.2%})"
    inside = None
    if prediction.low is not None and prediction.high is not None:
        inside = prediction.low <= record.val_bpb <= prediction.high
        where = "inside" if inside else ("better than" if record.val_bpb < prediction.low else "worse than")
        holds = "the laws hold here" if inside else "fit the laws again with this run among the data"
        text += f"; {where} the interval [{prediction.low:.4f}, {prediction.high:.4f}]: {holds}"
    return {**facts, "error": error, "inside": inside, "text": text}


def print_event(event: dict[str, Any], plan: LaunchPlan) -> None:
    """One line for each report of the run: step, loss, speed, MFU, time left, money."""
    if event["event"] == "eval":
        print(f"step {event['step']}: validation {event['val_bpb']:.4f} bpb", flush=True)
    elif event["event"] == "step":
        num_steps, speed = plan.config.num_steps, event["tokens_per_second"] or 0.0
        left = (num_steps - event["step"]) * plan.config.batch_tokens / speed if speed else float("nan")
        mfu = f"MFU {event['mfu']:.1%}" if event["mfu"] else "MFU unknown"
        parts = [f"step {event['step']}/{num_steps}", f"loss {event['train_loss']:.4f}", f"{speed:,.0f} tokens/s", mfu]
        parts.append(f"{left / 60:.1f} min left")
        if plan.target.price_per_device_hour:
            parts.append(f"${event['seconds'] / 3600 * plan.target.price_per_device_hour * plan.target.num_devices:.2f}")
        print("  ".join(parts), flush=True)
