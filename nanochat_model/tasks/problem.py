"""A problem put to a chat model, and how its answer is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["categorical", "generative", "conversation"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One row of a dataset as a conversation: messages that end with the reference answer of the assistant.

    categorical: `letters` are the possible answers, the last message is one of them. generative: `judge` names how a reply is
    compared with `reference`. conversation: nothing to judge, for fine-tuning only.
    """

    kind: Kind
    messages: list[dict[str, Any]]
    letters: tuple[str, ...] = ()
    judge: Literal["", "number", "program"] = ""
    reference: Mapping[str, str] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """Letter of the right answer."""
        return str(self.messages[-1]["content"])

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """All messages but the reference answer."""
        return self.messages[:-1]

    @property
    def conversation(self) -> dict[str, Any]:
        return {"messages": self.messages}
