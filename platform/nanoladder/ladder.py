"""A ladder: changes of a recipe are tried where runs are cheap; what wins there must win again, with seeds, where they are not.

A stage is a sweep over variants: the baseline and its candidates, by the same seeds, so that runs pair. A candidate goes on
when its gain exceeds the seed noise (`analysis.compare`). The verdicts lie in sweeps/<ladder>/promotions.json.

What goes on is moved: each stage takes the recipe with the laws that are current when it begins (laws.json; the choice is kept in
sweeps/<ladder>/<stage>/recipe.json), and a value that won goes on as a multiple of what the recipe gives there (`Times`), because
the best batch, rates and decay of one size are not those of the next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal, TypeAlias

from nanochat_model.config import DataConfig, Packing, RuntimeConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash, from_dict, write_atomic
from nanochat_model.recipe import NANOCHAT, Recipe
from nanochat_model.record import RunRecord
from nanoladder.cells import VARIANT, flatten, resolve_config
from nanoladder.execute import execute_sweep
from nanoladder.facts_file import SCHEMA_VERSION, read_facts
from nanoladder.laws_to_recipe import recipe_from_laws
from nanoladder.listen import Listener, SweepProgress
from nanoladder.promote import Promotion, judge_screened, judge_stage, mean_gain, not_reached, tag_verdicts, write_promotions
from nanoladder.space import Times
from nanoladder.sweep import BASELINE, Backend, Cell, Sweep
from nanoladder.sweep_index import read_index
from nanoladder.workspace import Workspace

RECIPE_FILE = "recipe.json"
RunsByVariant: TypeAlias = dict[str, dict[int, RunRecord]]  # variant -> pair number -> complete run


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One rung: where the candidates meet the baseline."""

    name: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = ()  # (): the ladder's
    finalists: int = 0  # all candidates run by the first seed, and only so many of the best by the others; 0: all by all seeds


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Candidates (named sets of overrides of the recipe) and the stages they must pass, cheapest first."""

    name: str
    question: str
    source: str = ""
    recipe: Recipe = NANOCHAT
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # without the baseline
    stages: tuple[Stage, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    alpha: float = 0.05  # of the test that a gain exceeds min_gain
    min_gain: float = 0.0  # relative loss
    combine: bool = False  # winners of a stage also go on together, as one more candidate
    laws: Literal["current", "none"] = "current"  # which laws move the recipe between stages; "none": its own rules alone
    overrides: Mapping[str, Any] = field(default_factory=dict)
    packing: Packing = "best_fit"
    backend: Backend = "auto"
    device: str = ""
    devices_per_trial: int = 1
    trials_per_device: int = 1
    threads_per_trial: int = 1
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError(f"ladder {self.name} has no stages; give at least one Stage(name=…, cells=…)")
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"ladder {self.name} has two stages of one name ({', '.join(names)}); give each its own")
        if not self.variants or BASELINE in self.variants:
            raise ConfigError(f"ladder {self.name} needs variants besides the {BASELINE}, which is added by itself (no overrides)")
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"alpha {self.alpha} of ladder {self.name} must lie in 0..0.5, for example 0.05")
        if self.laws not in ("current", "none"):
            raise ConfigError(f'laws {self.laws!r} of ladder {self.name} must be "current" or "none"')
        for stage in self.stages:
            if stage.finalists < 0:
                raise ConfigError(f"finalists {stage.finalists} of stage {stage.name} must be 0 (all candidates) or more")
            self.stage_sweep(stage, self.variants)

    def stage_sweep(self, stage: Stage, variants: Mapping[str, Mapping[str, Any]], recipe: Recipe | None = None) -> Sweep:
        return Sweep(
            name=f"{self.name}/{stage.name}",
            question=self.question,
            source=self.source,
            purpose="promotion",
            stage=stage.name,
            recipe=recipe or self.recipe,
            cells=stage.cells,
            variants={BASELINE: {}, **variants},
            overrides=self.overrides,
            seeds=stage.seeds or self.seeds,
            packing=self.packing,
            backend=self.backend,
            device=self.device,
            devices_per_trial=self.devices_per_trial,
            trials_per_device=self.trials_per_device,
            threads_per_trial=self.threads_per_trial,
            runtime=self.runtime,
        )


def execute_ladder(
    ladder: Ladder,
    workspace: Workspace,
    *,
    data: DataConfig | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
    listeners: Sequence[Listener] = (),
    mlflow_uri: str | None = None,
    noise: Any = None,
    **options: Any,
) -> list[Promotion]:
    """Run the stages; every candidate's verdict at every stage it reached, in order. Started again, it skips what is recorded.

    `noise`: a SeedNoise of `analysis.noise` known beforehand, which makes few seeds go further. `options` as of
    `execute_sweeps`. The result is also in the workspace, in sweeps/<ladder>/promotions.json.
    """
    variants: Mapping[str, Mapping[str, Any]] = ladder.variants
    promotions: list[Promotion] = []
    options |= {"data": data, "progress": progress, "listeners": listeners, "mlflow_uri": mlflow_uri}
    uri = workspace.mlflow_uri if mlflow_uri is None else mlflow_uri

    def run(sweep: Sweep) -> RunsByVariant:
        return by_variant(sweep, workspace, execute_sweep(sweep, workspace, **options))

    for number, stage in enumerate(ladder.stages):
        sweep = ladder.stage_sweep(stage, variants, stage_recipe(ladder, stage, workspace))
        judging: dict[str, Any] = {"alpha": ladder.alpha, "min_gain": ladder.min_gain, "before": promotions}
        chosen = finalists(sweep, stage.finalists, run)
        final = final_of(sweep, chosen)
        runs = run(final)
        judged = judge_stage(final, runs, noise=noise, num_candidates=len(sweep.variants) - 1, **judging)
        if len(final.variants) < len(sweep.variants):
            judged += judge_screened(sweep, final, run(screening(sweep)), runs, **judging)
        promotions += judged
        tag_verdicts(uri, workspace.root / "mlartifacts", final, judged)
        variants = moved(winners(judged, sweep.variants, combine=ladder.combine), sweep)
        rest = ladder.stages[number + 1 :]
        write_promotions(workspace, ladder.name, ladder.question, promotions, not_reached([s.name for s in rest], bool(variants)))
        if not variants:
            break
    return promotions


def stage_recipe(ladder: Ladder, stage: Stage, workspace: Workspace) -> Recipe:
    """The ladder's recipe, moved by the laws that are current when the stage first begins; later starts take the same again."""
    if ladder.laws == "none":
        return ladder.recipe
    path = workspace.sweep_dir(f"{ladder.name}/{stage.name}") / RECIPE_FILE
    base_hash = content_hash(asdict(ladder.recipe))
    if path.exists():
        facts = read_facts(path, "recipe", "remove it, and start the ladder again with the laws it had")
        if facts["base"] == base_hash:
            return from_dict(type(ladder.recipe), facts["recipe"], "recipe: ")
    recipe, uses = ladder.recipe, []
    if workspace.laws_path.exists():
        from analysis.laws import Laws

        laws = Laws.load(workspace.laws_path).as_dict()
        doubtful = [u.quantity for u in recipe_from_laws(laws, recipe).uses if u.blocking]
        fitted = recipe_from_laws(laws, recipe, without=doubtful)
        recipe, uses = fitted.recipe, [asdict(u) for u in fitted.uses]
    facts = {"schema_version": SCHEMA_VERSION, "base": base_hash, "uses": uses, "recipe": asdict(recipe)}
    write_atomic(path, json.dumps(facts, indent=1))
    return recipe


def screening(sweep: Sweep) -> Sweep:
    """The same stage by its first seed alone."""
    return replace(sweep, name=f"{sweep.name}/screen", seeds=sweep.seeds[:1])


def finalists(sweep: Sweep, count: int, run: Callable[[Sweep], RunsByVariant]) -> list[str]:
    """The candidates that get all seeds: all of them, or the best `count` by the first seed."""
    candidates = [name for name in sweep.variants if name != BASELINE]
    if not count or count >= len(candidates) or len(sweep.seeds) == 1:
        return candidates
    screened = run(screening(sweep))
    return sorted(candidates, key=lambda name: -mean_gain(screened[BASELINE], screened[name]))[:count]


def final_of(sweep: Sweep, chosen: Collection[str]) -> Sweep:
    """The same stage with the baseline and the chosen candidates alone."""
    return replace(sweep, variants={k: v for k, v in sweep.variants.items() if k == BASELINE or k in chosen})


# Values that the recipe's rules work out from each cell's own N, D and B: a winner's goes on as a multiple of them.
RULED = ("batch_tokens", "optimizer.weight_decay", *(f"optimizer.{k}_lr" for k in ("matrix", "embedding", "unembedding", "scalar")))


def moved(variants: Mapping[str, Mapping[str, Any]], sweep: Sweep) -> dict[str, Mapping[str, Any]]:
    """The winners of a stage for the next one: what the rules govern as a factor on the baseline's value in this stage's cells
    (their geometric mean)."""
    baselines = [flatten(resolve_config(sweep, cell, {VARIANT: BASELINE})) for cell in sweep.cells]

    def move(key: str, value: Any) -> Any:
        known = [float(b[key]) for b in baselines] if key in RULED else []
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or not known or min(known) <= 0:
            return value
        return Times(math.exp(fmean(math.log(float(value) / b) for b in known)))

    return {name: {k: move(k, v) for k, v in overrides.items()} for name, overrides in variants.items()}


def by_variant(sweep: Sweep, workspace: Workspace, records: Sequence[RunRecord]) -> RunsByVariant:
    """Variant -> pair number -> record; equal numbers (cell and seed) make a pair. Runs that did not complete are left out."""
    known = {r.run_id: r for r in records if r.status == "complete"}
    pairs: dict[tuple[str, int], int] = {}
    found: dict[str, dict[int, RunRecord]] = {name: {} for name in sweep.variants}
    for row in read_index(workspace.sweep_dir(sweep.name))["trials"]:
        number = pairs.setdefault((row["cell"], row["seed"]), len(pairs))
        if row["run_id"] in known:
            found[row["values"]["variant"]][number] = known[row["run_id"]]
    return found


def winners(
    judged: Sequence[Promotion], variants: Mapping[str, Mapping[str, Any]], *, combine: bool
) -> dict[str, Mapping[str, Any]]:
    """The adopted candidates, best first, and all of them together where asked and where they do not contradict."""
    adopted = sorted((p for p in judged if p.verdict == "adopt"), key=lambda p: -p.gain)
    chosen: dict[str, Mapping[str, Any]] = {p.change: variants[p.change] for p in adopted}
    keys = [k for overrides in chosen.values() for k in overrides]
    if combine and len(adopted) > 1 and len(keys) == len(set(keys)):
        chosen[" + ".join(chosen)] = {k: v for p in adopted for k, v in variants[p.change].items()}
    return chosen
