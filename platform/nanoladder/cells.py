"""From cells and candidates to the runs of a sweep, and the usual sets of cells."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from nanochat_model.config import DataConfig, GPTConfig, TrainConfig
from nanochat_model.counts import count_params
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.identity import run_id
from nanochat_model.overrides import apply_overrides, dotted_keys, take
from nanochat_model.recipe import RESOLVE_KEYS
from nanoladder.space import Times, Value, enumerate_space, format_values
from nanoladder.sweep import BASELINE, Cell, Sweep

VARIANT = "variant"  # the one dimension of a sweep with variants
BATCH_MULTIPLIER = "batch_multiplier"  # of the cell's own batch by the recipe's rule
CANDIDATE_KEYS = {**RESOLVE_KEYS, BATCH_MULTIPLIER: 1.0}  # and what each is like


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep: a candidate in a cell by a seed."""

    sweep: str
    cell: str
    candidate: int  # number within the cell
    values: Mapping[str, Value] = field(default_factory=dict)
    seed: int
    config: TrainConfig
    run_id: str
    stage: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.sweep, self.cell, format_values(self.values), f"seed {self.seed}"]
        return " · ".join(p for p in parts if p)


def candidate_values(sweep: Sweep, cell: Cell) -> list[dict[str, Value]]:
    """All candidates of a finite cell, in the order in which they are tried."""
    if sweep.variants:
        return [{VARIANT: name} for name in sweep.variants]
    return enumerate_space(sweep.space_of(cell))


def candidate_overrides(sweep: Sweep, values: Mapping[str, Value]) -> dict[str, Any]:
    """What a candidate changes: its values, or the overrides of its variant."""
    if VARIANT in values and sweep.variants:
        return dict(sweep.variants[str(values[VARIANT])])
    return dict(values)


def resolve_config(
    sweep: Sweep, cell: Cell, values: Mapping[str, Value] | None = None, *, seed: int = 0, data: DataConfig | None = None
) -> TrainConfig:
    """The TrainConfig of a candidate: overrides of sweep, cell and candidate, the later ones winning, through the recipe.

    `model.*` keys change the cell's model before N, D and the rules are worked out. `batch_multiplier` multiplies the batch
    that the recipe gives this cell, to the nearest whole row; a `Times` what the cell's number under that key would be without
    it. Raises ConfigError naming the nearest known key.
    """
    overrides, times = _stack((sweep.overrides, cell.overrides, candidate_overrides(sweep, values or {})))
    _check_keys({**overrides, **times}, sweep.name)
    overrides |= take(overrides, CANDIDATE_KEYS)
    of_model = {k.removeprefix("model."): overrides.pop(k) for k in list(overrides) if k.startswith("model.")}
    model = apply_overrides(cell.model, of_model)
    factor = overrides.pop(BATCH_MULTIPLIER, 1.0) * times.pop(BATCH_MULTIPLIER, 1.0) * times.pop("batch_tokens", 1.0)
    if factor != 1.0:
        rows = overrides.get("batch_tokens", 0) / model.sequence_len
        rows = rows or sweep.recipe.resolve(model, cell.horizon).rows_per_batch
        overrides["batch_tokens"] = max(1, round(rows * factor)) * model.sequence_len
    for key in [k for k in times if k in RESOLVE_KEYS]:
        overrides[key] = overrides.get(key, 1.0) * times.pop(key)
    if times:
        plain = flatten(sweep.recipe.resolve(model, cell.horizon, overrides=overrides))
        overrides |= {k: _multiplied(k, plain[k], factor, sweep.name) for k, factor in times.items()}
    return sweep.recipe.resolve(model, cell.horizon, data=data, seed=seed, overrides=overrides)


def _stack(layers: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, float]]:
    """Overrides of all layers, the later ones winning, and the factors on top: a plain value takes back factors before it."""
    overrides: dict[str, Any] = {}
    times: dict[str, float] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Times):
                times[key] = times.get(key, 1.0) * value.factor
            else:
                overrides[key] = value
                times.pop(key, None)
    return overrides, times


def _multiplied(key: str, value: Any, factor: float, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"sweep {where}: {key} is {value!r}, no number, so Times({factor:g}) of it means nothing; give a value")
    return value * factor


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested dataclass."""
    flat: dict[str, Any] = {}
    for f in fields(value):
        child = getattr(value, f.name)
        flat |= flatten(child, f"{prefix}{f.name}.") if is_dataclass(child) else {prefix + f.name: child}
    return flat


def make_trial(
    sweep: Sweep, cell: Cell, candidate: int, values: Mapping[str, Value], seed: int, data: DataConfig | None = None
) -> Trial:
    config = resolve_config(sweep, cell, values, seed=seed, data=data)
    return Trial(
        sweep=sweep.name,
        cell=cell.label,
        candidate=candidate,
        values=dict(values),
        seed=seed,
        config=config,
        run_id=run_id(config),
        stage=sweep.stage,
        tags=_tags(sweep, cell, values),
    )


def _tags(sweep: Sweep, cell: Cell, values: Mapping[str, Value]) -> dict[str, str]:
    tags = {"cell": cell.label}
    if sweep.purpose:
        tags["purpose"] = sweep.purpose
    if cell.horizon is not None and cell.horizon.train_flops is not None:
        tags["budget"] = f"{cell.horizon.train_flops:.6g}"
    if VARIANT in values and sweep.variants:
        tags[VARIANT] = str(values[VARIANT])
    return {**tags, **cell.tags}


def known_keys() -> list[str]:
    """Every key that a space, a variant or an override may use."""
    return [*CANDIDATE_KEYS, *dotted_keys(TrainConfig())]


def _check_keys(overrides: Mapping[str, Any], where: str) -> None:
    known = known_keys()
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(f"sweep {where}: unknown key {key!r}; did you mean {near[0]!r}?")


def check_sweep(sweep: Sweep, data: DataConfig | None = None) -> None:
    """Resolve every cell (and every candidate of a finite one), so that what cannot run is said before Ray starts."""
    if "core" in sweep.metrics and not sweep.runtime.core_bundle:
        raise ConfigError(
            f"sweep {sweep.name} is judged by CORE and names no tasks; give runtime=RuntimeConfig(core_bundle=…), a folder or "
            "zip, or --set runtime.core_bundle=…"
        )
    for cell in sweep.cells:
        resolve_config(sweep, cell, data=data)
        space = sweep.space_of(cell)
        _check_keys(space, sweep.name)
        if sweep.sampler_of(cell) == "grid" or sweep.variants:
            for values in candidate_values(sweep, cell):
                resolve_config(sweep, cell, values, data=data)
        elif not space:
            raise ConfigError(f"sweep {sweep.name}: sampler {sweep.sampler_of(cell)} needs a space to sample from")


def planned_trials(sweep: Sweep, data: DataConfig | None = None) -> list[Trial]:
    """Every trial that is known before the sweep starts. A cell whose candidates are suggested as results come in is
    represented by its baseline, once for each candidate and seed: the right number of runs, their sizes approximate."""
    trials: list[Trial] = []
    for cell in sweep.cells:
        if sweep.sampler_of(cell) == "grid":
            candidates = candidate_values(sweep, cell)
            candidates = candidates[: sweep.num_trials] if sweep.num_trials else candidates
        else:
            candidates = [{}] * sweep.num_trials
        trials += [make_trial(sweep, cell, i, v, seed, data) for i, v in enumerate(candidates) for seed in sweep.seeds]
    return trials


# --- the usual sets of cells ---


def depth_cells(depths: Iterable[int], *, tokens_per_param: float | None = None, **shape: Any) -> tuple[Cell, ...]:
    """One cell a depth at a fixed ratio; `shape` goes to GPTConfig.from_depth (sequence_len, vocab_size …)."""
    horizon = Horizon(tokens_per_param=tokens_per_param) if tokens_per_param is not None else None
    return tuple(Cell(model=GPTConfig.from_depth(depth, **shape), horizon=horizon) for depth in depths)


def isoflop_cells(
    budgets: Iterable[float],
    models: Sequence[GPTConfig],
    *,
    centre: Callable[[float], float] | None = None,
    sizes: int = 7,
) -> tuple[Cell, ...]:
    """Every budget (training FLOPs) with every model; with `centre`, the expected best N (matrices + lm_head) at a budget,
    only the `sizes` models around it, so that the minimum lies inside (scaling-law practice: 6–7 sizes spanning ±4×).

    Raises ConfigError where `models` has fewer than two sizes on a side of the centre: its minimum could lie outside.
    """
    ordered = sorted(models, key=lambda m: count_params(m).scaling)
    if not ordered:
        raise ConfigError("isoflop_cells needs models; give a list of GPTConfig")
    cells = []
    for budget in budgets:
        chosen = ordered if centre is None else _around(ordered, centre(budget), sizes, budget)
        cells += [Cell(model=m, horizon=Horizon(train_flops=budget)) for m in chosen]
    return tuple(cells)


def _around(ordered: Sequence[GPTConfig], centre: float, sizes: int, budget: float) -> Sequence[GPTConfig]:
    ns = [count_params(m).scaling for m in ordered]
    nearest = min(range(len(ns)), key=lambda i: abs(math.log(ns[i] / centre)))
    if nearest < 2 or nearest > len(ns) - 3:
        raise ConfigError(
            f"the expected best N {centre:.3g} at {budget:.3g} FLOPs has fewer than two of the models' sizes on a side "
            f"({ns[0]:.3g} … {ns[-1]:.3g}); add models there"
        )
    start = min(max(0, nearest - sizes // 2), max(0, len(ns) - sizes))
    return ordered[start : start + sizes]


def with_overrides(sweep: Sweep, overrides: Mapping[str, Any]) -> Sweep:
    """The sweep with `overrides` on top of its own; a key that is also in its space is refused."""
    for key in overrides:
        if key in sweep.space or any(key in (c.space or {}) for c in sweep.cells):
            raise ConfigError(f"{key} is a dimension of sweep {sweep.name}'s space; change the space instead of fixing it")
    return replace(sweep, overrides={**sweep.overrides, **overrides})


__all__ = [
    "BASELINE", "Trial", "candidate_values", "check_sweep", "depth_cells", "isoflop_cells", "known_keys", "make_trial",
    "planned_trials", "resolve_config", "with_overrides",
]  # fmt: skip
