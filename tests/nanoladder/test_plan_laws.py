"""Laws into recipes, horizons and sizes; a law of bad status stops a launch until it is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from allocation_tables import HOFFMANN, ladder

from analysis.allocation.calibrate import Calibration
from analysis.allocation.loss_model import fit_loss_model
from analysis.allocation.predict import make_predictor
from nanochat_model.config import GPTConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.recipe import NANOCHAT
from nanochat_model.record import RunRecord
from nanoladder.launch import LaunchOptions, judge, launch
from nanoladder.laws_to_recipe import best_model, optimal_horizon, recipe_from_laws, surface_loss
from nanoladder.outcomes import prediction_facts
from nanoladder.plan import LossPrediction, make_plan
from nanoladder.plan_text import plan_sections
from nanoladder.workspace import Workspace

SURFACE = {"E": 0.6, "A": 30.0, "B": 120.0, "alpha": 0.34, "beta": 0.31, "status": "converged", "n": 24}


def laws(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "allocation": {"convention": "matrices_lm_head", "parametric": SURFACE},
        "batch_size": {"coefficient": 3e5, "exponents": {"D": 0.5}, "references": {"D": 1e9}, "status": "converged", "n": 9},
        "learning_rate": {
            "coefficient": 0.04, "exponents": {"N": -0.2, "D": 0.1}, "references": {"N": 1e8, "D": 1e9}, "status": "converged",
            "n": 9,
        },
        "weight_decay": {
            "average": {"coefficient": 0.3, "exponents": {"D": -1.0}, "references": {"D": 1e9}}, "status": "converged",
        },
    }  # fmt: skip
    return {**good, **changes}


def test_good_laws_replace_rules() -> None:
    found = recipe_from_laws(laws(), NANOCHAT)
    assert [u.kind for u in found.uses] == ["law"] * 4
    assert not found.blocking
    model = GPTConfig.from_depth(12)
    config = found.recipe.resolve(model, Horizon(num_tokens=4e9))
    assert config.batch_tokens == 2 ** round(math.log2(3e5 * 2))
    expected = 0.04 * (count_params(model).scaling / 1e8) ** -0.2 * (config.num_tokens / 1e9) ** 0.1
    assert config.optimizer.matrix_lr == pytest.approx(expected, rel=1e-3)
    ratio = NANOCHAT.optimizer.embedding_lr / NANOCHAT.optimizer.matrix_lr
    assert config.optimizer.embedding_lr == pytest.approx(expected * ratio, rel=1e-3)
    assert config.optimizer.weight_decay == pytest.approx(0.3 / 4, rel=1e-3)


def test_without_laws_the_rules_stand() -> None:
    found = recipe_from_laws(None, NANOCHAT)
    assert found.recipe == NANOCHAT and found.allocation is None and not found.blocking
    assert all(u.kind == "rule" and u.source for u in found.uses)


@pytest.mark.parametrize("name", ["batch_size", "learning_rate", "weight_decay", "allocation"])
def test_bad_status_blocks_until_named(name: str) -> None:
    bad = laws()
    if name == "allocation":
        bad[name] = {**bad[name], "parametric": {**SURFACE, "status": "at_bound"}}
    else:
        bad[name] = {**bad[name], "status": "at_bound"}
    found = recipe_from_laws(bad, NANOCHAT)
    assert found.use(name).kind == "rule"
    assert len(found.blocking) == 1 and f"law {name} has status 'at_bound'" in found.blocking[0]
    assert f"--accept-law {name}" in found.blocking[0] and f"--without-law {name}" in found.blocking[0]
    without = recipe_from_laws(bad, NANOCHAT, without=[name])
    assert without.use(name).kind == "rule" and not without.blocking
    accepted = recipe_from_laws(bad, NANOCHAT, accept=[name])
    assert accepted.use(name).kind == "law" and not accepted.blocking


@pytest.fixture(scope="module")
def speaking() -> dict[str, Any]:
    """Laws that predict losses, from budgets of 1e17 to 1e19 FLOPs."""
    runs = ladder(HOFFMANN, 10.0 ** np.linspace(17, 19, 4), sizes=5, span=3)
    predictor = make_predictor(fit_loss_model(runs).model, Calibration(mean_squares=(1.0,), held_out=()))
    return laws(allocation={"convention": "matrices_lm_head", "parametric": SURFACE, "predictor": predictor.as_dict()})


def test_a_refused_prediction_stops_a_launch_until_accepted_by_name(speaking: dict[str, Any], tmp_path: Path) -> None:
    model, far = GPTConfig.from_depth(12), Horizon(train_flops=2e21)
    plan = make_plan(model, laws=speaking, horizon=far)
    assert plan.prediction is not None and plan.prediction.verdict == "refuse"
    with pytest.raises(ConfigError, match=rf"validation bpb {plan.prediction.loss:.4f} has verdict 'refuse' \(200x beyond") as e:
        launch(plan, Workspace(tmp_path), LaunchOptions(quiet=True))
    assert "--accept-law prediction" in str(e.value) and "--without-law allocation" in str(e.value)
    assert not any(line.startswith("prediction") for line in plan.warnings), "said once"
    accepted = make_plan(model, laws=speaking, horizon=far, accept=["prediction"])
    assert not accepted.blocking and any("200x beyond" in line for line in accepted.warnings)
    silent = make_plan(model, laws=speaking, horizon=far, without=["allocation"])
    assert not silent.blocking and silent.prediction is None


def test_a_doubtful_prediction_is_a_caution(speaking: dict[str, Any]) -> None:
    plan = make_plan(GPTConfig.from_depth(12), laws=speaking, horizon=Horizon(train_flops=3e20))
    assert plan.prediction is not None and plan.prediction.verdict == "warn" and not plan.blocking
    assert any("30x beyond" in line for line in plan.warnings)


def test_a_loss_in_nats_is_called_so_and_not_held_against_bits_per_byte(speaking: dict[str, Any]) -> None:
    nats = {**speaking, "allocation": {**speaking["allocation"], "loss_name": "loss"}}
    for given, name, predicted in ((speaking, "validation bpb", True), (nats, "loss", False)):
        plan = make_plan(GPTConfig.from_depth(12), laws=given, horizon=Horizon(train_flops=1e19))
        assert plan.prediction is not None and plan.prediction.loss_name == name
        shown = {label for _, rows in plan_sections(plan) for label, _ in rows}
        assert f"predicted {name}" in shown and ("predicted validation bpb" in shown) is predicted
        facts = prediction_facts(plan.config, plan.prediction, plan.uses)
        assert (facts["predicted"] is not None) is predicted
        assert any("will not be held against" in line for line in plan.warnings) is not predicted


def test_unknown_law_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="law 'gravity' is unknown; laws are allocation, batch_size"):
        recipe_from_laws(laws(), NANOCHAT, accept=["gravity"])
    with pytest.raises(ConfigError, match="law 'prediction' is unknown"):
        recipe_from_laws(laws(), NANOCHAT, without=["prediction"])


def test_optimal_horizon_is_the_stationary_point() -> None:
    """At the optimum, moving along constant N·D does not change the loss to first order, and any other split is worse."""
    allocation = laws()["allocation"]
    model = GPTConfig.from_depth(16)
    n = count_params(model).scaling
    tokens = optimal_horizon(allocation, model).num_tokens
    assert tokens is not None

    def loss(log_shift: float) -> float:
        scale = math.exp(log_shift)
        return SURFACE["E"] + SURFACE["A"] / (n * scale) ** SURFACE["alpha"] + SURFACE["B"] / (tokens / scale) ** SURFACE["beta"]

    assert loss(0) == pytest.approx(surface_loss(allocation, model, tokens))
    assert loss(0) < min(loss(0.01), loss(-0.01))
    assert (loss(1e-4) - loss(-1e-4)) / 2e-4 == pytest.approx(0, abs=1e-6)


def test_best_model_is_the_lowest_loss_at_that_compute() -> None:
    allocation = laws()["allocation"]
    models = [GPTConfig.from_depth(d) for d in range(2, 40)]
    losses = [surface_loss(allocation, m, 1e19 / flops_per_token(m)) for m in models]
    chosen = best_model(1e19, models, allocation=allocation, tokens_per_param=12)
    assert losses[models.index(chosen)] == min(losses)
    assert 2 < chosen.depth < 39
    by_ratio = best_model(4.33e19, models, allocation=None, tokens_per_param=12)
    assert by_ratio.depth == 24


def measured(val_bpb: float) -> RunRecord:
    from nanochat_model.config import TrainConfig

    config = TrainConfig()
    return RunRecord(
        run_id="r", status="complete", config=config, seed=0, params={}, num_tokens=1, flops_per_token=1, train_flops=1.0,
        val_bpb=val_bpb,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("val_bpb", "inside", "words"),
    [(0.80, True, "inside the interval"), (0.70, False, "better than the interval"), (0.90, False, "worse than the interval")],
)
def test_verdict_on_the_laws(val_bpb: float, inside: bool, words: str) -> None:
    prediction = LossPrediction(loss=0.8, low=0.78, high=0.82, surface_loss=0.81, level=0.9, extrapolation=4.0, verdict="ok")
    verdict = judge(measured(val_bpb), prediction)
    assert verdict["inside"] is inside and words in verdict["text"]
    assert verdict["error"] == pytest.approx(val_bpb / 0.8 - 1)
    assert judge(measured(val_bpb), None)["inside"] is None
