"""CORE on a small bundle, against one prompt at a time through the plain model."""

import dataclasses
import json
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_run import RUNTIME, tiny_config, tiny_shards

from nanochat_model import core
from nanochat_model.accuracy import accuracy_standard_error
from nanochat_model.callbacks import Callback
from nanochat_model.checkpoint import load_model
from nanochat_model.core import evaluate_core, prompts
from nanochat_model.core_bundle import Task, load_bundle, locate
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.tokenizer import Tokenizer
from nanochat_model.train import pretrain

TASKS = """
icl_tasks:
- {label: choices, icl_task_type: multiple_choice, dataset_uri: mc.jsonl, num_fewshot: [2], continuation_delimiter: "\\nAnswer: "}
- {label: options, icl_task_type: schema, dataset_uri: schema.jsonl, num_fewshot: [0]}
- {label: words, icl_task_type: language_modeling, dataset_uri: sub/lm.jsonl, num_fewshot: [1]}
"""


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 5))) for _ in range(rng.randint(low, high)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("bundle"), random.Random(0)
    (root / "eval_data" / "sub").mkdir(parents=True)
    (root / "core.yaml").write_text(TASKS)
    (root / "eval_meta_data.csv").write_text("Eval Task,Kind,Random baseline\nchoices,x,25\noptions,x,50.0\nwords,x,0\n")
    mc = [{"query": words(rng, 2, 5), "choices": [words(rng, 1, 3) for _ in range(4)], "gold": rng.randrange(4)} for _ in range(13)]
    schema = [
        {"context_options": [words(rng, 2, 6), words(rng, 2, 6)], "continuation": words(rng, 1, 4), "gold": rng.randrange(2)}
        for _ in range(11)
    ]
    lm = [{"context": words(rng, 2, 6) + "  ", "continuation": rng.choice(["a", "b", "c"])} for _ in range(9)]
    for name, rows in (("mc.jsonl", mc), ("schema.jsonl", schema), ("sub/lm.jsonl", lm)):
        (root / "eval_data" / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(tiny_config(model__sequence_len=128, batch_tokens=128).model).init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model.eval()


@torch.no_grad()
def slow_answer(model: GPT, tokenizer: Tokenizer, task: Task, index: int) -> bool:
    """One prompt at a time, all logits, sums in Python."""
    texts = prompts(task, index)
    rows = [[tokenizer.bos_id, *tokenizer.encode(t)] for t in texts]
    if task.kind == "language_modeling":
        start = len(rows[0])
        assert rows[1][:start] == rows[0]
        logits = model(torch.tensor(rows[1])[None])[0]
        return all(int(logits[t - 1].argmax()) == rows[1][t] for t in range(start, len(rows[1])))
    means = []
    for row in rows:
        if task.kind == "multiple_choice":
            start = next(t for t in range(len(row)) if len({tuple(r[: t + 1]) for r in rows}) > 1)
        else:
            suffix = next(n for n in range(len(row)) if len({tuple(r[len(r) - n - 1 :]) for r in rows}) > 1)
            start = len(row) - suffix
        logits = model(torch.tensor(row)[None])[0].double()
        losses = [float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, row[t]]) for t in range(start, len(row))]
        means.append(sum(losses) / len(losses))
    return means.index(min(means)) == task.examples[index]["gold"]


@pytest.mark.parametrize("max_batch_tokens", [1, 200, 100_000])
def test_batches_score_as_one_at_a_time(bundle: Path, model: GPT, max_batch_tokens: int) -> None:
    tokenizer = tiny_shards().tokenizer
    result = evaluate_core(model, tokenizer, str(bundle), max_batch_tokens=max_batch_tokens)
    centered = []
    for task, found in zip(load_bundle(str(bundle)), result.tasks, strict=True):
        right = [slow_answer(model, tokenizer, task, i) for i in range(len(task.examples))]
        accuracy = sum(right) / len(right)
        assert found.label == task.label and found.accuracy == pytest.approx(accuracy) and found.num_examples == len(right)
        centered.append((accuracy - task.random_baseline) / (1 - task.random_baseline))
        assert found.centered == pytest.approx(centered[-1])
        spread = accuracy_standard_error(accuracy, len(right)) / (1 - task.random_baseline)
        assert found.standard_error == pytest.approx(spread)
    assert result.core == pytest.approx(sum(centered) / 3)
    assert result.as_metrics()["core/words"] == pytest.approx(centered[2])
    assert len({t.accuracy for t in result.tasks}) > 1, "a model that is always or never right would prove nothing"


def test_prompts_are_those_of_the_rules() -> None:
    examples = [
        {"query": "q0", "choices": ["a0", "b0"], "gold": 1},
        {"query": "q1", "choices": ["a1", "b1"], "gold": 0},
    ]
    mc = Task(
        label="t", kind="multiple_choice", num_fewshot=1, continuation_delimiter=" -> ", random_baseline=0.5, examples=examples
    )
    assert prompts(mc, 0) == ["q1 -> a1\n\nq0 -> a0", "q1 -> a1\n\nq0 -> b0"]
    examples = [
        {"context_options": ["x", "y"], "continuation": "z", "gold": 1},
        {"context_options": ["u", "v"], "continuation": "w", "gold": 1},
    ]
    schema = Task(label="t", kind="schema", num_fewshot=1, continuation_delimiter=" ", random_baseline=0.5, examples=examples)
    assert prompts(schema, 0) == ["v w\n\nx z", "v w\n\ny z"]
    examples = [{"context": " one ", "continuation": "two"}, {"context": "three", "continuation": "four"}]
    lm = Task(label="t", kind="language_modeling", num_fewshot=1, continuation_delimiter=" ", random_baseline=0, examples=examples)
    assert prompts(lm, 0) == ["three four\n\none", "three four\n\none two"]


def test_few_shot_examples_are_drawn_by_the_item(bundle: Path) -> None:
    """random.Random(1234 + i) among the others, of examples shuffled with seed 1337."""
    task = load_bundle(str(bundle))[0]
    rows = [json.loads(line) for line in (bundle / "eval_data" / "mc.jsonl").read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    assert task.examples == rows
    for i in (0, 5):
        shots = random.Random(1234 + i).sample([j for j in range(len(rows)) if j != i], 2)
        expected = "".join(f"{rows[j]['query']}\nAnswer: {rows[j]['choices'][rows[j]['gold']]}\n\n" for j in shots)
        assert all(p.startswith(expected + rows[i]["query"]) for p in prompts(task, i))


def test_long_prompts_keep_their_end(model: GPT) -> None:
    span = core.Span(list(range(10)), 7, 10)
    assert core.crop(span, 5) == core.Span([5, 6, 7, 8, 9], 2, 5) and core.crop(span, 10) == span
    assert core.crop(core.Span(list(range(10)), 2, 10), 5).start == 1


def test_ranks_share_the_examples(bundle: Path, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanochat_model.distributed import Ranks

    whole = evaluate_core(model, tiny_shards().tokenizer, str(bundle))
    parts: list[list[torch.Tensor]] = []
    for rank in range(3):
        mine: list[torch.Tensor] = []
        parts.append(mine)
        monkeypatch.setattr(core, "current_ranks", lambda r=rank: Ranks(rank=r, world_size=3))
        monkeypatch.setattr(core, "all_sum", lambda v, m=mine: m.append(v.clone()) or v)
        evaluate_core(model, tiny_shards().tokenizer, str(bundle))
    for t, task in enumerate(whole.tasks):
        assert float(sum(p[t] for p in parts).mean()) == pytest.approx(task.accuracy)


def test_a_zip_and_a_limit(bundle: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for file in bundle.rglob("*"):
            z.write(file, Path("eval_bundle") / file.relative_to(bundle))
    tasks = load_bundle(str(archive), max_per_task=4)
    assert [len(t.examples) for t in tasks] == [4, 4, 4]
    assert tasks[1].examples == load_bundle(str(bundle))[1].examples[:4]
    torn = tmp_path / "torn.zip"
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as z:
        first = next(info for info in z.infolist() if not info.is_dir())
    data[first.header_offset + 40] ^= 0xFF  # in a file's name: the directory at the end is whole
    torn.write_bytes(data)
    with pytest.raises(ConfigError, match="not a whole zip file"):
        load_bundle(str(torn))
    assert not [p for p in tmp_path.iterdir() if p.is_dir() and "torn" in p.name]
    with zipfile.ZipFile(archive, "w") as z:  # a new edition under the old name
        for file in bundle.rglob("*"):
            if file.name == "core.yaml":
                z.writestr("eval_bundle/core.yaml", TASKS + "version: 2\n")
            else:
                z.write(file, Path("eval_bundle") / file.relative_to(bundle))
    assert "version: 2" in (locate(str(archive)) / "core.yaml").read_text()


def test_broken_bundles_are_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder"):
        load_bundle(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"has no core\.yaml"):
        load_bundle(str(tmp_path))
    with pytest.raises(ConfigError, match="too few for 2 shots"):
        load_bundle(str(bundle), max_per_task=2)
    for nothing in ("icl_tasks:", "icl_tasks: []", "icl_tasks: all"):
        (tmp_path / "core.yaml").write_text(nothing)
        with pytest.raises(ConfigError, match="no list of tasks"):
            load_bundle(str(tmp_path))
    (tmp_path / "core.yaml").write_text(TASKS)
    with pytest.raises(ConfigError, match=r"eval_meta_data\.csv"):
        load_bundle(str(tmp_path))
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoices,25\n")
    with pytest.raises(ConfigError, match="missing from the CORE bundle"):
        load_bundle(str(tmp_path))
    (tmp_path / "eval_data").mkdir()
    (tmp_path / "eval_data" / "mc.jsonl").write_text('{"query": "q", "choi')
    with pytest.raises(ConfigError, match=r"mc\.jsonl:1: not JSON"):
        load_bundle(str(tmp_path))


def test_training_scores_core_now_and_at_the_end(bundle: Path, tmp_path: Path) -> None:
    class Scores(Callback):
        def __init__(self) -> None:
            self.metrics: list[tuple[int, dict[str, float]]] = []
            self.samples: list[tuple[int, list[str]]] = []

        def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
            self.metrics.append((step, metrics))

        def on_sample(self, step: int, texts: Sequence[str]) -> None:
            self.samples.append((step, list(texts)))

    scores = Scores()
    runtime = dataclasses.replace(RUNTIME, core_bundle=str(bundle), core_every_steps=2, core_max_per_task=5, sample_every_steps=3)
    record = pretrain(tiny_config(num_steps=4), runtime, run_dir=tmp_path, callbacks=[scores])
    assert [step for step, _ in scores.metrics] == [2, 4]
    assert (
        record.core
        == scores.metrics[1][1]["core"]
        == evaluate_core(load_model(str(tmp_path)), tiny_shards().tokenizer, str(bundle), max_per_task=5).core
    )
    assert [step for step, _ in scores.samples] == [3, 4], "and after the last step"
    assert scores.samples[0][1][0].startswith("def ")
