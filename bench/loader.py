"""Tokens a second of ready training batches from packed shards, in one process.

    python bench/loader.py [--shards FOLDER] [--json PATH]

Without --shards it writes 64 million random tokens in documents of web-like lengths (log-normal, median 400) to a temporary
folder. `start` is opening the shards and the first batch, as a trial pays it; then batches are taken one after another for
--seconds. Goal: at least 50 million tokens a second from packed shards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_model.loader import Loader
from nanochat_model.shard_set import MANIFEST_FILE, SCHEMA_VERSION, TOKEN_BYTES_FILE, ShardSet, file_entry, manifest_hash

GOAL_TOKENS_PER_SECOND = 50e6
SHAPES = ((256, 8), (256, 64), (2048, 32), (2048, 256))  # sequence_len, rows of a batch
VOCAB_SIZE = 32768


def random_shards(folder: Path, num_tokens: int) -> ShardSet:
    """Shards of random tokens in documents of web-like lengths, one file a split."""
    rng = np.random.default_rng(0)
    splits: dict[str, Any] = {}
    for split, tokens in (("train", num_tokens), ("val", num_tokens // 64)):
        lengths = np.maximum(2, rng.lognormal(np.log(400), 1.2, tokens // 400).astype(np.int64))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        offsets = offsets[: np.searchsorted(offsets, tokens) + 1]
        ids = rng.integers(0, VOCAB_SIZE - 9, offsets[-1], np.uint16)
        ids[offsets[:-1]] = VOCAB_SIZE - 9
        ids.tofile(folder / f"{split}_00000.bin")
        np.save(folder / f"{split}_00000.offsets.npy", offsets)
        totals = {"num_docs": len(offsets) - 1, "num_tokens": len(ids), "num_bytes": 4 * len(ids)}
        files = {kind: file_entry(folder / f"{split}_00000.{end}") for kind, end in (("tokens", "bin"), ("offsets", "offsets.npy"))}
        splits[split] = {**totals, "files": [{**files, **totals}]}
    np.save(folder / TOKEN_BYTES_FILE, np.full(VOCAB_SIZE, 4, np.int32))
    manifest = {
        "schema_version": SCHEMA_VERSION, "corpus_hash": "random", "tokenizer_hash": "random", "vocab_size": VOCAB_SIZE,
        "bos_id": VOCAB_SIZE - 9, "dtype": "<u2", "shard_bytes": 1 << 28, "window_tokens": 1 << 28,
        "token_bytes": file_entry(folder / TOKEN_BYTES_FILE), "splits": splits,
    }  # fmt: skip
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, "hash": manifest_hash(manifest)}))
    return ShardSet.open(folder)


def measure(path: Path, packing: Any, sequence_len: int, rows: int, seconds: float) -> dict[str, Any]:
    """One line of the table."""
    began = time.perf_counter()
    loader = Loader(ShardSet.open(path), packing=packing, sequence_len=sequence_len, rows_per_batch=rows)
    loader.batch(0)
    start = time.perf_counter() - began
    times: list[float] = []
    k, began = 1, time.perf_counter()
    while (now := time.perf_counter()) < began + seconds or k < 10:
        loader.batch(k)
        times.append(time.perf_counter() - now)
        k += 1
    return {
        "packing": packing, "sequence_len": sequence_len, "rows": rows,
        "tokens_per_second": rows * sequence_len * len(times) / sum(times),
        "median_batch_seconds": statistics.median(times), "start_seconds": start, "dropped_fraction": loader.dropped_fraction,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="folder of shards; default: random ones in a temporary folder")
    parser.add_argument("--num-tokens", type=int, default=1 << 26, help="size of the random shards")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each line")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet.open(args.shards) if args.shards else random_shards(Path(folder), args.num_tokens)
        print(f"{shards.num_tokens():,} training tokens in {shards.num_docs():,} documents, {shards.dtype}")
        print(f"{'packing':15} {'T':>5} {'rows':>5} {'Mtok/s':>8} {'goal':>6} {'ms/batch':>9} {'start s':>8} {'dropped':>8}")
        lines = []
        for packing in ("best_fit", "keep_remainder"):
            for sequence_len, rows in SHAPES:
                line = measure(shards.path, packing, sequence_len, rows, args.seconds)
                lines.append(line)
                speed = line["tokens_per_second"]
                print(
                    f"{packing:15} {sequence_len:5} {rows:5} {speed / 1e6:8.1f} {speed / GOAL_TOKENS_PER_SECOND:5.2f}x "
                    f"{1e3 * line['median_batch_seconds']:9.3f} {line['start_seconds']:8.3f} {line['dropped_fraction']:8.1%}"
                )
        result = {
            "benchmark": "loader", "date": time.strftime("%Y-%m-%d"), "cpu": platform.processor() or platform.machine(),
            "num_cpus": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__,
            "num_tokens": shards.num_tokens(), "num_docs": shards.num_docs(), "goal_tokens_per_second": GOAL_TOKENS_PER_SECOND,
            "lines": lines,
        }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
