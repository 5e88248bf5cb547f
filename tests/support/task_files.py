"""Small files in the published layouts of the datasets, under a folder as the hub lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


def arc_rows(count: int) -> list[dict[str, Any]]:
    """The third has numbers for letters, the fourth three choices, as some of the real ones have."""
    rows = []
    for i in range(count):
        labels = ["1", "2", "3", "4"] if i % 7 == 3 else ["A", "B", "C"] if i % 7 == 4 else ["A", "B", "C", "D"]
        texts = [f"thing {i + j}" for j in range(len(labels))]
        choices = {"text": texts, "label": labels}
        rows.append({"id": f"q{i}", "question": f"Which is {i}?", "choices": choices, "answerKey": labels[i % len(labels)]})
    return rows


def mmlu_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"What of {i}?", "subject": "anatomy", "choices": [f"{i}{c}" for c in "wxyz"], "answer": i % 4}
        for i in range(count)
    ]


def gsm8k_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{i} and {i} more?", "answer": f"It is {i} + {i} = <<{i}+{i}={2 * i}>>{2 * i} in all.\n#### {2 * i:,}"}
        for i in range(count)
    ]


def humaneval_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'import math\n\n\ndef f{i}(x: int) -> int:\n    """Add {i}."""\n',
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n    assert candidate(-{i}) == 0\n",
            "entry_point": f"f{i}",
        }
        for i in range(count)
    ]


def smoltalk_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Tell me of {i}."},
                {"role": "assistant", "content": f"{i} is a number."},
            ],
            "source": "made",
        }
        for i in range(start, start + count)
    ]


def write_tasks(root: Path) -> Path:
    """All datasets, each in one of the folder forms that are looked for."""
    for subset in ("ARC-Easy", "ARC-Challenge"):
        for split, count in (("train", 12), ("test", 15)):
            write_parquet(root / "allenai" / "ai2_arc" / subset / f"{split}-00000-of-00001.parquet", arc_rows(count))
    mmlu = root / "cais--mmlu" / "all"
    write_parquet(mmlu / "auxiliary_train-00000-of-00001.parquet", [{"train": row} for row in mmlu_rows(9)])
    write_parquet(mmlu / "test-00000-of-00002.parquet", mmlu_rows(10))
    write_parquet(mmlu / "test-00001-of-00002.parquet", mmlu_rows(7))
    snapshot = root / "datasets--openai--gsm8k" / "snapshots" / "abc" / "main"
    write_parquet(snapshot / "train-00000-of-00001.parquet", gsm8k_rows(8))
    write_parquet(snapshot / "test-00000-of-00001.parquet", gsm8k_rows(11))
    write_parquet(root / "openai_humaneval" / "openai_humaneval" / "test" / "0000.parquet", humaneval_rows(5))
    talk = root / "HuggingFaceTB" / "smol-smoltalk" / "data"
    write_parquet(talk / "train-00000-of-00002.parquet", smoltalk_rows(20))
    write_parquet(talk / "train-00001-of-00002.parquet", smoltalk_rows(13, 20))
    write_parquet(talk / "test-00000-of-00001.parquet", smoltalk_rows(6))
    return root
