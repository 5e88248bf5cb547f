"""What a sweep is: a question, cells, a space. Frozen plain data; nothing here runs or imports Ray, Optuna or torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from nanochat_model.config import GPTConfig, Packing, RuntimeConfig
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.recipe import NANOCHAT, Recipe
from nanoladder.space import Dimension, Grid, LogUniform, Space, Uniform, check_space, is_finite

Sampler = Literal["auto", "grid", "tpe", "gp", "qmc", "cmaes", "random"]
Backend = Literal["auto", "actor", "train"]
Metric = Literal["val_bpb", "core", "train_seconds"]
Pruning = Literal["none", "constant"]
Purpose = Literal["", "allocation", "batch_size", "learning_rate", "weight_decay", "noise", "promotion", "production"]
SAMPLERS: tuple[Sampler, ...] = ("auto", "grid", "tpe", "gp", "qmc", "cmaes", "random")
ADAPTIVE: tuple[Sampler, ...] = ("tpe", "gp", "cmaes")  # what they suggest depends on what was seen
BASELINE = "baseline"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model at one horizon. Batch, learning rates and weight decay follow from its own N and D by the recipe."""

    model: GPTConfig
    horizon: Horizon | None = None  # None: the recipe's tokens per parameter
    name: str = ""  # "": made from the model and the horizon, unique within a sweep
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of this cell alone
    space: Space | None = None  # in place of the sweep's
    tags: Mapping[str, str] = field(default_factory=dict)  # go into its records

    @property
    def label(self) -> str:
        return self.name or f"{_model_label(self.model)}-{_horizon_label(self.horizon)}"


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """After a sweep's own cells: further (size, budget) cells, chosen in rounds where they tell most about the target per FLOP."""

    models: tuple[GPTConfig, ...]  # that may be chosen
    target_flops: float  # of the run whose size and loss are wanted
    total_flops: float  # to spend on the sweep, its first cells included
    quantity: Literal["loss", "ratio"] = "loss"  # what is wanted there: the loss, or tokens per parameter

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(self.models))
        if len(self.models) < 3:
            raise ConfigError(f"adaptive has {len(self.models)} models to choose from; give at least three sizes")
        if not (self.target_flops > 0 and self.total_flops > 0):
            raise ConfigError(f"target_flops {self.target_flops} and total_flops {self.total_flops} must be positive")
        if self.quantity not in ("loss", "ratio"):
            raise ConfigError(f'adaptive quantity {self.quantity!r} must be "loss" or "ratio"')


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A question to a set of cells: every candidate of the space (or every variant) is trained in every cell, by every seed.

    `variants` are named sets of overrides ("baseline": {}), for comparing recipes; a sweep has variants or a space, not both.
    """

    name: str  # of its folder, Optuna studies and MLflow run
    question: str
    source: str = ""  # where the question or its expected answer comes from
    purpose: Purpose = ""  # which law its records serve
    stage: str = ""
    recipe: Recipe = NANOCHAT
    cells: tuple[Cell, ...] = ()
    space: Space = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of every run
    sampler: Sampler = "auto"  # grid where the space is finite and num_trials is 0, else TPE
    num_trials: int = 0  # candidates a cell; 0: all of a finite space
    seeds: tuple[int, ...] = (0,)  # a candidate's value is the mean over them
    metric: Metric = "val_bpb"
    objectives: tuple[Metric, ...] = ()  # of a search with several: `metric` first, e.g. ("val_bpb", "train_seconds")
    extend_edges: bool = False  # where the best value is a grid's first or last, it grows by two geometric points, at most
    # twice; a range searched by tpe or gp grows by a third where the best value lies in its outer tenth
    pruning: Pruning = "none"  # "constant": stop runs that trail far behind while the learning rate is constant, never in a decay
    prune_failures: int = 0  # give a candidate up when so many of its seeds have failed; 0: run them all
    parallel_trials: int = 4  # candidates of one cell in flight, for samplers that learn: suggestion k has seen the
    # results up to k − parallel_trials exactly, so the runs of a sweep do not depend on who finishes first
    adaptive: Adaptive | None = None  # choose further cells by what was found
    packing: Packing = "best_fit"
    backend: Backend = "auto"  # actor for one device and under ten minutes, else train
    device: str = ""  # the accelerator it is meant for, say "h100"; "": whatever there is
    devices_per_trial: int = 1
    trials_per_device: int = 1  # small trials that share one accelerator
    threads_per_trial: int = 1  # CPU threads, and CPUs reserved, of a device's process
    keep_checkpoints: bool = False  # of finished runs; a law needs only their records
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"sweep name {self.name!r} may hold letters, digits and . _ - (a / for folders), say wd_d12")
        self._check_kinds()
        if not self.cells:
            raise ConfigError(f"sweep {self.name} has no cells; give at least one Cell(model=…, horizon=…)")
        labels = [c.label for c in self.cells]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError(f"sweep {self.name} has two cells named {twice[0]!r}; give each a name of its own")
        if self.variants and (self.space or any(c.space for c in self.cells)):
            raise ConfigError(f"sweep {self.name} has both variants and a space; use one of them")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds {self.seeds} of sweep {self.name} must be different and at least one")
        spaces = (self.space, *(c.space or {} for c in self.cells))
        if any("seed" in given for given in (self.overrides, *spaces, *self.variants.values())):
            raise ConfigError(
                f"seed of sweep {self.name} is no override: runs that should differ would be the same; set seeds=0,1,2"
            )
        for name in ("devices_per_trial", "trials_per_device", "parallel_trials", "threads_per_trial"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} of sweep {self.name} must be at least 1")
        if self.devices_per_trial > 1 and self.trials_per_device > 1:
            raise ConfigError(
                f"sweep {self.name}: devices_per_trial {self.devices_per_trial} and trials_per_device "
                f"{self.trials_per_device} exclude each other; leave one at 1"
            )
        if self.devices_per_trial > 1 and self.backend == "actor":
            raise ConfigError(f'sweep {self.name}: backend "actor" has one device; use "train" for {self.devices_per_trial}')
        self._check_objectives()
        if self.adaptive and (self.space or self.variants):
            raise ConfigError(f"sweep {self.name}: adaptive chooses sizes and budgets; it takes no space and no variants")
        for cell in self.cells:
            check_space(self.space_of(cell), f"sweep {self.name}")
            self._check_sampler(cell)
            self._check_edges(cell)

    def _check_kinds(self) -> None:
        for name, what in (("cells", "(Cell(…),)"), ("seeds", "(0, 1, 2)")):
            if isinstance(getattr(self, name), Cell | int):
                raise ConfigError(
                    f"{name} of sweep {self.name} is a single {type(getattr(self, name)).__name__}; write {name}={what}"
                )
        kinds = {"purpose": Purpose, "packing": Packing, "backend": Backend}
        given = [("metric", m, Metric) for m in self.metrics] + [(n, getattr(self, n), kind) for n, kind in kinds.items()]
        for name, value, kind in given:
            if value not in get_args(kind):
                known = ", ".join(map(repr, get_args(kind)))
                raise ConfigError(f"{name} {value!r} of sweep {self.name} must be one of {known}")

    def _check_objectives(self) -> None:
        if self.pruning not in ("none", "constant"):
            raise ConfigError(f'pruning {self.pruning!r} of sweep {self.name} must be "none" or "constant"')
        if self.prune_failures < 0:
            raise ConfigError(f"prune_failures {self.prune_failures} of sweep {self.name} must be 0 (never) or more")
        if not self.objectives:
            return
        if len(self.objectives) < 2 or len(set(self.objectives)) < len(self.objectives) or self.objectives[0] != self.metric:
            raise ConfigError(
                f"objectives {self.objectives} of sweep {self.name} must be two or more different metrics, {self.metric} first"
            )
        if self.extend_edges or self.pruning != "none":
            raise ConfigError(f"sweep {self.name}: extend_edges and pruning need one objective, not {len(self.objectives)}")

    def _check_edges(self, cell: Cell) -> None:
        """Grids with two or more values each, all in a grid; or only ranges, searched by a sampler that can look outside."""
        if not self.extend_edges:
            return
        space, sampler = self.space_of(cell), self.sampler_of(cell)
        grids = all(isinstance(d, Grid) and len(d.values) > 1 for d in space.values()) and self.num_trials == 0
        ranges = all(isinstance(d, Uniform | LogUniform) for d in space.values())
        if not space or not ((grids and sampler == "grid") or (ranges and sampler in ("tpe", "gp"))):
            raise ConfigError(
                f"sweep {self.name}: extend_edges needs a space of Grids with two or more values each, run whole, or of ranges "
                "searched by tpe or gp, in every cell"
            )

    def _check_sampler(self, cell: Cell) -> None:
        space = self.space_of(cell)
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler {self.sampler!r} of sweep {self.name} must be one of {', '.join(SAMPLERS)}")
        if self.num_trials < 0:
            raise ConfigError(f"num_trials {self.num_trials} of sweep {self.name} must be 0 (all of a grid) or more")
        if not is_finite(space) and self.num_trials == 0:
            raise ConfigError(f"sweep {self.name} has a continuous space and no num_trials; say how many candidates a cell gets")
        if self.sampler == "grid" and not is_finite(space):
            raise ConfigError(f"sweep {self.name}: sampler grid needs Grid or Choice dimensions; use tpe or qmc for ranges")
        if self.objectives and self.sampler_of(cell) == "cmaes":
            raise ConfigError(f"sweep {self.name}: sampler cmaes has one objective; use tpe or gp for {len(self.objectives)}")
        if self.sampler not in ("auto", "grid") and self.num_trials == 0:
            raise ConfigError(f"sweep {self.name}: sampler {self.sampler} needs num_trials, the candidates a cell gets")

    def space_of(self, cell: Cell) -> Mapping[str, Dimension]:
        return cell.space if cell.space is not None else self.space

    def sampler_of(self, cell: Cell) -> Sampler:
        """The sampler with "auto" resolved."""
        if self.sampler != "auto":
            return self.sampler
        return "grid" if self.variants or (is_finite(self.space_of(cell)) and self.num_trials == 0) else "tpe"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What a candidate is judged by, the first above all."""
        return self.objectives or (self.metric,)

    @property
    def directions(self) -> tuple[Literal["minimize", "maximize"], ...]:
        return tuple("maximize" if m == "core" else "minimize" for m in self.metrics)

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return self.directions[0]


def _model_label(model: GPTConfig) -> str:
    regular = model.model_dim == 64 * model.depth
    return f"d{model.depth}" if regular else f"d{model.depth}w{model.model_dim}"


def _horizon_label(horizon: Horizon | None) -> str:
    if horizon is None:
        return "compute-optimal"
    if horizon.tokens_per_param is not None:
        return f"r{horizon.tokens_per_param:g}"
    if horizon.train_flops is not None:
        return f"{horizon.train_flops:.3g}F".replace("e+", "e")
    if horizon.num_steps is not None:
        return f"{horizon.num_steps}steps"
    return f"{horizon.num_tokens:.3g}tok".replace("e+", "e")
