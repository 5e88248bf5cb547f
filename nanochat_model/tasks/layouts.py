"""The published layouts of rows, told apart by their columns, and each row as a Problem.

- ARC (allenai/ai2_arc): id, question, choices {text: [...], label: [...]}, answerKey
- MMLU (cais/mmlu): question, subject, choices [...], answer (index); auxiliary_train may nest them under `train`
- GSM8K (openai/gsm8k): question, answer with calculator calls <<3*4=12>> and the result after ####
- HumanEval (openai/openai_humaneval): task_id, prompt, canonical_solution, test, entry_point
- conversations (SmolTalk, identity files): messages, or a bare list of them
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_model.conversations import checked_conversation
from nanochat_model.errors import ConfigError
from nanochat_model.identity import from_dict
from nanochat_model.tasks.problem import Problem

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CALL = re.compile(r"<<([^>]*)>>")
_RESULT = re.compile(r"#### (-?[0-9.,]+)")


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a question with choices is put. The letter stands after its choice and directly after "=", so that it is the very
    token that the answer is (nanochat's finding: small models bind letters better so)."""

    head: str = "Choose the right answer: {question}\n"
    choice: str = "- {choice}={letter}\n"
    tail: str = "\nAnswer with its letter alone."

    @classmethod
    def load(cls, path: str | Path) -> Template:
        """Of a JSON file with these fields. Raises ConfigError."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf8"))
        except (OSError, ValueError) as e:
            raise ConfigError(f"template {str(path)!r} is not readable JSON ({e}); give head, choice and tail") from None
        return from_dict(cls, values if isinstance(values, dict) else {"template": values}, f"{path}: ")

    def render(self, question: str, choices: list[str], letters: tuple[str, ...]) -> str:
        lines = [self.choice.replace("{choice}", c).replace("{letter}", l) for c, l in zip(choices, letters, strict=True)]
        return self.head.replace("{question}", question) + "".join(lines) + self.tail


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout: the columns that tell it, and what makes a Problem of a row."""

    name: str
    columns: frozenset[str]
    problem: Callable[[Mapping[str, Any], Template], Problem]


def _exchange(question: str, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _choices(question: str, choices: list[str], letters: tuple[str, ...], answer: str, template: Template) -> Problem:
    if answer not in letters:
        raise ConfigError(f"answer {answer!r} is none of {', '.join(letters)}")
    return Problem(kind="categorical", messages=_exchange(template.render(question, choices, letters), answer), letters=letters)


def _arc(row: Mapping[str, Any], template: Template) -> Problem:
    choices = row["choices"]
    if isinstance(choices, list):  # the jsonl of AI2's own release: [{"text", "label"}, …]
        choices = {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}
    return _choices(row["question"], list(choices["text"]), tuple(choices["label"]), row["answerKey"], template)


def _mmlu(row: Mapping[str, Any], template: Template) -> Problem:
    choices = list(row["choices"])
    letters = tuple(LETTERS[: len(choices)])
    number = int(row["answer"])
    if not 0 <= number < len(choices):
        raise ConfigError(f"answer {number} is no index of its {len(choices)} choices")
    return _choices(row["question"], choices, letters, letters[number], template)


def _gsm8k(row: Mapping[str, Any], template: Template) -> Problem:
    answer = row["answer"]
    number = final_number(answer)
    if number is None:
        raise ConfigError("answer has no result after ####")
    return Problem(
        kind="generative", messages=_exchange(row["question"], call_parts(answer)), judge="number", reference={"number": number}
    )


def _humaneval(row: Mapping[str, Any], template: Template) -> Problem:
    reference = {"prompt": row["prompt"], "test": row["test"], "entry_point": row["entry_point"]}
    messages = _exchange(row["prompt"], f"{row['prompt']}{row['canonical_solution']}")
    return Problem(kind="generative", messages=messages, judge="program", reference=reference)


def _conversation(row: Mapping[str, Any], template: Template) -> Problem:
    return Problem(kind="conversation", messages=list(checked_conversation({"messages": row["messages"]})["messages"]))


LAYOUTS = (
    Layout(name="arc", columns=frozenset({"question", "choices", "answerKey"}), problem=_arc),
    Layout(name="mmlu", columns=frozenset({"question", "choices", "answer"}), problem=_mmlu),
    Layout(name="humaneval", columns=frozenset({"prompt", "canonical_solution", "test", "entry_point"}), problem=_humaneval),
    Layout(name="conversations", columns=frozenset({"messages"}), problem=_conversation),
    Layout(name="gsm8k", columns=frozenset({"question", "answer"}), problem=_gsm8k),
)


def find_layout(columns: Any, where: str) -> Layout:
    """The layout of rows with these columns; ConfigError where none fits."""
    for layout in LAYOUTS:
        if layout.columns <= set(columns):
            return layout
    known = "; ".join(f"{layout.name}: {', '.join(sorted(layout.columns))}" for layout in LAYOUTS)
    raise ConfigError(f"{where}: columns {', '.join(sorted(map(str, columns)))} fit no known layout ({known})")


def call_parts(answer: str) -> list[dict[str, str]]:
    """A GSM8K answer as parts: text, and for each <<expression=result>> a python call and its output."""
    parts: list[dict[str, str]] = []
    at = 0
    for call in _CALL.finditer(answer):
        parts.append({"type": "text", "text": answer[at : call.start()]})
        expression, sign, result = call[1].rpartition("=")
        parts.append({"type": "python", "text": expression if sign else call[1]})
        if sign:
            parts.append({"type": "python_output", "text": result})
        at = call.end()
    parts.append({"type": "text", "text": answer[at:]})
    return [p for p in parts if p["text"]]


def final_number(text: str) -> str | None:
    """The first number after "#### ", without thousands separators, as text: how GSM8K's authors compare answers."""
    found = _RESULT.search(text)
    return found[1].replace(",", "") if found is not None else None
