"""The demo's stages up to the laws: data, sweeps on Ray, fits. Each leaves plain facts for the next ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_model.config import DataConfig, Packing
from nanochat_model.identity import content_hash
from nanochat_model.recipe import Recipe
from nanochat_model.record import RECORD_FILE, RunRecord
from nanoladder import demo_sweeps
from nanoladder.data_stages import corpus_stage, shards_stage, tokenizer_stage
from nanoladder.demo_size import DEMO_RECIPE, DemoSize
from nanoladder.laws_to_recipe import LAW_NAMES, LawRecipe, recipe_from_laws
from nanoladder.recipes import RECIPE_FILE, write_recipe
from nanoladder.stages import Facts, Progress
from nanoladder.sweep import Sweep
from nanoladder.workspace import Workspace, record_sweeps

if TYPE_CHECKING:
    from analysis.laws import Laws
    from nanoladder.execute import SweepProgress

PACKING: Packing = "keep_remainder"  # documents of 18 kB against rows of 256 tokens: best-fit would drop nearly all
TUNING_SWEEPS = ("demo_wd", "demo_batch")


@dataclass(frozen=True)
class DemoStages:
    """What the stages share: sizes and the folder they work in."""

    size: DemoSize
    workspace: Workspace

    # --- data ---

    def corpus(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        return corpus_stage(self.size.source, self.workspace, self.size.val_fraction, progress)

    def tokenizer(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        return tokenizer_stage(self.workspace, self.size.vocab_size, progress)

    def shards(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        return shards_stage(self.workspace, self.size.concurrent_trials, progress)

    def data(self) -> DataConfig:
        return self.workspace.data_config(PACKING)

    # --- sweeps ---

    def recipe(self) -> Recipe:
        return demo_sweeps.demo_recipe(self.size)

    def tune(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        """Weight decay, and batch × learning rate, at small horizons."""
        recipe = self.recipe()
        return self._sweeps([demo_sweeps.weight_decay(self.size, recipe), demo_sweeps.batch(self.size, recipe)], progress)

    def promotion(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        """Changes of the recipe, judged by paired seeds at a small size; what wins there must win again at a larger one."""
        from nanoladder.ladder import execute_ladder

        ladder = demo_sweeps.promotion(self.size, self.recipe())
        result = execute_ladder(
            ladder, self.workspace, data=self.data(), progress=self._show(progress), max_concurrent=self.size.concurrent_trials
        )
        run_ids = sorted({run for p in result for run in (*p.run_ids, *p.baseline_run_ids)})
        verdicts = ", ".join(f"{p.change} ({p.stage}): {p.verdict}" for p in result)
        plain = [p.as_dict() for p in result]
        return {"hash": content_hash([run_ids, verdicts]), "run_ids": run_ids, "promotions": plain, "summary": verdicts}

    def isoflop(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        """The isoFLOP grid and the seeds, each cell by the recipe that the tuning laws give."""
        recipe = self.tuned_recipe(self.fit(TUNING_SWEEPS)).recipe
        return self._sweeps([demo_sweeps.isoflop(self.size, recipe), demo_sweeps.noise(self.size, recipe)], progress)

    def _sweeps(self, sweeps: Sequence[Sweep], progress: Progress) -> Facts:
        from nanoladder.execute import execute_sweeps

        records = execute_sweeps(
            sweeps, self.workspace, data=self.data(), progress=self._show(progress), max_concurrent=self.size.concurrent_trials
        )
        return self.sweep_facts(list({r.run_id: r for each in records for r in each}.values()))

    def _show(self, progress: Progress) -> Callable[[SweepProgress], None]:
        def show(state: SweepProgress) -> None:
            done, total = (state.flops_done, state.flops_total) if state.flops_total else (state.done, state.total)
            failed = f", {state.failed} failed" if state.failed else ""
            left = f", {state.eta_seconds:.0f} s left" if state.eta_seconds is not None else ""
            progress.update(done, total, f"{state.done} of {state.total} runs{failed}{left}")

        return show

    def sweep_facts(self, records: Sequence[RunRecord]) -> Facts:
        done = [r for r in records if r.status == "complete"]
        flops = sum(r.train_flops for r in done)
        failed = f", {len(records) - len(done)} failed" if len(done) < len(records) else ""
        return {
            "hash": content_hash(sorted(f"{r.run_id} {r.val_bpb!r}" for r in done)),
            "run_ids": sorted(r.run_id for r in done),
            "summary": f"{len(done)} runs{failed}, {flops:.2g} FLOPs",
        }

    def run_outputs(self, facts: Facts) -> list[Path]:
        return [self.workspace.run_dir(run) / RECORD_FILE for run in facts["run_ids"]]

    # --- laws ---

    def fit(self, sweeps: Sequence[str] = (), *, target_flops: float | None = None) -> Laws:
        """Laws of the recorded runs (of some sweeps)."""
        from analysis.laws import fit_laws
        from analysis.table import load_records

        paths = self.workspace.record_paths()
        if sweeps:
            chosen = {r.run_id for r in self.workspace.records() if set(record_sweeps(r)) & set(sweeps)}
            paths = [p for p in paths if p.parent.name in chosen]
        return fit_laws(load_records(paths), target_flops=target_flops, n_boot=self.size.n_boot)

    def tuned_recipe(self, laws: Laws) -> LawRecipe:
        """The demo's recipe with its good laws; a law of another status is left out by name, and the report shows why."""
        plain = laws.as_dict()
        first = recipe_from_laws(plain, self.recipe())
        bad = [use.quantity for use in first.uses if use.blocking]
        return recipe_from_laws(plain, self.recipe(), without=bad)

    def laws(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        progress.update(0, 1, f"{self.size.n_boot} resamples")
        laws = self.fit(target_flops=self.size.production_factor * self.size.largest_budget)
        laws.save(self.workspace.laws_path)
        write_recipe(self.recipe(), self.workspace.laws_path.parent / RECIPE_FILE)  # the rules that stay where no law is good
        used = [u.quantity for u in self.tuned_recipe(laws).uses if u.kind == "law"]
        return {
            "hash": hashlib.sha256(self.workspace.laws_path.read_bytes()).hexdigest()[:16],
            "summary": f"{', '.join(used)} of {len(LAW_NAMES)} laws are good enough to use"
            if used
            else "no law is good enough to use",
        }

    def inputs(self, *names: str) -> dict[str, Any]:
        """Sizes (by field name) and the recipe, as plain data for a stage's key."""
        sizes = asdict(self.size)
        return {**{name: sizes[name] for name in names}, "recipe": asdict(DEMO_RECIPE)}
