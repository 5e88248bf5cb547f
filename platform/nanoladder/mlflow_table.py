"""Runs of an MLflow experiment as the table that laws are fitted to: ours by their tags, anybody's by a column mapping.

The records remain the truth; this is for a tracking server that is at hand when the records are not. Curves stay there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.columns import KEYS
from analysis.errors import DataError
from analysis.table import RunTable, loss_name_of, table_from_frame
from nanoladder.mlflow_facts import NOT_PARAMS, TAG
from nanoladder.tracking import EXPERIMENT, connect

PAGE = 1000
KNOBS = (
    "seed", "batch_tokens", "num_steps", "trunk", "compute_dtype", "fp8", "model.depth", "model.model_dim", "model.num_heads",
    "model.num_kv_heads", "optimizer.matrix_lr", "optimizer.embedding_lr", "optimizer.unembedding_lr", "optimizer.scalar_lr",
    "optimizer.weight_decay", "schedule.warmup_steps",
)  # fmt: skip  # what varies inside one recipe
STATUS = {"FINISHED": "complete", "FAILED": "failed", "KILLED": "stopped", "RUNNING": "running", "SCHEDULED": "scheduled"}


def load_mlflow(uri: str, experiment: str = EXPERIMENT, mapping: Mapping[str, str] | None = None) -> RunTable:
    """Usable runs of `experiment` at the tracking `uri`, the rest listed with reasons.

    Runs that a sweep of this package logged are read by their tags. For other experiments `mapping` says what (params, tokens,
    loss, budget, flops, batch, lr, weight_decay, width, seed …) is which column: "metrics.val_loss", "params.n_params", "tags.x".
    Raises DataError on an unreachable server, an unknown experiment, a missing column, or no usable run.
    """
    runs = _runs(uri, experiment)
    source = f"MLflow {uri}, experiment {experiment}"
    if mapping is not None:
        return table_from_frame(_mapped(runs, mapping, source), source=source, loss_name=loss_name_of(mapping["loss"]))
    rows = {run.data.tags[TAG + "run_id"]: _row(run) for run in reversed(runs) if TAG + "run_id" in run.data.tags}
    if not rows:
        raise DataError(f"{source}: none of {len(runs)} runs was logged by a sweep; give a column mapping")
    return table_from_frame(pd.DataFrame(list(rows.values())), source=source, convention="matrices_lm_head")


def _runs(uri: str, experiment: str) -> list[Any]:
    from mlflow.exceptions import MlflowException

    found: list[Any] = []
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():  # MLflow would make an empty one
        raise DataError(f"no MLflow database at {uri}; a path from the root has four slashes: sqlite:////folder/mlflow.db")
    try:
        client = connect(uri)
        home = client.get_experiment_by_name(experiment)
        if home is None:
            raise DataError(f"no experiment {experiment!r} at {uri}; look for its name in the MLflow page")
        token = None
        while True:
            page = client.search_runs([home.experiment_id], max_results=PAGE, page_token=token)
            found += page
            token = page.token
            if not token:
                return found
    except (MlflowException, OSError) as e:
        raise DataError(f"MLflow at {uri} cannot be read ({str(e).splitlines()[0][:160]}); check the address") from None


def _row(run: Any) -> dict[str, Any]:
    """One of our runs as a row of the standard table."""
    tags = {k.removeprefix(TAG): v for k, v in run.data.tags.items() if k.startswith(TAG)}
    params, metrics = run.data.params, run.data.metrics
    identity = {k: v for k, v in params.items() if k not in NOT_PARAMS}
    matrices, head, total = (metrics.get(f"params_{k}") for k in ("transformer_matrices", "lm_head", "total"))
    return {
        "row": f"MLflow run {run.info.run_id}", "run_id": tags["run_id"], "name": run.info.run_name or "",
        "sweep": tags.get("sweep", ""), "stage": tags.get("stage", ""), "purpose": tags.get("purpose", ""),
        "group": (params.get("trunk") or "").split("@")[0] or tags["run_id"],
        "status": tags.get("status") or STATUS.get(run.info.status, run.info.status), "error": tags.get("error", ""),
        "N_matrices_lm_head": _sum(matrices, head), "N_all": total, "N_matrices": matrices,
        "D": metrics.get("total_num_tokens"), "C": metrics.get("total_train_flops"), "L": metrics.get("final_val_bpb"),
        "budget": tags.get("budget"), "B": params.get("batch_tokens"), "lr": params.get("optimizer.matrix_lr"),
        "weight_decay": params.get("optimizer.weight_decay"), "width": params.get("model.model_dim"),
        "depth": params.get("model.depth"), "sequence_len": params.get("model.sequence_len"), "seed": params.get("seed"),
        "comparable_hash": tags.get("comparable_hash", ""), "cell": _hash(identity, ("seed",)), "variant": _hash(identity, KNOBS),
        "seconds": metrics.get("total_train_seconds"), "device": tags.get("device", ""), "num_devices": metrics.get("num_devices"),
        "core": metrics.get("core"),
        "embedding_share": _share(_sum(metrics.get("params_wte"), metrics.get("params_value_embeds")), total),
    }  # fmt: skip


def _mapped(runs: list[Any], mapping: Mapping[str, str], source: str) -> pd.DataFrame:
    rows = []
    for run in runs:
        data = {"metrics": run.data.metrics, "params": run.data.params, "tags": run.data.tags}
        row = {
            "row": f"MLflow run {run.info.run_id}",
            "run_id": run.info.run_id,
            "status": STATUS.get(run.info.status, run.info.status),
        }
        for key, column in mapping.items():
            kind, _, name = column.partition(".")
            if key not in KEYS or kind not in data:
                raise DataError(f"mapping {key}={column}: give one of {', '.join(KEYS)} as metrics.NAME, params.NAME or tags.NAME")
            row[KEYS[key]] = data[kind].get(name)
        rows.append(row)
    frame = pd.DataFrame(rows)
    for key, column in mapping.items():
        if frame.empty or frame[KEYS[key]].isna().all():
            raise DataError(f"{source}: no run has {column} (for {key})")
    missing = [k for k in ("params", "tokens", "loss") if k not in mapping]
    if missing:
        raise DataError(f"the mapping names no column for {missing[0]}")
    return frame


def _sum(*values: float | None) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _hash(params: Mapping[str, str], without: tuple[str, ...]) -> str:
    kept = {k: v for k, v in params.items() if k not in without}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
