"""nanoladder demo: the whole ladder on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from nanoladder.cli.common import Json, Storage, print_json


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Corpus, tokenizer, sweeps on Ray, laws, a predicted production run, fine-tuning, chat and report, in about ten minutes.

    Started again it skips what is recorded; interrupted, it goes on.

    Example: nanoladder demo --storage demo
    """

    storage: Storage = "demo"
    source: str = "stdlib"
    """stdlib, site-packages, or a file or folder of parquet or jsonl with a `text` column."""
    json: Json = False

    def run(self) -> None:
        from nanoladder.demo import run_demo, wide_console
        from nanoladder.demo_size import DemoSize

        facts = run_demo(self.storage, DemoSize(source=self.source), wide_console(stderr=self.json))
        if self.json:
            print_json(facts)
