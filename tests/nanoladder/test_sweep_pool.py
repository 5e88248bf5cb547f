"""Studies and pool without Ray: what is tried next, skipped, shared and tried again; and that timing changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from sweep_bench import Bench
from toy_sweep import CELL, KNOBS, make_sweep, run_ids
from toy_training import BEST_LR, HORIZON, MODEL, toy_loss, train

from nanochat_model.errors import ConfigError
from nanoladder.pool import load_record
from nanoladder.space import Choice, Grid, LogUniform, Uniform
from nanoladder.study import open_storage
from nanoladder.sweep import Cell

LR = {"optimizer.matrix_lr": LogUniform(1e-3, 1e-1)}
TWO = {**LR, "optimizer.weight_decay": LogUniform(1e-3, 1e-1)}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")


SAMPLERS = [
    {"space": {"optimizer.matrix_lr": Grid([0.005, 0.01, 0.02]), "optimizer.weight_decay": Grid([0.01, 0.1])}},
    {"space": TWO, "sampler": "tpe", "num_trials": 12},
    {"space": TWO, "sampler": "gp", "num_trials": 12},
    {"space": TWO, "sampler": "cmaes", "num_trials": 9},
    {"space": TWO, "sampler": "qmc", "num_trials": 7},
    {"space": {**TWO, "schedule.kind": Choice(["nanochat", "constant_then_decay"])}, "sampler": "random", "num_trials": 7},
]


@pytest.mark.parametrize("fields", SAMPLERS, ids=lambda f: f.get("sampler", "grid"))
def test_neither_timing_nor_interruption_changes_the_runs(tmp_path: Path, fields: dict[str, Any]) -> None:
    sweep = make_sweep(parallel_trials=3, **fields)
    whole = Bench(tmp_path / "whole", [sweep])
    whole.run(parallel=3)
    other = tmp_path / "other"
    for stop in (2, 5, 10**9):  # killed twice, with other trials first
        Bench(other, [sweep]).run(parallel=3, pick=lambda n: n - 1, stop_after=stop)
    assert run_ids(other) == run_ids(tmp_path / "whole")
    last = Bench(other, [sweep])
    last.run()
    assert not last.trained, "all is recorded, nothing is trained again"
    for bench in (whole, last):
        trials = bench.study().trials
        assert len(trials) == bench.works[0].study.total
        assert {t.state for t in trials} == {optuna.trial.TrialState.COMPLETE}
    assert [t.params for t in whole.study().trials] == [t.params for t in last.study().trials]
    assert [t.value for t in whole.study().trials] == [t.value for t in last.study().trials]


def test_tpe_finds_the_valley_and_optunas_own_tools_read_the_study(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_sweep(space=LR, sampler="tpe", num_trials=25, parallel_trials=1)])
    bench.run()
    study = bench.study()
    assert abs(math.log2(study.best_params["optimizer.matrix_lr"] / BEST_LR)) < 0.7
    assert len(study.trials_dataframe()) == 25
    trial = study.best_trial
    assert trial.intermediate_values[10] == pytest.approx(trial.value)
    assert load_record(tmp_path / "runs" / trial.user_attrs["runs"]["0"]).val_bpb == trial.value  # type: ignore[union-attr]


def test_seeds_are_paired_and_the_mean_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_sweep(space={"optimizer.matrix_lr": Grid([0.005, 0.01])}, seeds=(0, 1, 2))])
    bench.run()
    assert len(bench.trained) == 6
    for trial in bench.study().trials:
        configs = [load_record(tmp_path / "runs" / r).config for r in trial.user_attrs["runs"].values()]  # type: ignore[union-attr]
        assert trial.value == pytest.approx(sum(toy_loss(c) for c in configs) / 3) and [c.seed for c in configs] == [0, 1, 2]


def test_runs_that_sweeps_share_are_trained_once_and_say_so(tmp_path: Path) -> None:
    first = make_sweep(name="first", purpose="allocation")
    second = make_sweep(name="second", purpose="learning_rate", space={"optimizer.matrix_lr": Grid([0.01, 0.02])})
    bench = Bench(tmp_path, [first, second])
    bench.run(parallel=3)
    assert len(bench.trained) == 2 and len(run_ids(tmp_path)) == 2
    shared = load_record(tmp_path / "runs" / bench.works[0].records[0][0].run_id)
    assert shared is not None and shared.sweep == "first"
    assert (shared.tags["purpose"], shared.tags["sweeps"]) == ("allocation,learning_rate", "first,second")
    assert all(t.state.name == "COMPLETE" for i in range(2) for t in bench.study(i).trials)
    assert len(bench.new) == 2, "a shared run is new once"
    third = Bench(tmp_path, [make_sweep(name="third", purpose="noise")])
    third.run()
    assert not third.trained
    record = load_record(tmp_path / "runs" / shared.run_id)
    assert record is not None and record.tags["purpose"] == "allocation,learning_rate,noise"


def test_a_failed_run_is_recorded_tried_once_more_and_told_failed(tmp_path: Path) -> None:
    sweep = make_sweep(space={"optimizer.weight_decay": Grid([0.1, 0.9])})
    first = Bench(tmp_path, [sweep])
    first.run(parallel=2)
    bad = next(t for t in first.trained if t.values["optimizer.weight_decay"] == 0.9)
    assert sum(t.run_id == bad.run_id for t in first.trained) == 2
    record = load_record(tmp_path / "runs" / bad.run_id)
    assert record is not None and (record.status, record.attempts) == ("failed", 2)
    assert [t.state.name for t in first.study().trials] == ["COMPLETE", "FAIL"]

    again = Bench(tmp_path, [sweep])
    again.run()
    assert [t.run_id for t in again.trained] == [bad.run_id], "the next command tries it once, and nothing else"
    record = load_record(tmp_path / "runs" / bad.run_id)
    assert record is not None and record.attempts == 3

    (tmp_path / "runs" / bad.run_id / "mended").touch()
    mended = Bench(tmp_path, [sweep])
    mended.run()
    assert len(mended.trained) == 1
    states = [t.state.name for t in mended.study().trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE"] and mended.study().trials[2].user_attrs["retry_of"] == 1
    quiet = Bench(tmp_path, [sweep])
    quiet.run()
    assert not quiet.trained and len(quiet.study().trials) == 3


def test_values_that_are_not_finite_are_told_failed_and_stopped_runs_pruned(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_sweep(space={"optimizer.matrix_lr": Grid([0.01, 0.02, 0.04])})])
    study = bench.works[0].study
    for _ in range(3):
        assert study.next_candidate() is not None
    curve = train(bench_config(bench), run_dir=tmp_path / "x").curve
    study.finish(0, "complete", (float("nan"),))
    study.finish(1, "pruned", None, curve)
    study.finish(2, "complete", (1.0,), curve)
    assert [t.state.name for t in bench.study().trials] == ["FAIL", "PRUNED", "COMPLETE"]
    assert bench.study().trials[1].value == pytest.approx(curve[-1].val_bpb)
    assert bench.study().best_value == 1.0


def bench_config(bench: Bench) -> Any:
    trial = Bench(bench.root / "scratch", [make_sweep()]).pool.next()
    assert trial is not None
    return trial.config


def test_a_trial_cut_off_while_it_was_created_is_completed(tmp_path: Path) -> None:
    sweep = make_sweep(space=TWO, sampler="tpe", num_trials=3)
    whole = Bench(tmp_path / "whole", [sweep])
    whole.run()
    bench = Bench(tmp_path / "cut", [sweep])
    study = bench.study()
    study.ask()  # exists, without any value
    after = Bench(tmp_path / "cut", [sweep])
    after.run()
    assert run_ids(tmp_path / "cut") == run_ids(tmp_path / "whole")
    assert {t.state.name for t in after.study().trials} == {"COMPLETE"}


def test_a_grid_with_its_best_at_the_edge_grows_twice_at_most_and_decides_the_same_after_a_kill(tmp_path: Path) -> None:
    sweep = make_sweep(space={"optimizer.matrix_lr": Grid([0.08, 0.16, 0.32])}, extend_edges=True)
    whole = Bench(tmp_path / "whole", [sweep])
    whole.run()
    tried = sorted(t.values["optimizer.matrix_lr"] for t in whole.trained)
    assert tried == pytest.approx([0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32]), "two points down, twice"
    for stop in (4, 6, 10**9):
        Bench(tmp_path / "cut", [sweep]).run(parallel=2, stop_after=stop)
    assert run_ids(tmp_path / "cut") == run_ids(tmp_path / "whole")
    far = Bench(tmp_path / "far", [make_sweep(space={"optimizer.matrix_lr": Grid([8.0, 16.0])}, extend_edges=True)])
    far.run()
    assert len(far.trained) == 6, "an optimum that is never reached ends after two extensions"


def test_more_trials_extend_a_finished_sweep(tmp_path: Path) -> None:
    for sampler in ("tpe", "qmc"):
        root = tmp_path / sampler
        small = make_sweep(space=LR, sampler=sampler, num_trials=4)
        Bench(root, [small]).run()
        more = Bench(root, [replace(small, num_trials=7)])
        more.run()
        assert len(more.trained) == 3 and len(more.study().trials) == 7


def test_longest_cells_come_first_and_a_learning_cell_waits_for_results(tmp_path: Path) -> None:
    long = Cell(model=MODEL, horizon=HORIZON, name="long", overrides={**KNOBS, "batch_tokens": 640})
    bench = Bench(tmp_path, [make_sweep(cells=(CELL, long), space=LR, sampler="tpe", num_trials=4, parallel_trials=2)])
    started = [bench.pool.next() for _ in range(5)]
    assert [t.cell if t else None for t in started] == ["long", "long", CELL.label, CELL.label, None]
    assert not bench.pool.done


def test_a_changed_question_gets_a_study_of_its_own(tmp_path: Path) -> None:
    base = make_sweep(space=LR, sampler="tpe", num_trials=2)
    names = {
        Bench(tmp_path, [s]).works[0].study.name
        for s in (base, replace(base, seeds=(0, 1)), replace(base, space={"optimizer.matrix_lr": Uniform(0.1, 0.2)}),
                  replace(base, overrides={"eval.num_tokens": 64}), replace(base, num_trials=9))
    }  # fmt: skip
    assert len(names) == 4, "only the number of trials keeps the study"


def test_a_broken_record_is_named_and_kept(tmp_path: Path) -> None:
    sweep = make_sweep()
    Bench(tmp_path, [sweep]).run()
    (path,) = (tmp_path / "runs").glob("*/record.json")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match=str(path)):
        Bench(tmp_path, [sweep]).run()
    assert path.read_text() == text[: len(text) // 2]


def test_cmaes_needs_two_ranges(tmp_path: Path) -> None:
    """Of a grid Optuna's CMA-ES would draw at random, without a word."""
    grid = {**LR, "optimizer.weight_decay": Grid([0.01, 0.1])}
    for space, words in ((LR, "this space has 1"), (grid, "optimizer.weight_decay is a Grid")):
        with pytest.raises(ConfigError, match=f"cmaes needs two or more ranges.*{words}"):
            Bench(tmp_path, [make_sweep(space=space, sampler="cmaes", num_trials=4)])


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "optuna.db"
    path.write_text("this is no database, but somebody's notes " * 100)
    with pytest.raises(ConfigError, match=r"optuna\.db cannot be read"):
        open_storage(f"sqlite:///{path}")
    assert path.read_text().startswith("this is no database")
