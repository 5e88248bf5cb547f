"""Storage roots at a URL, on a local S3 server and on an fsspec file system."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import toy_training
from local_s3 import local_s3
from ray_nodes import wait_for
from tiny_run import RUNTIME, tiny_config, tiny_shards
from toy_training import HORIZON, MODEL

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.config import DataConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import run_id, write_atomic
from nanochat_model.record import RunRecord
from nanochat_model.train import pretrain
from nanoladder import cli, remote_steering, storage
from nanoladder.cells import make_trial
from nanoladder.space import Grid
from nanoladder.stopping import request_stop
from nanoladder.storage import Remote, mirrored, pull, push
from nanoladder.sweep import Cell, Sweep
from nanoladder.trial_spec import TrialSpec
from nanoladder.workspace import Workspace


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with local_s3() as url:
        yield url


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on this process is another machine: its working copies lie in `folder`."""
    monkeypatch.setenv("NANOLADDER_LOCAL", str(folder))


class PowerCut(BaseException):
    """Nothing catches it, so nothing tidies up."""


class Die(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, info: StepInfo) -> None:
        if info.step == self._step:
            raise PowerCut


def spec_of(workspace: Workspace, num_steps: int = 12, **changes: object) -> TrialSpec:
    config = tiny_config(num_steps=num_steps, eval__every_steps=4)
    config = replace(config, data=replace(config.data, path=str(workspace.shards_dir)))
    spec = TrialSpec(
        run_id=run_id(config),
        config=config,
        runtime=replace(RUNTIME, checkpoint_every_steps=4, keep_last=1),
        run_dir=str(workspace.run_dir(run_id(config))),
        storage=workspace.remote,
        root=str(workspace.root),
        keep_checkpoints=False,
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def test_a_run_that_lost_its_machine_goes_on_from_the_url_on_another(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3}/lost"
    machine(monkeypatch, tmp_path / "one")
    first = Workspace(url)
    shutil.copytree(tiny_shards().path, first.shards_dir)
    push(url, first.root)
    spec = spec_of(first)
    alone = pretrain(spec.config, RUNTIME, run_dir=tmp_path / "alone")
    with pytest.raises(PowerCut):
        spec.run([Die(step=10)])
    remote = Remote(url)
    names = {p.split("/")[3] for p in remote.listing(f"runs/{spec.run_id}/checkpoints")}
    assert names == {"step_000008"}, "as many as are kept here, and no more"

    machine(monkeypatch, tmp_path / "two")
    second = Workspace(url)
    assert second.root != first.root and not second.root.exists()
    again = spec_of(second)
    assert again.run_id == spec.run_id
    steps: list[int] = []

    class Note(Callback):
        def on_start(self, config: object, start_step: int) -> None:
            steps.append(start_step)

    record = again.run([Note()])
    assert steps == [8] and record.status == "complete"
    assert [(p.step, p.val_bpb) for p in record.curve] == [(p.step, p.val_bpb) for p in alone.curve]
    left = remote.listing(f"runs/{spec.run_id}")
    assert f"runs/{spec.run_id}/record.json" in left and not [p for p in left if "checkpoints" in p], "a finished run keeps none"
    assert not (second.run_dir(spec.run_id) / "checkpoints").exists()

    machine(monkeypatch, tmp_path / "three")
    third = Workspace(url)
    with mirrored(url):
        assert third.records() == [record] and third.vocab_size == len(tiny_shards().token_bytes)
    assert storage.find_record(url, str(first.root), str(first.run_dir(spec.run_id))) == record, "also where it was not trained"


def test_requests_travel_over_the_url(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_steering, "LOOK_SECONDS", 0.05)
    url = f"{s3}/steered"
    remote = Remote(url)
    machine(monkeypatch, tmp_path / "driver")
    driver = Workspace(url)
    cell = Cell(model=MODEL, horizon=HORIZON, overrides={"batch_tokens": 64})
    sweep = Sweep(name="s", question="?", cells=(cell,), space={"optimizer.matrix_lr": Grid([0.01])})
    trial = make_trial(sweep, cell, 0, {"optimizer.matrix_lr": 0.01}, 0, DataConfig(manifest_hash="toy"))
    asked = f"runs/{trial.run_id}/stop"
    remote.put_text("sweeps/s/stop.json", "of an earlier command")
    steering = remote_steering.RemoteSteering(driver)
    steering.on_begin([sweep])
    status = driver.sweep_dir("s") / "status.json"
    write_atomic(status, "running")
    wait_for(lambda: remote.get_text("sweeps/s/status.json") == "running")
    assert not (driver.sweep_dir("s") / "stop.json").exists()
    remote.put_text("sweeps/s/stop.json", "{}")
    wait_for((driver.sweep_dir("s") / "stop.json").exists)
    write_atomic(driver.root / asked, "enough")
    steering.on_start(trial, 1)
    wait_for(lambda: remote.get_text(asked) == "enough")
    steering.on_pause(trial)
    wait_for(lambda: remote.get_text(asked) is None)
    write_atomic(status, "stopped")
    steering.on_end()
    assert remote.get_text("sweeps/s/status.json") == "stopped"

    machine(monkeypatch, tmp_path / "worker")
    worker = Workspace(url)
    shutil.copytree(tiny_shards().path, worker.shards_dir)
    spec = spec_of(worker, num_steps=20_000)
    remote.put_text(f"runs/{spec.run_id}/stop", "enough")
    (worker.run_dir(spec.run_id)).mkdir(parents=True)
    record = spec.run()
    assert (record.status, record.error) == ("stopped", "enough") and remote.get_text(f"runs/{spec.run_id}/stop") is None


def test_commands_read_and_write_a_url(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{s3}/commands"
    machine(monkeypatch, tmp_path / "one")
    workspace = Workspace(url)
    record = pretrain(tiny_config(), RUNTIME, run_dir=workspace.run_dir(run_id(tiny_config())))
    (workspace.root / "optuna.db").write_text("local")
    request_stop(workspace.sweep_dir("s"))
    assert push(url, workspace.root) > 0 and push(url, workspace.root) == 0, "what is there is not sent again"
    assert not [p for p in Remote(url).listing() if p.endswith((".db", "stop.json")) or "/checkpoints/" in p]

    machine(monkeypatch, tmp_path / "two")
    assert cli.run(["runs", "--storage", url, "--json"]) == 0
    assert [r["run_id"] for r in json.loads(capsys.readouterr().out)["runs"]] == [record.run_id]
    assert pull(url, Workspace(url).root) == 0
    newer = replace(record, tags={"note": "said on the second machine"})
    newer.save(Workspace(url).run_dir(record.run_id))
    with mirrored(url):
        pass
    machine(monkeypatch, tmp_path / "one")
    with mirrored(url):
        assert RunRecord.load(workspace.run_dir(record.run_id)).tags == newer.tags


def test_a_record_that_shows_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a node may not see for a while what another has written."""
    folder = str(tmp_path / "late")
    record = toy_training.train(tiny_config(), run_dir=tmp_path / "run")
    threading.Timer(0.3, record.save, [folder]).start()
    assert storage.left_record("", str(tmp_path), folder) == record
    monkeypatch.setattr(storage, "SHOW_SECONDS", 0.0)
    with pytest.raises(ConfigError, match="give a --storage that all nodes share"):
        storage.left_record("", str(tmp_path), str(tmp_path / "never"))


def test_file_systems_of_fsspec_and_wrong_urls(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path / "one")
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.0)
    for url in ("memory://root/of/runs", f"file://{tmp_path}/shared"):
        workspace = Workspace(url)
        for name, text in {"laws.json": "{}", "runs/a/record.json": "{1}", "runs/a/checkpoints/x": "no"}.items():
            (workspace.root / name).parent.mkdir(parents=True, exist_ok=True)
            (workspace.root / name).write_text(text)
        assert push(url, workspace.root) == 2
        shutil.rmtree(workspace.root)
        assert pull(url, workspace.root) == 2 and (workspace.root / "runs/a/record.json").read_text() == "{1}"
    with pytest.raises(ConfigError, match="give a folder, s3://"):
        pull("nonsense://x", tmp_path)
    (tmp_path / "x").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot write x.*the same command again"):
        Remote(f"{s3}-that-nobody-made/x").put(tmp_path / "x", "x")
    assert Workspace(tmp_path).remote == ""
