"""The model card: what a checkpoint is, what was predicted of it, what was measured, and from which laws it came."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanochat_model.checkpoint import CHECKPOINTS_DIR, CheckpointState, all_checkpoints, checkpoint_hash, read_state
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.record import RECORD_FILE, CurvePoint, RunRecord
from nanochat_model.sft import RECORD_FILE as SFT_FILE
from nanochat_model.sft import SFTRecord
from nanoladder.outcomes import PREDICTION_FILE, read_prediction

RECORD_FACTS = (
    "run_id", "status", "num_tokens", "train_flops", "val_bpb", "core", "device", "num_devices", "mfu", "tokens_per_second",
    "train_seconds", "finished_at", "git_commit",
)  # fmt: skip


def model_card(checkpoint: Path, *, name: str = "") -> dict[str, Any]:
    """Facts of one checkpoint as plain data; what is not recorded is null. `checkpoint`: its folder (see checkpoint.resolve)."""
    state = read_state(checkpoint)
    base_dir = _base_run_dir(checkpoint, state)
    record = _record(base_dir)
    model = state.model
    counts = count_params(model).as_dict()
    curve = record.curve if record is not None else state.curve if state.kind == "base" else ()
    return {
        "id": name or (record.name if record is not None else "") or _run_dir(checkpoint).name,
        "kind": state.kind,
        "hash": checkpoint_hash(checkpoint),
        "step": state.step,
        "created": int((checkpoint / "state.json").stat().st_mtime),
        "model": {**asdict(model), "head_dim": model.head_dim},
        "params": counts,
        "flops_per_token": flops_per_token(model),
        "pretraining": _pretraining(record, state),
        "curve": [_point(p) for p in curve],
        "prediction": _prediction(base_dir, record),
        "sft": _sft(_run_dir(checkpoint)) if state.kind == "sft" else None,
    }


def _run_dir(checkpoint: Path) -> Path:
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == CHECKPOINTS_DIR else folder


def _base_run_dir(checkpoint: Path, state: CheckpointState) -> Path | None:
    """The pretraining run's folder: the checkpoint's own; of a fine-tuned one the run under its root that has its base."""
    own = _run_dir(checkpoint)
    if state.kind != "sft":
        return own
    wanted = state.parents.get("base")
    for root in list(own.parents)[:3]:
        for run in sorted((root / "runs").glob("*")):
            if any(_hash_or_none(c) == wanted for c in all_checkpoints(run / CHECKPOINTS_DIR)):
                return run
    return None


def _hash_or_none(checkpoint: Path) -> str | None:
    try:
        return checkpoint_hash(checkpoint)
    except OSError:  # unfinished, or just being removed by a run that keeps its last few
        return None


def _record(run_dir: Path | None) -> RunRecord | None:
    return RunRecord.load(run_dir) if run_dir is not None and (run_dir / RECORD_FILE).is_file() else None


def _pretraining(record: RunRecord | None, state: CheckpointState) -> dict[str, Any] | None:
    """Of the finished run, or of a checkpoint of an unfinished one as far as it got."""
    if record is not None:
        plain = asdict(record)
        return {name: plain[name] for name in RECORD_FACTS}
    if state.kind == "imported":
        source = state.extra.get("source_meta", {})
        return {"run_id": "", "status": f"imported from {state.extra.get('source', 'elsewhere')}", "val_bpb": source.get("val_bpb")}
    if state.kind == "base" and state.config is not None:
        tokens = state.step * state.config.batch_tokens
        facts = {"run_id": state.run_id, "status": f"step {state.step} of {state.config.num_steps}", "num_tokens": tokens}
        bpb = state.curve[-1].val_bpb if state.curve else None
        return {**facts, "train_flops": float(flops_per_token(state.model)) * tokens, "val_bpb": bpb}
    return None


def _point(point: CurvePoint) -> dict[str, Any]:
    return {"num_tokens": point.num_tokens, "val_bpb": point.val_bpb, "train_loss": point.train_loss}


def _prediction(run_dir: Path | None, record: RunRecord | None) -> dict[str, Any] | None:
    """What the laws said of this very run, before it started; with the verdict where it has ended."""
    if run_dir is None or record is None:
        return None
    for path in (run_dir / PREDICTION_FILE, run_dir.parent.parent / PREDICTION_FILE):
        if not path.is_file():
            continue
        plain = read_prediction(path)
        if plain["run_id"] != record.run_id or plain["predicted"] is None:
            continue
        keys = ("predicted", "low", "high", "predicted_at", "laws_hash", "verdict", "reasons", "uses")
        facts = {key: plain.get(key) for key in keys}
        measured, low, high = record.val_bpb, plain["low"], plain["high"]
        known = None not in (measured, low, high)
        return {**facts, "measured": measured, "inside": low <= measured <= high if known else None}
    return None


def _sft(run_dir: Path) -> dict[str, Any] | None:
    if not (run_dir / SFT_FILE).is_file():
        return None
    plain = asdict(SFTRecord.load(run_dir))
    names = ("status", "name", "num_conversations", "num_supervised_tokens", "num_steps", "val_loss_before", "val_loss_after")
    return {name: plain[name] for name in names}
