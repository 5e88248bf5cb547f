"""From a budget or a wanted loss back to a depth and a horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_model.config import GPTConfig
from nanochat_model.errors import ConfigError
from nanochat_model.record import RunRecord
from nanoladder.laws_to_recipe import best_model
from nanoladder.target import Target
from nanoladder.throughput import estimate_throughput

MAX_DEPTH = 96
FLOPS_GUESS_ROUNDS = 8


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
    allocation: Mapping[str, Any] | None,
    tokens_per_param: float,
    model_args: Mapping[str, Any],
    records: Sequence[RunRecord] = (),
) -> tuple[GPTConfig, float]:
    """The model and the training FLOPs that meet `goal` on `target`.

    Speed depends on the model and the model on the FLOPs, so hours and dollars are solved by iteration (a few rounds: MFU
    moves slowly with size). Raises ConfigError when dollars come without a price, or a loss cannot be reached.
    """

    def model_for(flops: float) -> GPTConfig:
        depths = (GPTConfig.from_depth(depth, **model_args) for depth in range(1, MAX_DEPTH + 1))
        return best_model(flops, depths, allocation=allocation, tokens_per_param=tokens_per_param)

    if goal.flops is not None:
        return model_for(goal.flops), goal.flops
    if goal.target_bpb is not None:
        flops = _flops_for_loss(goal.target_bpb, allocation)
        return model_for(flops), flops
    hours = goal.budget_hours
    if hours is None:
        assert goal.budget_dollars is not None
        if not target.price_per_device_hour:
            raise ConfigError(f"budget_dollars {goal.budget_dollars:g} needs a price; give --price (dollars a device and hour)")
        hours = goal.budget_dollars / target.price_per_device_hour / target.num_devices
    model = GPTConfig.from_depth(12, **model_args)
    flops = 0.0
    for _ in range(FLOPS_GUESS_ROUNDS):
        speed = estimate_throughput(
            model,
            target.device,
            num_devices=target.num_devices,
            records=records,
            mfu=target.mfu,
            tokens_per_second=target.tokens_per_second,
        )
        flops = speed.flops_per_second * hours * 3600
        model = model_for(flops)
    return model, flops


def _flops_for_loss(target_bpb: float, allocation: Mapping[str, Any] | None) -> float:
    if allocation is None:
        raise ConfigError(f"target_bpb {target_bpb} needs fitted laws; give --laws laws.json (nanoladder fit writes one)")
    from analysis.allocation import compute_for_loss

    flops = compute_for_loss(allocation, target_bpb)
    if flops is None:
        floor = allocation["frontier"]["E"]
        raise ConfigError(f"target_bpb {target_bpb} is not above the fitted floor E = {floor:.4f}; ask for a higher loss")
    return float(flops)
