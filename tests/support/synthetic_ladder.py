"""A ladder of runs on a known loss surface, as the record.json files that real runs leave. No training.

L(N, D) = E + A/N^alpha + B/D^beta, times a quadratic penalty in the log distance of batch, learning rate and weight decay from
their known optima, times lognormal noise. Two scales: "demo" (N 20k-500k, FLOPs 4e11-1.6e13) and "real" (1e18-1e19 and up).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nanochat_model.config import DataConfig, EvalConfig, GPTConfig, OptimizerConfig, TrainConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.identity import run_id
from nanochat_model.record import CurvePoint, RunRecord


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The known laws. N counts matrices + lm_head, D and B tokens, lr is the matrix learning rate."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    batch: tuple[float, float]  # B* = k · D^gamma
    lr: tuple[float, float]  # lr* = k · N^exponent
    weight_decay: tuple[float, float]  # wd* = k · width^exponent
    penalty: float = 0.012  # relative loss a squared e-fold away from an optimum

    def loss(self, n: float, d: float) -> float:
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def optimal_params(self, flops: float, factor: float = 6.0) -> float:
        """N* at `flops` when FLOPs = factor · N · D."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return g * (flops / factor) ** (self.beta / (self.alpha + self.beta))


TRUTHS = {
    "demo": Truth(E=1.1, A=47.0, B=77.0, alpha=0.40, beta=0.34, batch=(1.6, 0.46), lr=(0.35, -0.25), weight_decay=(600.0, -1.85)),
    "real": Truth(
        E=0.42, A=310.0, B=690.0, alpha=0.37, beta=0.37, batch=(60.0, 0.40), lr=(2.1, -0.25), weight_decay=(25000.0, -1.85)
    ),
}


@dataclass(frozen=True, kw_only=True)
class LadderSpec:
    """Which runs to write. Every part may be left out (empty), as a user's ladder may lack it."""

    scale: str = "demo"
    budgets: tuple[float, ...] = (4e11, 1.2e12, 4e12, 1.3e13)
    sizes: int = 6
    span: float = 4.0  # sizes lie within ± this factor of N*
    weight_decay_cells: int = 3
    batch_cells: int = 3
    seed_replicates: int = 3
    failed: int = 1
    noise: float = 0.002  # standard deviation of log loss
    edge: bool = False  # the last batch cell's grid stops short of its optimum
    seed: int = 0
    truth: Truth | None = None
    tags: tuple[tuple[str, str], ...] = ()

    @property
    def surface(self) -> Truth:
        return self.truth or TRUTHS[self.scale]


DEMO = LadderSpec()
REAL = LadderSpec(scale="real", budgets=(1e18, 3e18, 1e19, 3e19))


def model_near(params: float, scale: str) -> GPTConfig:
    """The GPTConfig whose matrices + lm_head come nearest to `params`."""
    if scale == "demo":
        shapes = [(depth, width) for depth in range(1, 7) for width in range(24, 260, 8)]
        make: Callable[[int, int], GPTConfig] = _demo_model
    else:
        shapes = [(depth, 64 * depth) for depth in range(3, 40)] + [(depth, 64 * depth + 64) for depth in range(3, 40)]
        make = _real_model

    def mismatch(shape: tuple[int, int]) -> float:
        depth, width = shape
        size = math.log(count_params(make(depth, width)).scaling / params)
        aspect = math.log(width / depth / (40 if scale == "demo" else 64))
        return abs(size) + 0.05 * abs(aspect)

    return make(*min(shapes, key=mismatch))


def _demo_model(depth: int, width: int) -> GPTConfig:
    return GPTConfig(
        depth=depth, model_dim=width, num_heads=2, num_kv_heads=2, sequence_len=256, vocab_size=1024, window_pattern="L"
    )


def _real_model(depth: int, width: int) -> GPTConfig:
    return GPTConfig(depth=depth, model_dim=width, num_heads=width // 64, num_kv_heads=width // 64)


def iter_records(spec: LadderSpec = DEMO) -> Iterator[RunRecord]:
    """The runs of `spec`, in a fixed order."""
    rng = np.random.default_rng(spec.seed)
    yield from _isoflop(spec, rng)
    yield from _weight_decay(spec, rng)
    yield from _batch(spec, rng)
    yield from _seeds(spec, rng)
    for i in range(spec.failed):
        record = _record(
            spec, rng, model_near(spec.surface.optimal_params(spec.budgets[0]), spec.scale), spec.budgets[0], seed=90 + i
        )
        yield replace(record, status="failed", val_bpb=None, curve=(), error="loss is nan at step 12", sweep="isoflop")


def write_ladder(folder: str | Path, spec: LadderSpec = DEMO) -> list[RunRecord]:
    """Write folder/runs/<run_id>/record.json for every run; returns the records (a repeated config is written once)."""
    records = {r.run_id: r for r in iter_records(spec)}
    for record in records.values():
        record.save(Path(folder) / "runs" / record.run_id)
    return list(records.values())


def _isoflop(spec: LadderSpec, rng: np.random.Generator) -> Iterator[RunRecord]:
    for budget in spec.budgets:
        centre = spec.surface.optimal_params(budget, factor=6.6)
        for offset in np.linspace(-1, 1, spec.sizes):
            yield _record(spec, rng, model_near(centre * spec.span**offset, spec.scale), budget, sweep="isoflop", stage="isoflop")


def _weight_decay(spec: LadderSpec, rng: np.random.Generator) -> Iterator[RunRecord]:
    for i in range(spec.weight_decay_cells):
        budget = spec.budgets[min(i, len(spec.budgets) - 1)]
        model = model_near(spec.surface.optimal_params(budget, factor=6.6), spec.scale)
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            yield _record(
                spec,
                rng,
                model,
                budget,
                weight_decay_factor=factor,
                sweep="weight_decay",
                purpose="weight_decay",
                stage=f"d{model.depth}",
            )


def _batch(spec: LadderSpec, rng: np.random.Generator) -> Iterator[RunRecord]:
    for i in range(spec.batch_cells):
        budget = spec.budgets[min(i, len(spec.budgets) - 1)]
        model = model_near(spec.surface.optimal_params(budget, factor=6.6) * 0.8, spec.scale)
        grid = (0.25, 0.5, 1.0, 2.0, 4.0) if not (spec.edge and i == spec.batch_cells - 1) else (2.0, 4.0, 8.0)
        for batch_factor in grid:
            for lr_factor in (0.5, 1.0, 2.0):
                yield _record(
                    spec,
                    rng,
                    model,
                    budget,
                    batch_factor=batch_factor,
                    lr_factor=lr_factor,
                    sweep="batch_lr",
                    purpose="batch_size",
                    stage=f"d{model.depth}",
                )


def _seeds(spec: LadderSpec, rng: np.random.Generator) -> Iterator[RunRecord]:
    budget = spec.budgets[len(spec.budgets) // 2]
    model = model_near(spec.surface.optimal_params(budget, factor=6.6), spec.scale)
    for seed in range(1, spec.seed_replicates + 1):
        yield _record(spec, rng, model, budget, seed=seed, sweep="seeds", stage="noise", purpose="noise")


def _record(
    spec: LadderSpec,
    rng: np.random.Generator,
    model: GPTConfig,
    flops: float,
    *,
    batch_factor: float = 1.0,
    lr_factor: float = 1.0,
    weight_decay_factor: float = 1.0,
    seed: int = 0,
    sweep: str = "isoflop",
    stage: str = "isoflop",
    purpose: str = "allocation",
) -> RunRecord:
    truth, counts, per_token = spec.surface, count_params(model), flops_per_token(model)
    n, row = float(counts.scaling), model.sequence_len
    best_batch = truth.batch[0] * (flops / per_token) ** truth.batch[1]
    batch = max(row, round(best_batch * batch_factor / row) * row)
    steps = max(1, round(flops / per_token / batch))
    d = float(batch * steps)
    lr = truth.lr[0] * n ** truth.lr[1] * math.sqrt(batch / best_batch) * lr_factor
    best_decay = truth.weight_decay[0] * model.model_dim ** truth.weight_decay[1]
    misses = (math.log(batch / best_batch), math.log(lr_factor), math.log(weight_decay_factor))
    clean = truth.loss(n, d) * (1 + truth.penalty * sum(m * m for m in misses))
    loss = clean * math.exp(spec.noise * rng.standard_normal())
    config = TrainConfig(
        model=model,
        optimizer=OptimizerConfig(matrix_lr=lr, weight_decay=best_decay * weight_decay_factor),
        data=DataConfig(manifest_hash="5f0c1e2d3b4a5968", tokenizer_hash="0011223344556677", packing="keep_remainder"),
        eval=EvalConfig(num_tokens=65536, every_steps=max(1, steps // 8)),
        batch_tokens=batch,
        num_steps=steps,
        seed=seed,
    )
    speed = 8e10 if spec.scale == "demo" else 4e14
    return RunRecord(
        run_id=run_id(config),
        status="complete",
        name=f"{sweep}-d{model.depth}w{model.model_dim}",
        sweep=sweep,
        stage=stage,
        tags={"purpose": purpose, **({"budget": f"{flops:g}"} if purpose == "allocation" else {}), **dict(spec.tags)},
        config=config,
        seed=seed,
        params=counts.as_dict(),
        num_tokens=int(d),
        flops_per_token=per_token,
        train_flops=d * per_token,
        curve=_curve(truth, n, d, steps, batch, per_token, speed, loss),
        val_bpb=loss,
        device="cpu" if spec.scale == "demo" else "NVIDIA H100",
        num_devices=1 if spec.scale == "demo" else 8,
        mfu=0.41,
        train_seconds=d * per_token / speed,
        total_seconds=d * per_token / speed * 1.07 + 0.4,
        started_at="2026-01-12T09:00:00+00:00",
        finished_at="2026-01-12T09:30:00+00:00",
    )


def _curve(
    truth: Truth, n: float, d: float, steps: int, batch: int, per_token: int, speed: float, final: float
) -> tuple[CurvePoint, ...]:
    points = []
    for step in sorted({max(1, round(steps * k / 8)) for k in range(1, 9)}):
        tokens = step * batch
        value = final * truth.loss(n, tokens) / truth.loss(n, d) * (1 + 0.03 * (1 - step / steps))
        flops = float(tokens * per_token)
        points.append(CurvePoint(step=step, num_tokens=tokens, train_flops=flops, seconds=flops / speed, val_bpb=value))
    return tuple(points)
