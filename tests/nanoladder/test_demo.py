"""The demo from end to end at a tiny size: every stage real, on a real Ray, in the final file layout."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
from rich.console import Console
from small_text import texts, write_jsonl

from nanochat_model.horizon import Horizon
from nanochat_model.record import RunRecord
from nanoladder.demo import demo_stages, run_demo
from nanoladder.demo_size import DemoSize
from nanoladder.demo_stages import TUNING_SWEEPS, DemoStages, record_sweeps
from nanoladder.outcomes import read_prediction, read_production
from nanoladder.stages import Facts
from nanoladder.workspace import Workspace

pytestmark = pytest.mark.seconds(90)
BUDGETS = (1e8, 2e8, 4e8, 8e8)
SHAPES = ((1, 24), (1, 32), (1, 48))
TINY = DemoSize(
    vocab_size=384,
    sequence_len=64,
    val_fraction=0.2,
    eval_tokens=2048,
    curve_points=2,
    isoflop=tuple((budget, SHAPES) for budget in BUDGETS),
    noise_cell=(2e8, (1, 32)),
    noise_seeds=(1,),
    weight_decay_cells=(((1, 24), 4e3),),
    weight_decay_multipliers=(0.5, 1.0, 2.0),
    batch_cells=(((1, 24), 4e3), ((1, 24), 8e3)),
    batch_multipliers=(1.0, 2.0),
    lr_multipliers=(0.5, 1.0, 2.0),
    promotion_cells=(((1, 24), 4e3), ((1, 32), 4e3)),
    promotion_variants={"a quarter of the batch": {"batch_multiplier": 1.0}},
    promotion_eval_steps=5,
    production_shapes=SHAPES,
    sft_conversations=80,
    sft_task_rows=20,
    sft_epochs=2.0,
    chat_eval_problems=10,
    chat_eval_max_tokens=8,
    chat_max_tokens=8,
    n_boot=50,
    num_workers=1,
    concurrent_trials=1,
)
NAMES = [
    "corpus", "tokenizer", "shards", "tuning", "promotion", "isoflop", "laws", "prediction", "production", "sft", "chat_eval",
    "chat", "report",
]  # fmt: skip


class Finished(NamedTuple):
    """A finished demo: its folder, sizes, facts and what it printed."""

    workspace: Workspace
    size: DemoSize
    facts: dict[str, Facts]
    text: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("demo")
    size = replace(TINY, source=str(write_jsonl(folder / "text.jsonl", texts(300))))
    out = io.StringIO()
    facts = run_demo(folder / "root", size, Console(file=out, width=160))
    return Finished(Workspace(folder / "root"), size, facts, out.getvalue())


@pytest.mark.slow
def test_every_stage_leaves_its_artifact(demo: Finished) -> None:
    workspace, facts, text = demo.workspace, demo.facts, demo.text
    assert list(facts) == NAMES
    names = {s for r in workspace.records() for s in record_sweeps(r)}
    assert {
        "demo_isoflop",
        "demo_noise",
        "demo_wd",
        "demo_batch",
        "demo_promotion/small",
        "demo_promotion/large",
        "production",
    } <= names
    assert json.loads(workspace.laws_path.read_text())["schema_version"] == 1
    assert workspace.report_path.stat().st_size > 1e5
    assert (workspace.root / "mlflow.db").exists() and (workspace.root / "optuna.db").exists()
    assert "Production loss  predicted" in text and f"open in a browser: {workspace.report_path}" in text
    assert "Chat evaluation  demo-sums: " in text and "asked: What is 31 + 24?" in text
    for program in ("mlflow", "optuna", "nanoladder"):
        assert f"{program} " in text


@pytest.mark.slow
def test_cells_are_trained_at_their_budget_by_the_tuned_recipe_from_their_own_tokens(demo: Finished) -> None:
    ladder = DemoStages(demo.size, demo.workspace)
    recipe = ladder.tuned_recipe(ladder.fit(TUNING_SWEEPS)).recipe
    cells = [r for r in demo.workspace.records() if "demo_isoflop" in record_sweeps(r)]
    assert len(cells) == len(BUDGETS) * len(SHAPES)
    for record in cells:
        budget = float(record.tags["budget"])
        assert record.train_flops == pytest.approx(budget, rel=0.2)
        assert record.val_bpb is not None and 0.5 < record.val_bpb < 12
        expected = recipe.resolve(record.config.model, Horizon(train_flops=budget), data=record.config.data)
        assert record.config == expected
    assert len({r.config.optimizer.weight_decay for r in cells}) > len(SHAPES), "decay follows tokens, not the shape alone"


@pytest.mark.slow
def test_the_prediction_was_written_before_the_run_started(demo: Finished) -> None:
    workspace = demo.workspace
    said = read_prediction(workspace.prediction_path)
    record = RunRecord.load(workspace.run_dir(said["run_id"]))
    assert said["predicted_at"] <= record.started_at
    assert record.backend == "train", "production goes through Ray Train"
    assert said["C"] == pytest.approx(4 * max(BUDGETS), rel=0.1)
    assert any((workspace.run_dir(said["run_id"]) / "checkpoints").iterdir())
    production = read_production(workspace)
    assert production is not None and production["measured"] == record.val_bpb


@pytest.mark.slow
def test_a_true_gain_is_adopted_small_and_again_large_with_paired_seeds(demo: Finished) -> None:
    verdicts = demo.facts["promotion"]["promotions"]
    assert [(p["stage"], p["verdict"], p["n_seeds"]) for p in verdicts] == [("small", "adopt", 3), ("large", "adopt", 3)]
    for p in verdicts:
        runs = [RunRecord.load(demo.workspace.run_dir(r)) for r in (*p["baseline_run_ids"], *p["run_ids"])]
        logs = [math.log(r.val_bpb) for r in runs if r.val_bpb]
        assert p["gain"] == pytest.approx(sum(logs[:3]) / 3 - sum(logs[3:]) / 3)
    assert "large: adopt “a quarter of the batch”" in demo.text


@pytest.mark.slow
def test_the_chat_score_is_the_mean_over_unseen_questions_and_production_carries_diagnostics(demo: Finished) -> None:
    found = demo.facts["chat_eval"]
    assert [(t["task"], t["num_problems"]) for t in found["tasks"]] == [("demo-sums", 10), ("demo-choices", 10)]
    assert found["score"] == pytest.approx(sum(t["centered"] for t in found["tasks"]) / 2)
    seen, asked = (
        [json.loads(x)["question"] for x in (demo.workspace.root / f"tasks/sums-{part}.jsonl").open()] for part in ("train", "test")
    )
    assert len(seen) == 20 and len(asked) == 10 and not set(seen) & set(asked)
    record = RunRecord.load(demo.workspace.run_dir(read_prediction(demo.workspace.prediction_path)["run_id"]))
    assert any(name.startswith("update_to_weight/") for name in record.diagnostics)


@pytest.mark.slow
def test_second_run_skips_everything_without_ray(demo: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, size, facts = demo.workspace, demo.size, demo.facts
    before = {p: p.stat().st_mtime_ns for p in workspace.root.rglob("*") if p.is_file() and "mlflow.db" not in p.name}
    out = io.StringIO()
    monkeypatch.setattr("nanoladder.ray_init.ensure_ray", lambda *args, **options: pytest.fail("nothing is left to train"))
    again = run_demo(workspace.root, size, Console(file=out, width=160))
    assert again == facts
    assert out.getvalue().count("(done before)") == len(NAMES)
    after = {p: p.stat().st_mtime_ns for p in workspace.root.rglob("*") if p.is_file() and "mlflow.db" not in p.name}
    assert after == before, "nothing was written"


@pytest.mark.slow
def test_a_lost_record_is_trained_again_and_nothing_else(demo: Finished) -> None:
    workspace, size, facts = demo.workspace, demo.size, demo.facts
    lost = facts["tuning"]["run_ids"][0]
    kept = {r.run_id: r.finished_at for r in workspace.records() if r.run_id != lost}
    old = RunRecord.load(workspace.run_dir(lost))
    (workspace.run_dir(lost) / "record.json").unlink()
    out = io.StringIO()
    run_demo(workspace.root, size, Console(file=out, width=160))
    new = {r.run_id: r for r in workspace.records()}
    assert new[lost].val_bpb == pytest.approx(old.val_bpb, rel=1e-3)
    assert {k: v.finished_at for k, v in new.items() if k in kept} == kept
    skipped = out.getvalue().count("(done before)")
    assert len(NAMES) - 1 >= skipped >= 4


def test_every_size_is_a_field_and_every_shape_a_model() -> None:
    size = DemoSize()
    shapes = {s for _, row in size.isoflop for s in row} | set(size.production_shapes) | {s for s, _ in size.weight_decay_cells}
    for shape in shapes:
        model = size.model(shape)
        assert (model.depth, model.model_dim) == shape
        assert model.head_dim * model.num_heads == model.model_dim and model.num_heads >= 2
    budgets = [b for b, _ in size.isoflop]
    assert len(budgets) >= 4 and max(budgets) / min(budgets) >= 10 * (1 - 1e-9)
    assert all(len(row) >= 5 for _, row in size.isoflop)
    assert len(demo_stages(size, Workspace("/nowhere"))) == len(NAMES)
