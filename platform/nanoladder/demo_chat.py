"""The demo's last steps, in this process: fine-tune the production model on the project's conversations, and ask it something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.config import RuntimeConfig
from nanochat_model.record import RunRecord
from nanoladder.demo_size import DemoSize
from nanoladder.stages import Facts, Progress
from nanoladder.workspace import Workspace


@dataclass(frozen=True)
class ShowSteps(Callback):
    """Passes the loop's steps to the demo's display."""

    progress: Progress

    def on_step(self, info: StepInfo) -> None:
        self.progress.update(info.step, info.num_steps, f"step {info.step} of {info.num_steps}, loss {info.train_loss:.3f}")


def finetune(size: DemoSize, workspace: Workspace, production: RunRecord, progress: Progress) -> Facts:
    """Fine-tune the production run's last checkpoint; facts name the folder of the new one."""
    from nanochat_model.demo_conversations import write_demo_conversations
    from nanochat_model.device import tune_process
    from nanochat_model.sft import SFTConfig, sft

    threads = size.num_workers * size.threads_per_worker
    tune_process(threads)
    train_file, _ = write_demo_conversations(workspace.root / "conversations", size.sft_conversations)
    folder = workspace.root / "sft" / production.run_id
    record = sft(
        SFTConfig(num_epochs=size.sft_epochs),
        RuntimeConfig(device="cpu", num_threads=threads),
        base_checkpoint=workspace.run_dir(production.run_id),
        conversations=train_file,
        run_dir=folder,
        callbacks=[ShowSteps(progress)],
        name="demo",
    )
    if record.status != "complete":
        raise RuntimeError(f"fine-tuning {record.run_id} ended as {record.status}: {record.error}")
    losses = f"held-out loss {record.val_loss_before:.2f} → {record.val_loss_after:.2f} nats a token"
    return {"hash": record.run_id, "folder": str(folder), "summary": f"{record.num_conversations} conversations, {losses}"}


def reply(folder: Path, prompt: str, max_tokens: int) -> str:
    """The most likely answer of the fine-tuned model."""
    from nanochat_model.chat import load_chat

    return "".join(load_chat(str(folder)).reply(prompt, temperature=0.0, max_tokens=max_tokens)).strip()
