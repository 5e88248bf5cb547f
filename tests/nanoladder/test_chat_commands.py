"""chat, chat-eval, export and the nanochat commands on the command line, as a user gives them."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from served import write_checkpoint
from task_files import write_tasks

from nanochat_model.chat import Piece, load_chat
from nanochat_model.chat_eval import CHAT_TASKS
from nanochat_model.checkpoint import load_model, tokenizer_dir
from nanochat_model.demo_tasks import write_demo_tasks
from nanochat_model.tokenizer import Tokenizer
from nanoladder.cli import run
from nanoladder.reply_text import marked

torch.set_num_threads(1)
QUESTION = "hello there"
SAMPLE = Path(__file__).read_text(encoding="utf8")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("chat") / "tiny", context=4096))


def chat(run_dir: str, *args: str) -> int:
    return run(["chat", "--checkpoint", run_dir, "--num-threads", "1", "--device", "cpu", "--max-tokens", "20", *args])


def said(capsys: pytest.CaptureFixture[str], run_dir: str, *args: str) -> str:
    assert chat(run_dir, "-p", QUESTION, "--json", *args) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompt"] == QUESTION and facts["calls"] == []
    return str(facts["reply"])


def test_one_message_is_answered_by_the_settings_given(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = said(capsys, run_dir, "--temperature", "0")
    assert greedy == "".join(load_chat(run_dir).reply(QUESTION, temperature=0, max_tokens=20))
    assert said(capsys, run_dir, "--temperature", "2", "--top-k", "1", "--seed", "9") == greedy
    hot = ["--temperature", "1.5", "--top-k", "0"]
    assert said(capsys, run_dir, *hot, "--seed", "1") == said(capsys, run_dir, *hot, "--seed", "1")
    assert said(capsys, run_dir, *hot, "--seed", "1") != said(capsys, run_dir, *hot, "--seed", "2")
    assert chat(run_dir, "-p", QUESTION, "--temperature", "0") == 0
    assert capsys.readouterr().out == greedy + "\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "a", "--temperature", "-1"], "temperature -1.0 must be 0 or more"),
        (["-p", "a", "--top-k", "-1"], "top_k -1 must be 0 (all tokens) or more"),
        (["-p", "a", "--max-tokens", "0"], "max_tokens 0 must be at least 1"),
        (["-p", "a " * 5000], "shorten the message"),
        (["--json"], "give it with -p"),
    ],
)
def test_what_cannot_be_done_is_one_line(run_dir: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(run_dir, *args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_calculator_calls_stand_between_marks() -> None:
    def shown(*pieces: tuple[str, str]) -> str:
        return "".join(marked(Piece(kind, text) for kind, text in pieces))

    call = [("python", "31 "), ("python", "+24"), ("python_output", "55")]
    assert shown(("text", "so "), *call, ("text", "it is 55")) == "so «31 +24 → 55» it is 55"
    assert shown(*call, ("text", "\n#### 55")) == "«31 +24 → 55»\n#### 55"
    assert shown(*call) == "«31 +24 → 55»" and shown(call[0]) == "«31 »" and shown() == ""


class Terminal:
    """A command under a terminal of its own."""

    def __init__(self, *command: str) -> None:
        ours, theirs = pty.openpty()
        self._fd = ours
        main = [sys.executable, "-c", "from nanoladder.cli import main; main()"]
        env = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            [*main, *command], stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)

    def read_until(self, *ends: str) -> str:
        """What is written up to one of `ends` (the first that comes), as it comes; also the end of the command ends it."""
        text, deadline = "", time.monotonic() + 300
        while not text.endswith(ends):
            assert time.monotonic() < deadline, text
            if not select.select([self._fd], [], [], 1)[0]:
                continue
            try:
                text += os.read(self._fd, 1).decode("utf8", "replace")
            except OSError:  # the other side is closed
                break
        return text.replace("\r\n", "\n")

    def write(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def test_a_conversation_in_a_terminal(run_dir: str) -> None:
    """History, streaming, /clear, an unknown command, Ctrl-C during a reply, end of input."""
    terminal = Terminal("chat", "--checkpoint", run_dir, "--temperature", "0", "--num-threads", "1", "--max-tokens", "3000")
    try:
        terminal.read_until("you: ")
        replies = []
        for text in (QUESTION, QUESTION, "/clear", QUESTION):
            terminal.write(text + "\n")
            if text == "/clear":
                assert "(forgotten)" in terminal.read_until("you: ")
                continue
            terminal.read_until("assistant: ")
            first = terminal.read_until(*"abcdefghijklmnopqrstuvwxyz")  # some of it is there long before its 3,000 tokens are
            os.killpg(terminal.process.pid, signal.SIGINT)
            replies.append(first + terminal.read_until("you: "))
            assert "(cut short)" in replies[-1]
        assert replies[0][:1] == replies[2][:1]
        terminal.write("/foo\n")
        assert "unknown command '/foo'" in terminal.read_until("you: ")
        terminal.write("\x04")
        assert terminal.process.wait(240) == 0
    finally:
        terminal.close()


def test_clear_forgets(run_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([QUESTION, QUESTION, "/clear", QUESTION])

    def typed(prompt: str) -> str:
        print(prompt, end="")
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert chat(run_dir, "--temperature", "0") == 0
    out = capsys.readouterr().out
    first, second, third = (part.split("\n\nyou: ")[0] for part in out.split("assistant: ")[1:])
    assert first == third.rstrip("\n")
    assert first != second, "the second reply knows of the first exchange"


def test_chat_eval_of_the_five_and_of_files(run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["chat-eval", "--checkpoint", run_dir, "--device", "cpu", "--num-threads", "1", "--max-new-tokens", "8"]
    five = [*command, "--tasks-dir", str(write_tasks(tmp_path / "tasks")), "--max-problems", "4"]
    assert run([*five, "--json", "--out", str(tmp_path / "result.json")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [t["task"] for t in result["tasks"]] == list(CHAT_TASKS) and result["chatcore"] == result["score"]
    assert all(t["num_problems"] == 4 and t["standard_error"] >= 0 for t in result["tasks"])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    demo = write_demo_tasks(tmp_path / "demo", num_train=1, num_test=5)
    assert run([*command, "--tasks", *demo.tasks]) == 0
    table = capsys.readouterr().out
    assert "demo-sums" in table and "demo-choices" in table and "mean of the centred accuracies" in table
    for args, message in (
        (["--tasks", "ARC-Esy"], "known dataset (ARC-Easy"),
        (["--tasks-dir", str(tmp_path / "none")], "no 'test' files of ARC-Easy"),
        ([], "give --tasks-dir"),
    ):
        assert run([*command, *args]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_a_checkpoint_goes_out_and_comes_back(run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To nanochat's layout and back to the same weights and words; to a folder of its own."""
    theirs, back, alone = (str(tmp_path / name) for name in ("theirs", "back", "alone"))
    assert run(["export-nanochat", run_dir, "--out", theirs, "--json"]) == 0
    files = {Path(f).name for f in json.loads(capsys.readouterr().out)["files"]}
    assert files == {"model_000003.pt", "meta_000003.json", "tokenizer.pkl", "token_bytes.pt"}
    assert run(["import-nanochat", theirs, "--out", back, "--json"]) == 0
    assert Path(json.loads(capsys.readouterr().out)["checkpoint"]).is_dir()
    before, after = load_model(run_dir).state_dict(), load_model(back).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert said(capsys, back, "--temperature", "0") == said(capsys, run_dir, "--temperature", "0")
    ours, lengths = Tokenizer.load(tokenizer_dir(run_dir)), torch.load(Path(theirs) / "tokenizer" / "token_bytes.pt")
    assert Tokenizer.load(tokenizer_dir(back)).encode(SAMPLE) == ours.encode(SAMPLE)
    assert lengths.dtype == torch.int32 and lengths.tolist() == ours.token_bytes().tolist()
    assert run(["export", run_dir, "--out", alone, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] == ["config.json", "model.safetensors", "modeling_nanoladder.py", "tokenizer.json"]
    assert run(["export", str(tmp_path / "none"), "--out", alone]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
