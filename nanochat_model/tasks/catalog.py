"""Known datasets, and from a name or a path to problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat_model.errors import ConfigError
from nanochat_model.tasks.files import count_rows, dataset_folders, files_of, read_rows, split_files
from nanochat_model.tasks.layouts import Layout, Template, find_layout
from nanochat_model.tasks.problem import Problem

SHUFFLE_SEED = 42  # nanochat's: with it the first n problems are the same ones as there
DEFAULT_TEMPLATE = Template()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset of the Hugging Face hub and how it is used."""

    name: str
    repository: str
    subset: str = ""  # its configuration, a folder of the repository
    train_split: str = ""
    eval_split: str = "test"
    random_baseline: float = 0.0  # accuracy of guessing, as ChatCORE takes it


DATASETS: dict[str, Dataset] = {
    d.name.lower(): d
    for d in (
        Dataset(name="ARC-Easy", repository="allenai/ai2_arc", subset="ARC-Easy", train_split="train", random_baseline=0.25),
        Dataset(
            name="ARC-Challenge", repository="allenai/ai2_arc", subset="ARC-Challenge", train_split="train", random_baseline=0.25
        ),
        Dataset(name="MMLU", repository="cais/mmlu", subset="all", train_split="auxiliary_train", random_baseline=0.25),
        Dataset(name="GSM8K", repository="openai/gsm8k", subset="main", train_split="train"),
        Dataset(name="HumanEval", repository="openai/openai_humaneval", subset="openai_humaneval"),
        Dataset(name="SmolTalk", repository="HuggingFaceTB/smol-smoltalk", train_split="train"),
    )
}
CHAT_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval")  # of ChatCORE (nanochat chat_eval)


def source_files(source: str, *, tasks_dir: str | Path = "", split: str = "") -> list[Path]:
    """Files of a known dataset's `split` under `tasks_dir`, or of a path. ConfigError that says where was looked."""
    dataset = DATASETS.get(source.lower())
    if dataset is None:
        if Path(source).exists():
            return files_of(Path(source))
        known = ", ".join(d.name for d in DATASETS.values())
        raise ConfigError(f"{source!r} is neither a file or folder nor a known dataset ({known}); give one of these")
    if not tasks_dir:
        raise ConfigError(f"{dataset.name} needs the folder its files lie in; give --tasks-dir (see docs/sft.md)")
    split = split or dataset.eval_split
    folders = dataset_folders(Path(tasks_dir), dataset.repository)
    for folder in folders:
        files = split_files(folder, dataset.subset, split)
        if files:
            return files
    looked = ", ".join(map(str, folders)) or f"{tasks_dir}/{dataset.repository}"
    raise ConfigError(
        f"no {split!r} files of {dataset.name} ({dataset.repository}) in {looked}; fetch them with `nanoladder data download "
        f"--dataset chat --tasks-dir {tasks_dir}`, or put them there, for example as "
        f"{'/'.join(p for p in (dataset.repository, dataset.subset, f'{split}-00000-of-00001.parquet') if p)}"
    )


def read_problems(files: list[Path], template: Template = DEFAULT_TEMPLATE) -> Iterator[Problem]:
    """Every row of `files` as a Problem, streamed, in file order. ConfigError names the row that does not fit."""
    layout: Layout | None = None
    for where, row in read_rows(files):
        if layout is None or not layout.columns <= row.keys():
            layout = find_layout(row.keys(), where)
        try:
            yield layout.problem(row, template)
        except ConfigError as e:
            text = str(e).removeprefix("conversation: ")
            raise ConfigError(f"{where}: {text}") from None
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"{where}: not a row of layout {layout.name} ({e!r}); mend or remove it") from None


def task_problems(
    source: str,
    *,
    tasks_dir: str | Path = "",
    split: str = "",
    max_problems: int = 0,
    template: Template = DEFAULT_TEMPLATE,
) -> list[Problem]:
    """Problems to be judged, shuffled as nanochat shuffles them, the first `max_problems` of them (0: all). Raises ConfigError on
    a missing data set and on rows of another form."""
    files = source_files(source, tasks_dir=tasks_dir, split=split)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(count_rows(files))
    chosen = order[: max_problems or None]
    place = {int(row): i for i, row in enumerate(chosen)}
    found: list[Problem | None] = [None] * len(chosen)
    for row, problem in enumerate(read_problems(files, template)):
        if row in place:
            found[place[row]] = problem
    problems = [p for p in found if p is not None]
    if not problems:
        raise ConfigError(f"{source}: no problems in {files[0]}; give a file with at least one")
    if problems[0].kind == "conversation":
        raise ConfigError(f"{source}: conversations have no right answer to judge; give questions with answers")
    return problems
