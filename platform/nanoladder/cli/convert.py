"""nanoladder import-nanochat and export-nanochat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class ImportNanochat:
    """Read a nanochat checkpoint folder (base or SFT) into this layout: safetensors and JSON, no pickled code is run.

    Example: nanoladder import-nanochat ~/.cache/nanochat/base_checkpoints/d24 --out checkpoints/d24
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Folder with model_*.pt and meta_*.json."""
    out: str
    """Folder to write."""
    step: int | None = None
    """Which checkpoint of the folder; left out: the newest."""
    tokenizer: str | None = None
    """nanochat's tokenizer folder; left out: looked for two folders up, as nanochat lays it out."""

    def run(self) -> None:
        from nanochat_model.interop import import_nanochat

        print(f"written: {import_nanochat(self.checkpoint, self.out, step=self.step, tokenizer=self.tokenizer)}")


@dataclass(frozen=True, kw_only=True)
class ExportNanochat:
    """Write a checkpoint in nanochat's layout.

    Example: nanoladder export-nanochat demo/sft --out exported
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint, or a run's folder (its newest checkpoint)."""
    out: str
    """Folder to write."""
    bf16_tables: bool = False
    """Store the look-up tables in bf16, as nanochat does on a GPU."""

    def run(self) -> None:
        from nanochat_model.interop import export_nanochat

        print(f"written: {export_nanochat(self.checkpoint, self.out, bf16_tables=self.bf16_tables)}")
