"""Corpus, tokenizer and token shards as stages of a job: each returns facts with the hash of what it made."""

from __future__ import annotations

from concurrent.futures import Executor

from nanoladder.stages import Facts, Progress
from nanoladder.workspace import Workspace


def corpus_stage(source: str, workspace: Workspace, val_fraction: float, progress: Progress) -> Facts:
    from nanochat_model.corpus import build_corpus

    info = build_corpus(source, workspace.corpus_dir, val_fraction=val_fraction, progress=progress.update)
    summary = f"{info.num_docs:,} documents, {info.num_bytes / 1e6:,.1f} MB"
    return {"hash": info.hash, "num_docs": info.num_docs, "num_bytes": info.num_bytes, "summary": summary}


def tokenizer_stage(workspace: Workspace, vocab_size: int, progress: Progress) -> Facts:
    from nanochat_model.corpus import open_corpus, training_texts
    from nanochat_model.tokenizer import Tokenizer

    progress.update(0, 1, "learning merges")
    tokenizer = Tokenizer.train(training_texts(open_corpus(workspace.corpus_dir)), vocab_size)
    tokenizer.save(workspace.tokenizer_dir)
    return {"hash": tokenizer.hash, "summary": f"{tokenizer.vocab_size} tokens, byte-level BPE"}


def shards_stage(workspace: Workspace, num_workers: int, progress: Progress, executor: Executor | None = None) -> Facts:
    from nanochat_model.shards import build_shards
    from nanochat_model.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(workspace.tokenizer_dir)
    shards = build_shards(
        workspace.corpus_dir,
        tokenizer,
        workspace.shards_dir,
        num_workers=num_workers,
        progress=progress.update,
        executor=executor,
    )
    tokens = shards.num_tokens("train")
    return {
        "hash": shards.manifest_hash,
        "train_tokens": tokens,
        "bytes_per_token": shards.bytes_per_token,
        "summary": f"{tokens / 1e6:.1f}M tokens, {shards.bytes_per_token:.2f} bytes a token",
    }
