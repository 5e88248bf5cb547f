"""What a sweep may be, the runs it stands for, strict settings, and what a dry run says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import nanoladder
from nanochat_model.config import DataConfig, GPTConfig, RuntimeConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.identity import run_id
from nanochat_model.recipe import NANOCHAT
from nanoladder.cells import candidate_values, check_sweep, depth_cells, isoflop_cells, planned_trials, resolve_config
from nanoladder.dry_run import plan_sweep
from nanoladder.failed_record import failed_record
from nanoladder.ladder import Ladder, Stage
from nanoladder.listen import Listener
from nanoladder.settings import apply_settings
from nanoladder.space import Choice, Grid, LogUniform, Times, Uniform, When, enumerate_space
from nanoladder.sweep import Cell, Sweep
from nanoladder.sweep_command import load_sweep, run_sweep
from nanoladder.trial_spec import TrialSpec
from nanoladder.workspace import Workspace

D12 = GPTConfig.from_depth(12)
CELL = Cell(model=D12)


def sweep(**fields: object) -> Sweep:
    return replace(Sweep(name="s", question="?", cells=(CELL,)), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grid([]), "no values"),
        (lambda: Grid([1, 1]), "twice"),
        (lambda: Grid([float("nan")]), "finite"),
        (lambda: LogUniform(0, 1), "positive"),
        (lambda: Uniform(2, 1), "low below high"),
        (lambda: Choice([object()]), "number"),  # type: ignore[list-item]
        (lambda: sweep(name="a b"), "letters"),
        (lambda: sweep(cells=()), "no cells"),
        (lambda: sweep(cells=(CELL, CELL)), "two cells"),
        (lambda: sweep(space={"lr_multiplier": Uniform(1, 2)}), "num_trials"),
        (lambda: sweep(space={"lr_multiplier": Uniform(1, 2)}, num_trials=3, sampler="grid"), "Grid or Choice"),
        (lambda: sweep(space={"lr_multiplier": Grid([1])}, variants={"baseline": {}}), "both"),
        (lambda: sweep(seeds=(1, 1)), "different"),
        (lambda: apply_settings(sweep(), {"seed": "1"}), "set seeds="),
        (lambda: sweep(devices_per_trial=2, backend="actor"), "one device"),
        (lambda: sweep(devices_per_trial=2, trials_per_device=2), "exclude"),
        (lambda: sweep(space={"lr_multiplier": Grid([1, 2]), "schedule.kind": Choice(["nanochat"])}, extend_edges=True), "Grids"),
        (lambda: sweep(space={"lr_multiplier": Uniform(1, 2)}, num_trials=4, sampler="qmc", extend_edges=True), "tpe or gp"),
        (lambda: sweep(space={"lr_multiplier": When("schedule.kind", "nanochat", Uniform(1, 2))}, num_trials=4), "before it"),
        (lambda: sweep(space={"a": Choice(["x"]), "lr_multiplier": When("a", "y", Grid([1, 2]))}), "never is"),
        (lambda: Times(-1.0), "positive"),
        (lambda: sweep(objectives=("core", "train_seconds")), "val_bpb first"),
        (lambda: sweep(objectives=("val_bpb", "train_seconds"), pruning="constant"), "one objective"),
        (lambda: sweep(prune_failures=-1), "prune_failures"),
        (lambda: sweep(cells=CELL), r"cells of sweep .* is a single Cell; write cells=\(Cell\(…\),\)"),
        (lambda: sweep(seeds=3), "seeds of sweep .* is a single int"),
        (lambda: sweep(metric="loss"), "metric 'loss' of sweep .* must be one of 'val_bpb', 'core'"),
        (lambda: sweep(objectives=("val_bpb", "loss")), "metric 'loss'"),
        (lambda: sweep(purpose="lr"), "purpose 'lr' .*'learning_rate'"),
        (lambda: sweep(packing="best"), "packing 'best' .*'best_fit'"),
        (lambda: sweep(backend="ray"), "backend 'ray' .*'actor', 'train'"),
        (lambda: sweep(space={"lr_multiplier": [0.5, 1]}), "lr_multiplier is of type list, no dimension; write Grid"),
        (lambda: Ladder(name="l", question="?", stages=(Stage(name="a", cells=(CELL,)),)), "variants"),
        (lambda: isoflop_cells([1e18], [D12], centre=lambda c: 1e8), "fewer than two"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as e:
        make()  # type: ignore[operator]
    assert "\n" not in str(e.value)


def test_every_cell_gets_batch_rates_and_decay_from_its_own_horizon() -> None:
    s = sweep(cells=depth_cells([12, 20], tokens_per_param=12))
    for cell in s.cells:
        assert resolve_config(s, cell) == NANOCHAT.resolve(cell.model, cell.horizon)
    small, large = (resolve_config(s, c) for c in s.cells)
    assert small.optimizer.weight_decay != large.optimizer.weight_decay and small.batch_tokens != large.batch_tokens


def test_overrides_stack_and_model_keys_act_before_the_rules() -> None:
    cell = Cell(model=D12, overrides={"lr_multiplier": 2.0})
    s = sweep(cells=(cell,), overrides={"lr_multiplier": 4.0, "model.vocab_size": 1024, "eval.every_steps": 7})
    config = resolve_config(s, cell, {"weight_decay_multiplier": 0.5})
    plain = NANOCHAT.resolve(replace(D12, vocab_size=1024))
    assert config.model.vocab_size == 1024 and config.eval.every_steps == 7
    assert config.num_steps == plain.num_steps, "N and D must follow the overridden model"
    assert config.optimizer.matrix_lr == pytest.approx(2 * plain.optimizer.matrix_lr)
    assert config.optimizer.weight_decay == pytest.approx(0.5 * NANOCHAT.resolve(
        replace(D12, vocab_size=1024), overrides={"lr_multiplier": 2.0}).optimizer.weight_decay)  # fmt: skip


def test_batch_multiplier_multiplies_the_cells_own_batch() -> None:
    s = sweep(cells=depth_cells([12, 20]), space={"batch_multiplier": Grid([0.5, 1, 3])})
    for cell in s.cells:
        own = resolve_config(s, cell).batch_tokens
        assert [resolve_config(s, cell, v).batch_tokens / own for v in candidate_values(s, cell)] == [0.5, 1, 3]


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.matrix_lr"):
        check_sweep(sweep(space={"optimizer.matrix_l": Grid([1, 2])}))
    with pytest.raises(ConfigError, match="num_trials"):
        apply_settings(sweep(), {"num_trial": "3"})
    with pytest.raises(ConfigError, match=r"runtime\.compile"):
        apply_settings(sweep(), {"runtime.compil": "off"})
    with pytest.raises(ConfigError, match=r"--set runtime\.core_bundle"):  # every run would end without its metric
        check_sweep(sweep(metric="core"))
    check_sweep(apply_settings(sweep(metric="core"), {"runtime.core_bundle": "eval_bundle.zip"}))
    with pytest.raises(ConfigError, match="dimension"):
        apply_settings(sweep(space={"lr_multiplier": Grid([1, 2])}), {"lr_multiplier": "3"})


def test_settings_reach_fields_runtime_and_runs() -> None:
    s = apply_settings(sweep(), {"seeds": "3,4", "runtime.compile": "off", "eval.every_steps": "9", "trials_per_device": "2"})
    assert (s.seeds, s.runtime.compile, s.overrides, s.trials_per_device) == ((3, 4), "off", {"eval.every_steps": "9"}, 2)
    assert resolve_config(s, CELL).eval.every_steps == 9
    ladder = Ladder(name="l", question="?", variants={"x": {}}, stages=(Stage(name="a", cells=(CELL,)),))
    assert apply_settings(ladder, {"alpha": "0.1", "seeds": "0"}).alpha == 0.1
    for bad in ({"seeds": "a"}, {"num_trials": "x"}, {"sampler": "magic"}):
        with pytest.raises(ConfigError):
            apply_settings(sweep(space={"lr_multiplier": Grid([1])}), bad)


def test_planned_trials_are_candidates_times_seeds_and_know_their_run_id() -> None:
    data = DataConfig(manifest_hash="m")
    s = sweep(space={"lr_multiplier": Grid([0.5, 1, 2])}, seeds=(0, 1), purpose="learning_rate")
    trials = planned_trials(s, data)
    assert len(trials) == 6 and len({t.run_id for t in trials}) == 6
    assert all(t.run_id == run_id(t.config) and t.config.data.manifest_hash == "m" for t in trials)
    assert trials[0].tags == {"cell": "d12-compute-optimal", "purpose": "learning_rate"}
    adaptive = sweep(space={"lr_multiplier": LogUniform(0.1, 1)}, num_trials=5)
    assert len(planned_trials(adaptive)) == 5


def test_isoflop_cells_centre_on_the_expected_best_size_and_carry_their_budget() -> None:
    models = [GPTConfig.from_depth(d) for d in range(4, 36, 2)]
    cells = isoflop_cells([1e18, 1e20], models, centre=lambda c: 3e8 * (c / 1e19) ** 0.5, sizes=5)
    assert [len([c for c in cells if c.horizon == Horizon(train_flops=b)]) for b in (1e18, 1e20)] == [5, 5]
    for budget, centre in ((1e18, 3e8 / 10**0.5), (1e20, 3e8 * 10**0.5)):
        sizes = [count_params(c.model).scaling for c in cells if c.horizon == Horizon(train_flops=budget)]
        assert min(sizes) < centre < max(sizes)
    trial = planned_trials(sweep(cells=cells))[0]
    assert trial.tags["budget"] == "1e+18"
    assert trial.config.num_tokens * flops_per_token(trial.config.model) == pytest.approx(1e18, rel=0.05)


def test_enumeration_moves_the_last_key_fastest() -> None:
    points = enumerate_space({"a": Grid([1, 2]), "b": Choice(["x", "y"])})
    assert points == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    assert enumerate_space({}) == [{}]


def test_a_dry_run_states_sizes_flops_memory_and_hours() -> None:
    s = sweep(space={"weight_decay_multiplier": Grid([0.5, 1])}, seeds=(0, 1), device="h100")
    config = resolve_config(s, CELL)
    plan = plan_sweep(s, device="h100", recorded=frozenset({planned_trials(s)[0].run_id}))
    first = plan.trials[0]
    assert (first.N, first.D, first.B, first.num_steps) == (
        count_params(D12).scaling, config.num_tokens, config.batch_tokens, config.num_steps,
    )  # fmt: skip
    assert first.train_flops == config.num_tokens * flops_per_token(D12)
    assert plan.train_flops == pytest.approx(4 * first.train_flops) and plan.num_trials == 4 and plan.num_recorded == 1
    assert first.hours == pytest.approx(first.train_flops / (0.41 * 989e12) / 3600, rel=0.01), "41% of an H100 at d12"
    assert 1e9 < first.memory_bytes < 80e9 and plan.notes == []
    tiny = sweep(
        cells=(Cell(model=GPTConfig.from_depth(2, sequence_len=256, vocab_size=1024), horizon=Horizon(num_tokens=300_000)),)
    )
    (note,) = plan_sweep(tiny, device="cpu").notes
    assert "of the weights in every step" in note and "optimizer.weight_decay" in note
    with pytest.raises(ConfigError, match=r"trials_per_device|row"):
        plan_sweep(replace(s, trials_per_device=40), device="h100")


FILE = '''"""A question."""
from nanoladder import Cell, GPTConfig, Grid, Horizon, Sweep, run_sweep

SWEEP = Sweep(
    name="toy",
    question="Which decay?",
    cells=(Cell(model=GPTConfig.from_depth(4, vocab_size=1024, sequence_len=256), horizon=Horizon(tokens_per_param=12)),),
    space={"weight_decay_multiplier": Grid([0.5, 1, 2])},
)

if __name__ == "__main__":
    run_sweep(SWEEP)
'''


def test_a_sweep_file_is_loaded_without_effect_and_its_dry_run_prints_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "toy.py"
    path.write_text(FILE)
    loaded = load_sweep(path)
    assert capsys.readouterr().out == ""
    assert run_sweep(loaded, ["--dry-run", "--json", "--storage", str(tmp_path / "none")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_trials"] == 3 and len(plan["trials"]) == 3 and not (tmp_path / "none").exists()
    assert run_sweep(loaded, ["--dry-run", "--storage", str(tmp_path / "none")]) == 0
    assert "Which decay?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--set", "nonsense"], "key=value"),
        (["--set", "optimizer.matrix_l=1"], "optimizer.matrix_lr"),
        (["--set", "batch_tokens=1000", "--dry-run"], "not a multiple"),
        (["--dry-run", "--device", "mi9000"], "not in the table"),
        (["--json"], "goes with --dry-run"),
        (["--set", "lr_multiplier=twice", "--dry-run"], "lr_multiplier 'twice' is not of type float"),
        (["--set", "batch_multiplier=2x", "--dry-run"], "batch_multiplier '2x' is not of type float"),
        (["--max-concurrent", "0"], "max_concurrent 0 must be at least 1"),
        (["--num-cpus", "-1"], "num_cpus -1 must be at least 1"),
        ([], "--vocab-size 1024"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    path = tmp_path / "toy.py"
    path.write_text(FILE)
    assert run_sweep(load_sweep(path), [*argv, "--storage", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_file_without_a_sweep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    for name, words in (("empty.py", "defines 0 sweeps"), ("broken.py", "cannot be imported"), ("none.py", "no sweep file")):
        with pytest.raises(ConfigError, match=words):
            load_sweep(tmp_path / name)


def test_the_sweeps_in_the_documentation_can_be_run() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf8")
    found = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names = {name: getattr(nanoladder, name) for name in nanoladder.__all__} | {"depth_cells": depth_cells, "__name__": "read"}
        exec(block, names)
        found.append(names["SWEEP"])
    for made in found:
        sweeps = [made.stage_sweep(s, made.variants) for s in made.stages] if isinstance(made, Ladder) else [made]
        for each in sweeps:
            check_sweep(each)
            assert not plan_sweep(each, device=each.device or "cpu").notes
    assert [type(made) for made in found] == [Sweep, Sweep, Ladder]


def test_a_ladder_whose_runs_failed_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = Ladder(name="l", question="?", variants={"x": {}}, stages=(Stage(name="a", cells=(CELL,)),))
    trial = planned_trials(ladder.stage_sweep(ladder.stages[0], ladder.variants))[0]
    spec = TrialSpec(run_id=trial.run_id, config=trial.config, runtime=RuntimeConfig(), run_dir=str(tmp_path))
    for listed, status in (([], 0), ([trial, trial], 1)):

        def execute(ladder: Ladder, workspace: Workspace, *, listeners: list[Listener], listed: list = listed, **_: object) -> list:
            for trial in listed:
                listeners[0].on_record(trial, failed_record(spec, "broken", seconds=1.0), True)
            return []

        monkeypatch.setattr("nanoladder.sweep_command.execute_ladder", execute)
        assert run_sweep(ladder, ["--storage", str(tmp_path)]) == status
        assert f"{status} run{'' if status else 's'} failed; verdicts: " in capsys.readouterr().out
