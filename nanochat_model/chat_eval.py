"""Evaluation of a chat model on questions with right answers, and ChatCORE, the mean of the centred accuracies of five tasks.

Categorical tasks compare the logits of the answer letters after <|assistant_start|>; generative ones sample a reply (greedily
unless told otherwise, with the calculator at hand) and judge it. Both are batched over problems; what a problem's answer is
does not depend on its batch, up to rounding. B rows, T positions, C model_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_model import gpt
from nanochat_model.accuracy import accuracy_standard_error
from nanochat_model.batching import Request, run_requests
from nanochat_model.conversations import render_prompt
from nanochat_model.distributed import all_sum, current_ranks
from nanochat_model.errors import ConfigError
from nanochat_model.loss import softcapped_logits
from nanochat_model.sampling import Sampling
from nanochat_model.tasks.catalog import CHAT_TASKS, DATASETS, DEFAULT_TEMPLATE, task_problems
from nanochat_model.tasks.judge import judge
from nanochat_model.tasks.layouts import Template
from nanochat_model.tasks.problem import Problem
from nanochat_model.tokenizer import Tokenizer
from nanochat_model.tool_use import PythonCalls, reply_parts

MAX_NEW_TOKENS = 512  # of a generated answer (nanochat chat_eval)
BATCH_ROWS = {"cpu": 8, "cuda": 64}
STOP_TOKENS = ("<|assistant_end|>", "<|bos|>", "<|user_start|>")

Progress = Callable[[str, int, int], None]  # (task, problems done, problems in all)


@dataclass(frozen=True, kw_only=True)
class ChatTaskResult:
    """One task. `standard_error` is that of `centered`, from the spread over its problems (`accuracy_standard_error`)."""

    task: str
    kind: str
    num_problems: int
    num_correct: int
    num_cropped: int  # problems too long for the model's context, cut at their beginning
    accuracy: float
    random_baseline: float  # accuracy of guessing
    centered: float  # (accuracy - random_baseline) / (1 - random_baseline)
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class ChatEvalResult:
    """`score` is the mean of the centred accuracies of the tasks evaluated; it is ChatCORE where these are the five that it is
    made of (`chatcore`, else None). Its standard error takes tasks as fixed and problems as drawn."""

    score: float
    standard_error: float
    chatcore: float | None
    tasks: tuple[ChatTaskResult, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_metrics(self) -> dict[str, float]:
        name = "chatcore" if self.chatcore is not None else "chat_score"
        metrics = {name: self.score, f"{name}_standard_error": self.standard_error}
        return metrics | {f"chat/{t.task}": t.accuracy for t in self.tasks}


@dataclass(frozen=True, kw_only=True)
class ChatEvalOptions:
    """How answers are got."""

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 50
    seed: int = 0
    batch_rows: int = 0  # problems at a time; 0: what suits the device
    template: Template = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_rows < 0:
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens} must be at least 1 and batch_rows {self.batch_rows} at least 0"
            )


def run_chat_eval(
    checkpoint: str | Path,
    tasks: Sequence[str] = CHAT_TASKS,
    *,
    tasks_dir: str | Path = "",
    max_problems: int = 0,
    device: str = "auto",
    options: ChatEvalOptions | None = None,
    progress: Progress | None = None,
) -> ChatEvalResult:
    """Load a checkpoint (or run folder) with its tokenizer and evaluate it; see `evaluate_chat`."""
    from nanochat_model.checkpoint import load_model, tokenizer_dir
    from nanochat_model.device import choose_device

    chosen = choose_device(device)
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    model = load_model(checkpoint, device=str(chosen), dtype=dtype)
    tokenizer = Tokenizer.load(tokenizer_dir(checkpoint))
    return evaluate_chat(
        model, tokenizer, tasks, tasks_dir=tasks_dir, max_problems=max_problems, options=options, progress=progress
    )


def evaluate_chat(
    model: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[str] = CHAT_TASKS,
    *,
    tasks_dir: str | Path = "",
    max_problems: int = 0,
    options: ChatEvalOptions | None = None,
    progress: Progress | None = None,
) -> ChatEvalResult:
    """Evaluate `model` on each task: "NAME" of a known dataset under `tasks_dir`, or "name=path" of a file whose columns tell its
    layout. `max_problems` > 0 takes that many of each. Several ranks share the problems. Raises ConfigError on missing files
    and before anything is evaluated."""
    options = options or ChatEvalOptions()
    if not tasks:
        raise ConfigError(f"no tasks to evaluate; known: {', '.join(CHAT_TASKS)}, or name=path of a file")
    named = [named_task(task) for task in tasks]
    loaded = [
        task_problems(source, tasks_dir=tasks_dir, max_problems=max_problems, template=options.template) for _, source in named
    ]
    was_training = model.training
    model.eval()
    try:
        results = tuple(
            _evaluate_task(model, tokenizer, name, source, problems, options, progress or (lambda task, done, total: None))
            for (name, source), problems in zip(named, loaded, strict=True)
        )
    finally:
        model.train(was_training)
    score = math.fsum(r.centered for r in results) / len(results)
    return ChatEvalResult(
        score=score,
        standard_error=math.sqrt(math.fsum(r.standard_error**2 for r in results)) / len(results),
        chatcore=score if {r.task for r in results} == set(CHAT_TASKS) else None,
        tasks=results,
    )


def named_task(task: str) -> tuple[str, str]:
    """Name and source of "NAME" or "name=path"."""
    dataset = DATASETS.get(task.lower())
    if dataset is not None:
        return dataset.name, dataset.name
    name, sign, path = task.partition("=")
    return (name, path) if sign else (Path(task).stem, task)


def _evaluate_task(
    model: Any,
    tokenizer: Tokenizer,
    name: str,
    source: str,
    problems: list[Problem],
    options: ChatEvalOptions,
    progress: Progress,
) -> ChatTaskResult:
    ranks = current_ranks()
    mine = list(range(ranks.rank, len(problems), ranks.world_size))
    answer = _categorical if problems[0].kind == "categorical" else _generative
    chosen = [problems[i] for i in mine]
    verdicts, num_cropped = answer(model, tokenizer, chosen, options, lambda done: progress(name, done, len(mine)))
    counted = torch.zeros(len(problems) + 1, dtype=torch.float64)
    counted[mine] = torch.tensor([float(v) for v in verdicts], dtype=torch.float64)
    counted[-1] = num_cropped
    counted = all_sum(counted)
    num, correct = len(problems), int(counted[:-1].sum())
    dataset = DATASETS.get(source.lower())
    guessing = [1 / len(p.letters) if p.letters else 0.0 for p in problems]
    baseline = dataset.random_baseline if dataset is not None else math.fsum(guessing) / num
    accuracy, scale = correct / num, 1.0 - baseline
    return ChatTaskResult(
        task=name,
        kind=problems[0].kind,
        num_problems=num,
        num_correct=correct,
        num_cropped=int(counted[-1]),
        accuracy=accuracy,
        random_baseline=baseline,
        centered=(accuracy - baseline) / scale,
        standard_error=accuracy_standard_error(accuracy, num) / scale,
    )


def _batch_rows(model: Any, options: ChatEvalOptions) -> int:
    device = model.lm_head.weight.device.type
    return options.batch_rows or BATCH_ROWS.get(device, BATCH_ROWS["cpu"])


@torch.no_grad()
def _categorical(
    model: Any, tokenizer: Tokenizer, problems: Sequence[Problem], options: ChatEvalOptions, done: Callable[[int], None]
) -> tuple[list[bool], int]:
    """Whether the likeliest of each problem's letters is the right one. Problems of similar length share a batch."""
    letter_ids = {letter: _letter_id(tokenizer, letter) for p in problems for letter in p.letters}
    rows, num_cropped = _prompts(model, tokenizer, problems, 0)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    verdicts = [False] * len(rows)
    size = _batch_rows(model, options)
    device = model.lm_head.weight.device
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        longest = len(rows[batch[0]])
        padded = [rows[i] + [tokenizer.bos_id] * (longest - len(rows[i])) for i in batch]  # on the right: not seen by what counts
        features = gpt.GPT.features(model, torch.tensor(padded, device=device))  # (B, T, C); never the compiled one: shapes vary
        last = features[torch.arange(len(batch), device=device), [len(rows[i]) - 1 for i in batch]]
        logits = softcapped_logits(last, model.lm_head.weight, model.config.vocab_size).cpu()  # (B, V)
        for i, scores in zip(batch, logits, strict=True):
            letters = problems[i].letters
            best = int(scores[[letter_ids[letter] for letter in letters]].argmax())
            verdicts[i] = letters[best] == problems[i].answer
        done(min(start + size, len(order)))
    return verdicts, num_cropped


def _letter_id(tokenizer: Tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ConfigError(f"answer {letter!r} is {len(ids)} tokens; a categorical task needs answers of one token")
    return ids[0]


def _prompts(model: Any, tokenizer: Tokenizer, problems: Sequence[Problem], reserve: int) -> tuple[list[list[int]], int]:
    """Ids of each question that leave `reserve` positions (at most half) of the trained length; how many were cut for it."""
    room = model.config.sequence_len - min(reserve, model.config.sequence_len // 2)
    rows = [render_prompt(p.prompt, tokenizer) for p in problems]
    return [row[-room:] for row in rows], sum(len(row) > room for row in rows)


def _generative(
    model: Any, tokenizer: Tokenizer, problems: Sequence[Problem], options: ChatEvalOptions, done: Callable[[int], None]
) -> tuple[list[bool], int]:
    """Whether each problem's sampled reply is right."""
    rows, num_cropped = _prompts(model, tokenizer, problems, options.max_new_tokens)
    stops = frozenset(tokenizer.special_id(t) for t in STOP_TOKENS)
    size, verdicts = _batch_rows(model, options), list[bool]()
    step = 8 * size  # problems between two reports
    for start in range(0, len(rows), step):
        requests = [
            Request(
                prompt=row,
                max_tokens=min(options.max_new_tokens, model.config.sequence_len - len(row)),
                sampling=Sampling(temperature=options.temperature, top_k=options.top_k, seed=options.seed + start + i),
                stop_ids=stops,
                tool=PythonCalls(tokenizer),
            )
            for i, row in enumerate(rows[start : start + step])
        ]
        made = run_requests(model, requests, max_rows=min(size, len(requests)))
        replies = ["".join(text for kind, text in reply_parts(_said(ids, stops), tokenizer) if kind == "text") for ids in made]
        verdicts += judge(problems[start : start + step], replies)
        done(len(verdicts))
    return verdicts, num_cropped


def _said(ids: Sequence[int], stops: frozenset[int]) -> Sequence[int]:
    return ids[:-1] if ids and ids[-1] in stops else ids
