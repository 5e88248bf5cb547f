"""Sweeps on a real local Ray: reused actors, failures, Ray Train's trials, MLflow, index, and nothing done twice."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.tune.execution.tune_controller import _get_max_pending_trials
from small_text import small_shards
from task_files import write_jsonl
from tiny_run import RUNTIME, tiny_config, tiny_shards
from toy_sweep import CELL, KNOBS
from toy_training import HORIZON, MODEL, TRAIN, notes, toy_loss

from nanochat_model import corpus as corpus_module
from nanochat_model.config import DataConfig, EvalConfig
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanochat_model.recipe import Recipe
from nanochat_model.record import RunRecord
from nanochat_model.sft_recipe import TRAIN_FUNCTION
from nanochat_model.shards import build_shards
from nanochat_model.train import pretrain
from nanoladder.execute import execute_sweep, execute_sweeps
from nanoladder.handout import MAX_PENDING
from nanoladder.ladder import Ladder, Stage, execute_ladder
from nanoladder.listen import Listener, SweepProgress
from nanoladder.own_devices import HIDES
from nanoladder.promote import read_promotions
from nanoladder.ray_executor import RayExecutor
from nanoladder.ray_init import (
    LOCAL_SETTINGS,
    PATIENCE,
    SETTINGS,
    check_temp_dir,
    ensure_ray,
    secure_token_file,
    shutdown_ray,
)
from nanoladder.run_lock import LOCK_FILE, exclusive, remove_abandoned
from nanoladder.schedule_trials import PoolSearcher
from nanoladder.sft_sweep import SFTSweep
from nanoladder.space import Grid
from nanoladder.stopping import SweepStopped, request_stop
from nanoladder.sweep import Cell, Sweep
from nanoladder.sweep_command import load_sweep
from nanoladder.sweep_index import read_index
from nanoladder.tracking import connect
from nanoladder.train_backend import START_TIMEOUT_ENV, run_training_on_ray_train
from nanoladder.workspace import Workspace

pytestmark = pytest.mark.seconds(110)
DATA = DataConfig(manifest_hash="toy")
TOY = Sweep(name="toy", question="?", cells=(CELL,))
SUPPORT = str(Path(__file__).parents[1] / "support")


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([SUPPORT, *filter(None, [before])])
    ensure_ray(num_cpus=2, object_store_bytes=100 * 2**20)
    yield
    shutdown_ray()
    os.environ["PYTHONPATH"] = before or ""


class Heard(Listener):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str, bool]] = []
        self.events: list[dict[str, object]] = []
        self.ended = 0

    def on_failure(self, trial: object, error: str, traceback: str, retry: bool) -> None:
        self.failures.append((error, traceback, retry))

    def on_event(self, trial: object, event: dict[str, object]) -> None:
        self.events.append(event)

    def on_end(self) -> None:
        self.ended += 1


def test_sweeps_share_actors_skip_what_is_recorded_and_mirror_themselves(tmp_path: Path) -> None:
    workspace, heard = Workspace(tmp_path), Heard()
    grid = replace(TOY, name="grid", purpose="learning_rate", space={"optimizer.matrix_lr": Grid([0.005, 0.01, 0.02, 0.04])})
    decay = replace(TOY, name="decay", purpose="weight_decay", space={"optimizer.weight_decay": Grid([0.1, 0.9])}, seeds=(0, 1))
    seen: list[SweepProgress] = []
    options = {"data": DATA, "train_function": TRAIN}
    found = execute_sweeps([grid, decay], workspace, progress=seen.append, listeners=[heard], **options)  # type: ignore[arg-type]

    assert [len(r) for r in found] == [4, 4]
    assert [r.status for r in found[1]] == ["complete", "complete", "failed", "failed"]
    assert all(r.val_bpb == pytest.approx(toy_loss(r.config)) and r.backend == "actor" for r in found[0])
    starts = notes(tmp_path, "start")
    assert len(starts) == 3 + 2 + 2 * 2, "a run that both want is trained once, a failing one twice"
    assert len({s["pid"] for s in starts}) <= 2, "actors are used again"
    assert [retry for _, _, retry in heard.failures].count(True) == 2 and heard.ended == 1
    assert all("beyond all bounds" in error and "Traceback" in trace for error, trace, _ in heard.failures)
    assert (seen[-1].done, seen[-1].total, seen[-1].failed, seen[-1].running) == (8, 8, 2, 0)
    assert seen[-1].best is not None and seen[-1].best.val_bpb == min(r.val_bpb for r in found[0] if r.val_bpb)
    assert not list((tmp_path / "tune").glob("*")), "Tune leaves nothing behind"

    index = read_index(workspace.sweep_dir("decay"))
    assert [(t["values"], t["seed"], t["status"]) for t in index["trials"]][:2] == [
        ({"optimizer.weight_decay": 0.1}, 0, "complete"), ({"optimizer.weight_decay": 0.1}, 1, "complete"),
    ]  # fmt: skip

    mlflow_has_it_all(workspace, found)
    again = execute_sweeps([grid], workspace, listeners=[heard], **options)  # type: ignore[arg-type]
    assert again == [[*found[0]]] or [r.run_id for r in again[0]] == [r.run_id for r in found[0]]
    assert len(notes(tmp_path, "start")) == len(starts), "nothing is trained again"
    mlflow_has_it_all(workspace, found)


def mlflow_has_it_all(workspace: Workspace, found: list[list[RunRecord]]) -> None:
    client = connect(workspace.mlflow_uri)
    experiment = client.get_experiment_by_name("nanoladder")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = {r.info.run_name: r for r in runs if r.data.tags.get("nanoladder.kind") == "sweep"}
    assert set(parents) == {"grid", "decay"} and all(p.info.status == "FINISHED" for p in parents.values())
    for sweep, records in zip(("grid", "decay"), found, strict=True):
        children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[sweep].info.run_id]
        assert sorted(c.data.tags["nanoladder.run_id"] for c in children) == sorted(r.run_id for r in records)
        by_id = {c.data.tags["nanoladder.run_id"]: c for c in children}
        for record in records:
            child = by_id[record.run_id]
            assert child.info.status == ("FINISHED" if record.status == "complete" else "FAILED")
            assert float(child.data.params["optimizer.matrix_lr"]) == record.config.optimizer.matrix_lr
            history = client.get_metric_history(child.info.run_id, "val_bpb")
            assert [(m.step, m.value) for m in history] == [(p.step, p.val_bpb) for p in record.curve]
            for key in ("by_gflops/val_bpb", "by_milliseconds/val_bpb", "train_flops", "train_seconds"):
                assert len(client.get_metric_history(child.info.run_id, key)) == len(record.curve), key
            (milliseconds,) = {m.step for m in client.get_metric_history(child.info.run_id, "by_milliseconds/val_bpb")[-1:]} or {0}
            assert milliseconds == (round(1000 * record.curve[-1].seconds) if record.curve else 0)


def test_a_mistake_of_the_user_ends_the_sweep_at_once_in_one_line(tmp_path: Path) -> None:
    bad = replace(TOY, overrides={"optimizer.scalar_lr": 1000.0})
    with pytest.raises(ConfigError, match="scalar_lr over 100"):
        execute_sweep(bad, Workspace(tmp_path), data=DATA, train_function=TRAIN, mlflow_uri="")
    assert len(notes(tmp_path, "start")) == 1


def test_a_trial_that_fits_nowhere_is_refused_before_it_waits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 3 CPU \(the cluster has 2\)"):
        execute_sweep(replace(TOY, threads_per_trial=3), Workspace(tmp_path), data=DATA, train_function=TRAIN, mlflow_uri="")
    with pytest.raises(ConfigError, match="meant for h100"):
        execute_sweep(replace(TOY, device="h100"), Workspace(tmp_path), data=DATA, train_function=TRAIN, mlflow_uri="")


def test_a_trial_whose_resources_others_hold_is_named_by_the_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = ray.remote(num_cpus=2)(type("Holder", (), {"ready": lambda self: True})).remote()  # type: ignore[attr-defined]
    assert ray.get(holder.ready.remote())
    workspace = Workspace(tmp_path)
    monkeypatch.setenv("NANOLADDER_PLACEMENT_SECONDS", "2")
    try:
        with pytest.raises(ConfigError, match="for 1 CPU and was not placed: the cluster has 2 CPU, free nothing, 1 CPU short"):
            execute_sweep(TOY, workspace, data=DATA, train_function=TRAIN, mlflow_uri="")
        monkeypatch.setenv("NANOLADDER_PLACEMENT_SECONDS", "600")
        with pytest.raises(SweepStopped, match="toy stopped on request"):  # nothing runs, so there is nothing to wait for
            execute_sweep(TOY, workspace, listeners=[Asks(workspace)], data=DATA, train_function=TRAIN, mlflow_uri="")
        monkeypatch.setenv("NANOLADDER_PLACEMENT_SECONDS", "soon")
        with pytest.raises(ConfigError, match="NANOLADDER_PLACEMENT_SECONDS='soon' must be a positive number"):
            execute_sweep(TOY, workspace, data=DATA, train_function=TRAIN, mlflow_uri="")
    finally:
        ray.kill(holder)
    assert notes(tmp_path, "start") == []


class Asks(Listener):
    """Asks for an end as soon as the sweep is at work."""

    def __init__(self, workspace: Workspace) -> None:
        self._folder = workspace.sweep_dir("toy")

    def on_tick(self) -> None:
        request_stop(self._folder)


def test_both_backends_train_the_same_model_to_the_same_loss(tmp_path: Path) -> None:
    shards = tiny_shards()
    config = tiny_config()
    recipe = Recipe(eval=EvalConfig(num_tokens=2048, every_steps=5), compute_dtype="float32")
    cell = Cell(model=config.model, horizon=Horizon(num_steps=12), overrides={"batch_tokens": 8 * config.model.sequence_len})
    sweep = Sweep(
        name="both", question="?", recipe=recipe, cells=(cell,), packing="keep_remainder", runtime=RUNTIME, backend="actor"
    )
    data = shards.data_config("keep_remainder")
    (actor,) = execute_sweep(sweep, Workspace(tmp_path / "actor"), data=data, mlflow_uri="")
    heard = Heard()
    two = replace(sweep, backend="train", devices_per_trial=2)
    (train,) = execute_sweep(two, Workspace(tmp_path / "train"), data=data, listeners=[heard], mlflow_uri="")
    assert (actor.backend, actor.num_devices, train.backend, train.num_devices) == ("actor", 1, "train", 2)
    assert actor.run_id == train.run_id and train.status == "complete"
    assert [p.val_bpb for p in train.curve] == pytest.approx([p.val_bpb for p in actor.curve], rel=1e-4)
    assert {"start", "eval"} <= {e["event"] for e in heard.events}


def test_a_ladder_promotes_what_wins_and_records_why(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    large = Cell(model=replace(MODEL, depth=3), horizon=HORIZON, overrides=KNOBS)
    ladder = Ladder(
        name="steps",
        question="Is half the learning rate better?",
        variants={"half lr": {"optimizer.matrix_lr": 0.01}, "eight lr": {"optimizer.matrix_lr": 0.16}},
        stages=(Stage(name="d2", cells=(CELL,)), Stage(name="d3", cells=(large,), seeds=(0, 1, 2, 3))),
    )
    # The candidate's override must win over the cell's own.
    promotions = execute_ladder(ladder, workspace, data=DATA, train_function=TRAIN, max_concurrent=1)
    assert [(p.stage, p.change, p.verdict, p.n_seeds) for p in promotions] == [
        ("d2", "half lr", "adopt", 3), ("d2", "eight lr", "reject", 3), ("d3", "half lr", "adopt", 4),
    ]  # fmt: skip
    rows = read_promotions(workspace.sweep_dir("steps"))
    assert rows == json.loads(json.dumps([p.as_dict() for p in promotions]))
    assert set(rows[0]["axes"]) == {"steps", "flops", "seconds"} and rows[0]["p_value"] < 0.05 < rows[1]["p_value"]
    assert len(notes(tmp_path, "start")) == 3 * 3 + 2 * 4
    client = connect(workspace.mlflow_uri)
    experiment = client.get_experiment_by_name("nanoladder").experiment_id
    tagged = client.search_runs([experiment], filter_string="tags.`nanoladder.verdict` = 'adopt'")
    assert {r.data.tags["nanoladder.run_id"] for r in tagged} == {i for p in promotions if p.verdict == "adopt" for i in p.run_ids}
    assert {r.data.tags["nanoladder.stage"] for r in tagged} == {"d2", "d3"}

    hopeless = replace(ladder, name="hopeless", variants={"eight lr": {"optimizer.matrix_lr": 0.16}})
    promotions = execute_ladder(hopeless, workspace, data=DATA, train_function=TRAIN, mlflow_uri="")
    assert [p.verdict for p in promotions] == ["reject"]
    assert json.loads((workspace.sweep_dir("hopeless") / "promotions.json").read_text())["not_reached"] == {
        "d3": "no candidate won the stage before"
    }
    assert len(notes(tmp_path, "start")) == 3 * 3 + 2 * 4, "the second ladder only asks for what the first has run"


def test_every_setting_is_one_that_this_ray_reads() -> None:
    names = {*SETTINGS, *LOCAL_SETTINGS, *PATIENCE, *HIDES, START_TIMEOUT_ENV}
    root = Path(ray.__file__).parent
    folders = [root / name for name in ("_private", "_common", "air", "train", "tune")]
    texts = [p.read_text(encoding="utf8") for folder in folders for p in folder.rglob("*.py")]
    raylet = (root / "core/src/ray/raylet/raylet").read_bytes()
    unknown = {name for name in names if not any(f'"{name}"' in text for text in texts) and name.encode() not in raylet}
    assert not unknown, "renamed by Ray, and without effect"
    assert _get_max_pending_trials(PoolSearcher(None)) == MAX_PENDING > 1  # type: ignore[arg-type]


def test_what_killed_commands_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Process ids tell nothing: in a container, or on another machine of a shared folder, the same number is another process."""
    here = socket.gethostname()
    with pytest.raises(ConfigError, match=f"this Ray session is being worked on by process {os.getpid()} on {here}"):
        exclusive(Path(ensure_ray().session_dir), "this Ray session").__enter__()
    holders = {1: f"process 1 on {here}", 2: f"process {os.getpid()} on {here}", 3: "process 1 on another", 4: None, 5: None, 6: ""}
    for number, holder in holders.items():
        session = tmp_path / f"session_2026-01-01_00-00-00_000000_{number}"
        (session / "logs").mkdir(parents=True)
        if holder is not None:
            (session / LOCK_FILE).write_text(holder)
    os.utime(tmp_path / "session_2026-01-01_00-00-00_000000_5", (0, 0))  # died in its start, without a lock
    (tmp_path / "notes").mkdir()
    with exclusive(tmp_path / "session_2026-01-01_00-00-00_000000_7", "a session that lives"):
        remove_abandoned(tmp_path.glob("session_*"))
        assert {p.name.rpartition("_")[2] for p in tmp_path.iterdir()} == {"3", "4", "6", "7", "notes"}
    remove_abandoned(tmp_path.glob("session_*"))
    assert {p.name.rpartition("_")[2] for p in tmp_path.iterdir()} == {"3", "4", "6", "notes"}


def test_the_token_is_private_and_a_long_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    secure_token_file()
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) >= 32
    kept = token.read_text()
    token.chmod(0o644)
    secure_token_file()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and token.read_text() == kept
    with pytest.raises(ConfigError, match="shorter one"):
        check_temp_dir(tmp_path / ("x" * 60))


def test_fine_tunings_are_swept_recorded_and_the_same_on_two_workers(tmp_path: Path) -> None:
    folder = Workspace(tmp_path).run_dir("base")
    pretrain(tiny_config(model__sequence_len=64, batch_tokens=256, num_steps=4), RUNTIME, run_dir=folder)
    talks = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}] for i in range(40)]
    chats = write_jsonl(tmp_path / "chats.jsonl", talks)
    question = load_sweep(Path(__file__).parents[2] / "sweeps" / "sft_lr.py")
    assert isinstance(question, SFTSweep)
    given = ["--storage", str(tmp_path), "--base-checkpoint", str(folder), "--conversations", str(chats), "--epochs", "2"]
    sweep, rest = question.resolve(given)
    assert rest == given[:2]
    sweep = replace(sweep, space={"lr_multiplier": Grid([0.5, 2.0])}, runtime=RUNTIME)
    slow, fast = execute_sweep(sweep, Workspace(tmp_path), mlflow_uri="", max_concurrent=1)
    assert all(r.status == "complete" and r.kind == "sft" and r.backend == "actor" for r in (slow, fast))
    assert fast.config.optimizer.matrix_lr == pytest.approx(4 * slow.config.optimizer.matrix_lr) and fast.val_bpb != slow.val_bpb
    assert slow.parents["base"] == fast.parents["base"] and slow.config.trunk == f"sft:{slow.parents['base']}"
    index = read_index(Workspace(tmp_path).sweep_dir(sweep.name))
    assert {t["run_id"] for t in index["trials"]} == {slow.run_id, fast.run_id}
    assert execute_sweep(sweep, Workspace(tmp_path), mlflow_uri="") == [slow, fast], "nothing is done twice"
    where = {"run_dir": tmp_path / "two", "workspace": Workspace(tmp_path), "start_from": str(folder)}
    two = run_training_on_ray_train(fast.config, RUNTIME, num_workers=2, train_function=TRAIN_FUNCTION, **where)
    assert (two.backend, two.num_devices, two.run_id) == ("train", 2, fast.run_id)
    assert two.val_bpb == pytest.approx(fast.val_bpb, rel=2e-4)


def test_a_clusters_cpus_tokenize_and_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "ROW_GROUP_BYTES", 4000)
    alone = small_shards(tmp_path, shard_bytes=15_000)

    def interrupt(done: int, total: int) -> None:
        if len(list(tmp_path.glob(".cluster*/done/*"))) == 2:
            raise KeyboardInterrupt

    options = {"shard_bytes": 15_000, "num_workers": 2, "executor": RayExecutor()}
    where = (tmp_path / "corpus", alone.tokenizer, tmp_path / "cluster")
    with pytest.raises(KeyboardInterrupt):
        build_shards(*where, progress=interrupt, **options)
    finished = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob(".cluster*/train_0000[01].bin")}
    seen: list[tuple[int, int]] = []
    cluster = build_shards(*where, progress=lambda done, total: seen.append((done, total)), **options)
    assert cluster.manifest == alone.manifest and RayExecutor().num_cpus == 2
    assert len(finished) == 2 and {n: (cluster.path / n).stat().st_mtime_ns for n in finished} == finished
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
