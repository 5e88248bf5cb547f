"""nanoladder production: from data to a chat page, by one file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanochat_model.errors import ConfigError
from nanochat_model.overrides import parse_overrides
from nanoladder.cli.common import Json, Overrides, Storage, print_json
from nanoladder.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Production:
    """Data, tokenizer, pretraining, base evaluation, fine-tuning, chat evaluation and report, in order; what exists is skipped.

    It shows the plan and asks once. Interrupted or failed it goes on where it was, when started again.

    Example: nanoladder production production/d24_h100.toml --storage runs/d24 --set device.price=3.0

    On any machine: nanoladder production production/demo.toml --storage runs/demo --yes
    """

    file: Annotated[str, tyro.conf.Positional]
    """What to make, in TOML; production/ in the repository has some to start from."""
    storage: Storage = "runs"
    address: str = ""
    """Of a Ray cluster; left out: a Ray of its own on this machine."""
    set: Overrides = ()
    until: str = ""
    """The last stage to run: download, corpus, tokenizer, shards, pretraining, evaluation, sft, chat or report."""
    dry_run: bool = False
    """Show the plan and what would be done, and end."""
    yes: bool = False
    """Do not ask."""
    serve: bool = False
    """Serve the chat page at the end (port 8000)."""
    json: Json = False

    def run(self) -> int:
        from nanoladder.cli.plan import confirm
        from nanoladder.demo import wide_console
        from nanoladder.plan_text import plan_as_dict, print_plan
        from nanoladder.production import missing_inputs, plan_production, production_stages, run_production
        from nanoladder.production_config import read_production

        config, workspace = read_production(self.file, parse_overrides(self.set)), Workspace(self.storage)
        names = [s.name for s in production_stages(config, workspace)]
        if self.until and self.until not in names:
            raise ConfigError(f"until {self.until!r} is no stage of this production; stages are {', '.join(names)}")
        plan = plan_production(config, workspace, built=(workspace.shards_dir / "manifest.json").is_file())
        if not self.json:
            print_plan(plan)
            print(f"stages: {', '.join(names)}")
        missing = [] if self.until in names[: names.index("evaluation")] else missing_inputs(config)
        if self.dry_run:
            if self.json:
                print_json({**plan_as_dict(plan), "stages": names, "missing": missing})
            for line in missing:
                print(f"stops it: {line}", file=sys.stderr)
            return 0
        if missing:
            more = f" (and {len(missing) - 1} more, which --dry-run lists)" if len(missing) > 1 else ""
            raise ConfigError(f"{missing[0]}{more}")
        if plan.blocking:
            raise ConfigError("; ".join(plan.blocking))
        if not self.yes and not confirm():
            print("not started")
            return 1
        facts = run_production(
            config, workspace, address=self.address or None, console=wide_console(stderr=self.json), until=self.until
        )
        if self.json:
            print_json(facts)
        if self.serve and "sft" in facts:
            return serve(Path(facts["sft"]["folder"]))
        return 0


def serve(model: Path) -> int:
    """The chat page of `model`, until interrupted: as `nanoladder serve` does."""
    from nanoladder.cli import run

    sys.stdout.flush()
    return run(["serve", str(model)])
