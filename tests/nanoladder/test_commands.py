"""Commands in this process, one after the other as a user gives them: from a mirror of a hub to a fine-tuned model."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_text import texts
from task_files import write_jsonl, write_tasks

from nanochat_model.record import RunRecord
from nanoladder.cli import run
from nanoladder.workspace import Workspace

CPU = ["--device", "cpu", "--num-threads", "1"]
SMALL = [
    "--depth", "1", "--model-dim", "32", "--head-dim", "16", "--sequence-len", "64", "--window-pattern", "L", "--compile", "off",
    "--compute-dtype", "float32", "--packing", "keep_remainder", "--batch-tokens", "512", "--eval-tokens", "1024",
]  # fmt: skip


class Made(NamedTuple):
    """A storage root with data and one base run, tasks beside it, and what the commands said as JSON."""

    folder: Path
    root: Workspace
    base: Path
    said: dict[str, Any]

    @property
    def tuned(self) -> Path:
        return self.folder / "tuned"


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`nanoladder data mirror` as a process, and its address."""
    folder = tmp_path_factory.mktemp("hub")
    write_jsonl(folder / "docs.jsonl", [{"text": text} for text in texts(200)])
    made = ["--make", "local/text", "--source", str(folder / "docs.jsonl"), "--num-shards", "3", "--port", "0"]
    arguments = ["data", "mirror", "--root", str(folder), *made, "--json"]
    command = [sys.executable, "-c", "from nanoladder.cli import main; main()", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or lines[-1] != "}\n":  # told once it answers
        lines.append(process.stdout.readline())
        assert lines[-1], "the mirror has ended"
    facts = json.loads("".join(lines))
    assert facts["datasets"] == ["local/text"]
    yield facts["endpoint"], process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, mirror: tuple[str, Any]) -> Made:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("commands")
    storage, said = ["--storage", str(folder / "root")], {}

    def call(*args: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert run(list(args)) == 0, args
        said[args[0] if args[1].startswith("-") else f"{args[0]} {args[1]}"] = out.getvalue()

    call("data", "download", "--dataset", "local/text", "--tokens", "12e3", "--endpoint", mirror[0], *storage, "--json")
    source = json.loads(said["data download"])["folder"]
    call("data", "--source", source, "--vocab-size", "320", "--num-workers", "1", "--val-fraction", "0.2", *storage, "--json")
    call("train", *storage, *SMALL, *CPU, "--num-steps", "20")
    root = Workspace(folder / "root")
    (record,) = root.record_paths()
    write_tasks(folder / "tasks")
    write_jsonl(folder / "identity.jsonl", [[{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]] * 3)
    mixture = ["nanochat", f"{folder / 'identity.jsonl'}=2"]
    tuning = ["--tasks-dir", str(folder / "tasks"), "--conversations", *mixture, "--out", str(folder / "tuned"), "--json"]
    call("sft", "--checkpoint", str(record.parent), *tuning, *CPU, "--num-steps", "4")
    return Made(folder, root, record.parent, said)


def facts(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    """What a command says as JSON, which is all that is on stdout."""
    assert run([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_data_as_much_as_is_needed(made: Made) -> None:
    downloaded, built = json.loads(made.said["data download"]), json.loads(made.said["data"])
    assert 0 < len(downloaded["files"]) < downloaded["num_offered"] == 3 and "measured" in downloaded["note"]
    assert built["vocab_size"] == 320 and built["source"] == downloaded["folder"]
    assert built["train_tokens"] > 12e3 and 1 < built["bytes_per_token"] < 4


def test_a_tokenizer_shows_how_it_cuts(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    cut = facts(capsys, "tokenizer", "--storage", str(made.root.root), "def decode(s):")
    assert "".join(cut["pieces"]) == "def decode(s):" and len(cut["ids"]) < cut["num_bytes"]


def test_a_run_is_listed_and_its_checkpoint_evaluated(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = facts(capsys, "runs", "--storage", str(made.root.root))["runs"]
    record = RunRecord.load(made.base)
    assert row["run_id"] == record.run_id and record.run_id in made.said["train"]
    found = facts(capsys, "eval", "--checkpoint", str(made.base), *CPU)
    assert found["val_bpb"] == pytest.approx(record.val_bpb, rel=1e-5) and found["step"] == 20


def test_a_plan_uses_what_the_storage_root_knows(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    storage = ["--storage", str(made.root.root), "--device", "cpu"]
    plan = facts(capsys, "plan", "--depth", "1", "--num-tokens", "1e5", "--sequence-len", "64", "--recipe", "demo", *storage)
    assert plan["throughput"]["measured"] and plan["config"]["model"]["vocab_size"] == 320
    assert plan["data_bytes"] == pytest.approx(plan["num_tokens"] * json.loads(made.said["data"])["bytes_per_token"], rel=1e-3)


def test_a_mixture_of_datasets_and_files_is_fine_tuned_on(made: Made) -> None:
    record = json.loads(made.said["sft"])
    seen = {(s["data"].rsplit("/", 1)[-1], s["split"]): (s["num_train"], s["num_val"], s["num_seen"]) for s in record["sources"]}
    assert seen["SmolTalk", "train"] == (33, 0, 33) and seen["SmolTalk", "test"] == (0, 6, 0)
    assert seen["MMLU", "auxiliary_train"] == (9, 0, 27) and seen["GSM8K", "train"] == (8, 0, 32)
    assert seen["identity.jsonl", ""] == (3, 0, 6), "held-out sources are given, so nothing of the others is"
    assert record["status"] == "complete" and record["val_loss_after"] < record["val_loss_before"]
    assert record["num_conversations"] == 33 + 27 + 32 + 6 and record["num_truncated"] > 0
    assert RunRecord.load(made.tuned).kind == "sft"


def test_a_production_can_be_looked_at_first(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(Path(__file__).parents[2] / "production" / "demo.toml")
    plan = facts(capsys, "production", file, "--storage", str(made.folder / "none"), "--dry-run")
    assert plan["num_tokens"] == 1_999_872 and plan["stages"][-1] == "report" and plan["missing"] == []
    assert not (made.folder / "none").exists()


def test_ctrl_c_ends_a_mirror(made: Made, mirror: tuple[str, subprocess.Popen[str]]) -> None:
    """Last, since the mirror is gone then; what was downloaded is known without it."""
    mirror[1].send_signal(signal.SIGINT)
    mirror[1].wait(timeout=240)
    assert mirror[1].returncode in (0, 130)
