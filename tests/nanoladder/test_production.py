"""The production preset from a download to a chat reply, at a tiny size; what exists is skipped, what changed is made again."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_hub import DATASET, FaultyHub
from rich.console import Console
from small_text import texts
from task_files import smoltalk_rows, write_jsonl, write_tasks

from nanochat_model.errors import ConfigError
from nanochat_model.record import RunRecord
from nanoladder.production import missing_inputs, plan_production, production_stages, run_production
from nanoladder.production_card import production_card
from nanoladder.production_config import (
    ChatStage,
    DataStage,
    DeviceStage,
    EvaluationStage,
    ModelStage,
    PretrainingStage,
    ProductionConfig,
    SftStage,
    read_production,
)
from nanoladder.stages import Facts
from nanoladder.workspace import Workspace

pytestmark = pytest.mark.seconds(30)
ROOT = Path(__file__).parents[2]
NAMES = ["download", "corpus", "tokenizer", "shards", "pretraining", "evaluation", "sft", "chat", "report"]
TINY = ProductionConfig(
    name="tiny",
    data=DataStage(dataset=DATASET, vocab_size=384, val_fraction=0.2, num_workers=1),
    model=ModelStage(depth=1, aspect_ratio=32, head_dim=16, sequence_len=64, window_pattern="L"),
    pretraining=PretrainingStage(  # at so few tokens the rule for weight decay would erase the weights
        recipe="demo", num_tokens=2e4, overrides={"eval.num_tokens": 2048, "optimizer.weight_decay": 0.01}
    ),
    device=DeviceStage(device="cpu", num_devices=1, price=1.0),
    sft=SftStage(num_demo_conversations=60, num_steps=3),
    chat=ChatStage(max_problems=4, max_new_tokens=4),
)


class Made(NamedTuple):
    """A finished production, its folder, the hub it came from (closed by now), and what was printed."""

    workspace: Workspace
    config: ProductionConfig
    facts: dict[str, Facts]
    text: str


def run(config: ProductionConfig, workspace: Workspace) -> tuple[dict[str, Facts], str]:
    out = io.StringIO()
    facts = run_production(config, workspace, console=Console(file=out, width=160))
    return facts, out.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("production")
    data = folder / "hub" / DATASET
    data.mkdir(parents=True)
    for i in range(3):
        pq.write_table(pa.table({"text": texts(100, seed=i)}), data / f"shard_{i}.parquet")
    with FaultyHub(folder / "hub") as hub:
        hub.cut_after["shard_0"] = [5000]
        config = replace(TINY, data=replace(TINY.data, endpoint=hub.endpoint))
        workspace = Workspace(folder / "root")
        return Made(workspace, config, *run(config, workspace))


@pytest.mark.slow
def test_every_stage_ran_and_left_what_it_says(made: Made) -> None:
    facts = made.facts
    assert list(facts) == NAMES
    needed = plan_production(made.config, Workspace("/nowhere")).data_bytes
    assert needed == pytest.approx(2e4 * 4.8, rel=0.01)
    assert len(facts["download"]["files"]) == 2, "96 kB of training text: one file of 100 kB, a fifth for validation, is too few"
    verdict = facts["pretraining"]["verdict"]
    record = RunRecord.load(Path(facts["pretraining"]["folder"]))
    assert record.status == "complete" and record.backend == "train" and verdict["measured"] == record.val_bpb
    assert facts["evaluation"]["val_bpb"] == pytest.approx(record.val_bpb, rel=1e-4), "what the checkpoint on disk reaches"
    tuned = RunRecord.load(Path(facts["sft"]["folder"]))
    assert tuned.kind == "sft" and facts["sft"]["after"] < facts["sft"]["before"]
    assert len(facts["chat"]["tasks"]) == 2 and all(t["num_problems"] == 4 for t in facts["chat"]["tasks"])


@pytest.mark.slow
def test_the_card_says_planned_and_actual_and_how_to_talk(made: Made) -> None:
    card = (made.workspace.root / "production.md").read_text()
    assert card in made.text
    assert f"{made.facts['pretraining']['verdict']['measured']:.4f} |" in card and "| cost | $" in card
    assert f"nanoladder serve {made.facts['sft']['folder']} --port 8000" in card
    dearer = replace(made.config, device=replace(made.config.device, price=100.0))
    hours = made.facts["pretraining"]["verdict"]["hours"]
    assert f"| ${100 * hours:,.2f} |" in production_card(dearer, made.facts), "a price given later is reckoned with"
    stored = json.loads((made.workspace.root / "production.json").read_text())
    assert stored["config"]["name"] == "tiny" and set(stored["stages"]) == set(NAMES) - {"report"}


@pytest.mark.slow
def test_again_everything_is_skipped_without_a_hub(made: Made) -> None:
    """The hub is gone by now: a skipped stage asks nobody."""
    facts, text = run(made.config, made.workspace)
    assert facts == made.facts and text.count("(done before)") == len(NAMES)


@pytest.mark.slow
def test_another_fine_tuning_makes_only_what_follows_from_it(made: Made) -> None:
    changed = replace(made.config, sft=replace(made.config.sft, num_steps=4))
    facts, text = run(changed, made.workspace)
    assert text.count("(done before)") == NAMES.index("sft")
    assert facts["sft"]["folder"] != made.facts["sft"]["folder"] and facts["pretraining"] == made.facts["pretraining"]


@pytest.mark.parametrize("name", ["demo", "d24_h100", "d24_mi300x"])
def test_the_files_of_the_repository_are_read_and_planned(name: str) -> None:
    config = read_production(ROOT / "production" / f"{name}.toml")
    plan = plan_production(config, Workspace("/nowhere"))
    assert not plan.blocking and plan.config.model.depth == config.model.depth


def test_what_later_stages_need_is_asked_for_first(tmp_path: Path) -> None:
    h100 = read_production(ROOT / "production" / "d24_h100.toml", {"sft.tasks_dir": str(tmp_path)})
    missing = "\n".join(missing_inputs(h100))
    assert "auxiliary_train" in missing and "openai/gsm8k" in missing and "HumanEval" in missing and "smol-smoltalk" in missing
    write_tasks(tmp_path)
    assert not missing_inputs(h100)
    wrong = replace(
        TINY, chat=replace(TINY.chat, tasks=("sums=/nowhere.jsonl",)), evaluation=EvaluationStage(core_bundle="/nowhere")
    )
    assert ["/nowhere.jsonl" in line or "CORE bundle" in line for line in missing_inputs(wrong)] == [True, True]


def test_files_that_were_edited_are_another_input(tmp_path: Path) -> None:
    chats, sums = write_jsonl(tmp_path / "chats.jsonl", smoltalk_rows(3)), write_jsonl(tmp_path / "sums.jsonl", smoltalk_rows(4))
    config = replace(
        TINY, sft=replace(TINY.sft, conversations=("demo", f"{chats}=2")), chat=replace(TINY.chat, tasks=("demo", f"sums={sums}"))
    )

    def inputs() -> dict[str, object]:
        return {s.name: s.inputs for s in production_stages(config, Workspace(tmp_path / "root"))}

    before = inputs()
    assert inputs() == before
    write_jsonl(chats, smoltalk_rows(5))
    assert {n for n, given in inputs().items() if given != before[n]} == {"sft"}
    write_jsonl(sums, smoltalk_rows(5))
    assert {n for n, given in inputs().items() if given != before[n]} == {"sft", "chat"}


def test_wrong_files_and_overrides_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_production(tmp_path)
    path = tmp_path / "p.toml"
    path.write_text("[model]\ndepth = 3\n")
    config = read_production(path, {"sft.num_epochs": "2", "pretraining.overrides.eval.num_tokens": "4096", "data.dataset": "a/b"})
    assert (config.model.depth, config.sft.num_epochs, config.data.dataset) == (3, 2, "a/b")
    assert config.pretraining.overrides == {"eval.num_tokens": 4096}
    with pytest.raises(ConfigError, match=r"unknown override .model\.dept.; did you mean .model\.depth."):
        read_production(path, {"model.dept": "4"})
    with pytest.raises(ConfigError, match=r"model\.depth 'four' is not of type int"):
        read_production(path, {"model.depth": "four"})
    with pytest.raises(ConfigError, match="give at most one horizon"):
        read_production(path, {"pretraining.num_tokens": "1e9", "pretraining.tokens_per_param": "8"})
    path.write_text("[modle]\ndepth = 3\n")
    with pytest.raises(ConfigError, match=r"unknown field .*modle"):
        read_production(path)
    path.write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_production(path)
