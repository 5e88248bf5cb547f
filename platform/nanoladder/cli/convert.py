"""nanoladder export, import-nanochat and export-nanochat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from nanoladder.cli.common import Json, print_json


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


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint as a folder of its own: model.safetensors, tokenizer.json (Hugging Face), config.json, and one Python file
    that needs PyTorch, safetensors and tokenizers only.

    Example: nanoladder export demo/sft/0123456789abcdef --out exported && python exported/modeling_nanoladder.py "Hello"
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint, or a run's folder (its newest checkpoint)."""
    out: str
    """Folder to write, new or empty."""
    dtype: str = "float32"
    """bfloat16 halves the file and rounds the weights."""
    json: Json = False

    def run(self) -> None:
        from nanochat_model.export import export_standalone

        folder = export_standalone(self.checkpoint, self.out, dtype=self.dtype)
        if self.json:
            print_json({"folder": str(folder), "files": sorted(p.name for p in folder.iterdir())})
        else:
            print(f'written: {folder}\ntry: python {folder}/modeling_nanoladder.py "Hello"')
