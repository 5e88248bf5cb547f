"""The chat and evaluation sets from the hub (or a mirror of it), as they are, to where `--tasks-dir` looks for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat_model.errors import ConfigError
from nanochat_model.tasks.catalog import DATASETS, read_problems
from nanoladder.download import DATASETS as TEXT_DATASETS
from nanoladder.download import Downloaded, Source, download, find_source, stored_revision

CHAT_DATASETS = {
    "smoltalk": "HuggingFaceTB/smol-smoltalk",
    "mmlu": "cais/mmlu",
    "gsm8k": "openai/gsm8k",
    "arc": "allenai/ai2_arc",
    "humaneval": "openai/openai_humaneval",
}
ALL = "chat"  # names all of them


def chat_datasets(name: str) -> tuple[str, ...]:
    """Repositories of chat and evaluation sets that a name (short, or owner/name) stands for; empty for text (`find_source`).
    ConfigError for a short name of neither."""
    if name == ALL:
        return tuple(CHAT_DATASETS.values())
    if name in CHAT_DATASETS or name in CHAT_DATASETS.values():
        return (CHAT_DATASETS.get(name, name),)
    if "/" not in name and name not in TEXT_DATASETS:
        names = ", ".join((*TEXT_DATASETS, *CHAT_DATASETS, ALL))
        raise ConfigError(f"dataset {name!r} is none of {names}, no owner/name and no address; give one of these")
    return ()


def fetch_chat_dataset(repository: str, tasks_dir: Path, *, revision: str = "", endpoint: str = "", **options: Any) -> Downloaded:
    """All splits of `repository` in tasks_dir/owner/name, where `sft` and `chat-eval` find them; `options` are `download`'s.

    Of a set with several configurations those that are read (nanochat_model.tasks.catalog): of MMLU `all`, not each subject
    again. Raises ConfigError as `download` does, and for a file whose first row has no layout that is known.
    """
    folder = tasks_dir / repository
    source = find_source(repository, revision=revision or stored_revision(folder), endpoint=endpoint)
    return download(_wanted(source), folder, check_file=check_problems, **options)


def _wanted(source: Source) -> Source:
    """Only the configurations that are read, where each has a folder."""
    subsets = {d.subset for d in DATASETS.values() if d.repository == source.dataset} - {""}
    files = tuple(f for f in source.files if not subsets or subsets & set(PurePosixPath(f.name).parent.parts))
    if not files:
        raise ConfigError(f"dataset {source.dataset} holds no folder {' or '.join(sorted(subsets))}; give a --revision that does")
    return replace(source, files=files)


def check_problems(path: Path) -> None:
    """ConfigError when a file's first row is none that a task or a fine-tuning can read."""
    next(read_problems([path]), None)
