"""From a budget or a wanted loss back to a depth and a horizon."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_model.config import DataConfig, GPTConfig
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.record import RunRecord
from nanoladder.laws_to_recipe import LawRecipe, best_model
from nanoladder.plan import run_time
from nanoladder.target import Target

MAX_DEPTH = 96
FLOPS_GUESS, MIN_FLOPS = 1e18, 1e9  # where the search for a budget's FLOPs begins, and where it gives up
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Exactly one is set."""

    flops: float | None = None
    budget_hours: float | None = None
    budget_dollars: float | None = None
    target_bpb: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            names = ", ".join(f"--{k.replace('_', '-')}" for k in vars(self))
            raise ConfigError(f"{len(given)} goals are given ({', '.join(given) or 'none'}); give exactly one of {names}")
        name, value = next(iter(given.items()))
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value} must be positive and finite")


def solve_goal(
    goal: Goal,
    *,
    target: Target,
    resolved: LawRecipe,
    model_args: Mapping[str, Any],
    records: Sequence[RunRecord] = (),
    data: DataConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[GPTConfig, float]:
    """The model and the training FLOPs that meet `goal` on `target`; hours and dollars are met from below, the network's
    share of each step included. Raises ConfigError when dollars come without a price, a loss cannot be reached, or a budget
    does not pay for one step.
    """
    candidates = [GPTConfig.from_depth(depth, **model_args) for depth in range(1, MAX_DEPTH + 1)]
    recipe = resolved.recipe

    def model_for(flops: float) -> GPTConfig:
        return best_model(flops, candidates, allocation=resolved.allocation, tokens_per_param=recipe.tokens_per_param)

    def hours_of(flops: float) -> float:
        config = recipe.resolve(model_for(flops), Horizon(train_flops=flops), data=data, overrides=overrides)
        return float(run_time(config, target, records)[1]["hours"])

    if goal.flops is not None:
        flops = goal.flops
    elif goal.target_bpb is not None:
        flops = _flops_for_loss(goal.target_bpb, resolved.allocation)
    else:
        flops = _flops_for_hours(_hours(goal, target), hours_of)
    return model_for(flops), flops


def _hours(goal: Goal, target: Target) -> float:
    """Hours that the goal's budget pays for."""
    if goal.budget_hours is not None:
        return goal.budget_hours
    assert goal.budget_dollars is not None
    if not target.price_per_device_hour:
        raise ConfigError(f"budget_dollars {goal.budget_dollars:g} needs a price; give --price (dollars a device and hour)")
    return goal.budget_dollars / target.price_per_device_hour / target.num_devices


def _flops_for_hours(hours: float, hours_of: Callable[[float], float]) -> float:
    """The most FLOPs whose run takes `hours` at most, by doubling and bisection: time rises with FLOPs, but not evenly, since
    sizes and batches come in steps."""
    low = FLOPS_GUESS
    while hours_of(low) > hours:
        low /= 2
        if low < MIN_FLOPS:
            raise ConfigError(f"a budget of {hours:.3g} h does not pay for one step here; ask for more, or for fewer devices")
    high = 2 * low
    while hours_of(high) <= hours:
        low, high = high, 2 * high
    while high / low > 1 + TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if hours_of(middle) <= hours else (low, middle)
    return low


def _flops_for_loss(target_bpb: float, allocation: Mapping[str, Any] | None) -> float:
    if allocation is None:
        raise ConfigError(f"target_bpb {target_bpb} needs fitted laws; give --laws laws.json (nanoladder fit writes one)")
    from analysis.allocation import compute_for_loss

    flops = compute_for_loss(allocation, target_bpb)
    if flops is None:
        floor = allocation["frontier"]["E"]
        if floor is None:
            raise ConfigError(f"target_bpb {target_bpb}: the laws hold no frontier (too few budgets); ask by --flops or a budget")
        raise ConfigError(f"target_bpb {target_bpb} is not above the fitted floor E = {floor:.4f}; ask for a higher loss")
    return float(flops)
