"""Datasets in their published layouts, what is right, and mixtures of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_text import texts
from task_files import arc_rows, gsm8k_rows, humaneval_rows, mmlu_rows, smoltalk_rows, write_jsonl, write_parquet, write_tasks

from nanochat_model.conversation_set import IGNORED, ConversationLoader
from nanochat_model.demo_tasks import write_demo_tasks
from nanochat_model.errors import ConfigError
from nanochat_model.mixture import Source, nanochat_mixture, parse_sources, repeats, weighted
from nanochat_model.sft_data import SFTData, prepare
from nanochat_model.tasks.catalog import CHAT_TASKS, read_problems, source_files, task_problems
from nanochat_model.tasks.judge import checked_program, extract_code, judge
from nanochat_model.tasks.layouts import Template, call_parts, final_number
from nanochat_model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(texts(40), 320)


def test_every_dataset_is_found_in_its_folder_form(root: Path) -> None:
    counts = {name: len(task_problems(name, tasks_dir=root)) for name in CHAT_TASKS}
    assert counts == {"ARC-Easy": 15, "ARC-Challenge": 15, "MMLU": 17, "GSM8K": 11, "HumanEval": 5}
    train = {name: len(list(read_problems(source_files(name, tasks_dir=root, split=split)))) for name, split in
             (("smoltalk", "train"), ("mmlu", "auxiliary_train"), ("gsm8k", "train"), ("arc-easy", "train"))}  # fmt: skip
    assert train == {"smoltalk": 33, "mmlu": 9, "gsm8k": 8, "arc-easy": 12}
    assert len(task_problems("MMLU", tasks_dir=root, max_problems=4)) == 4


def test_problems_come_in_the_order_of_nanochat(root: Path) -> None:
    """datasets.shuffle(seed=42) is numpy's permutation, so the first n are the same questions as there."""
    order = np.random.default_rng(42).permutation(15)
    questions = [p.messages[0]["content"] for p in task_problems("ARC-Easy", tasks_dir=root, max_problems=5)]
    assert all(f"Which is {i}?" in q for i, q in zip(order[:5], questions, strict=True))


def test_a_choice_is_asked_and_answered_by_its_letter(tmp_path: Path) -> None:
    problems = list(read_problems([write_jsonl(tmp_path / "a.jsonl", arc_rows(6))]))
    assert problems[0].messages[0]["content"] == (
        "Choose the right answer: Which is 0?\n- thing 0=A\n- thing 1=B\n- thing 2=C\n- thing 3=D\n\nAnswer with its letter alone."
    )
    assert [p.answer for p in problems] == ["A", "B", "C", "4", "B", "B"] and problems[4].letters == ("A", "B", "C")
    (tmp_path / "t.json").write_text('{"head": "{question}?\\n", "choice": "({letter}) {choice}\\n", "tail": ""}')
    template = Template.load(tmp_path / "t.json")
    again = next(read_problems([tmp_path / "a.jsonl"], template))
    assert again.messages[0]["content"].startswith("Which is 0??\n(A) thing 0\n")
    odd = arc_rows(1)[0] | {"question": "Is {choice} {letter}?"}  # braces in a question are no placeholders
    assert "Is {choice} {letter}?" in next(read_problems([write_jsonl(tmp_path / "b.jsonl", [odd])])).messages[0]["content"]


def test_gsm8k_calls_become_parts(tmp_path: Path) -> None:
    problem = next(read_problems([write_jsonl(tmp_path / "a.jsonl", gsm8k_rows(900)[-1:])]))
    parts = problem.messages[1]["content"]
    assert [p["type"] for p in parts] == ["text", "python", "python_output", "text"]
    assert (parts[1]["text"], parts[2]["text"]) == ("899+899", "1798") and problem.reference["number"] == "1798"
    assert "".join(p["text"] for p in parts if p["type"] == "text").endswith("1798 in all.\n#### 1,798")
    assert [final_number(t) for t in ("#### -3.5", "x #### 1,000 y", "####5", "18", "")] == ["-3.5", "1000", None, None, None]
    assert call_parts("no calls") == [{"type": "text", "text": "no calls"}]


def test_programs_pass_their_tests_or_not(tmp_path: Path) -> None:
    problem = list(read_problems([write_jsonl(tmp_path / "a.jsonl", humaneval_rows(3))]))[2]
    replies = {
        "    return x + 2\n": True,  # the body alone
        "def f2(x):\n    return math.floor(x) + 2": True,  # anew, with the prompt's imports
        "Sure:\n```python\ndef f2(x):\n    return x + 2\n```\nDone.": True,
        "```\ndef f2(x):\n    return x + 3\n```": False,
        "def f2(x):\n    while True: pass": False,
        "import sys; sys.exit(0)\ndef f2(x): pass": False,
        "I do not know": False,
    }
    for reply, right in replies.items():
        if "while" not in reply:
            assert judge([problem], [reply]) == [right], checked_program(problem, reply)
    assert extract_code("```py\nx\n```") == "x" and extract_code("```python\ny") == "y"


BAD = [
    ([{"question": "q", "words": "w"}], "fit no known layout"),
    ([{**arc_rows(1)[0], "answerKey": "Z"}], "row 0: answer 'Z' is none of A, B, C, D"),
    ([{**mmlu_rows(1)[0], "answer": 9}], "row 0: answer 9 is no index of its 4 choices"),
    ([gsm8k_rows(1)[0], {"question": "q", "answer": "no number"}], "row 1: answer has no result after ####"),
    ([{"messages": [{"role": "assistant", "content": "x"}]}], "row 0: message 1 has role 'assistant'"),
    (smoltalk_rows(2), "conversations have no right answer to judge"),
]


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_bad_rows_are_named(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_problems(str(write_parquet(tmp_path / "a.parquet", rows)))


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", gsm8k_rows(9))
    path.write_bytes(path.read_bytes()[:4] + b"\xff" * 20 + path.read_bytes()[24:])
    with pytest.raises(ConfigError, match=r"a\.parquet: not a readable parquet file"):
        task_problems(str(path))


def test_missing_datasets_say_where_they_should_lie(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no 'test' files of ARC-Easy \(allenai/ai2_arc\).*allenai/ai2_arc/ARC-Easy/test-"):
        task_problems("ARC-Easy", tasks_dir=tmp_path)
    with pytest.raises(ConfigError, match="give --tasks-dir"):
        task_problems("MMLU")
    with pytest.raises(ConfigError, match="neither a file or folder nor a known dataset"):
        task_problems("nothing", tasks_dir=root)
    with pytest.raises(ConfigError, match="no split to train on"):
        _ = Source(data="HumanEval").training_split


def test_sources_as_texts() -> None:
    assert Source.parse("mmlu=3") == Source(data="mmlu", epochs=3)
    assert Source.parse("MMLU:test") == Source(data="MMLU", split="test")
    assert Source.parse("a=b/c.jsonl") == Source(data="a=b/c.jsonl") and Source.parse("a=b/c.jsonl=0.5").epochs == 0.5
    assert Source.parse("gsm8k", held_out=True).training_split == "test"
    assert parse_sources(["nanochat", "me.jsonl"]) == (*nanochat_mixture(), Source(data="me.jsonl"))
    with pytest.raises(ConfigError, match="epochs 0"):
        Source.parse("x=0")


def test_epochs_and_weights() -> None:
    assert Counter(repeats(4, 2.0).tolist()) == dict.fromkeys(range(4), 2)
    part = repeats(100, 1.25, "key")
    assert len(part) == 125 and set(Counter(part.tolist()).values()) == {1, 2} and (part == repeats(100, 1.25, "key")).all()
    mixed = weighted([(Source(data="a"), 3.0), (Source(data="b"), 1.0)], rows=[300, 400])
    assert [s.epochs * n for s, n in zip(mixed, (300, 400), strict=True)] == [300, 100]


def test_the_nanochat_mixture_is_prepared_once(root: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = prepare(nanochat_mixture(), tokenizer, tmp_path, tasks_dir=root)
    seen = {(s.data, s.split): (s.num_train, s.num_val, s.num_seen) for s in data.sources}
    assert seen == {
        ("SmolTalk", "train"): (33, 0, 33), ("MMLU", "auxiliary_train"): (9, 0, 27), ("GSM8K", "train"): (8, 0, 32),
        ("SmolTalk", "test"): (0, 6, 0), ("MMLU", "test"): (0, 17, 0), ("GSM8K", "test"): (0, 11, 0),
    }  # fmt: skip
    assert len(data.train) == 92 and len(data.val) == 34
    stamp = (data.folder / "train" / "ids.bin").stat().st_mtime_ns
    again = prepare(nanochat_mixture(), tokenizer, tmp_path, tasks_dir=root)
    assert again.hash == data.hash and (data.folder / "train" / "ids.bin").stat().st_mtime_ns == stamp
    assert prepare(nanochat_mixture(), tokenizer, tmp_path, tasks_dir=root, seed=1).hash != data.hash
    other = Tokenizer.train(texts(30), 300)
    with pytest.raises(ConfigError, match="prepare it again"):
        SFTData.open(data.folder, other)
    counts = Counter(data.train.order.tolist())
    assert sorted(Counter(counts.values()).items()) == [(1, 33), (3, 9), (4, 8)]
    long = ConversationLoader(data.train, sequence_len=2048, rows_per_batch=1)
    assert long.num_truncated == 0 and (long.epoch()[1] != IGNORED).sum() == data.train.num_supervised_tokens


def test_what_is_held_out_is_never_trained_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]} for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = prepare([Source(data=str(path), epochs=3)], tokenizer, tmp_path / "out", val_fraction=0.2)
    (counts,) = data.sources
    assert counts.num_train + counts.num_val == 60 and counts.num_val > 2 and counts.num_seen == 3 * counts.num_train

    def contents(part) -> set[bytes]:
        return {part.ids[s : s + n].tobytes() for s, n in zip(part.starts, part.lengths, strict=True)}

    assert not contents(data.train) & contents(data.val)
    moved = prepare([Source(data=str(path.rename(tmp_path / "b.jsonl")), epochs=3)], tokenizer, tmp_path / "out", val_fraction=0.2)
    assert moved.hash == data.hash  # where a file lies is no part of what it is
    with pytest.raises(ConfigError, match="give more conversations"):
        prepare([Source(data=str(tmp_path / "b.jsonl"), max_rows=1)], tokenizer, tmp_path / "out")


def test_demo_tasks_are_right_and_held_out(tmp_path: Path) -> None:
    tasks = write_demo_tasks(tmp_path, num_train=40, num_test=30)
    asked: dict[str, set[str]] = {}
    for path in sorted(tmp_path.glob("*.jsonl")):
        problems = list(read_problems([path]))
        assert len(problems) == (40 if "train" in path.name else 30)
        for p in problems:
            question = p.messages[0]["content"]
            sum_ = next(w for w in (question.split("right answer: ")[-1].split("\n")[0],)).rstrip("?.")
            a, b = (int(x) for x in sum_.replace("What is ", "").replace("Work out ", "").replace("How much is ", "").split(" + "))
            if p.kind == "categorical":
                assert f"- {a + b}={p.answer}\n" in question and question.count(f"- {a + b}=") == 1
            else:
                assert p.reference["number"] == str(a + b)
            asked.setdefault(path.stem, set()).add(f"{a}+{b}")
    assert not asked["sums-train"] & asked["sums-test"] and not asked["sums-train"] & asked["choices-test"]
    assert [t.split("=")[0] for t in tasks.tasks] == ["demo-sums", "demo-choices"] and len(tasks.sources) == 2
