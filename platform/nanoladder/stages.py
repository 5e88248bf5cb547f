"""A job of several stages that can be interrupted anywhere: each stage is skipped when its output with the same parents exists."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanochat_model.identity import content_hash, write_atomic

Facts = dict[str, Any]  # plain data that a stage leaves for later ones; "hash" names its artifact's content


class Progress(Protocol):
    """What a stage may tell while it runs."""

    def update(self, done: float, total: float, text: str = "") -> None: ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`run(facts of all stages so far, progress)` returns this stage's facts, with "hash" among them."""

    name: str
    title: str
    run: Callable[[Mapping[str, Facts], Progress], Facts]
    parents: tuple[str, ...] = ()
    inputs: Any = None  # plain data that the result depends on besides the parents
    outputs: Callable[[Facts], Sequence[Path]] = lambda facts: ()  # files that must exist for the stage to be skipped


class Display(Protocol):
    """Shows stages as they start, move and end."""

    def start(self, stage: Stage) -> Progress: ...

    def finish(self, stage: Stage, facts: Facts, seconds: float) -> None: ...

    def skip(self, stage: Stage, facts: Facts) -> None: ...


def run_stages(stages: Sequence[Stage], folder: Path, display: Display) -> dict[str, Facts]:
    """Run what is missing, in order, and return every stage's facts.

    A stage's key is the hash of its inputs and of its parents' artifacts; it is written, with the facts, when the stage has
    ended. An interrupted stage leaves no key and runs again: what it does inside must itself skip what is there.
    """
    facts: dict[str, Facts] = {}
    for stage in stages:
        key = content_hash([stage.name, stage.inputs, {p: facts[p]["hash"] for p in stage.parents}])
        path = folder / f"{stage.name}.json"
        known = _finished(path, key)
        if known is not None and all(p.exists() for p in stage.outputs(known)):
            facts[stage.name] = known
            display.skip(stage, known)
            continue
        started = time.perf_counter()
        result = json.loads(json.dumps(stage.run(facts, display.start(stage))))  # as the next start will read it
        seconds = time.perf_counter() - started
        assert "hash" in result, f"stage {stage.name} names no hash of its output"
        write_atomic(path, json.dumps({"key": key, "seconds": round(seconds, 2), "facts": result}, indent=1))
        facts[stage.name] = result
        display.finish(stage, result, seconds)
    return facts


def _finished(path: Path, key: str) -> Facts | None:
    """Facts of a stage that ended with this key. A file that cannot be read counts as not finished: the stage runs again."""
    try:
        state = json.loads(path.read_text(encoding="utf8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state["facts"] if isinstance(state, dict) and state.get("key") == key else None
