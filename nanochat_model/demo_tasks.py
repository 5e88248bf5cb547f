"""The demo's own questions with right answers, in the layouts of the real datasets: sums to be worked out with the calculator
(GSM8K's layout) and sums with four answers to choose from (ARC's). No pair of numbers is in both the training and the test files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_model.identity import write_atomic
from nanochat_model.packing import permutation

NUM_TRAIN, NUM_TEST = 600, 200
_LARGEST = 49  # of a number: every result is one token of at most two digits
_LETTERS = ("A", "B", "C", "D")
_QUESTIONS = ("What is {sum}?", "Work out {sum}.", "How much is {sum}?")


@dataclass(frozen=True, kw_only=True)
class DemoTasks:
    """Files written. `sources` go into a fine-tuning's mixture, `tasks` into `evaluate_chat`."""

    sources: tuple[str, ...]
    tasks: tuple[str, ...]


def write_demo_tasks(folder: str | Path, *, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, seed: int = 0) -> DemoTasks:
    """Write sums-train.jsonl, sums-test.jsonl, choices-train.jsonl and choices-test.jsonl; the same on every machine."""
    folder = Path(folder)
    pairs = permutation((_LARGEST + 1) ** 2, "demo tasks", seed).tolist()
    assert num_train + num_test <= len(pairs), f"there are {len(pairs)} pairs of numbers"
    parts = {"train": pairs[:num_train], "test": pairs[num_train : num_train + num_test]}
    for part, numbers in parts.items():
        for name, rows in (("sums", _sums(numbers)), ("choices", _choices(numbers, seed))):
            write_atomic(folder / f"{name}-{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return DemoTasks(
        sources=tuple(str(folder / f"{name}-train.jsonl") for name in ("sums", "choices")),
        tasks=tuple(f"demo-{name}={folder / f'{name}-test.jsonl'}" for name in ("sums", "choices")),
    )


def _question(pair: int, number: int) -> tuple[str, int]:
    """The sum of pair number `pair` as text, and its value."""
    a, b = divmod(pair, _LARGEST + 1)
    text = f"{a} + {b}"
    return _QUESTIONS[number % len(_QUESTIONS)].format(sum=text), a + b


def _sums(pairs: list[int]) -> Iterator[dict[str, Any]]:
    for number, pair in enumerate(pairs):
        question, value = _question(pair, number)
        a, b = divmod(pair, _LARGEST + 1)
        yield {"question": question, "answer": f"<<{a} + {b}={value}>>\n#### {value}"}


def _choices(pairs: list[int], seed: int) -> Iterator[dict[str, Any]]:
    """The right value and three near it, the right one equally often under each letter."""
    for number, pair in enumerate(pairs):
        question, value = _question(pair, number)
        others = [value + d for d in (1, 2, 10, -1, -2, -10) if value + d >= 0]
        wrong = [others[i] for i in permutation(len(others), "wrong answers", seed, pair)[:3].tolist()]
        place = (number * 7 + pair) % len(_LETTERS)
        values = [*wrong[:place], value, *wrong[place:]]
        yield {
            "id": f"sum-{pair}",
            "question": question,
            "choices": {"text": [str(v) for v in values], "label": list(_LETTERS)},
            "answerKey": _LETTERS[place],
        }
