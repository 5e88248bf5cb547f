"""A ladder's winners are moved and its finalists chosen, and pruning judges only the constant part: without Ray."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from sweep_bench import Bench
from toy_sweep import CELL, KNOBS
from toy_training import TRAIN

from analysis.errors import DataError
from analysis.law import Law
from analysis.laws import Laws
from nanochat_model.config import RuntimeConfig
from nanochat_model.recipe import PowerRule
from nanochat_model.record import CurvePoint
from nanoladder.cells import resolve_config
from nanoladder.ladder import Ladder, Stage, finalists, moved, screening, stage_recipe
from nanoladder.promote import Promotion, judge_screened, judge_stage, rank_correlations
from nanoladder.prune import Pruner, constant_from, constant_until, is_far_behind, loss_at
from nanoladder.space import Grid, Times
from nanoladder.sweep import Sweep
from nanoladder.trial_spec import TrialSpec
from nanoladder.workspace import Workspace

LADDER = Ladder(
    name="l", question="?", stages=(Stage(name="a", cells=(CELL,), finalists=1), Stage(name="b", cells=(CELL,))),
    variants={"half": {"optimizer.matrix_lr": 0.01}, "eight": {"optimizer.matrix_lr": 0.16}, "two": {"optimizer.matrix_lr": 0.04}},
)  # fmt: skip


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")


def test_a_winner_goes_on_as_a_multiple_of_the_next_stages_own_value() -> None:
    sweep = LADDER.stage_sweep(LADDER.stages[0], LADDER.variants)
    go_on = moved({"half": LADDER.variants["half"]}, sweep)
    assert go_on == {"half": {"optimizer.matrix_lr": Times(0.5)}}
    larger = replace(CELL, overrides={**KNOBS, "optimizer.matrix_lr": 0.006})
    next_stage = LADDER.stage_sweep(Stage(name="b", cells=(larger,)), go_on)
    assert resolve_config(next_stage, larger, {"variant": "half"}).optimizer.matrix_lr == pytest.approx(0.003)
    assert moved({"x": {"schedule.final_lr_fraction": 0.0}}, sweep) == {"x": {"schedule.final_lr_fraction": 0.0}}


def test_only_finalists_get_all_seeds_and_nothing_is_adopted_on_one(tmp_path: Path) -> None:
    sweep = LADDER.stage_sweep(LADDER.stages[0], LADDER.variants)

    def run(each: Sweep) -> dict:
        bench = Bench(tmp_path, [each])
        bench.run()
        (work,) = bench.works
        return {c.values["variant"]: {s: work.records[c.number][s] for s in each.seeds} for c in work.study.candidates}

    assert finalists(sweep, 1, run) == ["half"]
    final = replace(sweep, variants={k: v for k, v in sweep.variants.items() if k in ("baseline", "half")})
    runs = run(final)
    assert [p.verdict for p in judge_stage(final, runs, num_candidates=3)] == ["adopt"]
    uneven = {n: replace(r, val_bpb=(r.val_bpb or 0) * (0.99, 1.004, 0.985)[n]) for n, r in runs["baseline"].items()}
    (open_question,) = judge_stage(final, {**runs, "half": uneven})
    needed = open_question.runs_to_decide
    assert open_question.verdict == "undecided" and needed is not None and needed > 3
    assert f"{needed} paired seeds would decide" in open_question.reason and open_question.as_dict()["runs_to_decide"] == needed
    for last in (3, 1):  # of three pairs none has a curve, and then two have
        ends = {name: {n: replace(r, curve=r.curve[-1:]) if n < last else r for n, r in s.items()} for name, s in runs.items()}
        (at_the_end,) = judge_stage(final, ends)
        assert (at_the_end.axes == {}) == ('add overrides={"eval.every_steps": 1}' in at_the_end.summary) == (last == 3)
    rest = judge_screened(sweep, final, run(screening(sweep)), runs)
    assert {p.change for p in rest} == {"eight", "two"} and all(p.verdict != "adopt" and "first seed" in p.reason for p in rest)


def test_winners_that_hurt_later_are_named_and_stages_compared_by_rank(tmp_path: Path) -> None:
    variants = {name: {"optimizer.matrix_lr": lr} for name, lr in (("0.5", 0.01), ("0.6", 0.012), ("0.4", 0.008))}
    stages = (
        Stage(name="a", cells=(CELL,)),
        Stage(name="b", cells=(replace(CELL, overrides={**KNOBS, "optimizer.matrix_lr": 0.01}),)),
    )

    def judged(sweep: Sweep, before: list[Promotion]) -> list[Promotion]:
        bench = Bench(tmp_path, [sweep])
        bench.run()
        (work,) = bench.works
        return judge_stage(sweep, {c.values["variant"]: work.records[c.number] for c in work.study.candidates}, before=before)

    first = LADDER.stage_sweep(stages[0], variants)
    small = judged(first, [])
    large = judged(LADDER.stage_sweep(stages[1], moved(variants, first)), small)
    assert [p.verdict for p in small] == ["adopt"] * 3 and [p.verdict for p in large] == ["reject"] * 3
    assert all(p.reason.endswith("it won at a and hurts at b") for p in large) and "hurts" not in small[0].reason
    # gains by the distance of the rate from its best in log: 0.5 > 0.6 > 0.4, then 0.6 > 0.5 > 0.4
    (found,) = rank_correlations([*small, *large])
    assert found["stages"] == ["a", "b"] and found["n"] == 3 and found["spearman"] == pytest.approx(0.5)
    assert rank_correlations(small) == [] and rank_correlations([*small[:2], *large[:2]]) == []


def test_a_stage_takes_the_laws_of_its_beginning_and_keeps_them(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    facts = {"coefficient": 4096.0, "references": {"D": 1e6}, "status": "converged", "n": 9, "method": "x"}
    law = Law(name="batch_size", target="B", form="", exponents={"D": 0.5}, **facts)
    laws = Laws(source_hash="t", n_runs=9, batch_size=law)
    laws.save(workspace.laws_path)
    recipe = stage_recipe(LADDER, LADDER.stages[0], workspace)
    assert recipe.batch_size.exponents == {"D": 0.5} and recipe.batch_size.status == "fitted"
    replace(laws, batch_size=replace(law, exponents={"D": 0.1})).save(workspace.laws_path)
    assert asdict(stage_recipe(LADDER, LADDER.stages[0], workspace)) == asdict(recipe), "kept where it began"
    assert stage_recipe(LADDER, LADDER.stages[1], workspace).batch_size.exponents == {"D": 0.1}, "the next takes what is current"
    assert isinstance(recipe.batch_size, PowerRule)
    assert stage_recipe(replace(LADDER, laws="none"), LADDER.stages[0], workspace) is LADDER.recipe
    workspace.laws_path.write_text('{"batch_size"')
    with pytest.raises(DataError, match="cut short"):
        stage_recipe(LADDER, replace(LADDER.stages[0], name="next"), workspace)


def test_pruning_stops_only_what_trails_far_behind_before_the_decay(tmp_path: Path) -> None:
    space = {"optimizer.matrix_lr": Grid([0.008, 0.009, 0.01, 0.011, 0.012, 0.013])}
    sweep = replace(
        Sweep(name="toy", question="?", cells=(CELL,)), space=space, pruning="constant", overrides={"schedule.warmup_steps": 2}
    )
    bench = Bench(tmp_path, [sweep])
    pruner = Pruner(Workspace(tmp_path), [sweep])
    bench.pool._on_record = pruner.on_record
    bench.run(stop_after=5)
    (trial,) = bench.pool.in_flight.values()
    trial = trial.trial
    step = constant_until(trial.config)
    known = loss_at(next(iter(pruner._curves.values()))[0], step / trial.config.num_steps)
    assert known is not None
    pruner.on_event(trial, {"event": "eval", "step": step + 1, "val_bpb": 9 * known})
    pruner.on_event(trial, {"event": "eval", "step": 1, "val_bpb": 99 * known})
    pruner.on_event(trial, {"event": "eval", "step": step, "val_bpb": 1.01 * known})
    assert not pruner.stopped, "in the decay, in the warm-up, or near the others: goes on"
    pruner.on_event(trial, {"event": "eval", "step": step, "val_bpb": 1.2 * known})
    assert pruner.stopped == {trial.run_id} and (tmp_path / "runs" / trial.run_id / "stop").read_text().startswith("pruned")
    run_dir = str(tmp_path / "runs" / trial.run_id)
    record = TrialSpec(
        run_id=trial.run_id, config=trial.config, runtime=RuntimeConfig(), run_dir=run_dir, train_function=TRAIN
    ).run()
    assert record.status == "stopped" and (record.error or "").startswith("pruned at step")
    bench.pool.finish(trial.run_id, record)
    assert [t.state.name for t in bench.study().trials] == ["COMPLETE"] * 5 + ["PRUNED"], "never complete"
    assert not is_far_behind(9.0, [1.0] * 4) and is_far_behind(math.nan, [1.0] * 5)
    assert is_far_behind(1.021, [1.0] * 5) and not is_far_behind(1.019, [1.0] * 5)
    assert constant_from(replace(trial.config, num_steps=100)) == 10
    points = [CurvePoint(step=s, num_tokens=s, train_flops=s, seconds=s, val_bpb=v) for s, v in ((1, 4.0), (3, 1.0))]
    assert loss_at(points, 2 / 3) == pytest.approx(2.0) and loss_at(points, 0.1) is None
