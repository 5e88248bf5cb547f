"""Sweeps over fine-tunings: a sweep whose cells come of a base checkpoint and conversations given on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash
from nanochat_model.sft_recipe import SFTConfig
from nanoladder.job_context import default_storage
from nanoladder.space import Dimension
from nanoladder.sweep import Cell, Sweep


@dataclass(frozen=True, kw_only=True)
class SFTSweep:
    """A question about fine-tuning. `resolve` makes a Sweep of it, which then runs, is recorded and promoted like any other; its
    name gets the hash of the base and of the conversations, so that answers for other bases lie beside each other."""

    name: str
    question: str
    source: str = ""
    space: Mapping[str, Dimension] = field(default_factory=dict)  # lr_multiplier (of lr_fraction), batch_tokens, num_steps, …
    config: SFTConfig = field(default_factory=SFTConfig)
    seeds: tuple[int, ...] = (0,)
    num_trials: int = 0  # 0: all of a finite space
    device: str = ""

    def parser(self) -> argparse.ArgumentParser:
        """Of the options that only a fine-tuning has."""
        parser = argparse.ArgumentParser(
            description=f"{self.name}: {self.question}\nSource: {self.source}",
            epilog="example:\n"
            "  %(prog)s --storage demo --base-checkpoint demo/runs/0123456789abcdef --conversations chats.jsonl\n\n"
            "Every option of a sweep may follow: --dry-run, --set, --max-concurrent … (see any other sweep's --help).",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--base-checkpoint", required=True, metavar="PATH", help="checkpoint, or a run's folder")
        parser.add_argument(
            "--conversations", required=True, nargs="+", metavar="SOURCE[=EPOCHS]", help="paths, or datasets under --tasks-dir"
        )
        parser.add_argument("--tasks-dir", default="", metavar="DIR", help="folder of datasets in the hub's layout")
        parser.add_argument("--epochs", type=float, default=0.0, help=f"passes over the mixture ({self.config.num_epochs:g})")
        return parser

    def resolve(self, argv: Sequence[str]) -> tuple[Sweep, list[str]]:
        """The sweep for the base and the conversations that `argv` names, and the rest of `argv`. Prepares the conversations.
        Raises ConfigError on unfit input."""
        from nanochat_model.sft import plan_sft

        args, rest = self.parser().parse_known_args(list(argv))
        known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        known.add_argument("--storage", default=default_storage())
        storage = known.parse_known_args(rest)[0].storage
        if "://" in storage:
            raise ConfigError(f"storage {storage} is remote; sweeps over fine-tunings need a folder that all nodes share")
        config = replace(self.config, num_epochs=args.epochs) if args.epochs else self.config
        root = Path(storage) / "conversations"
        recipe = plan_sft(config, args.base_checkpoint, args.conversations, root, tasks_dir=args.tasks_dir).recipe
        sweep = Sweep(
            name=f"{self.name}-{content_hash([recipe.base_hash, recipe.data.manifest_hash])[:8]}",
            question=self.question,
            source=self.source,
            stage="sft",
            recipe=recipe,
            cells=(Cell(model=recipe.inherited.model, name="sft"),),
            space=self.space,
            seeds=self.seeds,
            num_trials=self.num_trials,
            device=self.device,
        )
        return sweep, rest
