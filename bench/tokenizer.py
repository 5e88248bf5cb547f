"""Bytes a second from text to token shards, and of learning the tokenizer.

    python bench/tokenizer.py [--source stdlib] [--vocab-size 1024] [--json PATH]

Lines: building the corpus; learning the tokenizer; encoding in one process as shards do it, cold (words not seen before) and
warm; the same by plain `tokenizers` for comparison (on a sample, one thread); and whole shard builds with one process and with
one a core. (Not called tokenize.py: that would hide the standard library's module from every script in this folder.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nanochat_model.corpus import build_corpus, iter_texts, training_texts
from nanochat_model.shards import build_shards
from nanochat_model.tokenizer import Tokenizer

SAMPLE_BYTES = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib", help="as of `nanoladder data`")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread unless a line says otherwise
    lines: list[dict[str, Any]] = []

    def timed(name: str, num_bytes: Callable[[], int], work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - began
        lines.append({"name": name, "seconds": seconds, "bytes_per_second": num_bytes() / seconds})
        print(f"{name:44} {seconds:8.2f} s {num_bytes() / seconds / 1e6:8.1f} MB/s", flush=True)
        return result

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = build_corpus(args.source, folder / "warm")  # reads the files into the page cache
        total, train = corpus.num_bytes, corpus.train_bytes
        print(f"{corpus.num_docs:,} documents, {total:,} bytes; vocabulary {args.vocab_size}")
        timed("corpus", lambda: total, lambda: build_corpus(args.source, folder / "corpus"))
        texts = list(iter_texts(corpus))
        tokenizer = timed("tokenizer", lambda: train, lambda: Tokenizer.train(training_texts(corpus), args.vocab_size))
        ids = timed("encode, cold", lambda: train, lambda: [tokenizer.encode_array(t) for t in texts])
        timed("encode, warm", lambda: train, lambda: [tokenizer.encode_array(t) for t in texts])
        sample, size = [], 0
        for text in texts:
            if size < SAMPLE_BYTES:
                sample.append(text)
                size += len(text.encode())
        plain = tokenizer._backend
        timed("encode by plain tokenizers", lambda: size, lambda: [plain.encode(t, add_special_tokens=False).ids for t in sample])
        for workers in sorted({1, args.workers}):
            out = folder / f"shards{workers}"
            build = partial(build_shards, folder / "corpus", tokenizer, out, num_workers=workers)
            timed(f"shards, {workers} process{'es' * (workers > 1)}", lambda: total, build)
        num_tokens = sum(map(len, ids))
        print(f"{train / num_tokens:.3f} bytes a token")
        result = {
            "benchmark": "tokenize", "date": time.strftime("%Y-%m-%d"), "cpu": platform.processor() or platform.machine(),
            "num_cpus": os.cpu_count(), "python": platform.python_version(), "source": args.source, "vocab_size": args.vocab_size,
            "num_bytes": total, "train_bytes": train, "bytes_per_token": train / num_tokens, "lines": lines,
        }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
