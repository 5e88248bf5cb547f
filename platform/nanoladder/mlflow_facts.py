"""A run's record, points and tags in MLflow's terms."""

from __future__ import annotations

import datetime
import time
from typing import Any

from nanochat_model.identity import NOT_IDENTITY
from nanochat_model.record import CurvePoint, RunRecord
from nanoladder.cells import Trial
from nanoladder.space import format_values
from nanoladder.sweep import Sweep

TAG = "nanoladder."
NOT_PARAMS = NOT_IDENTITY  # MLflow refuses another value of a parameter


def point_metrics(point: CurvePoint, started_ms: int) -> list[Any]:
    """One evaluation as MLflow metrics on the three axes."""
    from mlflow.entities import Metric

    at = started_ms + round(point.seconds * 1000)
    plain = {"val_bpb": point.val_bpb, "num_tokens": point.num_tokens, "train_flops": point.train_flops}
    plain |= {"train_seconds": point.seconds} | ({"train_loss": point.train_loss} if point.train_loss is not None else {})
    metrics = [Metric(k, float(v), at, point.step) for k, v in plain.items()]
    metrics.append(Metric("by_gflops/val_bpb", point.val_bpb, at, round(point.train_flops / 1e9)))
    metrics.append(Metric("by_milliseconds/val_bpb", point.val_bpb, at, round(point.seconds * 1000)))
    return metrics


def final_metrics(record: RunRecord) -> dict[str, float]:
    """The numbers of a record that tables and laws are made of."""
    numbers = {
        "final_val_bpb": record.val_bpb,
        "core": record.core,
        "total_train_flops": record.train_flops,
        "total_num_tokens": record.num_tokens,
        "total_train_seconds": record.train_seconds,
        "tokens_per_second": record.tokens_per_second,
        "mfu": record.mfu,
        "attempts": record.attempts,
        "num_devices": record.num_devices,
        "startup_seconds": sum(record.startup_seconds.values()) if record.startup_seconds else None,
        **{f"step_seconds/{part}": seconds for part, seconds in record.step_seconds.items()},
        **{f"params_{k}": v for k, v in record.params.items()},
    }
    return {k: float(v) for k, v in numbers.items() if v is not None}


def diagnostic_metrics(record: RunRecord, at: int, after_step: int) -> list[Any]:
    """What a run measured inside, as MLflow metrics `diagnostics/<kind>/<where>` at the steps after `after_step`. `at`: ms."""
    from mlflow.entities import Metric

    steps = record.diagnostics.get("step", [])
    return [
        Metric(f"diagnostics/{name}", float(value), at, step)
        for name, column in record.diagnostics.items()
        for step, value in zip(steps, column, strict=True)
        if name != "step" and value is not None and step > after_step
    ]


def record_tags(trial: Trial, record: RunRecord) -> dict[str, str]:
    """What a run is found by: stage, status, seed, candidate, and the tags of its record."""
    tags = {"status": record.status, "stage": record.stage, "finished_at": record.finished_at, "device": record.device}
    tags |= {"backend": record.backend, "comparable_hash": record.comparable_hash, "seed": str(record.seed)}
    tags |= {"git_commit": record.git_commit, "candidate": str(trial.candidate), "values": format_values(trial.values)}
    tags |= {"data_path": record.config.data.path, **record.tags}
    if record.error:
        tags["error"] = record.error[:500]
    return {TAG + k: v for k, v in tags.items() if v}


def sweep_tags(sweep: Sweep) -> dict[str, str]:
    """Of a sweep's parent run."""
    tags = {"question": sweep.question, "source": sweep.source, "stage": sweep.stage, "purpose": sweep.purpose}
    return {TAG + k: v for k, v in tags.items() if v} | {"mlflow.note.content": sweep.question}


def milliseconds(iso: str) -> int:
    """An ISO time as MLflow takes it; now for ""."""
    if not iso:
        return round(time.time() * 1000)
    return round(datetime.datetime.fromisoformat(iso).timestamp() * 1000)
