"""Run records (record.json, schema 1) as rows of the standard table. Reads JSON only: the model package is not needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.clean import LeftOut
from analysis.errors import DataError

RECORD_SCHEMA = 1
RECORD_FILE = "record.json"
PLACES = (RECORD_FILE, f"*/{RECORD_FILE}", f"runs/*/{RECORD_FILE}")
LEARNING_RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")


def find_records(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Record files of the given folders (or the files given themselves), sorted: in a run's folder, in a folder of runs, or in a
    storage root. DataError when there is none; no deeper search, which would be one of the whole disk for a mistaken path."""
    given = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give the folder that holds the runs' {RECORD_FILE} files")
        found += [p for place in PLACES for p in sorted(path.glob(place))] if path.is_dir() else [path]
    if not found:
        raise DataError(
            f"no run records in {', '.join(map(str, given))}; give a folder that holds runs/*/{RECORD_FILE} (a storage "
            f"root), */{RECORD_FILE} (its runs) or {RECORD_FILE}, or run a sweep first"
        )
    return found


def read_record(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """One row of the standard table and the run's curve, an array (points, 5): step, tokens, FLOPs, seconds, bpb.

    Raises DataError naming what is wrong: not UTF-8, cut short, another schema, a missing field.
    """
    try:
        text = path.read_text(encoding="utf8")
        record = json.loads(text)
    except UnicodeDecodeError:
        raise DataError("not UTF-8 text") from None
    except OSError as e:
        raise DataError(f"cannot be read: {e.strerror}") from None
    except json.JSONDecodeError as e:
        raise DataError(f"not valid JSON at character {e.pos} of {len(text)} (cut short?)") from None
    if not isinstance(record, dict) or record.get("schema_version") != RECORD_SCHEMA:
        found = record.get("schema_version") if isinstance(record, dict) else type(record).__name__
        raise DataError(f"record schema {found!r}, this version reads {RECORD_SCHEMA}")
    if record.get("kind", "base") != "base":
        raise DataError(f"kind {record['kind']!r}: a fine-tuning is no point of a scaling law")
    try:
        return _row(record), _curve(record)
    except (KeyError, TypeError, AttributeError) as e:
        raise DataError(f"not a run record: field {e} is missing or of another kind") from None


def read_records(paths: str | Path | Sequence[str | Path]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray], list[LeftOut]]:
    """All rows, curves by run_id, and the files that could not be read."""
    rows, curves, left_out = [], {}, []
    for path in find_records(paths):
        try:
            row, curve = read_record(path)
        except DataError as e:
            left_out.append(LeftOut(row=str(path), reason=str(e)))
            continue
        rows.append({**row, "row": str(path)})
        curves[row["run_id"]] = curve
    return rows, curves, left_out


def _row(record: dict[str, Any]) -> dict[str, Any]:
    config, params, tags = record["config"], record["params"], record.get("tags") or {}
    model, optimizer = config["model"], config["optimizer"]
    trunk = str(config.get("trunk") or "").split("@")[0]
    matrices, head = params["transformer_matrices"], params["lm_head"]
    total = params["total"]
    return {
        "run_id": record["run_id"], "name": record.get("name", ""), "sweep": record.get("sweep", ""),
        "stage": record.get("stage", ""), "purpose": tags.get("purpose", ""), "group": trunk or record["run_id"],
        "status": record["status"], "error": record.get("error"),
        "N_matrices_lm_head": matrices + head, "N_all": total, "N_matrices": matrices,
        "D": record["num_tokens"], "C": record["train_flops"], "L": record.get("val_bpb"), "budget": tags.get("budget"),
        "B": config["batch_tokens"], "lr": optimizer["matrix_lr"], "weight_decay": optimizer["weight_decay"],
        "width": model["model_dim"], "depth": model["depth"], "sequence_len": model["sequence_len"], "seed": record["seed"],
        "comparable_hash": record.get("comparable_hash") or _comparable_hash(config), "variant": _variant(config),
        "cell": _hash(_without(config, "seed")), "seconds": record.get("train_seconds"), "device": record.get("device", ""),
        "num_devices": record.get("num_devices"), "core": record.get("core"),
        "embedding_share": (params["wte"] + params["value_embeds"]) / total, "inside": inside_of(record),
    }  # fmt: skip


def _curve(record: dict[str, Any]) -> np.ndarray:
    points = [[p["step"], p["num_tokens"], p["train_flops"], p["seconds"], p["val_bpb"]] for p in record.get("curve") or []]
    return np.array(points, dtype=float).reshape(len(points), 5)


def inside_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says about the inside of its run: diagnostics (equally long lists by metric, "step" among them), mean seconds
    of a step by part, each rank's of computing, and seconds until the first step by part. Empty where it says nothing."""
    return {
        "diagnostics": record.get("diagnostics") or {},
        "step_seconds": record.get("step_seconds") or {},
        "rank_compute_seconds": record.get("rank_compute_seconds") or [],
        "startup_seconds": record.get("startup_seconds") or {},
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def _without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The config without `keys`, the place of the data and the rhythm of evaluation, which do not change a result."""
    out = {k: (dict(v) if isinstance(v, Mapping) else v) for k, v in config.items() if k not in keys}
    for section, key in (("data", "path"), ("eval", "every_steps")):
        if isinstance(out.get(section), dict):
            out[section].pop(key, None)
    return out


def _comparable_hash(config: Mapping[str, Any]) -> str:
    data = config["data"]
    return _hash([data["manifest_hash"], data["packing"], config["model"]["sequence_len"], config["eval"]["num_tokens"]])


def _variant(config: Mapping[str, Any]) -> str:
    """What a run is besides size, horizon, batch, learning rates, matrix weight decay and seed: its recipe."""
    out = _without(config, "seed", "batch_tokens", "num_steps", "trunk", "compute_dtype", "fp8")
    for key in ("depth", "model_dim", "num_heads", "num_kv_heads"):
        out["model"].pop(key, None)
    for key in (*LEARNING_RATES, "weight_decay"):
        out["optimizer"].pop(key, None)
    if isinstance(out.get("schedule"), dict):
        out["schedule"].pop("warmup_steps", None)  # scaled with the length of tiny runs
    return _hash(out)
