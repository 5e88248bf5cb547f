"""What a report is made of: a fitted synthetic ladder, a production run and stage promotions as the platform hands them over."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

from synthetic_ladder import DEMO, LadderSpec, write_ladder

from analysis.laws import Laws, fit_laws
from analysis.table import RunTable, load_records

TARGET = 5e13


@functools.cache
def fitted(spec: LadderSpec = DEMO, target_flops: float = TARGET) -> tuple[Laws, RunTable]:
    """Laws and table of a synthetic ladder; fitted once a process, since a fit takes seconds. `spec` must be hashable."""
    with tempfile.TemporaryDirectory(prefix="ladder-") as folder:
        write_ladder(folder, spec)
        table = load_records(folder)
    return fit_laws(table, target_flops=target_flops, n_boot=300), table


def production(*, measured: float | None, predicted: float = 1.62, run_id: str = "77aa00ff77aa00ff") -> dict[str, Any]:
    return {
        "name": "production", "run_id": run_id, "N": 538_000.0, "D": 1.46e7, "C": 5.2e13, "predicted": predicted,
        "low": predicted * 0.991, "high": predicted * 1.009, "surface": predicted * 1.004, "measured": measured, "seconds": 312.0,
        "predicted_at": "2026-01-12 09:12 UTC",
    }  # fmt: skip


def fronts(name: str = "small_batches") -> list[dict[str, Any]]:
    points = [
        {"candidate": i, "values": {"batch_multiplier": b}, "val_bpb": loss, "train_seconds": s, "on_front": best}
        for i, (b, loss, s, best) in enumerate([(0.5, 1.6, 9.0, True), (1.0, 1.65, 5.0, True), (2.0, 1.7, 6.0, False)])
    ]
    objectives = {"val_bpb": "minimize", "train_seconds": "minimize"}
    return [{"sweep": name, "question": "What does a smaller batch cost?", "objectives": objectives, "cells": {name: points}}]


def promotions() -> list[dict[str, Any]]:
    gain = {"gain": 0.012, "multiplier": 1.08, "low": 0.006, "high": 0.018, "p_value": 0.003}
    loss = {"gain": -0.02, "low": -0.03, "high": -0.01, "p_value": 0.99}
    weak = {"gain": 0.001, "low": -0.004, "high": 0.006, "p_value": 0.4}
    return [
        {
            "change": "weight_decay_multiplier=0.5", "stage": "d2 → d4", "verdict": "adopt", "n_seeds": 3,
            "axes": {"steps": gain, "flops": gain, "seconds": {**gain, "gain": 0.009}}, "reason": "better at both depths",
        },
        {"change": "lr_multiplier=2", "stage": "d2", "verdict": "reject", "n_seeds": 3, "axes": {"steps": loss}, "reason": "worse"},
        {"change": "batch_multiplier=2", "stage": "d2", "verdict": "undecided", "n_seeds": 2, "axes": {"steps": weak}},
    ]  # fmt: skip
