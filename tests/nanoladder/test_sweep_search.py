"""What a search may be: conditional spaces, several objectives, edges that move, candidates given up, cells chosen in rounds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from sweep_bench import Bench
from toy_sweep import CELL, make_sweep, run_ids
from toy_training import BEST_LR, toy_loss, train

from nanochat_model.config import GPTConfig
from nanochat_model.counts import count_params
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.record import RunRecord
from nanoladder.adaptive import CHOICES_FILE, execute_adaptive
from nanoladder.cells import resolve_config
from nanoladder.front import best_candidates, fronts
from nanoladder.listen import Listeners
from nanoladder.live_status import StatusWriter
from nanoladder.outcomes import read_fronts
from nanoladder.space import Choice, Grid, LogUniform, Times, Uniform, When, enumerate_space
from nanoladder.status_view import read_statuses
from nanoladder.sweep import Adaptive, Cell, Sweep
from nanoladder.sweep_index import IndexWriter, read_index
from nanoladder.sync import sync
from nanoladder.workspace import Workspace

LR, DECAY = "optimizer.matrix_lr", "optimizer.weight_decay"
CONDITIONAL = {
    "schedule.kind": Choice(["nanochat", "constant_then_decay"]),
    "schedule.warmdown_fraction": When("schedule.kind", "constant_then_decay", Uniform(0.1, 0.4)),
    LR: LogUniform(1e-3, 1e-1),
}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc"])
def test_a_dimension_with_a_condition_applies_only_there_whoever_suggests(tmp_path: Path, sampler: str) -> None:
    sweep = make_sweep(space=CONDITIONAL, sampler=sampler, num_trials=14, parallel_trials=2)
    whole = Bench(tmp_path / "whole", [sweep])
    whole.run(parallel=2)
    kinds = [t.values["schedule.kind"] for t in whole.trained]
    assert set(kinds) == {"nanochat", "constant_then_decay"}
    for trial in whole.trained:
        applies = trial.values["schedule.kind"] == "constant_then_decay"
        assert ("schedule.warmdown_fraction" in trial.values) == applies
        fraction = trial.config.schedule.warmdown_fraction
        assert (0.1 <= fraction <= 0.4) if applies else fraction == sweep.recipe.schedule.warmdown_fraction
    for stop in (5, 10**9):
        Bench(tmp_path / "cut", [sweep]).run(parallel=2, pick=lambda n: n - 1, stop_after=stop)
    assert run_ids(tmp_path / "cut") == run_ids(tmp_path / "whole")


def test_a_finite_conditional_space_has_each_point_once() -> None:
    space = {"a": Choice(["x", "y"]), "b": When("a", ("y",), Grid([1, 2])), "c": Grid([5, 6])}
    assert enumerate_space(space) == [
        {"a": "x", "c": 5}, {"a": "x", "c": 6}, {"a": "y", "b": 1, "c": 5}, {"a": "y", "b": 1, "c": 6},
        {"a": "y", "b": 2, "c": 5}, {"a": "y", "b": 2, "c": 6},
    ]  # fmt: skip


def test_times_keeps_its_meaning_in_every_cell() -> None:
    small, large = Cell(model=GPTConfig.from_depth(12)), Cell(model=GPTConfig.from_depth(20))
    sweep = make_sweep(cells=(small, large), variants={"baseline": {}, "more": {DECAY: Times(2.0), "batch_tokens": Times(0.5)}})
    for cell in sweep.cells:
        plain, more = (resolve_config(sweep, cell, {"variant": name}) for name in ("baseline", "more"))
        assert more.batch_tokens == plain.batch_tokens / 2
        half = resolve_config(sweep, replace(cell, overrides={"batch_tokens": plain.batch_tokens // 2}), {"variant": "baseline"})
        assert more.optimizer.weight_decay == pytest.approx(2 * half.optimizer.weight_decay), "twice what the rule gives that batch"
    with pytest.raises(ConfigError, match=r"schedule\.kind"):
        resolve_config(replace(sweep, variants={"baseline": {}, "bad": {"schedule.kind": Times(2.0)}}), small, {"variant": "bad"})


def slow_when_good(config: Any, **options: Any) -> RunRecord:
    """A loss that falls where the time rises, in log learning rate; off that line both are worse."""
    record = train(config, **options)
    lr = math.log10(config.optimizer.matrix_lr)  # -3 … -1
    worse = 1 + config.optimizer.weight_decay
    record = replace(record, val_bpb=worse * (1 - 0.2 * (lr + 3)), train_seconds=worse * (1 + lr + 3))
    record.save(options["run_dir"])
    return record


def test_several_objectives_are_searched_at_once_and_the_front_is_written(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    sweep = make_sweep(
        space={LR: LogUniform(1e-3, 1e-1), DECAY: LogUniform(1e-3, 0.4)}, sampler="tpe", num_trials=16, parallel_trials=2,
        objectives=("val_bpb", "train_seconds"),
    )  # fmt: skip
    bench = Bench(tmp_path, [sweep], slow_when_good)
    index = IndexWriter(workspace, bench.works)
    index.on_begin([sweep])
    bench.pool._on_record = index.on_record
    bench.run(parallel=2)
    index.on_end()
    study = bench.study()
    assert [d.name for d in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert all(len(t.values) == 2 and t.state.name == "COMPLETE" for t in study.trials)
    front = fronts(read_index(workspace.sweep_dir("toy")))[CELL.label]
    best = {t.number for t in study.best_trials}
    assert {p["candidate"] for p in front if p["on_front"]} == best and 1 < len(best) < 16
    (for_report,) = read_fronts(workspace)
    assert (for_report["sweep"], for_report["cells"]) == ("toy", {CELL.label: front})
    page = (workspace.sweep_dir("toy") / "front.html").read_text()
    assert "train_seconds" in page and "plotly" in page.lower()

    (tmp_path / "optuna.db").rename(tmp_path / "old.db")
    assert sync(workspace, mlflow_uri="").num_studies == 1
    again = optuna.load_study(study_name=bench.works[0].study.name, storage=workspace.optuna_uri)
    assert [t.values for t in again.trials] == [t.values for t in study.trials]


def lucky_once(config: Any, **options: Any) -> RunRecord:
    """The highest learning rate has the best single run, and the worst mean."""
    record = train(config, **options)
    loss = {0.01: 1.5, 0.04: 1.0 if config.seed == 1 else 3.0}[config.optimizer.matrix_lr]
    record = replace(record, val_bpb=loss)
    record.save(options["run_dir"])
    return record


def test_the_best_candidate_is_so_by_the_mean_over_its_seeds(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    sweep = make_sweep(space={LR: Grid([0.01, 0.04])}, seeds=(0, 1, 2))
    bench = Bench(tmp_path, [sweep], lucky_once)
    listener = Listeners([IndexWriter(workspace, bench.works), StatusWriter(workspace, bench.works)])
    listener.on_begin([sweep])
    bench.pool._on_record = listener.on_record
    bench.run(parallel=2)
    listener.on_end()
    best = best_candidates(read_index(workspace.sweep_dir("toy")))[CELL.label]
    assert (best["values"], best["val_bpb"], len(best["run_ids"])) == ({LR: 0.01}, 1.5, 3)
    shown = read_statuses(workspace, "toy")[0]["best"]
    assert (shown["values"], shown["value"], shown["run_id"]) == ({LR: 0.01}, 1.5, best["run_ids"][0])


def test_a_range_whose_best_lies_at_its_edge_is_widened_and_searched_on(tmp_path: Path) -> None:
    sweep = make_sweep(
        space={LR: LogUniform(0.05, 0.4)}, sampler="tpe", num_trials=12, parallel_trials=2, extend_edges=True, name="edge"
    )  # fmt: skip
    whole = Bench(tmp_path / "whole", [sweep])
    whole.run(parallel=2)
    tried = [t.values[LR] for t in whole.trained]
    assert len(tried) == 12 + 2 * 4 and min(tried[:12]) >= 0.05
    assert 0.05 / 8 ** (1 / 3 + 4 / 9) <= min(tried) < 0.05, "a third of the width further down, twice, towards the best at 0.01"
    for stop in (13, 17, 10**9):
        Bench(tmp_path / "cut", [sweep]).run(parallel=2, stop_after=stop)
    assert run_ids(tmp_path / "cut") == run_ids(tmp_path / "whole")
    inside = Bench(tmp_path / "in", [replace(sweep, space={LR: LogUniform(1e-3, 1e-1)})])
    inside.run()
    assert len(inside.trained) == 12


def test_a_grid_of_two_knobs_grows_along_the_one_whose_best_is_at_its_edge(tmp_path: Path) -> None:
    space = {LR: Grid([0.02, 0.04, 0.08]), DECAY: Grid([0.0125, 0.025, 0.05])}
    bench = Bench(tmp_path, [make_sweep(space=space, extend_edges=True)])
    bench.run()
    tried = {(t.values[LR], t.values[DECAY]) for t in bench.trained}
    assert sorted({lr for lr, _ in tried}) == pytest.approx([BEST_LR / 2, BEST_LR, 0.02, 0.04, 0.08]), "two points down"
    assert min(d for _, d in tried) < 0.0125, "less decay is always better here"
    lrs, decays = {lr for lr, _ in tried}, {d for _, d in tried}
    assert len(tried) == len(lrs) * len(decays), "the grown grid is run whole"


def test_a_candidate_that_keeps_failing_is_given_up_and_told_pruned(tmp_path: Path) -> None:
    sweep = make_sweep(space={DECAY: Grid([0.1, 0.9])}, seeds=(0, 1, 2, 3), prune_failures=2)
    bench = Bench(tmp_path, [sweep])
    bench.run()
    bad = {t.seed for t in bench.trained if t.values[DECAY] == 0.9}
    assert bad == {0, 1}, "two seeds failed once each; they are not tried again and the other two never run"
    assert [t.state.name for t in bench.study().trials] == ["COMPLETE", "PRUNED"]
    assert len(bench.trained) == 4 + 2
    everything = Bench(tmp_path / "all", [replace(sweep, prune_failures=0)])
    everything.run()
    assert [t.state.name for t in everything.study().trials] == ["COMPLETE", "FAIL"]


SIZES = tuple(GPTConfig(depth=d, model_dim=w, num_heads=2, num_kv_heads=2, sequence_len=32, vocab_size=64, window_pattern="L")
              for d, w in ((1, 24), (1, 32), (1, 48), (2, 32), (2, 48), (2, 64), (3, 64), (3, 96), (4, 96), (4, 128)))  # fmt: skip
ALPHA, BETA = 0.5, 0.45


def surface_training(config: Any, **options: Any) -> RunRecord:
    record = train(config, **options)
    n, d = count_params(config.model).scaling, config.num_tokens
    loss = 1.5 + 12 * n**-ALPHA + 30 * d**-BETA + 1e-4 * (toy_loss(config) - 1)
    record = replace(record, num_tokens=d, train_flops=float(record.flops_per_token * d), val_bpb=loss)
    record.save(options["run_dir"])
    return record


def test_an_adaptive_sweep_chooses_cells_writes_them_down_and_resumes(tmp_path: Path) -> None:
    first = tuple(Cell(model=m, horizon=Horizon(train_flops=c)) for c in (1e9, 3e9) for m in SIZES[:5])
    plan = Adaptive(models=SIZES, target_flops=1e12, total_flops=1e11, quantity="ratio")
    sweep = make_sweep(cells=first, overrides={"batch_tokens": 32, DECAY: 0.1}, adaptive=plan)
    calls: list[int] = []

    def run(grown: Sweep, workspace: Workspace, stop_after: int = 10**9) -> list[RunRecord]:
        bench = Bench(workspace.root, [grown], surface_training)
        bench.run(stop_after=stop_after)
        calls.append(len(bench.trained))
        return [r for w in bench.works for seeds in w.records.values() for r in seeds.values()]

    said: list[str] = []
    records = execute_adaptive(sweep, Workspace(tmp_path), say=said.append, run=run)
    spent = sum(r.train_flops for r in records)
    *chosen_rounds, end = said
    assert 0.95e11 < spent <= 1e11 and len(calls) == len(chosen_rounds) + 1 > 3
    assert all(text.startswith("round ") for text in chosen_rounds) and "FLOPs are left, too few" in end
    path = tmp_path / "sweeps" / "toy" / CHOICES_FILE
    rounds = json.loads(path.read_text())["rounds"]
    assert all(r["sd_after"] < r["sd_before"] for r in rounds if r["surface"])
    assert rounds[-1]["surface"]["alpha"] == pytest.approx(ALPHA, abs=0.1)
    chosen = {c["cell"] for r in rounds for c in r["cells"]}
    assert len(chosen) == sum(len(r["cells"]) for r in rounds) and not chosen & {c.label for c in first}
    again = {c["seed"] for r in rounds for c in r["cells"] if c["cell"].endswith(f"-s{c.get('seed')}")}
    assert again and {r.seed for r in records} == {0} | again, "a cell that is chosen once more is run by another seed"

    with pytest.raises(ConfigError, match="no run of round 1 completed"):
        execute_adaptive(sweep, Workspace(tmp_path / "failing"), run=lambda *args, **options: records[: len(first)])

    calls.clear()
    assert {r.run_id for r in execute_adaptive(sweep, Workspace(tmp_path), run=run)} == {r.run_id for r in records}
    assert calls == [0], "nothing is chosen or trained again"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ConfigError, match="remove it"):
        execute_adaptive(sweep, Workspace(tmp_path), run=run)
