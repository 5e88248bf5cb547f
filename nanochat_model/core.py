"""The CORE metric of DCLM (arXiv 2406.11794, section 3.5 and appendix G): in-context tasks, batched over examples.

A bundle holds core.yaml (the tasks), eval_meta_data.csv (accuracy of guessing, in percent) and eval_data/*.jsonl. Prompts,
shuffles and few-shot draws follow nanochat's core_eval, so scores compare. B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_model import gpt
from nanochat_model.accuracy import accuracy_standard_error
from nanochat_model.core_bundle import Task, load_bundle
from nanochat_model.distributed import all_sum, current_ranks
from nanochat_model.loss import softcapped_logits

FEWSHOT_SEED = 1234  # + index of the example (nanochat core_eval.py)
MAX_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
LOGIT_TOKENS = 4096  # continuation positions whose (n, V) logits exist at a time


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task. `standard_error` is that of `centered`, from the spread over its examples (`accuracy_standard_error`)."""

    label: str
    kind: str
    num_fewshot: int
    num_examples: int
    accuracy: float
    random_baseline: float  # accuracy of guessing
    centered: float  # (accuracy - random_baseline) / (1 - random_baseline)
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class CoreResult:
    """CORE is the mean of the tasks' centred accuracies; its standard error takes tasks as fixed and examples as drawn."""

    core: float
    standard_error: float
    tasks: tuple[TaskResult, ...]

    def as_metrics(self) -> dict[str, float]:
        metrics = {"core": self.core, "core_standard_error": self.standard_error}
        return metrics | {f"core/{t.label}": t.centered for t in self.tasks}


@dataclass(frozen=True)
class Span:
    """Ids of one prompt, of which those at start..end are the continuation that is scored."""

    ids: list[int]
    start: int
    end: int


def evaluate_core(
    model: Any,
    tokenizer: Any,
    bundle: str,
    *,
    max_per_task: int = 0,
    max_batch_tokens: int = 0,
    progress: Callable[[TaskResult], None] | None = None,
) -> CoreResult:
    """Score `model` on every task of `bundle` (a folder, a zip, or a URL). Every rank takes its share of the examples.

    `max_per_task` > 0 takes that many of each task's shuffled examples. Raises ConfigError on a missing or broken bundle.
    """
    results = []
    was_training = model.training
    model.eval()
    try:
        for task in load_bundle(bundle, max_per_task=max_per_task):
            results.append(_evaluate_task(model, tokenizer, task, max_batch_tokens))
            if progress is not None:
                progress(results[-1])
    finally:
        model.train(was_training)
    n = len(results)
    return CoreResult(
        core=sum(r.centered for r in results) / n,
        standard_error=math.sqrt(sum(r.standard_error**2 for r in results)) / n,
        tasks=tuple(results),
    )


def _evaluate_task(model: Any, tokenizer: Any, task: Task, max_batch_tokens: int) -> TaskResult:
    ranks = current_ranks()
    mine = list(range(ranks.rank, len(task.examples), ranks.world_size))
    correct = torch.zeros(len(task.examples), dtype=torch.float64)
    correct[mine] = torch.tensor([float(ok) for ok in answers(model, tokenizer, task, mine, max_batch_tokens)], dtype=torch.float64)
    num = len(task.examples)
    accuracy = float(all_sum(correct).mean())
    scale = 1.0 - task.random_baseline
    return TaskResult(
        label=task.label,
        kind=task.kind,
        num_fewshot=task.num_fewshot,
        num_examples=num,
        accuracy=accuracy,
        random_baseline=task.random_baseline,
        centered=(accuracy - task.random_baseline) / scale,
        standard_error=accuracy_standard_error(accuracy, num) / scale,
    )


def answers(model: Any, tokenizer: Any, task: Task, indices: Sequence[int], max_batch_tokens: int = 0) -> list[bool]:
    """Whether the model is right on each of the examples `indices`, whose prompts are batched across examples."""
    limit = max_tokens(model)
    per_example = [[crop(s, limit) for s in spans(tokenizer, task, i)] for i in indices]
    flat = [s for group in per_example for s in group]
    scores = iter(_score(model, flat, tokenizer.bos_id, max_batch_tokens))
    verdicts = []
    for i, group in zip(indices, per_example, strict=True):
        results = [next(scores) for _ in group]
        if task.kind == "language_modeling":
            verdicts.append(results[0][1])
        else:
            losses = [loss for loss, _ in results]
            verdicts.append(losses.index(min(losses)) == task.examples[i]["gold"])
    return verdicts


def max_tokens(model: Any) -> int:
    """Longest prompt the model takes."""
    return int(getattr(model, "max_tokens", model.config.sequence_len))


def prompts(task: Task, index: int) -> list[str]:
    """The prompts of one example: one a choice, one a context option, or (language modeling) without and with the answer."""
    item, delimiter = task.examples[index], task.continuation_delimiter
    others = [i for i in range(len(task.examples)) if i != index]
    shots = (
        [task.examples[i] for i in random.Random(FEWSHOT_SEED + index).sample(others, task.num_fewshot)] if task.num_fewshot else []
    )
    if task.kind == "multiple_choice":
        head = "".join(f"{s['query']}{delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{head}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        head = "".join(f"{s['context_options'][s['gold']]}{delimiter}{s['continuation']}\n\n" for s in shots)
        return [f"{head}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
    head = "".join(f"{str(s['context']).strip()}{delimiter}{s['continuation']}\n\n" for s in shots)
    without = f"{head}{str(item['context']).strip()}{delimiter}"
    # Stripped, since a trailing blank would merge into the first word of the answer.
    return [without.strip(), f"{without}{item['continuation']}"]


def spans(tokenizer: Any, task: Task, index: int) -> list[Span]:
    """The prompts as ids after BOS, with what is scored: what follows the common prefix of the choices, the common suffix of
    the context options, or the answer. (An answer starts where its prompt's ids end; where a tokenizer merges across that
    point, at the first id that differs.)"""
    rows = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(prompts(task, index))]
    if task.kind == "schema":
        suffix = common_length([row[::-1] for row in rows])
        return [Span(row, len(row) - suffix, len(row)) for row in rows]
    start = common_length(rows)
    if task.kind == "language_modeling":
        return [Span(rows[1], start, len(rows[1]))]
    return [Span(row, start, len(row)) for row in rows]


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix."""
    for i, column in enumerate(zip(*rows, strict=False)):
        if len(set(column)) > 1:
            return i
    return min(len(row) for row in rows)


def crop(span: Span, limit: int) -> Span:
    """The last `limit` ids of a prompt that is longer."""
    cut = max(0, len(span.ids) - limit)
    return Span(span.ids[cut:], max(1, span.start - cut), span.end - cut) if cut else span


@torch.no_grad()
def _score(model: Any, all_spans: Sequence[Span], pad_id: int, max_batch_tokens: int) -> list[tuple[float, bool]]:
    """(mean loss of the continuation in nats, whether each of its ids is the most likely one) of each span.

    Prompts of similar length share a batch, padded on the right, which a causal model does not see.
    """
    device = next(model.parameters()).device
    budget = max_batch_tokens or MAX_BATCH_TOKENS.get(device.type, MAX_BATCH_TOKENS["cpu"])
    order = sorted(range(len(all_spans)), key=lambda i: -len(all_spans[i].ids))
    results: list[tuple[float, bool]] = [(math.inf, False)] * len(all_spans)
    start = 0
    while start < len(order):
        longest = len(all_spans[order[start]].ids)
        batch = order[start : start + max(1, budget // longest)]
        start += len(batch)
        rows = [all_spans[i].ids + [pad_id] * (longest - len(all_spans[i].ids)) for i in batch]
        features = gpt.GPT.features(model, torch.tensor(rows, device=device))  # (B, T, C); never the compiled one: shapes vary
        for i, result in zip(batch, _score_batch(model, features, [all_spans[i] for i in batch]), strict=True):
            results[i] = result
    return results


def _score_batch(model: Any, features: torch.Tensor, batch: Sequence[Span]) -> list[tuple[float, bool]]:
    """Logits are made for the scored positions only: the id at position t is predicted at t - 1."""
    picked = torch.cat([features[b, s.start - 1 : s.end - 1] for b, s in enumerate(batch)])  # (n, C)
    target = torch.tensor([i for s in batch for i in s.ids[s.start : s.end]], device=features.device)
    losses, hits = [], []
    for x, y in zip(picked.split(LOGIT_TOKENS), target.split(LOGIT_TOKENS), strict=True):
        logits = softcapped_logits(x, model.lm_head.weight, model.config.vocab_size)
        losses.append(torch.nn.functional.cross_entropy(logits, y, reduction="none"))
        hits.append(logits.argmax(-1) == y)
    loss, hit = torch.cat(losses).double().tolist(), torch.cat(hits).tolist()
    results, at = [], 0
    for s in batch:
        n = s.end - s.start
        results.append((math.fsum(loss[at : at + n]) / n if n else math.inf, all(hit[at : at + n])))
        at += n
    return results
