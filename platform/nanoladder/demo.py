"""The whole ladder on one machine: from the text every machine has to a model that answers, in stages that resume."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from nanoladder.demo_production import ProductionStages
from nanoladder.demo_size import DemoSize
from nanoladder.demo_stages import DemoStages
from nanoladder.demo_summary import print_summary
from nanoladder.display import StageDisplay
from nanoladder.outcomes import read_production
from nanoladder.stages import Facts, Stage, run_stages
from nanoladder.workspace import Workspace


def demo_stages(size: DemoSize, workspace: Workspace) -> list[Stage]:
    """Every stage with its parents and what else its result depends on."""
    ladder = DemoStages(size, workspace)
    return [*_data_stages(ladder), *_sweep_stages(ladder), *_model_stages(ladder)]


def _data_stages(ladder: DemoStages) -> list[Stage]:
    """Text, tokenizer, token shards."""
    size, ws = ladder.size, ladder.workspace
    return [
        Stage(
            name="corpus",
            title="corpus: Python's own sources" if size.source == "stdlib" else f"corpus: {size.source}",
            run=ladder.corpus,
            inputs=[size.source, size.val_fraction],
            outputs=lambda f: [ws.corpus_dir / "corpus.json"],
        ),
        Stage(
            name="tokenizer",
            title="tokenizer",
            run=ladder.tokenizer,
            parents=("corpus",),
            inputs=size.vocab_size,
            outputs=lambda f: [ws.tokenizer_dir / "tokenizer.json"],
        ),
        Stage(
            name="shards",
            title="token shards",
            run=ladder.shards,
            parents=("tokenizer",),
            outputs=lambda f: [ws.shards_dir / "manifest.json"],
        ),
    ]


def _sweep_stages(ladder: DemoStages) -> list[Stage]:
    """Sweeps on Ray, and the laws of their runs."""
    tuning = ("weight_decay_cells", "weight_decay_multipliers", "batch_cells", "batch_multipliers", "lr_multipliers")
    promotion = ("promotion_cells", "promotion_baseline", "promotion_variants", "promotion_seeds", "promotion_eval_steps")
    return [
        Stage(
            name="tuning",
            title="sweeps: batch × learning rate, weight decay",
            run=ladder.tune,
            parents=("shards",),
            inputs=ladder.inputs("eval_tokens", *tuning),
            outputs=ladder.run_outputs,
        ),
        Stage(
            name="promotion",
            title="promotion: win small, win again larger",
            run=ladder.promotion,
            parents=("shards",),
            inputs=ladder.inputs("eval_tokens", *promotion),
            outputs=ladder.run_outputs,
        ),
        Stage(
            name="isoflop",
            title="sweep: sizes at equal compute",
            run=ladder.isoflop,
            parents=("tuning",),
            inputs=ladder.inputs("eval_tokens", "isoflop", "noise_cell", "noise_seeds"),
            outputs=ladder.run_outputs,
        ),
        Stage(
            name="laws",
            title="laws",
            run=ladder.laws,
            parents=("tuning", "isoflop"),
            inputs=ladder.size.n_boot,
            outputs=lambda f: [ladder.workspace.laws_path],
        ),
    ]


def _model_stages(ladder: DemoStages) -> list[Stage]:
    """From the laws to a model that answers, and the report."""
    last, ws = ProductionStages(ladder), ladder.workspace
    return [
        Stage(
            name="prediction",
            title="prediction",
            run=last.predict,
            parents=("laws",),
            inputs=ladder.inputs("production_factor", "production_shapes", "curve_points"),
            outputs=lambda f: [ws.prediction_path],
        ),
        Stage(
            name="production",
            title="production run on Ray Train",
            run=last.production,
            parents=("prediction",),
            outputs=last.outputs,
        ),
        Stage(
            name="sft",
            title="fine-tuning on conversations",
            run=last.sft,
            parents=("production",),
            inputs=ladder.inputs("sft_conversations", "sft_task_rows", "sft_epochs"),
            outputs=lambda f: [Path(f["folder"])],
        ),
        Stage(
            name="chat_eval",
            title="chat evaluation",
            run=last.evaluate_chat,
            parents=("sft",),
            inputs=ladder.inputs("chat_eval_problems", "chat_eval_max_tokens"),
        ),
        Stage(
            name="chat",
            title="chat",
            run=last.chat,
            parents=("sft",),
            inputs=ladder.inputs("chat_prompt", "chat_max_tokens"),
        ),
        Stage(
            name="report",
            title="report",
            run=last.report,
            parents=("production", "laws", "promotion"),
            outputs=lambda f: [ws.report_path],
        ),
    ]


def run_demo(storage: str | Path, size: DemoSize | None = None, console: Console | None = None) -> dict[str, Facts]:
    """Run (or go on with) the demo under `storage`, and print what came out. Returns every stage's facts."""
    size, workspace = size or DemoSize(), Workspace(storage)
    console = console or wide_console()
    stages = demo_stages(size, workspace)
    started = time.perf_counter()
    console.print(
        f"nanoladder demo in {workspace.root}; interrupt it at any time, the next start goes on", soft_wrap=True, markup=False
    )
    try:
        with StageDisplay(len(stages), console) as display:
            facts = run_stages(stages, workspace.stages_dir, display)
    finally:
        _end_ray()
    print_summary(console, workspace, facts, read_production(workspace) or {})
    console.print(f"[dim]{time.perf_counter() - started:.0f} s[/]")
    return facts


def wide_console(*, stderr: bool = False) -> Console:
    """A console of the terminal's width; in a log, which has none, wide enough for every line."""
    console = Console(highlight=False, stderr=stderr)
    return console if console.is_terminal else Console(highlight=False, stderr=stderr, width=160)


def _end_ray() -> None:
    """End our Ray if a stage started one (without importing Ray when none did)."""
    if "ray" in sys.modules:
        from nanoladder.ray_init import shutdown_ray

        shutdown_ray()
