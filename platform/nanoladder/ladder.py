"""A ladder: changes of a recipe are tried where runs are cheap; what wins there must win again, with seeds, where they are not.

A stage is a sweep over variants: the baseline and its candidates, by the same seeds, so that runs pair. A candidate goes on
when its gain exceeds the seed noise (`analysis.compare`). The verdicts lie in sweeps/<ladder>/promotions.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_model.config import DataConfig, Packing, RuntimeConfig
from nanochat_model.errors import ConfigError
from nanochat_model.recipe import NANOCHAT, Recipe
from nanochat_model.record import RunRecord
from nanoladder.execute import execute_sweep
from nanoladder.listen import Listener, SweepProgress
from nanoladder.promote import Promotion, judge_stage, not_reached, tag_verdicts, write_promotions
from nanoladder.sweep import BASELINE, Backend, Cell, Sweep
from nanoladder.sweep_index import read_index
from nanoladder.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One rung: where the candidates meet the baseline."""

    name: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = ()  # (): the ladder's


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
        for stage in self.stages:
            self.stage_sweep(stage, self.variants)

    def stage_sweep(self, stage: Stage, variants: Mapping[str, Mapping[str, Any]]) -> Sweep:
        return Sweep(
            name=f"{self.name}/{stage.name}",
            question=self.question,
            source=self.source,
            purpose="promotion",
            stage=stage.name,
            recipe=self.recipe,
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
    for number, stage in enumerate(ladder.stages):
        sweep = ladder.stage_sweep(stage, variants)
        records = execute_sweep(
            sweep, workspace, data=data, progress=progress, listeners=listeners, mlflow_uri=mlflow_uri, **options
        )
        judged = judge_stage(
            sweep,
            by_variant(sweep, workspace, records),
            alpha=ladder.alpha,
            min_gain=ladder.min_gain,
            noise=noise,
            before=promotions,
        )
        promotions += judged
        uri = workspace.mlflow_uri if mlflow_uri is None else mlflow_uri
        tag_verdicts(uri, workspace.root / "mlartifacts", sweep, judged)
        variants = winners(judged, combine=ladder.combine)
        rest = ladder.stages[number + 1 :]
        write_promotions(workspace, ladder.name, ladder.question, promotions, not_reached([s.name for s in rest], bool(variants)))
        if not variants:
            break
    return promotions


def by_variant(sweep: Sweep, workspace: Workspace, records: Sequence[RunRecord]) -> dict[str, dict[int, RunRecord]]:
    """Variant -> pair number -> record; equal numbers (cell and seed) make a pair. Runs that did not complete are left out."""
    known = {r.run_id: r for r in records if r.status == "complete"}
    pairs: dict[tuple[str, int], int] = {}
    found: dict[str, dict[int, RunRecord]] = {name: {} for name in sweep.variants}
    for row in read_index(workspace.sweep_dir(sweep.name))["trials"]:
        number = pairs.setdefault((row["cell"], row["seed"]), len(pairs))
        if row["run_id"] in known:
            found[row["values"]["variant"]][number] = known[row["run_id"]]
    return found


def winners(judged: Sequence[Promotion], *, combine: bool) -> dict[str, Mapping[str, Any]]:
    """The adopted candidates, best first, and all of them together where asked and where they do not contradict."""
    adopted = sorted((p for p in judged if p.verdict == "adopt"), key=lambda p: -p.gain)
    chosen: dict[str, Mapping[str, Any]] = {p.change: p.overrides for p in adopted}
    keys = [k for p in adopted for k in p.overrides]
    if combine and len(adopted) > 1 and len(keys) == len(set(keys)):
        chosen[" + ".join(chosen)] = {k: v for p in adopted for k, v in p.overrides.items()}
    return chosen
