"""A launch on Ray Train: a rank runs out of memory, a worker is killed, the run goes on by itself, and who should know is told."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from faulty_training import KILL_STEP, SMALL_AND_KILLED
from rich.console import Console
from tiny_run import RUNTIME, tiny_config
from webhook_receiver import WebhookReceiver

from nanochat_model.errors import ConfigError
from nanochat_model.recipe import NANOCHAT
from nanochat_model.record import RunRecord
from nanochat_model.train import pretrain
from nanoladder import live_run
from nanoladder.launch import LaunchOptions, launch
from nanoladder.laws_to_recipe import recipe_from_laws
from nanoladder.live_run import LiveRun, span, step_line
from nanoladder.plan import LaunchPlan, LossPrediction, plan_config
from nanoladder.target import Target
from nanoladder.workspace import Workspace

pytestmark = pytest.mark.seconds(60)
SUPPORT = str(Path(__file__).parents[1] / "support")


def tiny_plan(**overrides: Any) -> LaunchPlan:
    config = tiny_config(num_steps=60, eval__every_steps=20, **overrides)
    target = Target(device="cpu", num_devices=2, price_per_device_hour=2.0)
    return plan_config(config, resolved=recipe_from_laws(None, NANOCHAT), target=target)


class Launched(NamedTuple):
    plan: LaunchPlan
    workspace: Workspace
    verdict: dict[str, Any]
    events: list[dict[str, Any]]
    posted: list[dict[str, Any]]
    text: str


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    workspace, plan, out = Workspace(tmp_path_factory.mktemp("launch")), tiny_plan(), io.StringIO()
    events: list[dict[str, Any]] = []
    with WebhookReceiver() as receiver, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")]))
        patch.setattr(live_run, "Console", lambda **kw: Console(file=out, width=160))
        patch.setattr(live_run, "LOG_EVERY_SECONDS", 0.0)
        options = LaunchOptions(webhook=receiver.url, sample_every_steps=30)
        verdict = launch(plan, workspace, options, progress=events.append, train_function=SMALL_AND_KILLED)
        return Launched(plan, workspace, verdict, events, receiver.got, out.getvalue())


@pytest.mark.slow
def test_a_run_outlives_a_rank_without_memory_and_a_killed_worker(launched: Launched, tmp_path: Path) -> None:
    record = RunRecord.load(launched.workspace.run_dir(launched.verdict["run_id"]))
    alone = pretrain(launched.plan.config, RUNTIME, run_dir=tmp_path)
    assert record.status == "complete" and record.val_bpb == pytest.approx(alone.val_bpb, rel=1e-4)
    starts = [e["step"] for e in launched.events if e["event"] == "start"]
    assert starts == [0, 0, KILL_STEP], "memory ran out at once; the kill cost no step"
    assert record.micro_batch_rows == 2 and len(record.out_of_memory) == 1
    assert [p.step for p in record.curve] == [20, 40, 60] and [e["event"] for e in launched.events].count("eval") == 3
    assert (record.num_devices, record.backend, record.stage) == (2, "train", "production")
    folder = launched.workspace.run_dir(record.run_id)
    assert list((folder / "checkpoints").glob("step_*")), "a production run keeps its checkpoints"
    assert launched.verdict["status"] == "complete" and launched.verdict["measured"] == record.val_bpb
    assert json.loads((folder / "verdict.json").read_text())["text"] == launched.verdict["text"]


@pytest.mark.slow
def test_launched_again_it_says_what_was_said_and_alerted_before(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other laws, another speed, no Ray: the finished run is judged by what was predicted before it began."""
    monkeypatch.setattr("nanoladder.ray_init.ensure_ray", lambda *args, **kw: pytest.fail("a finished run needs no Ray"))
    later = replace(launched.plan, hours=99.0, prediction=LossPrediction(
        loss=1.0, low=0.9, high=1.1, surface_loss=None, level=None, extrapolation=None, verdict="ok"))  # fmt: skip
    again = launch(later, launched.workspace, LaunchOptions(quiet=True, mlflow=""))
    assert again == launched.verdict and len(again["alerts"]) >= 1 and again["predicted_hours"] == launched.plan.hours


@pytest.mark.slow
def test_terminal_webhook_and_mlflow_are_told(launched: Launched) -> None:
    assert "ALERT restarted at step 20: workers were replaced" in launched.text
    assert "goes on from step 20" in launched.text and "step 60/60" in launched.text and "validation" in launched.text
    assert "step 30: '" in launched.text, "samples"
    assert any(p["kind"] == "restarted" and p["step"] == KILL_STEP for p in launched.posted)
    assert any("restarted at step 20" in line for line in launched.verdict["alerts"])
    from mlflow.tracking import MlflowClient

    client = MlflowClient(launched.workspace.mlflow_uri)
    experiment = client.get_experiment_by_name("nanoladder")
    runs = client.search_runs([experiment.experiment_id], f"tags.`nanoladder.run_id` = '{launched.verdict['run_id']}'")
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    tags = runs[0].data.tags
    assert tags["nanoladder.alert"] == launched.verdict["alerts"][-1] and "restarted 2" in tags["nanoladder.alerts"]
    assert tags["nanoladder.verdict"] == launched.verdict["text"]
    assert runs[0].data.metrics["val_bpb"] == pytest.approx(launched.verdict["measured"])


def test_the_live_line_has_all_seven_things() -> None:
    plan = tiny_plan()
    event = {"event": "step", "step": 20, "train_loss": 3.25, "tokens_per_second": 256.0, "mfu": 0.415, "seconds": 1800.0}
    line = step_line(event, plan, 1.2345)
    assert line.startswith("step 20/60  loss 3.2500  bpb 1.2345  256 tok/s  MFU 41.5%  40 s left  $2.00 of $")
    assert "bpb –" in step_line({**event, "mfu": None}, plan) and "MFU unknown" in step_line({**event, "mfu": None}, plan)
    assert span(89) == "89 s" and span(600) == "10 min" and span(3 * 3600 + 420) == "3 h 07 min"


def test_on_a_terminal_the_line_stays_in_place() -> None:
    out = io.StringIO()
    plan = tiny_plan()
    with LiveRun(plan, Console(file=out, force_terminal=True, width=120)) as live:
        times = {"startup_seconds": {"build": 1.0, "first_step": 2.0}, "step_seconds": {"compute": 3.0, "communication": 1.0}}
        for step in (10, 20, 30):
            facts = {"train_loss": 3.0, "tokens_per_second": 99.0, "mfu": None, "seconds": 1.0, **times}
            live.event({"event": "step", "step": step, "rank_compute_seconds": (2.0, 4.0), **facts})
        live.event({"event": "eval", "step": 30, "val_bpb": 2.5})
        assert live._live is not None
        live._live.refresh()
    text = out.getvalue()
    assert "step 30: validation 2.5000 bpb\n" in text.replace("\r", "") and "step 30/60" in text
    assert "step 10/60  loss 3.0000\n" not in text
    assert text.count("first step done after 3.0 s (build 1.0, first step 2.0)") == 1
    assert text.count("a step: compute 75%, communication 25%, slowest rank 1 (+100% on the fastest)") == 1


def test_a_plan_without_data_or_with_a_bad_law_is_not_launched(tmp_path: Path) -> None:
    bad = tiny_plan(optimizer__matrix_lr=1.0, optimizer__weight_decay=0.5)
    with pytest.raises(ConfigError, match="weights would be gone"):
        launch(bad, Workspace(tmp_path), LaunchOptions(quiet=True))
    nothing = tiny_plan(data__manifest_hash="")
    with pytest.raises(ConfigError, match="no token shards"):
        launch(nothing, Workspace(tmp_path), LaunchOptions(quiet=True))
