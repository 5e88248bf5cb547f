"""Recipes by name, from a file, or from a run whose values are to be carried to another size."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from nanochat_model.config import TrainConfig
from nanochat_model.counts import count_params
from nanochat_model.errors import ConfigError
from nanochat_model.identity import from_dict, write_atomic
from nanochat_model.recipe import NANOCHAT, PowerRule, Recipe
from nanochat_model.record import RECORD_FILE, RunRecord

RECIPE_FILE = "recipe.json"  # beside a laws.json: the recipe its runs were made by
NAMES = ("nanochat", "demo")


def find_recipe(given: str = "", laws_path: str = "") -> Recipe:
    """The recipe that a plan starts from.

    `given`: "nanochat", "demo", a recipe file, or a run (its folder or record), whose batch, rates and decay then hold at its
    own batch and tokens. Left out: recipe.json beside the laws, for rules that no law replaces must be those that the laws'
    runs were made by; without one nanochat's. Raises ConfigError.
    """
    if not given:
        beside = Path(laws_path).parent / RECIPE_FILE if laws_path else None
        return read_recipe(beside) if beside is not None and beside.is_file() else NANOCHAT
    if given == "nanochat":
        return NANOCHAT
    if given == "demo":
        from nanoladder.demo_sweeps import demo_recipe

        return demo_recipe()
    path = Path(given)
    if path.is_dir() or path.name == RECORD_FILE:
        return recipe_of_run(RunRecord.load(path))
    if not path.is_file():
        raise ConfigError(f"recipe {given!r} is none of {', '.join(NAMES)}, no file and no run's folder; give one of these")
    return read_recipe(path)


def read_recipe(path: Path) -> Recipe:
    """A recipe file. Raises ConfigError naming what is wrong with it."""
    try:
        plain = json.loads(path.read_text(encoding="utf8"))
    except (OSError, json.JSONDecodeError) as e:
        raise ConfigError(f"{path}: no recipe ({type(e).__name__}: {e}); nanoladder writes recipe.json beside laws.json") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: a recipe is a JSON object, this is a {type(plain).__name__}")
    return from_dict(Recipe, plain, f"{path}: ")


def write_recipe(recipe: Recipe, path: Path) -> None:
    write_atomic(path, json.dumps(asdict(recipe), indent=1))


def recipe_of_run(record: RunRecord) -> Recipe:
    """The recipe that reproduces this run at its own size and tokens, and carries it elsewhere by the published exponents."""
    return recipe_of_config(record.config, f"run {record.run_id}")


def recipe_of_config(config: TrainConfig, name: str) -> Recipe:
    """nanochat's exponents through the values of `config`: what was good there is taken as measured there."""
    here = {"D": float(config.num_tokens), "B": float(config.batch_tokens)}

    def through(rule: PowerRule, value: float) -> PowerRule:
        references = {s: here[s] for s in rule.exponents}
        exponents = ", ".join(f"{s}^{e:g}" for s, e in rule.exponents.items())
        return replace(
            rule, coefficient=value, references=references, source=f"{name}: its own value there, then {exponents} as nanochat"
        )

    power = config.batch_tokens & (config.batch_tokens - 1) == 0
    return Recipe(
        name=name,
        tokens_per_param=config.num_tokens / count_params(config.model).scaling,
        batch_size=through(NANOCHAT.batch_size, float(config.batch_tokens)),
        lr_multiplier=through(NANOCHAT.lr_multiplier, 1.0),
        weight_decay=through(NANOCHAT.weight_decay, config.optimizer.weight_decay),
        batch_rounding="power_of_two" if power else "row",
        optimizer=config.optimizer,
        schedule=config.schedule,
        eval=config.eval,
        compute_dtype=config.compute_dtype,
    )
