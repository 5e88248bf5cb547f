"""Chat evaluation: numbers that can be worked out by hand, and batched equal to one at a time."""

import math
from pathlib import Path

import pytest
import torch
from task_files import arc_rows, gsm8k_rows, humaneval_rows, smoltalk_rows, write_jsonl, write_tasks
from tiny_run import RUNTIME, tiny_config, tiny_shards

from nanochat_model import chat_eval
from nanochat_model.accuracy import accuracy_standard_error
from nanochat_model.chat_eval import ChatEvalOptions, ChatEvalResult, evaluate_chat, run_chat_eval
from nanochat_model.conversations import render_prompt
from nanochat_model.engine import generate
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.tasks.catalog import CHAT_TASKS, task_problems
from nanochat_model.tasks.layouts import final_number
from nanochat_model.tokenizer import Tokenizer
from nanochat_model.train import pretrain

OPTIONS = ChatEvalOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_shards().tokenizer


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights whose logits differ."""
    model = GPT(tiny_config(model__sequence_len=256, batch_tokens=256).model).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


@pytest.fixture(scope="module")
def result(model: GPT, tokenizer: Tokenizer, root: Path) -> ChatEvalResult:
    return evaluate_chat(model, tokenizer, tasks_dir=root, options=OPTIONS)


def test_chatcore_is_the_mean_of_centred_accuracies(result: ChatEvalResult) -> None:
    assert [t.task for t in result.tasks] == list(CHAT_TASKS) and result.chatcore == result.score
    for t in result.tasks:
        baseline = 0.25 if t.kind == "categorical" else 0.0
        assert t.random_baseline == baseline and t.accuracy == t.num_correct / t.num_problems
        assert t.centered == pytest.approx((t.accuracy - baseline) / (1 - baseline))
        assert t.standard_error == pytest.approx(accuracy_standard_error(t.accuracy, t.num_problems) / (1 - baseline))
    assert result.score == pytest.approx(sum(t.centered for t in result.tasks) / 5)
    assert result.standard_error == pytest.approx(math.sqrt(sum(t.standard_error**2 for t in result.tasks)) / 5)
    assert result.as_metrics()["chatcore"] == result.score and result.as_dict()["tasks"][0]["task"] == "ARC-Easy"


def test_the_error_of_a_share_is_that_of_two_more_right_and_two_more_wrong_answers() -> None:
    for none_or_all in (0.0, 1.0):
        assert accuracy_standard_error(none_or_all, 10) == pytest.approx(math.sqrt(2 * 12 / 14**3))
    assert accuracy_standard_error(0.92, 200) == pytest.approx(math.sqrt(186 * 18 / 204**3))
    assert accuracy_standard_error(0.3, 100_000) == pytest.approx(math.sqrt(0.3 * 0.7 / 100_000), rel=1e-4)
    # The interval of 95% holds the truth at least about as often as it says, also at p = 0.05 and n = 10.
    held = [abs((k + 2) / 14 - 0.05) <= 1.96 * accuracy_standard_error(k / 10, 10) for k in range(11)]
    chance = [math.comb(10, k) * 0.05**k * 0.95 ** (10 - k) for k in range(11)]
    assert sum(c for c, h in zip(chance, held, strict=True) if h) > 0.93


def test_letters_are_compared_one_problem_at_a_time(model: GPT, tokenizer: Tokenizer, root: Path, result: ChatEvalResult) -> None:
    """The whole logits of one unpadded prompt each, as the definition has it."""
    for task in result.tasks[:3]:
        correct = 0
        for p in task_problems(task.task, tasks_dir=root):
            logits = model(torch.tensor([render_prompt(p.prompt, tokenizer)[-256:]]))[0, -1]
            correct += max(p.letters, key=lambda c: logits[tokenizer.encode(c)[0]].item()) == p.answer
        assert correct == task.num_correct, task.task


@pytest.mark.parametrize("batch_rows", [1, 3])
def test_batches_change_nothing(model: GPT, tokenizer: Tokenizer, root: Path, result: ChatEvalResult, batch_rows: int) -> None:
    options = ChatEvalOptions(max_new_tokens=12, batch_rows=batch_rows)
    assert evaluate_chat(model, tokenizer, tasks_dir=root, options=options) == result


def test_a_generated_answer_is_what_the_engine_says_alone(
    model: GPT, tokenizer: Tokenizer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a right one counts, a wrong one does not: the judge is asked for each, in order."""
    asked: list[str] = []

    def judge(problems: list, replies: list[str]) -> list[bool]:
        asked.extend(replies)
        return [i % 3 == 0 for i in range(len(replies))]

    monkeypatch.setattr(chat_eval, "judge", judge)
    found = evaluate_chat(model, tokenizer, ["GSM8K"], tasks_dir=root, options=ChatEvalOptions(max_new_tokens=12, batch_rows=4))
    assert found.tasks[0].num_correct == 4 and found.chatcore is None
    stops = [tokenizer.special_id(t) for t in chat_eval.STOP_TOKENS]
    markers = {tokenizer.special_id(t) for t in ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")}
    compared = 0
    for p, reply in zip(task_problems("GSM8K", tasks_dir=root), asked, strict=True):
        prompt = render_prompt(p.prompt, tokenizer)
        alone = [ids[0] for ids in generate(model, [prompt], max_tokens=12, temperature=0, stop_ids=stops)]
        if not markers & set(alone):
            assert reply == tokenizer.decode([t for t in alone if t not in stops])
            compared += 1
    assert compared > 0


def test_a_model_that_knows_the_answers_gets_them_all(tokenizer: Tokenizer, model: GPT, tmp_path: Path, monkeypatch) -> None:
    """The reference answers, put where the model's replies come from, are right under every judge."""
    files = {"sums": gsm8k_rows(6), "programs": humaneval_rows(4)}
    tasks = [f"{name}={write_jsonl(tmp_path / f'{name}.jsonl', rows)}" for name, rows in files.items()]

    def replies(model: GPT, requests: list, *, max_rows: int) -> list[list[int]]:
        problems = {tuple(render_prompt(p.prompt, tokenizer)[-200:]): p for t in tasks for p in task_problems(t.split("=")[1])}
        answers = []
        for r in requests:
            content = problems[tuple(list(r.prompt)[-200:])].messages[-1]["content"]
            text = content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")
            answers.append([*tokenizer.encode(text), tokenizer.special_id("<|assistant_end|>")])
        return answers

    monkeypatch.setattr(chat_eval, "run_requests", replies)
    found = evaluate_chat(model, tokenizer, tasks, options=OPTIONS)
    assert [(t.task, t.accuracy) for t in found.tasks] == [("sums", 1.0), ("programs", 1.0)]
    assert all(0.1 < t.standard_error < 0.2 for t in found.tasks), "six and four right answers do not say that all will be"
    assert found.score == 1.0 and final_number("#### 10") == "10"


def test_guessing_of_a_file_is_that_of_its_choices(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "mine.jsonl", arc_rows(7))  # six of four choices, one of three
    (task,) = evaluate_chat(model, tokenizer, [str(path)]).tasks
    assert task.task == "mine" and task.random_baseline == pytest.approx((6 / 4 + 1 / 3) / 7)


def test_long_questions_are_cut_at_their_beginning_and_counted(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = arc_rows(2)
    rows[1]["question"] = "word " * 400
    (task,) = evaluate_chat(model, tokenizer, [str(write_jsonl(tmp_path / "a.jsonl", rows))]).tasks
    assert task.num_cropped == 1 and task.num_problems == 2


def test_from_a_checkpoint_and_bad_input(tmp_path: Path, root: Path, model: GPT, tokenizer: Tokenizer) -> None:
    pretrain(tiny_config(num_steps=2), RUNTIME, run_dir=tmp_path / "run")
    seen: list[tuple[str, int, int]] = []
    found = run_chat_eval(
        tmp_path / "run", ["ARC-Easy"], tasks_dir=root, max_problems=6, device="cpu", progress=lambda *a: seen.append(a)
    )
    assert found.tasks[0].num_problems == 6 and seen[-1] == ("ARC-Easy", 6, 6)
    with pytest.raises(ConfigError, match="no right answer"):
        evaluate_chat(model, tokenizer, [str(write_jsonl(tmp_path / "t.jsonl", smoltalk_rows(2)))])
    with pytest.raises(ConfigError, match="no tasks"):
        evaluate_chat(model, tokenizer, [])
    rows = arc_rows(1)
    rows[0] |= {"choices": {"text": ["x", "y"], "label": ["first", "second"]}, "answerKey": "first"}
    with pytest.raises(ConfigError, match=r"answer 'first' is \d tokens"):
        evaluate_chat(model, tokenizer, [str(write_jsonl(tmp_path / "b.jsonl", rows))])
