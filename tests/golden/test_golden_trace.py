"""A 20-step CPU trace that a refactoring must reproduce. `python tests/golden/test_golden_trace.py` writes it anew, which is
right only after a change that is meant to move the numbers."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import RUNTIME, tiny_config

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.checkpoint import CHECKPOINTS_DIR, read_model_state, step_dir
from nanochat_model.train import pretrain

FILE = Path(__file__).with_name("trace.json")
NUM_STEPS = 20
# "whole": the recipe as it is. Its first steps amplify rounding (the scalars' first gradients are nothing else), so another
# processor moves it by up to some 1e-3. "still": the same with the scalars held, which stays within 1e-5 anywhere.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "whole": ({}, 1e-2),
    "still": ({"optimizer__scalar_lr": 1e-9, "optimizer__smear_lr": 1e-9}, 1e-4),
    "best_fit_gqa_windows": (
        {"optimizer__scalar_lr": 1e-9, "optimizer__smear_lr": 1e-9, "data__packing": "best_fit", "model__depth": 3,
         "model__window_pattern": "SL", "schedule__kind": "constant_then_decay", "schedule__warmdown_fraction": 0.3}, 1e-4,
    ),
}  # fmt: skip


def trace(overrides: dict[str, Any]) -> dict[str, Any]:
    losses: list[float] = []

    class Keep(Callback):
        def on_step(self, info: StepInfo) -> None:
            losses.append(info.train_loss)

    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(num_steps=NUM_STEPS, **overrides)
        record = pretrain(config, dataclasses.replace(RUNTIME, keep_last=1), run_dir=folder, callbacks=[Keep()])
        weights = read_model_state(step_dir(Path(folder) / CHECKPOINTS_DIR, NUM_STEPS))
    norms = {name: float(w.double().norm()) for name, w in sorted(weights.items())}
    return {"losses": losses, "val_bpb": record.val_bpb, "norms": norms}


@pytest.mark.parametrize("case", CASES)
def test_reproduces_the_stored_trace(case: str) -> None:
    overrides, tolerance = CASES[case]
    golden, now = json.loads(FILE.read_text())[case], trace(overrides)
    np.testing.assert_allclose(now["losses"], golden["losses"], rtol=tolerance)
    assert now["val_bpb"] == pytest.approx(golden["val_bpb"], rel=tolerance)
    if case != "whole":
        assert now["norms"] == pytest.approx(golden["norms"], rel=10 * tolerance)


@pytest.mark.parametrize(
    "change", [{"optimizer__matrix_lr": 0.0202}, {"optimizer__weight_decay": 0.1}, {"schedule__momentum_start": 0.84}, {"seed": 2}]
)
def test_is_fine_enough_to_notice(change: dict[str, Any]) -> None:
    """One per cent of a learning rate, or another momentum, is more than the tolerance lets pass."""
    overrides, tolerance = CASES["still"]
    golden, now = json.loads(FILE.read_text())["still"], trace({**overrides, **change})
    assert not np.allclose(now["losses"], golden["losses"], rtol=tolerance, atol=0)


if __name__ == "__main__":
    FILE.write_text(json.dumps({case: trace(overrides) for case, (overrides, _) in CASES.items()}, indent=1) + "\n")
