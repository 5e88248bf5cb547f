"""The demo's own conversations: about this project, arithmetic, and what names of Python's builtins and standard library do.

Everything is made from the tables below and from Python itself, the same on every machine; answers of sums and of expressions
are computed, not typed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanochat_model.demo_facts import EXPRESSIONS, GREETINGS, PROJECT, PYTHON_NAMES
from nanochat_model.errors import ConfigError
from nanochat_model.identity import write_atomic
from nanochat_model.packing import permutation

Conversation = dict[str, Any]
DEFAULT_COUNT = 1500
TRAIN_FILE, VAL_FILE = "train.jsonl", "val.jsonl"
_VAL_EVERY = 20  # of which one goes to validation
_NAME_QUESTIONS = (
    "What does {name} do in Python?",
    "What is {name} in Python?",
    "Explain {name} in one sentence.",
    "What is {name} for?",
    "Tell me about Python's {name}.",
)
_SUM_QUESTIONS = ("What is {text}?", "{text} = ?", "How much is {text}?", "Compute {text}.", "Please work out {text}.")
_EXPRESSION_QUESTIONS = ("What does {text} return in Python?", "What is the value of {text}?", "Evaluate {text}.")


def demo_conversations(count: int = DEFAULT_COUNT, *, seed: int = 0) -> list[Conversation]:
    """`count` different conversations, mostly of one exchange, in an order that depends on `seed`. Raises ConfigError when
    there are not that many."""
    kinds = [list(kind(seed)) for kind in (_project, _sums, _tool_sums, _names, _expressions, _dialogues)]
    available = sum(map(len, kinds))
    if not 1 <= count <= available:
        raise ConfigError(f"demo conversations {count}: there are {available}; ask for 1 to {available}")
    taken = _shares([len(kind) for kind in kinds], count)
    chosen = [kind[i] for kind, n in zip(kinds, taken, strict=True) for i in range(n)]
    return [chosen[i] for i in permutation(len(chosen), "demo conversations", seed).tolist()]


def write_demo_conversations(folder: str | Path, count: int = DEFAULT_COUNT, *, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and val.jsonl (one conversation in 20) into `folder`; returns their paths."""
    found = demo_conversations(count, seed=seed)
    folder = Path(folder)
    for name, part in (
        (TRAIN_FILE, [c for i, c in enumerate(found) if i % _VAL_EVERY]),
        (VAL_FILE, found[::_VAL_EVERY]),
    ):
        write_atomic(folder / name, "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in part))
    return folder / TRAIN_FILE, folder / VAL_FILE


def _shares(sizes: list[int], count: int) -> list[int]:
    """How many of each kind: all of the small kinds, the rest shared evenly."""
    taken, left = [0] * len(sizes), count
    for n, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        taken[i] = min(sizes[i], left // (len(sizes) - n))
        left -= taken[i]
    return taken


def _exchange(question: str, answer: str | list[dict[str, str]]) -> Conversation:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _shuffled(items: list[Any], *key: object) -> list[Any]:
    return [items[i] for i in permutation(len(items), *key).tolist()]


def _asked(questions: tuple[str, ...], facts: list[tuple[dict[str, str], Any]], *key: object) -> Iterator[Conversation]:
    """Every fact asked in every way, each way once over all facts before any comes again."""
    for turn in range(len(questions)):
        for i, (values, answer) in enumerate(_shuffled(facts, *key, turn)):
            yield _exchange(questions[(turn + i) % len(questions)].format(**values), answer)


def _distinct(make: Callable[[int], Iterator[Conversation]]) -> Callable[[int], Iterator[Conversation]]:
    def generate(seed: int) -> Iterator[Conversation]:
        seen = set()
        for conversation in make(seed):
            text = json.dumps(conversation)
            if text not in seen:
                seen.add(text)
                yield conversation

    return generate


@_distinct
def _project(seed: int) -> Iterator[Conversation]:
    asked = [(question, answer) for questions, answer in PROJECT for question in questions]
    for question, answer in _shuffled(asked, "project", seed):
        yield _exchange(question, answer)


@_distinct
def _sums(seed: int) -> Iterator[Conversation]:
    facts = [({"text": f"{a} + {b}"}, f"{a} + {b} = {a + b}.") for a in range(11) for b in range(11)]
    facts += [({"text": f"{a} - {b}"}, f"{a} - {b} = {a - b}.") for a in range(11) for b in range(a + 1)]
    facts += [({"text": f"{a} * {b}"}, f"{a} * {b} = {a * b}.") for a in range(2, 11) for b in range(2, 11)]
    yield from _asked(_SUM_QUESTIONS, facts, "sums", seed)


@_distinct
def _tool_sums(seed: int) -> Iterator[Conversation]:
    """Sums too large to know by heart: the answer comes from a Python call."""
    for i, n in enumerate((permutation(30_000, "tool sums", seed)[:300]).tolist()):
        a, b, operator = 12 + n % 97, 11 + n // 97 % 89, "+-*"[i % 3]
        text = f"{a} {operator} {b}"
        result = str({"+": a + b, "-": a - b, "*": a * b}[operator])
        parts = [
            {"type": "python", "text": text},
            {"type": "python_output", "text": result},
            {"type": "text", "text": f"{text} = {result}."},
        ]
        yield _exchange(_SUM_QUESTIONS[i % len(_SUM_QUESTIONS)].format(text=text), parts)


@_distinct
def _names(seed: int) -> Iterator[Conversation]:
    facts = [({"name": name}, f"{name} {says}.") for name, says in PYTHON_NAMES.items()]
    yield from _asked(_NAME_QUESTIONS, facts, "names", seed)


@_distinct
def _expressions(seed: int) -> Iterator[Conversation]:
    facts = [({"text": text}, f"{text} gives {eval(text)!r}.") for text in EXPRESSIONS]
    yield from _asked(_EXPRESSION_QUESTIONS, facts, "expressions", seed)


@_distinct
def _dialogues(seed: int) -> Iterator[Conversation]:
    """Greetings, conversations of two exchanges, and some with a system message."""
    singles = [c["messages"] for kind in (_project, _sums, _names) for c in list(kind(seed + 1))[:60]]
    singles = _shuffled(singles, "dialogues", seed)
    for i, (question, answer) in enumerate(GREETINGS):
        greeting = _exchange(question, answer)["messages"]
        yield {"messages": greeting}
        yield {"messages": [*greeting, *singles[i % len(singles)]]}
    for first, second in zip(singles[::2], singles[1::2], strict=False):
        yield {"messages": [*first, *second]}
    for messages in singles[:20]:
        yield {"messages": [{"role": "system", "content": "Answer in one short sentence."}, *messages]}
