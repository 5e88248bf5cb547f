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
    """Folder with model_*.pt and meta_*.json, or one of these model files."""
    out: str
    """Folder to write."""
    step: int | None = None
    """Which checkpoint of the folder; left out: the newest."""
    tokenizer: str | None = None
    """nanochat's tokenizer folder, or none; left out: looked for in the folder and two folders up, as nanochat lays it out."""
    json: Json = False

    def run(self) -> None:
        from nanochat_model.checkpoint import read_state
        from nanochat_model.counts import count_params
        from nanochat_model.interop import import_nanochat

        folder = import_nanochat(self.checkpoint, self.out, step=self.step, tokenizer=self.tokenizer)
        state = read_state(folder)
        facts = {
            "checkpoint": str(folder),
            "step": state.step,
            "depth": state.model.depth,
            "num_params": count_params(state.model).total,
            "val_bpb": state.extra["source_meta"].get("val_bpb"),
            "tokenizer": state.extra["tokenizer_path"] or None,
            "filled": state.extra["filled"],
        }
        if self.json:
            print_json(facts)
            return
        print(f"written: {folder} (step {state.step}, depth {state.model.depth}, {facts['num_params']:,} parameters)")
        print(f"tokenizer: {facts['tokenizer'] or 'none found; give --tokenizer, chat and evaluation need one'}")
        if facts["filled"]:
            print(f"missing and filled as nanochat does, without effect: {', '.join(state.extra['filled'])}")


@dataclass(frozen=True, kw_only=True)
class ExportNanochat:
    """Write a checkpoint and its tokenizer in nanochat's layout. nanochat reads the tokenizer from its base folder: to use this
    one there, copy OUT/tokenizer over ~/.cache/nanochat/tokenizer.

    Example: nanoladder export-nanochat demo/sft/0123456789abcdef --out ~/.cache/nanochat/chatsft_checkpoints/d4
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint, or a run's folder (its newest checkpoint)."""
    out: str
    """Folder to write."""
    bf16_tables: bool = False
    """Store the look-up tables in bf16, as nanochat does on a GPU."""
    json: Json = False

    def run(self) -> None:
        from nanochat_model.interop import export_nanochat

        model = export_nanochat(self.checkpoint, self.out, bf16_tables=self.bf16_tables)
        files = sorted(str(p) for p in model.parent.rglob("*") if p.is_file())
        if self.json:
            print_json({"folder": str(model.parent), "files": files})
        else:
            print("\n".join([f"written: {model.parent}", *(f"  {f}" for f in files)]))


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
