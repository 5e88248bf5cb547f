"""The files of the CORE metric: where they come from and what they hold."""

from __future__ import annotations

import csv
import json
import os
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from nanochat_model.artifacts import build_folder, sha256_file
from nanochat_model.distributed import on_main
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash
from nanochat_model.transfer import fetch_one

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # nanochat's copy of DCLM's files
SHUFFLE_SEED = 1337  # order of the examples, so that a limit takes the same ones everywhere (nanochat base_eval.py)
TASK_KINDS = ("multiple_choice", "schema", "language_modeling")
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a bundle, its examples shuffled."""

    label: str
    kind: Literal["multiple_choice", "schema", "language_modeling"]
    num_fewshot: int
    continuation_delimiter: str
    random_baseline: float  # share, not percent
    examples: list[dict[str, Any]]


def load_bundle(bundle: str, *, max_per_task: int = 0) -> list[Task]:
    """All tasks of `bundle`: a folder, a zip file, a URL, or "download" for the public copy. Raises ConfigError."""
    import yaml

    root = on_main(lambda: locate(bundle))
    path = root / "core.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf8"))["icl_tasks"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: no list icl_tasks in it ({type(e).__name__}); give a CORE bundle") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: icl_tasks is {entries!r}, no list of tasks; give a CORE bundle")
    baselines = _baselines(root / "eval_meta_data.csv")
    return [_load_task(root, entry, baselines, max_per_task) for entry in entries]


def locate(bundle: str) -> Path:
    """Folder that holds core.yaml. A zip is unpacked beside itself, a URL into the user's cache; the same content once."""
    if bundle == "download" or bundle.startswith(("https://", "http://")):
        return _unpack(_download(BUNDLE_URL if bundle == "download" else bundle))
    path = Path(bundle)
    if path.is_dir():
        return _folder_with_tasks(path)
    if zipfile.is_zipfile(path):
        return _unpack(path)
    raise ConfigError(f"CORE bundle {bundle!r} is neither a folder, nor a zip file, nor a URL; give one, or 'download'")


def _folder_with_tasks(path: Path) -> Path:
    for candidate in (path, path / "eval_bundle"):
        if (candidate / "core.yaml").is_file():
            return candidate
    raise ConfigError(f"CORE bundle {path} has no core.yaml; give the folder that holds it")


def _unpack(archive: Path) -> Path:
    target = archive.with_name(f"{archive.stem}-{sha256_file(archive)[:8]}")  # another archive may take its place

    def extract(work: Path) -> None:
        try:
            with zipfile.ZipFile(archive) as z:
                z.extractall(work)
        except (zipfile.BadZipFile, EOFError) as e:
            raise ConfigError(f"{archive}: not a whole zip file ({e}); remove it and fetch the CORE bundle again") from None

    unpacked = build_folder(target, "zip", existing=lambda: target if target.is_dir() else None, build=extract)
    return _folder_with_tasks(unpacked)


def _download(url: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanoladder"
    target = cache / f"core-{content_hash(url)[:8]}" / "bundle.zip"  # addresses may share a file name
    return fetch_one(url, target)


def _baselines(path: Path) -> dict[str, float]:
    try:
        with path.open(encoding="utf8", newline="") as f:
            return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(f)}
    except (OSError, KeyError, ValueError) as e:
        raise ConfigError(f"{path}: not readable ({e!r}); it needs the columns 'Eval Task' and 'Random baseline'") from None


def _load_task(root: Path, entry: dict[str, Any], baselines: dict[str, float], max_per_task: int) -> Task:
    try:
        label, kind = str(entry["label"]), str(entry["icl_task_type"])
        path = root / "eval_data" / str(entry["dataset_uri"])
        num_fewshot = int(entry["num_fewshot"][0])
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise ConfigError(f"{root / 'core.yaml'}: task {entry!r} is not complete ({e!r}); give a CORE bundle") from None
    if kind not in TASK_KINDS:
        raise ConfigError(f"CORE task {label!r} is of kind {kind!r}; known: {', '.join(TASK_KINDS)}")
    if label not in baselines:
        raise ConfigError(f"{root / 'eval_meta_data.csv'}: no random baseline of task {label!r}; use files of one bundle")
    examples = _read_examples(path, kind)
    random.Random(SHUFFLE_SEED).shuffle(examples)
    if max_per_task > 0:
        examples = examples[:max_per_task]
    if len(examples) <= num_fewshot:
        raise ConfigError(f"CORE task {label!r} has {len(examples)} examples, too few for {num_fewshot} shots; raise max_per_task")
    return Task(
        label=label,
        kind=cast(Literal["multiple_choice", "schema", "language_modeling"], kind),
        num_fewshot=num_fewshot,
        continuation_delimiter=str(entry.get("continuation_delimiter", " ")),
        random_baseline=baselines[label],
        examples=examples,
    )


def _read_examples(path: Path, kind: str) -> list[dict[str, Any]]:
    examples = []
    try:
        lines = path.read_text(encoding="utf8").split("\n")
    except OSError:
        raise ConfigError(f"{path}: missing from the CORE bundle; unpack it again") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError:
            raise ConfigError(f"{path}:{number}: not JSON (cut short?); unpack the CORE bundle again") from None
        missing = [f for f in FIELDS[kind] if f not in example]
        if missing:
            raise ConfigError(f"{path}:{number}: no field {missing[0]!r}, which a {kind} task needs; use files of one bundle")
        examples.append(example)
    return examples
