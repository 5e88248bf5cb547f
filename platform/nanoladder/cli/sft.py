"""nanoladder sft: fine-tune a checkpoint on conversations."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, Storage, print_json, print_table

Checkpoint = Annotated[str, tyro.conf.arg(metavar="PATH", help="A checkpoint, or a run's folder (its newest intact checkpoint).")]
SHOW_SECONDS = 5.0
TasksDir = Annotated[str, tyro.conf.arg(metavar="DIR", help="Folder of datasets in the hub's layout (docs/sft.md).")]


@dataclass(frozen=True, kw_only=True)
class SftOptions:
    """Values of the fine-tuning; everything else is the base's."""

    num_epochs: float = 1.0
    """Passes over the mixture."""
    num_steps: int = 0
    """Instead of epochs, if over 0."""
    batch_tokens: int = 0
    """0: the base's."""
    lr_fraction: float = 0.8
    """Of the learning rates that the base was trained with."""
    warmup_fraction: float = 0.0
    """Of the steps."""
    warmdown_fraction: float = 0.5
    """Of the steps, at the end."""
    final_lr_fraction: float = 0.0
    """Of the learning rates, at the last step."""
    cold_start: bool = False
    """Take over the base's weights, but not its optimizer state (an imported base has none)."""
    eval_every_steps: int = 0
    """0: before and after only."""
    eval_tokens: int = 0
    """Of the held-out conversations; 0: all."""
    seed: int = 0


class ShowSteps(Callback):
    """One line of progress every few seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def on_step(self, info: StepInfo) -> None:
        self.show(info.step, info.num_steps, info.train_loss, info.tokens_per_second)

    def event(self, event: dict[str, Any]) -> None:
        """The same of workers elsewhere, as they report it."""
        if event["event"] == "step":
            self.show(event["step"], event["num_steps"], event["train_loss"], event["tokens_per_second"])

    def show(self, step: int, num_steps: int, loss: float, tokens_per_second: float | None) -> None:
        now = time.monotonic()
        if now - self._last >= SHOW_SECONDS or step == num_steps:
            self._last = now
            speed = f", {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
            print(f"step {step} of {num_steps}, loss {loss:.4f}{speed}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Fine-tune a checkpoint on conversations: jsonl of {"messages": [{"role", "content"}, …]}. Started again it goes on.

    Example: nanoladder sft --checkpoint demo/runs/0123456789abcdef --conversations chats.jsonl --out sft

    Example: nanoladder sft --checkpoint runs/runs/0123456789abcdef --tasks-dir tasks --conversations nanochat identity.jsonl=2
    """

    checkpoint: Checkpoint
    conversations: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="SOURCE[=EPOCHS] ...",
            help="Files or folders (jsonl, parquet), datasets under --tasks-dir (SmolTalk, MMLU, GSM8K …), or nanochat: its mix.",
        ),
    ]
    held_out: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="SOURCE ...", help="Sources to validate on; left out: a tenth of each, by content.")
    ] = ()
    tasks_dir: TasksDir = ""
    out: str = ""
    """Folder of the fine-tuned checkpoint and its record; left out: the run's folder under --storage."""
    storage: Storage = "runs"
    name: str = ""
    options: SftOptions = field(default_factory=SftOptions)
    device: str = "auto"
    num_threads: int = 0
    """CPU threads; 0: all."""
    num_workers: int = 1
    """More than one: that many processes, a device each, through Ray Train."""
    checkpoint_every_steps: int = 0
    """0: at the end only."""
    json: Json = False

    def run(self) -> int:
        from nanochat_model.config import RuntimeConfig
        from nanochat_model.device import tune_process
        from nanochat_model.identity import run_id
        from nanochat_model.mixture import Source, parse_sources
        from nanochat_model.sft import SFTConfig, SFTRecord, plan_sft
        from nanoladder.workspace import Workspace

        if self.num_workers < 1:
            raise ConfigError(f"num_workers {self.num_workers} must be at least 1")
        tune_process(self.num_threads)
        workspace = Workspace(self.storage)
        sources = [*parse_sources(self.conversations), *(Source.parse(s, held_out=True) for s in self.held_out)]
        root = Path(self.out) / "conversations" if self.out else workspace.root / "conversations"
        values = asdict(self.options)
        config = SFTConfig(warm_start=not values.pop("cold_start"), **values)
        plan = plan_sft(config, self.checkpoint, sources, root, tasks_dir=self.tasks_dir, report=self.report)
        folder = Path(self.out) if self.out else workspace.run_dir(run_id(plan.config))
        runtime = RuntimeConfig(
            device=self.device, num_threads=self.num_threads, checkpoint_every_steps=self.checkpoint_every_steps
        )
        self.train(plan, runtime, folder, workspace)
        record = SFTRecord.load(folder)
        if self.json:
            print_json(record)
        else:
            self.show(record, folder)
        return 0 if record.status == "complete" else 1

    def report(self, source: str, rows: int) -> None:
        if not self.json and rows % 20_000 == 0:
            print(f"{source}: {rows:,} rows rendered", flush=True)

    def train(self, plan: Any, runtime: Any, folder: Path, workspace: Any) -> None:
        from nanochat_model.sft import finetune
        from nanochat_model.sft_recipe import TRAIN_FUNCTION

        shown = [] if self.json else [ShowSteps()]
        if self.num_workers == 1:
            finetune(plan.config, runtime, run_dir=folder, start_from=plan.base, callbacks=shown, name=self.name)
            return
        from nanoladder.ray_init import shutdown_ray
        from nanoladder.train_backend import run_training_on_ray_train

        try:
            run_training_on_ray_train(
                plan.config,
                runtime,
                run_dir=folder,
                workspace=workspace,
                num_workers=self.num_workers,
                threads_per_worker=max(1, self.num_threads),
                name=self.name,
                stage="sft",
                progress=shown[0].event if shown else None,
                train_function=TRAIN_FUNCTION,
                start_from=str(plan.base.absolute()),
            )
        finally:
            shutdown_ray()

    def show(self, record: Any, folder: Path) -> None:
        columns = ("source", "split", "epochs", "training", "held out", "a pass")
        rows = [(s.data, s.split, f"{s.epochs:g}", f"{s.num_train:,}", f"{s.num_val:,}", f"{s.num_seen:,}") for s in record.sources]
        print_table(columns, rows, right=columns[2:])
        if record.num_truncated:
            print(f"{record.num_truncated:,} conversations are longer than a row and were cut at their end")
        if record.val_loss_after is None:
            print(f"{record.status}: {record.error}")
            return
        change = f"{record.val_loss_before:.4f} → {record.val_loss_after:.4f} nats a token"
        print(f"{record.status}: {record.num_steps} steps, held-out loss {change}; written: {folder.absolute()}")
