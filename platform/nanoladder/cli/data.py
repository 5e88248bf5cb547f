"""nanoladder data and nanoladder tokenizer: text into corpus, tokenizer and token shards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, Storage, duration, human, print_json, print_table
from nanoladder.workspace import Workspace

if TYPE_CHECKING:
    from nanochat_model.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Data:
    """Make corpus, tokenizer and token shards under a storage root; what is there already is kept.

    Example: nanoladder data --source stdlib --storage runs --vocab-size 4096
    """

    source: str = "stdlib"
    """stdlib, site-packages (that and the installed packages), or a file or folder of parquet or jsonl with a `text` column."""
    storage: Storage = "runs"
    vocab_size: int = 4096
    """Size of the tokenizer's vocabulary, its special tokens included."""
    val_fraction: float = 0.05
    """Share of documents, chosen by hash, that is kept for validation."""
    num_workers: int = os.cpu_count() or 1
    """Processes that tokenize."""
    address: str = ""
    """Of a Ray cluster that sees the storage root: its CPUs tokenize instead of this machine's."""
    json: Json = False

    def run(self) -> None:
        from nanochat_model.corpus import build_corpus, training_texts
        from nanochat_model.shards import build_shards
        from nanochat_model.tokenizer import Tokenizer, check_vocab_size

        root = Workspace(self.storage)
        check_vocab_size(self.vocab_size)
        tokenizer = existing_tokenizer(root, self.vocab_size)
        with byte_bar("corpus", quiet=self.json) as progress:
            corpus = build_corpus(self.source, root.corpus_dir, val_fraction=self.val_fraction, progress=progress)
        if tokenizer is None:
            if not self.json:
                print(f"tokenizer: learning {self.vocab_size} tokens from {human(corpus.train_bytes)}B of text ...")
            tokenizer = Tokenizer.train(training_texts(corpus), self.vocab_size)
            tokenizer.save(root.tokenizer_dir)
        started = time.perf_counter()
        with byte_bar("shards", quiet=self.json) as progress, tokenizing(root, self.address, self.num_workers) as workers:
            shards = build_shards(root.corpus_dir, tokenizer, root.shards_dir, progress=progress, **workers)
        facts = {
            "storage": str(root.root),
            "source": corpus.source,
            "num_docs": corpus.num_docs,
            "num_bytes": corpus.num_bytes,
            "dropped": corpus.dropped,
            "left_out": list(corpus.left_out),
            "corpus_hash": corpus.hash,
            "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "manifest_hash": shards.manifest_hash,
            "train_tokens": shards.num_tokens("train"),
            "val_tokens": shards.num_tokens("val"),
            "bytes_per_token": round(shards.bytes_per_token, 4),
        }
        if self.json:
            print_json({**facts, "tokenize_seconds": round(time.perf_counter() - started, 2)})
            return
        print_table(("data", ""), [(k, str(v)) for k, v in facts.items()])


@dataclass(frozen=True, kw_only=True)
class TokenizerCommand:
    """Train a tokenizer from a corpus (`--train`), or show how the stored one cuts a text.

    Example: nanoladder tokenizer --storage runs "def main(): return 42"
    """

    text: Annotated[str, tyro.conf.Positional] = ""
    """Text to cut into tokens."""
    storage: Storage = "runs"
    train: bool = False
    """Train from the storage root's corpus."""
    vocab_size: int = 4096
    """With --train: size of the vocabulary, its special tokens included."""
    json: Json = False

    def run(self) -> None:
        from nanochat_model.corpus import open_corpus, training_texts
        from nanochat_model.tokenizer import Tokenizer

        root = Workspace(self.storage)
        if self.train:
            tokenizer = Tokenizer.train(training_texts(open_corpus(root.corpus_dir)), self.vocab_size)
            tokenizer.save(root.tokenizer_dir)
        else:
            tokenizer = Tokenizer.load(root.tokenizer_dir)
        ids = tokenizer.encode(self.text)
        pieces = [tokenizer.decode_bytes([i]).decode("utf8", "backslashreplace") for i in ids]
        num_bytes = len(self.text.encode())
        facts = {"vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash, "num_bytes": num_bytes, "ids": ids, "pieces": pieces}
        if self.json:
            print_json(facts)
            return
        print(f"vocabulary {tokenizer.vocab_size}, hash {tokenizer.hash}")
        if self.text:
            print(" ".join(f"{piece!r}" for piece in pieces))
            print(f"{len(ids)} tokens of {num_bytes} bytes: {num_bytes / len(ids):.2f} bytes a token")


def existing_tokenizer(root: Workspace, vocab_size: int) -> Tokenizer | None:
    """The stored tokenizer, or None. ConfigError when it has another size: its shards would not fit."""
    from nanochat_model.tokenizer import Tokenizer

    if not root.tokenizer_dir.exists():
        return None
    tokenizer = Tokenizer.load(root.tokenizer_dir)
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"{root.tokenizer_dir} holds a tokenizer of {tokenizer.vocab_size} tokens, {vocab_size} were asked for; "
            "give that vocab_size, or another --storage"
        )
    return tokenizer


@contextmanager
def tokenizing(root: Workspace, address: str, num_workers: int) -> Iterator[dict[str, Any]]:
    """Who tokenizes, as options of `build_shards`: a Ray cluster's CPUs where an address is given, else processes here."""
    if not address:
        yield {"num_workers": num_workers}
        return
    from nanoladder.ray_executor import RayExecutor
    from nanoladder.ray_init import ensure_ray, shutdown_ray

    ensure_ray(root, address=address)
    try:
        executor = RayExecutor()
        yield {"num_workers": executor.num_cpus, "executor": executor}
    finally:
        shutdown_ray()


@contextmanager
def byte_bar(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Progress over bytes of text, as (done, total): a bar with rate and time left, or a line every 15 s in a log."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(highlight=False)
    if not console.is_terminal:
        yield byte_lines(title)
        return
    columns = (TextColumn(f"{title:<8}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def byte_lines(title: str) -> Callable[[int, int], None]:
    from nanoladder.cli.download import LOG_EVERY_SECONDS, Rate

    rate, last = Rate(), [time.monotonic()]

    def show(done: int, total: int) -> None:
        rate.add(done)
        if time.monotonic() - last[0] >= LOG_EVERY_SECONDS:
            last[0] = time.monotonic()
            speed = rate.per_second
            tail = f", {human(speed)}B/s, {duration((total - done) / speed)} left" if speed else ""
            print(f"{title}: {human(done)}B of {human(total)}B{tail}", flush=True)

    return show
