"""Where trials run and with what: several on one device, which backend, what is reserved, and what is said when it does not fit.

The device of these tests is a logical GPU: Ray counts it, torch does not see it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from local_s3 import local_s3
from tiny_run import tiny_config
from toy_sweep import KNOBS
from toy_training import HORIZON, MODEL, TRAIN, Held, held, notes

from nanochat_model.config import DataConfig, GPTConfig
from nanochat_model.counts import count_params, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.probe import Probe
from nanochat_model.record import RunRecord
from nanoladder.actor_backend import trial_resources
from nanoladder.cells import planned_trials
from nanoladder.execute import SpecMaker, execute_sweep
from nanoladder.handout import Room
from nanoladder.listen import Listener
from nanoladder.node_labels import NodeLabels
from nanoladder.ray_init import RaySession, ensure_ray, shutdown_ray
from nanoladder.schedule_trials import NothingRuns, Scheduler
from nanoladder.sharing import check_estimate, check_probe
from nanoladder.space import Grid
from nanoladder.stopping import StopWatch, request_stop
from nanoladder.storage import Remote, mirrored
from nanoladder.sweep import Cell, Sweep
from nanoladder.sync import sync
from nanoladder.train_backend import run_training_on_ray_train
from nanoladder.trial_spec import TrialSpec
from nanoladder.watchdog import not_placed
from nanoladder.workspace import Workspace

pytestmark = pytest.mark.seconds(50)
DATA = DataConfig(manifest_hash="toy")
TOY = Sweep(name="toy", question="?", cells=(Cell(model=MODEL, horizon=HORIZON, overrides=KNOBS),))
FOUR = replace(TOY, space={"optimizer.matrix_lr": Grid([0.005, 0.01, 0.02, 0.04])})
D24 = GPTConfig.from_depth(24)
SUPPORT = str(Path(__file__).parents[1] / "support")


class Here(NamedTuple):
    session: RaySession
    bucket: str


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    with local_s3() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("TOY_STEP_SECONDS", "0.02")
        patch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")  # as nodes with AMD's GPUs are started with theirs
        yield Here(ensure_ray(num_cpus=2, num_gpus=1, object_store_bytes=100 * 2**20), url)
        shutdown_ray()


def test_two_trials_share_a_device_and_each_is_told_its_share(tmp_path: Path, here: Here) -> None:
    assert here.session.dashboard_url, "without its dashboard Ray never frees what a dead controller held"
    shared = replace(FOUR, device="h100", trials_per_device=2)
    with held(tmp_path) as stuck:
        options: dict[str, Any] = {"data": DATA, "train_function": TRAIN, "mlflow_uri": "", "listeners": [LetsTwoGo(stuck)]}
        records = execute_sweep(shared, Workspace(tmp_path), **options)
    assert [r.status for r in records] == ["complete"] * 4
    starts = notes(tmp_path, "start")
    assert len({s["pid"] for s in starts}) == 2
    assert {s["gpus"] for s in starts} == {"0"}, "a trial sees its own device, also where Ray hides none"
    spec = maker(shared, tmp_path)(planned_trials(shared, DATA)[0], 1)
    assert spec.resources_per_worker == {"CPU": 1.0, "GPU": 0.5} and spec.runtime.memory_share == 0.5


class LetsTwoGo(Listener):
    """Lets held trials go on once there are two of them: one after the other they would wait for ever."""

    def __init__(self, stuck: Held) -> None:
        self._stuck = stuck

    def on_tick(self) -> None:
        if len(self._stuck()) == 2:
            self._stuck.let_go()


def maker(sweep: Sweep, root: Path) -> SpecMaker:
    made = SpecMaker([sweep], Workspace(root), has_gpu=True, train_function=TRAIN)
    made._fitting_rows[sweep.name] = 4  # what a probe step would say
    return made


def test_what_cannot_share_is_refused_before_it_starts(tmp_path: Path, here: Here) -> None:
    crowded = replace(FOUR, device="h100", trials_per_device=200, cells=(Cell(model=MODEL, horizon=HORIZON, overrides=KNOBS),))
    with pytest.raises(ConfigError, match=r"a trial needs .* by estimate and 1/200 of h100 offers 0.37 GB; set trials_per_device"):
        execute_sweep(crowded, Workspace(tmp_path), data=DATA, train_function=TRAIN, mlflow_uri="")
    wide = replace(crowded, trials_per_device=40, space={"model.model_dim": Grid([32, 4096])})
    with pytest.raises(ConfigError, match=r"1/40 of h100 offers 1.84 GB; set trials_per_device"):
        execute_sweep(wide, Workspace(tmp_path), data=DATA, train_function=TRAIN, mlflow_uri="")
    assert notes(tmp_path, "start") == []


def test_estimate_and_probe_name_the_number_that_would_fit() -> None:
    sweep = replace(TOY, device="h100", trials_per_device=8)
    with pytest.raises(ConfigError, match=r"1/8 of h100 offers 9.20 GB; set trials_per_device to [2-6]$"):
        check_estimate(sweep, "d24", replace(tiny_config(), model=D24, batch_tokens=2048), 80e9)
    check_estimate(sweep, "d12", replace(tiny_config(), model=GPTConfig.from_depth(12), batch_tokens=2048), 80e9)
    probe = Probe(micro_batch_rows=4, peak_bytes=30e9, device_bytes=80e9, device="H100")
    with pytest.raises(ConfigError, match=r"took 30.00 GB with 4 rows; 1/8 of it offers 10.00 GB; set trials_per_device to 2$"):
        check_probe(sweep, "d24", probe, 80e9)
    check_probe(replace(sweep, trials_per_device=2), "d24", probe, 80e9)
    with pytest.raises(ConfigError, match=r"does not fit with a single row.*leave trials_per_device at 1"):
        check_probe(sweep, "d24", replace(probe, micro_batch_rows=0, peak_bytes=float("inf")), 80e9)


def test_auto_takes_the_actor_for_short_trials_of_one_device_and_train_for_the_rest(tmp_path: Path) -> None:
    def backend(sweep: Sweep) -> str:
        return SpecMaker([sweep], Workspace(tmp_path), has_gpu=False)(planned_trials(sweep, DATA)[0], 1).backend

    long = replace(
        TOY, cells=(replace(TOY.cells[0], model=GPTConfig.from_depth(4), horizon=Horizon(num_steps=10**6), overrides={}),)
    )
    assert [backend(s) for s in (TOY, long, replace(TOY, devices_per_trial=2))] == ["actor", "train", "train"]
    assert [backend(replace(s, backend=b)) for s, b in ((TOY, "train"), (long, "actor"))] == ["train", "actor"]


def test_trials_are_told_the_mfu_of_recorded_runs_on_their_device(tmp_path: Path) -> None:
    sweep = replace(TOY, device="h100")
    trial = planned_trials(sweep, DATA)[0]
    assert maker(sweep, tmp_path)(trial, 1).runtime.usual_mfu == 0
    flops = float(flops_per_token(trial.config.model)) * trial.config.num_tokens
    RunRecord(
        run_id="done", status="complete", config=trial.config, seed=0, params=count_params(trial.config.model).as_dict(),
        num_tokens=trial.config.num_tokens, flops_per_token=1, train_flops=flops, device="NVIDIA H100 80GB HBM3",
        train_seconds=flops / 300e12,
    ).save(Workspace(tmp_path).run_dir("done"))  # fmt: skip
    assert maker(sweep, tmp_path)(trial, 1).runtime.usual_mfu == pytest.approx(300 / 989)


def test_the_driver_of_a_train_trial_holds_nothing_that_its_workers_need() -> None:
    config = tiny_config()
    from nanochat_model.config import RuntimeConfig

    spec = TrialSpec(run_id="x", config=config, runtime=RuntimeConfig(), run_dir="x", backend="train", num_workers=2)
    assert not set(trial_resources(spec)) & {"CPU", "GPU"}
    assert 256 * trial_resources(spec)["node:__internal_head__"] < 1, "a head holds the drivers of a fleet's trials"
    assert trial_resources(replace(spec, backend="actor")) == {"CPU": 1.0}


class Trials:
    """A pool that always has another trial."""

    done = False

    def __init__(self, sweep: Sweep) -> None:
        self._trials = planned_trials(sweep, DATA)

    def next(self) -> Any:
        return self._trials.pop(0)

    def attempts(self, run_id: str) -> int:
        return 1


def test_no_more_trials_are_placed_than_the_cluster_holds_workers(tmp_path: Path) -> None:
    pairs = replace(FOUR, devices_per_trial=2)
    make = SpecMaker([pairs], Workspace(tmp_path), has_gpu=False, placement_seconds=900)
    room = {"CPU": 5.0}
    scheduler = Scheduler(Trials(pairs), make, None, capacity=lambda labels: room, max_concurrent=None, placement_seconds=1)  # type: ignore[arg-type]
    assert [scheduler.suggest(str(i)) is not None for i in range(3)] == [True, True, False], "4 of 5 CPUs: a third would starve"
    room["CPU"] = 6.0
    assert scheduler.suggest("3") is not None and scheduler.suggest("4") is None, "a cluster that grows takes more"
    assert scheduler.assigned["3"].spec.placement_seconds == 900, "Ray Train waits as long for a node that is yet to start"
    labelled = replace(FOUR, device="h100")
    make = SpecMaker([labelled], Workspace(tmp_path), has_gpu=True, labels=NodeLabels(present=frozenset({"h100", "mi300x"})))
    cards = {"h100": 2.0, "mi300x": 8.0}
    two = Scheduler(
        Trials(labelled), make, None, max_concurrent=None, placement_seconds=1,
        capacity=lambda labels: {"CPU": 64.0, "GPU": cards[labels["gpu"]]},
    )  # type: ignore[arg-type]  # fmt: skip
    assert [two.suggest(str(i)) is not None for i in range(3)] == [True, True, False], "nodes of another label do not count"
    booked = Room()
    booked.take({"GPU": 2.0}, {"gpu": "h100"})
    assert not booked.fits({"GPU": 1.0}, {"GPU": 2.0}) and booked.fits({"GPU": 1.0}, {"GPU": 2.0}, {"gpu": "mi300x"})
    text = not_placed("it waited 9 s", {"GPU": 2.0}, {"gpu": "h100"}, {"GPU": 8.0}, {"GPU": 8.0})
    assert "2 GPU on nodes labelled gpu=h100 and was not placed" in text and "not together on one such node" in text


def test_an_end_is_not_put_off_by_what_waits_for_workers(tmp_path: Path) -> None:
    pairs = replace(FOUR, devices_per_trial=2)
    make = SpecMaker([pairs], Workspace(tmp_path), has_gpu=False)
    for events, waits in (([], True), ([{"event": "start", "step": 0, "num_steps": 10}], False)):
        given: dict[str, Any] = {"capacity": None, "max_concurrent": None, "placement_seconds": 1, "stop": StopWatch([tmp_path])}
        scheduler = Scheduler(Trials(pairs), make, Listener(), **given)  # type: ignore[arg-type]
        assert scheduler.suggest("0") is not None
        scheduler.started("0")
        scheduler.result("0", {"events": events})
        request_stop(tmp_path)
        with pytest.raises(NothingRuns) if waits else nullcontext():
            scheduler.tick()
        assert scheduler.stopping is not None


def test_train_workers_that_find_no_place_are_named_with_what_there_is(tmp_path: Path, here: Here) -> None:
    import ray

    holder = ray.remote(num_cpus=1)(type("Holder", (), {"ready": lambda self: True})).remote()  # type: ignore[attr-defined]
    assert ray.get(holder.ready.remote())
    try:
        with pytest.raises(
            ConfigError, match=r"waited 3 s for 2 CPU and was not placed: the cluster has 2 CPU.*free 1 CPU.* 1 CPU short"
        ):
            run_training_on_ray_train(
                tiny_config(), run_dir=tmp_path, num_workers=2, use_gpu=False, placement_seconds=3, train_function=TRAIN
            )
    finally:
        ray.kill(holder)


def test_a_probe_step_measures_this_process(tmp_path: Path, here: Here) -> None:
    from nanochat_model.config import RuntimeConfig
    from nanochat_model.probe import probe_step

    probe = probe_step(tiny_config(), RuntimeConfig(device="cpu", compile="off"))
    assert probe.micro_batch_rows == 8 and probe.device_bytes is None and 1e8 < probe.peak_bytes < 1e11


def test_a_sweep_in_a_bucket_goes_on_where_no_file_of_it_is(tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{here.bucket}/sweeps"
    options: dict[str, Any] = {"data": DATA, "train_function": TRAIN, "mlflow_uri": ""}
    monkeypatch.setenv("NANOLADDER_LOCAL", str(tmp_path / "one"))
    two = replace(TOY, space={"optimizer.matrix_lr": Grid([0.01, 0.02])})
    first = execute_sweep(two, Workspace(url), **options)
    kept = {p for p in Remote(url).listing() if p.endswith("record.json")}
    assert kept == {f"runs/{r.run_id}/record.json" for r in first}, "before the command ends"
    with mirrored(url):
        pass  # as at the end of a command
    assert "sweeps/toy/index.json" in Remote(url).listing()

    monkeypatch.setenv("NANOLADDER_LOCAL", str(tmp_path / "two"))
    workspace = Workspace(url)
    assert not workspace.root.exists()
    with mirrored(url):
        again = execute_sweep(replace(two, space={"optimizer.matrix_lr": Grid([0.01, 0.02, 0.04])}), workspace, **options)
    assert again[:2] == first and len(notes(workspace.root, "start")) == 1, "only what is new is trained"
    report = sync(workspace, mlflow_uri="")
    assert (report.num_runs, report.broken) == (3, ())
