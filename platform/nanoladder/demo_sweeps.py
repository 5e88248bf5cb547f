"""The demo's sweeps: the questions of the GPU-sized files under sweeps/, at a size that two CPU cores answer in minutes."""

from __future__ import annotations

from dataclasses import replace

from nanochat_model.config import RuntimeConfig
from nanochat_model.hardware import cpu_has_bf16
from nanochat_model.horizon import Horizon
from nanochat_model.recipe import Recipe
from nanoladder.demo_size import DEMO_RECIPE, DemoSize, Shape
from nanoladder.ladder import Ladder, Stage
from nanoladder.space import Grid
from nanoladder.sweep import Cell, Purpose, Sweep

DEMO = DemoSize()
TRIAL_RUNTIME = RuntimeConfig(device="cpu", num_threads=1, keep_last=0)  # tiny runs: the record is all that is kept


def demo_recipe(size: DemoSize = DEMO) -> Recipe:
    """The demo's rules, in bf16 where this CPU is fast at it."""
    return DEMO_RECIPE.recipe(size, "bfloat16" if cpu_has_bf16() else "float32")


def _sweep(name: str, purpose: Purpose, question: str, source: str, recipe: Recipe, cells: tuple[Cell, ...]) -> Sweep:
    return Sweep(
        name=name,
        question=question,
        source=source,
        purpose=purpose,
        recipe=recipe,
        cells=cells,
        packing="keep_remainder",
        backend="actor",
        runtime=TRIAL_RUNTIME,
    )


def _token_cells(size: DemoSize, cells: tuple[tuple[Shape, float], ...]) -> tuple[Cell, ...]:
    return tuple(Cell(model=size.model(shape), horizon=Horizon(num_tokens=tokens)) for shape, tokens in cells)


def isoflop(size: DemoSize = DEMO, recipe: Recipe | None = None) -> Sweep:
    """Which size is best at each compute budget?"""
    cells = tuple(
        Cell(model=size.model(shape), horizon=Horizon(train_flops=budget)) for budget, shapes in size.isoflop for shape in shapes
    )
    return _sweep(
        "demo_isoflop",
        "allocation",
        "Which model size is best at each compute budget?",
        "isoFLOP profiles, arXiv 2203.15556",
        recipe or demo_recipe(size),
        cells,
    )


def noise(size: DemoSize = DEMO, recipe: Recipe | None = None) -> Sweep:
    """How far apart do runs end that differ in nothing but their seed?"""
    budget, shape = size.noise_cell
    sweep = _sweep(
        "demo_noise",
        "noise",
        "How far apart do runs end that differ in nothing but their seed?",
        "seven identical d24 runs of nanochat spread over 0.016 CORE",
        recipe or demo_recipe(size),
        (Cell(model=size.model(shape), horizon=Horizon(train_flops=budget)),),
    )
    return replace(sweep, seeds=size.noise_seeds)


def weight_decay(size: DemoSize = DEMO, recipe: Recipe | None = None) -> Sweep:
    """Which weight decay is best, and does it follow width?"""
    sweep = _sweep(
        "demo_wd",
        "weight_decay",
        "Which weight decay is best, and does it follow width?",
        "nanochat found 0.40, 0.22, 0.10, 0.08 at d8, d12, d16, d20",
        recipe or demo_recipe(size),
        _token_cells(size, size.weight_decay_cells),
    )
    return replace(sweep, space={"weight_decay_multiplier": Grid(size.weight_decay_multipliers)})


def batch(size: DemoSize = DEMO, recipe: Recipe | None = None) -> Sweep:
    """Which batch and learning rate are best at each horizon?"""
    sweep = _sweep(
        "demo_batch",
        "batch_size",
        "Which batch size and learning rate are best at each horizon?",
        "B ~ D^0.383 in arXiv 2505.13738, D^0.571 in arXiv 2503.04715",
        recipe or demo_recipe(size),
        _token_cells(size, size.batch_cells),
    )
    space = {"batch_multiplier": Grid(size.batch_multipliers), "lr_multiplier": Grid(size.lr_multipliers)}
    return replace(sweep, space=space)


def promotion(size: DemoSize = DEMO, recipe: Recipe | None = None) -> Ladder:
    """Which changes of the recipe win at a small size, and still win at a larger one?"""
    small, large = _token_cells(size, size.promotion_cells)
    return Ladder(
        name="demo_promotion",
        question="Which changes of the recipe win at a small size, and still win at a larger one?",
        source="nanochat's log: gains tuned at d12 shrink or turn at d20",
        recipe=recipe or demo_recipe(size),
        variants=size.promotion_variants,
        stages=(Stage(name="small", cells=(small,)), Stage(name="large", cells=(large,))),
        seeds=size.promotion_seeds,
        overrides={**size.promotion_baseline, "eval.every_steps": size.promotion_eval_steps},
        laws="none",
        packing="keep_remainder",
        backend="actor",
        runtime=TRIAL_RUNTIME,
    )
