"""What a storage root says about predictions and promotions, in the report's terms."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.words import BITS_PER_BYTE
from nanochat_model.config import TrainConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.identity import canonical_json, run_id
from nanochat_model.record import RECORD_FILE, RunRecord
from nanoladder.laws_to_recipe import RuleUse
from nanoladder.plan import LossPrediction
from nanoladder.workspace import Workspace

PREDICTION_FILE = "prediction.json"  # in a launched run's folder, written before the run starts
PRODUCTION = "production"
PREDICTION_KEYS = ("run_id", "N", "D", "C", "predicted", "low", "high", "surface", "predicted_at")


def prediction_facts(
    config: TrainConfig, prediction: LossPrediction | None, uses: Sequence[RuleUse], laws_hash: str = ""
) -> dict[str, Any]:
    """prediction.json: what will run, the bits per byte it should reach (of which laws of another loss say nothing), from which
    laws, and when that was said."""
    counts = count_params(config.model)
    p = prediction
    reasons = list(p.reasons) if p else ["no usable allocation law"]
    if p is not None and p.loss_name != BITS_PER_BYTE:
        reasons = [f"the laws' loss is {p.loss_name!r} ({p.loss:.4f} here), a run measures bits per byte"]
        p = None
    return {
        "predicted_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "laws_hash": laws_hash,
        "run_id": run_id(config),
        "N": counts.scaling,
        "D": config.num_tokens,
        "C": float(flops_per_token(config.model)) * config.num_tokens,
        "predicted": p.loss if p else None,
        "low": p.low if p else None,
        "high": p.high if p else None,
        "surface": p.surface_loss if p else None,
        "verdict": p.verdict if p else "refuse",
        "reasons": reasons,
        "uses": [asdict(use) for use in uses],
        "config": json.loads(canonical_json(asdict(config))),
    }


def read_prediction(path: Path) -> dict[str, Any]:
    """A prediction file; ConfigError when it is not one."""
    try:
        plain = json.loads(path.read_text(encoding="utf8"))
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path}: not valid JSON at character {e.pos} (cut short?); remove it and predict again") from None
    missing = [k for k in PREDICTION_KEYS if k not in plain] if isinstance(plain, dict) else list(PREDICTION_KEYS)
    if missing:
        raise ConfigError(f"{path}: {missing[0]!r} is missing, so this is no prediction; remove it and predict again")
    return plain


def said_prediction(facts: Mapping[str, Any]) -> LossPrediction | None:
    """The loss that a prediction file names; null where it names none."""
    if facts["predicted"] is None:
        return None
    return LossPrediction(
        loss=facts["predicted"],
        low=facts["low"],
        high=facts["high"],
        surface_loss=facts["surface"],
        level=None,
        extrapolation=None,
        verdict=facts["verdict"],
        reasons=tuple(facts["reasons"]),
    )


def read_production(workspace: Workspace) -> dict[str, Any] | None:
    """The root's prediction, else the newest launched run's, with what was measured; null where nothing was predicted."""
    paths = [workspace.prediction_path] if workspace.prediction_path.exists() else []
    paths += sorted(workspace.runs_dir.glob(f"*/{PREDICTION_FILE}"), key=lambda p: p.stat().st_mtime, reverse=True)
    if not paths:
        return None
    plain = read_prediction(paths[0])
    facts = {**{key: plain[key] for key in PREDICTION_KEYS}, "name": PRODUCTION, "measured": None, "seconds": None}
    folder = workspace.run_dir(plain["run_id"])
    if (folder / RECORD_FILE).exists():
        record = RunRecord.load(folder)
        facts |= {"measured": record.val_bpb, "seconds": record.train_seconds}
    return facts


def read_promotions(workspace: Workspace) -> list[dict[str, Any]]:
    """The verdicts of every ladder under the root, in the order of their names; each says of which ("ladder")."""
    from nanoladder.promote import PROMOTIONS_FILE
    from nanoladder.promote import read_promotions as read_file

    root = workspace.root / "sweeps"
    paths = sorted(root.rglob(PROMOTIONS_FILE))
    return [{**p, "ladder": path.parent.relative_to(root).as_posix()} for path in paths for p in read_file(path)]


def read_fronts(workspace: Workspace) -> list[dict[str, Any]]:
    """Of every sweep under the root with several objectives: {"sweep", "question", "objectives": {metric: direction}, "cells":
    {cell: candidates, as `front.fronts` gives them}}."""
    from nanoladder.front import fronts
    from nanoladder.sweep_index import INDEX_FILE, read_index

    indexes = [read_index(path) for path in sorted((workspace.root / "sweeps").rglob(INDEX_FILE))]
    keys = ("sweep", "question", "objectives")
    return [{**{k: i[k] for k in keys}, "cells": fronts(i)} for i in indexes if len(i.get("objectives") or {}) > 1]
