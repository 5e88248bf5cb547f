"""nanoladder data and nanoladder tokenizer: text into corpus, tokenizer and token shards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, Storage, human, print_json, print_table
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
    num_workers: int = max(1, (os.cpu_count() or 2) - 1)
    """Processes that tokenize."""
    json: Json = False

    def run(self) -> None:
        from nanochat_model.corpus import build_corpus, training_texts
        from nanochat_model.shards import build_shards
        from nanochat_model.tokenizer import Tokenizer

        root = Workspace(self.storage)
        with byte_bar("corpus", quiet=self.json) as progress:
            corpus = build_corpus(self.source, root.corpus_dir, val_fraction=self.val_fraction, progress=progress)
        tokenizer = existing_tokenizer(root, self.vocab_size)
        if tokenizer is None:
            if not self.json:
                print(f"tokenizer: learning {self.vocab_size} tokens from {human(corpus.train_bytes)}B of text ...")
            tokenizer = Tokenizer.train(training_texts(corpus), self.vocab_size)
            tokenizer.save(root.tokenizer_dir)
        started = time.perf_counter()
        with byte_bar("shards", quiet=self.json) as progress:
            shards = build_shards(root.corpus_dir, tokenizer, root.shards_dir, num_workers=self.num_workers, progress=progress)
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
def byte_bar(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar over bytes of text, as (done, total)."""
    if quiet:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (TextColumn(f"{title:<8}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
