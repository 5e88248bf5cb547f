"""A simulated fleet against schedules worked out by hand, the books, the theory of checkpoints, and the real pool's decisions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweep_bench import Bench
from toy_sweep import KNOBS
from toy_training import MODEL

from nanochat_model.horizon import Horizon
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.cli import run
from nanoladder.ladder import Ladder, Stage
from nanoladder.simulation.engine import Kill
from nanoladder.simulation.figure import devices_by_kind
from nanoladder.simulation.fleet import Fleet, Job, Overheads, Workers
from nanoladder.simulation.jobs import JobMaker, speed_spread, workers_of
from nanoladder.simulation.phases import Assumed, assumed_record, phases
from nanoladder.simulation.runs import Setting, Simulated, simulate_once
from nanoladder.space import Grid, LogUniform
from nanoladder.sweep import Adaptive, Cell, Sweep

ROOT = Path(__file__).parents[2]
NOTHING = Overheads(driver=0, process=0, imports=0, train_start=0, detect=0, command=0, stage=0)


def cell(num_steps: int) -> Cell:
    return Cell(model=MODEL, horizon=Horizon(num_steps=num_steps), overrides=KNOBS)


def sweep_of(*num_steps: int, **fields: Any) -> Sweep:
    return replace(Sweep(name="toy", question="?", cells=tuple(cell(n) for n in num_steps)), **fields)


class Given(JobMaker):
    """Jobs as a test wants them."""

    def __init__(self, job_of: Callable[[Trial], Job]) -> None:
        self._job_of = job_of

    def job(self, sweep: Sweep, trial: Trial) -> Job:
        return self._job_of(trial)


def a_second_a_step(trial: Trial) -> Job:
    return Job(seconds=float(trial.config.num_steps))


def setting_of(target: Sweep | Ladder, fleet: Fleet, job_of: Callable[[Trial], Job] = a_second_a_step, **fields: Any) -> Setting:
    planned = phases(target, fields.pop("assumed", Assumed()), {})
    defaults: dict[str, Any] = {"overheads": NOTHING, "spread": 0.0, "recorded": {}, "jobs": Given(job_of)}
    return Setting(phases=planned, fleet=fleet, workers=workers_of(planned[0].sweep, fleet), **{**defaults, **fields})


def fleet_of(num_nodes: int, devices: int, **fields: Any) -> Fleet:
    return Fleet(device=fields.pop("device", "cpu"), num_nodes=num_nodes, devices_per_node=devices, **fields)


def check_books(simulated: Simulated, fleet: Fleet) -> None:
    assert simulated.booked == pytest.approx(fleet.num_devices * simulated.wall_seconds, rel=1e-9)
    assert min(simulated.device_seconds.values()) >= -1e-6


# --- by hand ---


def test_three_runs_on_two_devices() -> None:
    fleet = fleet_of(1, 2)
    simulated = simulate_once(setting_of(sweep_of(10, 30, 20), fleet), 0)
    assert simulated.wall_seconds == 30, "30 s on one device, 20 and then 10 on the other"
    assert simulated.device_seconds["useful"] == 60 and simulated.device_seconds["idle"] == 0

    overheads = replace(NOTHING, driver=0.2, process=5.0, imports=3.0)
    # first: 0.1 + 5 to its start, 3 + 30. second: 0.2 + 5, or, where one process starts at a time, 5.1 + 0.1 + 5; 3 + 20, 0.1 for
    # its end; then 0.1 + 10 and 0.1, in a process that has all imports
    for pending, second_starts in ((2, 5.2), (1, 10.2)):
        simulated = simulate_once(setting_of(sweep_of(10, 30, 20), fleet, overheads=replace(overheads, pending=pending)), 0)
        assert simulated.wall_seconds == pytest.approx(second_starts + 23 + 0.1 + 0.1 + 10 + 0.1)
        check_books(simulated, fleet)


def test_the_cap_and_the_sampler_hold_back_what_would_fit() -> None:
    fleet = fleet_of(1, 8)
    grid = sweep_of(10, space={"optimizer.matrix_lr": Grid([0.001 * (1 + i) for i in range(8)])})
    assert simulate_once(setting_of(grid, fleet), 0).wall_seconds == 10
    assert simulate_once(setting_of(grid, fleet, max_concurrent=3), 0).wall_seconds == 30
    learning = {"space": {"optimizer.matrix_lr": LogUniform(1e-3, 1e-1)}, "sampler": "tpe", "num_trials": 6, "parallel_trials": 2}
    assert simulate_once(setting_of(sweep_of(10, **learning), fleet), 0).wall_seconds == 30


def test_workers_of_a_trial_lie_together_and_shares_add_up() -> None:
    four = sweep_of(10, devices_per_trial=4, seeds=(0, 1, 2))
    fleet = fleet_of(2, 6, device="h100")
    simulated = simulate_once(setting_of(four, fleet), 0, keep_bars=True)
    assert simulated.wall_seconds == 10, "one trial on each node, and one on what both have left"
    nodes = {frozenset(b.node for b in simulated.bars if b.name == name) for name in {b.name for b in simulated.bars}}
    assert nodes == {frozenset({0}), frozenset({1}), frozenset({0, 1})}
    shared = sweep_of(*[10 + i for i in range(8)], trials_per_device=4)
    simulated = simulate_once(setting_of(shared, fleet_of(1, 1, device="h100")), 0)
    assert simulated.wall_seconds == 17 + 10 and simulated.device_seconds["useful"] == sum(range(10, 18)) / 4


def test_a_killed_process_is_lost_and_tried_again_from_its_checkpoint() -> None:
    fleet = fleet_of(1, 1)
    killed = simulate_once(setting_of(sweep_of(10), fleet, kills=(Kill(run=0, after=7.0),)), 0)
    assert (killed.wall_seconds, killed.failed_attempts, killed.device_seconds["lost"]) == (17, 1, 7)

    def saving(trial: Trial) -> Job:
        return Job(seconds=10, start=1, save_every=2.0, save_seconds=0.5)

    killed = simulate_once(setting_of(sweep_of(10), fleet, saving, kills=(Kill(run=0, after=7.0),)), 0)
    # 1 + 7 with two checkpoints, so 4 s are kept; 1 + 6 with three more
    assert killed.wall_seconds == pytest.approx(1 + 7 + 1 + 6 + 3 * 0.5)
    assert killed.device_seconds["save"] == 2.5 and killed.device_seconds["lost"] == pytest.approx(1 + 2)
    check_books(killed, fleet)


def test_runs_that_fail_twice_wait_for_the_same_command_again() -> None:
    kills = tuple(Kill(run=i, after=1.0) for i in range(3))
    simulated = simulate_once(setting_of(sweep_of(10), fleet_of(1, 1), kills=kills, overheads=replace(NOTHING, command=5.0)), 0)
    assert (simulated.commands, simulated.failed_attempts, simulated.unfinished) == (3, 3, 0)
    assert simulated.wall_seconds == 5 + 1 + 1 + 5 + 1 + 5 + 10, "two tries, and one in each later command"


# --- the books, and theory ---


@pytest.mark.parametrize("fields", [{}, {"devices_per_trial": 3}, {"trials_per_device": 2}, {"backend": "train"}], ids=str)
def test_every_device_second_is_booked_once(fields: dict[str, Any]) -> None:
    fleet = fleet_of(4, 8, device="h100", mtbf_hours=0.05, repair_hours=0.01)
    sweep = sweep_of(*range(60, 100), **fields)

    def job(trial: Trial) -> Job:
        seconds = float(trial.config.num_steps)
        return Job(
            seconds=seconds, start=3, save_every=20, save_seconds=1, own_process=not {"backend", "devices_per_trial"} & set(fields)
        )

    setting = setting_of(sweep, fleet, job, overheads=Overheads(detect=60.0), spread=0.1)
    failed = 0
    for seed in range(8):
        simulated = simulate_once(setting, seed)
        check_books(simulated, fleet)
        assert simulated.node_failures and simulated.unfinished == 0
        failed += simulated.failed_attempts
        work = sum(range(60, 100)) * setting.workers.count * setting.workers.devices_per_slot
        trained = simulated.device_seconds["useful"] + simulated.device_seconds["slow"]
        assert trained == pytest.approx(work, rel=0.25), "the work, but for the speed of the devices that did it"
    assert failed > 8


def test_one_long_run_takes_the_expected_time_under_failures() -> None:
    """E[T] of n segments of tau + c, downtime D, restart R, exponential failures of rate 1/M (Daly 2006; Bougeret et al. 2011):
    n e^(R/M) (M + D) (e^((tau + c)/M) − 1), and (M + D) (e^(R/M) − 1) for the first start."""
    m, tau, c, d, r, n = 1000.0, 200.0, 10.0, 50.0, 30.0, 20
    fleet = fleet_of(1, 1, mtbf_hours=m / 3600, repair_hours=d / 3600)
    setting = setting_of(sweep_of(10), fleet, lambda trial: Job(seconds=n * tau, start=r, save_every=tau, save_seconds=c))
    simulated = [simulate_once(setting, seed) for seed in range(300)]
    expected = n * math.exp(r / m) * (m + d) * (math.exp((tau + c) / m) - 1) + (m + d) * (math.exp(r / m) - 1)
    assert np.mean([s.wall_seconds for s in simulated]) == pytest.approx(expected, rel=0.02)
    failures = [sum(at < s.wall_seconds for at, _ in s.node_failures) for s in simulated]
    up = expected - np.mean(failures) * d
    assert np.mean(failures) == pytest.approx(up / m, rel=0.05)


def test_the_slowest_device_of_a_trial_sets_its_pace() -> None:
    sweep, jobs = sweep_of(10, devices_per_trial=8), Given(lambda trial: Job(seconds=100.0))
    setting = replace(setting_of(sweep, fleet_of(1, 8, device="h100"), spread=0.05), jobs=jobs)
    walls = [simulate_once(setting, seed).wall_seconds for seed in range(400)]
    slowest = np.exp(0.05 * np.random.default_rng(1).standard_normal((20_000, 8)).max(axis=1)).mean()
    assert np.mean(walls) == pytest.approx(100 * slowest, rel=0.01) and slowest > 1.06


def test_a_seed_repeats_itself_and_others_differ() -> None:
    setting = setting_of(sweep_of(*range(60, 90)), fleet_of(4, 2, mtbf_hours=0.05, repair_hours=0.01), spread=0.05)
    first, again, other = (simulate_once(setting, seed, keep_bars=True) for seed in (3, 3, 4))
    assert first == again and first.wall_seconds != other.wall_seconds


def test_two_thousand_runs_on_256_devices_take_seconds() -> None:
    space = {"optimizer.matrix_lr": Grid([0.001 * (1 + 0.01 * i) for i in range(1000)])}
    fleet = fleet_of(32, 8, device="mi300x", mtbf_hours=1.0)
    setting = setting_of(sweep_of(100, 200, space=space), fleet, overheads=Overheads(), spread=0.04)
    began = time.process_time()
    simulated = simulate_once(setting, 0)
    assert time.process_time() - began < 20, "2 s on one core: a quadratic step would be seen"
    assert simulated.runs == 2000 and simulated.node_failures
    check_books(simulated, fleet)


# --- the real rules ---


def test_runs_are_given_out_in_the_order_of_the_real_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")
    sweeps = [
        sweep_of(5, 20, 10, space={"optimizer.matrix_lr": Grid([0.01, 0.02, 0.04])}, seeds=(0, 1)),
        sweep_of(5, space={"optimizer.matrix_lr": LogUniform(1e-3, 1e-1)}, sampler="qmc", num_trials=5, name="points"),
    ]
    for sweep in sweeps:
        real = Bench(tmp_path / sweep.name, [sweep])
        real.run()
        setting = setting_of(sweep, fleet_of(1, 1))
        planned = replace(setting.phases[0], data=real.works[0].data)
        simulated = simulate_once(replace(setting, phases=[planned]), 0, keep_bars=True)
        assert [b.name for b in simulated.bars] == [t.name for t in real.trained]
        recorded = {t.run_id: assumed_record(sweep, t) for t in real.trained[:3]}
        rest = simulate_once(replace(setting, phases=[planned], recorded=recorded), 0)
        assert rest.runs == len(real.trained) - 3, "what is recorded is skipped"


def test_ranges_grow_only_where_the_best_value_is_assumed_outside() -> None:
    for fields, most in (
        ({"space": {"optimizer.matrix_lr": Grid([0.005, 0.01, 0.02])}}, 3 + 2 * 2),
        ({"space": {"optimizer.matrix_lr": LogUniform(0.005, 0.02)}, "sampler": "tpe", "num_trials": 6}, 6 + 2 * 2),
    ):
        sweep = sweep_of(10, extend_edges=True, **fields)
        runs = [simulate_once(setting_of(sweep, fleet_of(1, 2), assumed=Assumed(edges=e)), 0).runs for e in ("inside", "outside")]
        assert runs[0] == (3 if "sampler" not in fields else 6) and runs[0] < runs[1] <= most, fields


def test_a_ladder_runs_its_stages_in_turn_and_a_shared_run_once() -> None:
    ladder = Ladder(
        name="l",
        question="?",
        variants={name: {"optimizer.matrix_lr": lr} for name, lr in (("a", 0.01), ("b", 0.03), ("c", 0.04))},
        stages=(
            Stage(name="s", cells=(cell(10),), finalists=1),
            Stage(name="m", cells=(cell(20),)),
            Stage(name="x", cells=(cell(40),)),
        ),
        seeds=(0, 1, 2),
    )
    setting = setting_of(ladder, fleet_of(1, 1))
    assert [p.sweep.name for p in setting.phases] == ["l/s/screen", "l/s", "l/m", "l/x"]
    assert list(setting.phases[1].sweep.variants) == ["baseline", "a"]
    simulated = simulate_once(setting, 0)
    # four screened by one seed, two finalists by two more; then two variants by three seeds
    assert simulated.runs == 4 + 2 * 2 + 6 + 6 and simulated.wall_seconds == 80 + 120 + 240
    none = setting_of(ladder, fleet_of(1, 1), assumed=Assumed(winners=0))
    assert [p.sweep.name for p in none.phases] == ["l/s/screen", "l/s"]


def test_an_adaptive_sweep_spends_what_it_may() -> None:
    from nanochat_model.config import GPTConfig

    models = tuple(GPTConfig.from_depth(d) for d in (4, 6, 8, 10, 12, 14))
    cells = tuple(Cell(model=m, horizon=Horizon(train_flops=c)) for c in (1e17, 3e17) for m in models[:5])
    sweep = Sweep(name="iso", question="?", cells=cells, adaptive=Adaptive(models=models, target_flops=1e20, total_flops=1e19))
    planned = phases(sweep, Assumed(), {})
    assert len(planned) > 2 and planned[0].sweep.cells == cells
    spent = sum(c.horizon.train_flops for c in planned[-1].sweep.cells if c.horizon is not None and c.horizon.train_flops)
    assert 0.5e19 < spent <= 1.1e19


# --- jobs, from recorded runs and without ---


def recorded(sweep: Sweep, seconds: list[float]) -> list[RunRecord]:
    trial = phases(sweep, Assumed(), {})[0].make(sweep, sweep.cells[0], 0, {}, 0, None)
    record = replace(assumed_record(sweep, trial), device="cpu", params={"scaling": 1000})
    return [replace(record, train_seconds=s, total_seconds=s + 2.0, run_id=str(i)) for i, s in enumerate(seconds)]


def test_jobs_follow_recorded_runs_and_the_rules_for_checkpoints() -> None:
    sweep = sweep_of(10)
    records = recorded(sweep, [10.0, 11.0, 9.0])
    fleet = fleet_of(1, 2)
    phase = phases(sweep, Assumed(), {})[0]
    for steps, saves, process in ((10, False, True), (1000, True, False)):
        trial = phase.make(sweep_of(steps), cell(steps), 0, {}, 0, None)
        job = JobMaker(fleet=fleet, overheads=NOTHING, records=records).job(sweep_of(steps), trial)
        assert job.seconds == pytest.approx(1.0 * steps) and job.start == 2.0
        assert (math.isfinite(job.save_every), job.own_process) == (saves, process)
    assert job.save_every == 300 and job.save_seconds > 0
    assert JobMaker(fleet=fleet, overheads=replace(NOTHING, start=7.0), records=records).job(sweep, trial).start == 7.0

    assert speed_spread("cpu", records)[1].startswith("assumed")
    spread, source = speed_spread("cpu", recorded(sweep, [10 * math.exp(0.1 * (-1) ** i) for i in range(40)]))
    assert spread == pytest.approx(0.1, rel=0.03) and source.startswith("measured")


def recorded_job(took: dict[int, float], trial: Trial) -> Job:
    return Job(seconds=took[trial.config.num_steps])


def test_the_fit_of_a_recorded_sweep() -> None:
    """The runs of a real sweep on two CPUs (bench/simulate_check.py), as long as each took: the same wall-clock within 20%."""
    facts = json.loads((ROOT / "tests" / "support" / "recorded_sweep.json").read_text())
    overheads = Overheads(command=0.0, pending=1, **facts["overheads"])  # as Ray Tune was set when it was recorded
    for name in ("undisturbed", "kill -9"):
        real = facts[name]["real"]
        longest_first = sorted((r["seconds"] for r in real["runs"]), reverse=True)
        took = {
            10 * (len(longest_first) - i): seconds for i, seconds in enumerate(longest_first)
        }  # by steps: the order of the pool
        setting = setting_of(sweep_of(*took), fleet_of(1, 2), partial(recorded_job, took), overheads=overheads)
        if real["lost_device_seconds"]:
            setting = replace(setting, kills=(Kill(run=3, after=real["lost_device_seconds"]),))
        assert simulate_once(setting, 0).wall_seconds == pytest.approx(real["wall_seconds"], rel=0.2), name


# --- the command ---


def test_the_command_prints_draws_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "fleet.html"
    storage = ["--storage", str(tmp_path)]
    command = ["simulate", str(ROOT / "sweeps" / "ladder.py"), *storage, "--nodes", "4", "--device", "mi300x", "--seeds", "5"]
    assert run([*command, "--mtbf-hours", "100", "--price", "2", "--html", str(page), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    results = facts["results"]
    assert facts["runs"] == 45 and facts["stages"] == ["ladder/d12", "ladder/d20", "ladder/d24"]
    assert results["dollars"]["median"] == pytest.approx(2 * results["wall_hours"]["median"] * 32)
    assert results["wall_hours"]["low"] <= results["wall_hours"]["median"] <= results["wall_hours"]["high"]
    assert any("MFU 27.5%" in line for line in facts["assumptions"]) and results["node_failures"]["high"] > 0
    drawn = page.read_text(encoding="utf8")
    assert "node 3" in drawn and "lost to slow devices" in drawn and "a node fails" in drawn
    assert run([*command, "--set", "devices_per_trial=8"]) == 0
    shown = capsys.readouterr().out
    assert "45 runs on 4 × 8 mi300x, 4 at a time" in shown and "utilization" in shown and "no node fails" in shown

    for wrong, said in (
        (["--mtbf-hours", "-1"], "mtbf_hours -1.0 must be positive"),
        (["--nodes", "0"], "nodes 0 must be at least 1"),
        (["--seeds", "0"], "seeds 0 must be at least 1"),
        (["--device", "mi9000"], "mi9000"),
        (["--mfu", "40"], "mfu 40.0 must lie in 0..1"),
        (["--winners", "-2"], "winners -2"),
        (["--set", "devices_per_trial=64"], "needs 64 CPU, 64 GPU, which 4 × inf CPU, 8 GPU never hold"),
        (["--price", "-1"], "price -1.0"),
    ):
        assert run([*command, *wrong]) == 2, wrong
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


def test_the_figure_shows_every_device_once() -> None:
    fleet = fleet_of(3, 4, device="h100", mtbf_hours=0.05, repair_hours=0.01)
    setting = setting_of(sweep_of(*range(60, 90)), fleet, overheads=Overheads(command=0), spread=0.05)
    simulated = simulate_once(setting, 1, keep_bars=True)
    edges = np.linspace(0, simulated.wall_seconds, 31)
    shares = devices_by_kind(simulated.bars, edges, fleet, setting.workers)
    assert sum(shares.values()) == pytest.approx(np.full(30, 12.0))
    for kind in ("useful", "lost", "idle"):
        assert (shares[kind] * np.diff(edges)).sum() == pytest.approx(simulated.device_seconds[kind], rel=1e-6, abs=1e-3), kind


def test_slots_follow_the_scarcest_resource() -> None:
    workers = Workers(per_worker={"CPU": 3.0, "GPU": 0.5}, count=1, node={"CPU": 10.0, "GPU": 8.0}, device="GPU")
    assert workers.slots_per_node == 3 and workers.devices_per_slot == 0.5 and workers.need == {"CPU": 3.0, "GPU": 0.5}
