"""Compute-optimal allocation: how loss depends on parameters N and tokens D, and what a larger budget will give.

Everything takes plain arrays, one value a run. `fit_allocation` gives all of it for a table.
"""

from analysis.allocation.assemble import fit_allocation, ratio_at
from analysis.allocation.bootstrap import Bootstrap, bootstrap_parametric
from analysis.allocation.calibrate import Calibration, HeldOut, calibrate
from analysis.allocation.compute_law import ComputeLaw, fit_compute_law
from analysis.allocation.conventions import Steadiness, optimum_path, ratio_steadiness, steadiest
from analysis.allocation.frontier import FrontierFit, fit_frontier
from analysis.allocation.isoflop import BudgetMinimum, IsoflopFit, Parabola, fit_isoflop
from analysis.allocation.loss_model import LossModel, Runs, fit_loss_model, make_runs
from analysis.allocation.parametric import FlopsRule, ParametricFit, fit_flops_rule, fit_parametric, fit_variants
from analysis.allocation.predict import Prediction, Predictor, compute_for_loss, predict_from_block, predict_loss
from analysis.allocation.profile import Profile, leave_one_budget_out, profile_exponent

__all__ = [
    "Bootstrap",
    "BudgetMinimum",
    "Calibration",
    "ComputeLaw",
    "FlopsRule",
    "FrontierFit",
    "HeldOut",
    "IsoflopFit",
    "LossModel",
    "Parabola",
    "ParametricFit",
    "Prediction",
    "Predictor",
    "Profile",
    "Runs",
    "Steadiness",
    "bootstrap_parametric",
    "calibrate",
    "compute_for_loss",
    "fit_allocation",
    "fit_compute_law",
    "fit_flops_rule",
    "fit_frontier",
    "fit_isoflop",
    "fit_loss_model",
    "fit_parametric",
    "fit_variants",
    "leave_one_budget_out",
    "make_runs",
    "optimum_path",
    "predict_from_block",
    "predict_loss",
    "profile_exponent",
    "ratio_at",
    "ratio_steadiness",
    "steadiest",
]
