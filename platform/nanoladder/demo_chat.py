"""The demo's last steps, in this process: fine-tune the production model on the project's conversations and questions, measure how
many new questions it answers, and ask it something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.config import RuntimeConfig
from nanochat_model.identity import content_hash
from nanochat_model.record import RunRecord
from nanoladder.demo_size import DemoSize
from nanoladder.reply_text import marked
from nanoladder.stages import Facts, Progress
from nanoladder.workspace import Workspace

if TYPE_CHECKING:
    from nanochat_model.demo_tasks import DemoTasks


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

    tune_process(1)  # batches of such a model are too small to share, and a second thread only waits where cores are busy
    train_file, _ = write_demo_conversations(workspace.root / "conversations", size.sft_conversations)
    folder = workspace.root / "sft" / production.run_id
    record = sft(
        SFTConfig(num_epochs=size.sft_epochs),
        RuntimeConfig(device="cpu", num_threads=1),
        base_checkpoint=workspace.run_dir(production.run_id),
        conversations=[str(train_file), *demo_tasks(size, workspace).sources],
        run_dir=folder,
        callbacks=[ShowSteps(progress)],
        name="demo",
    )
    if record.status != "complete":
        raise RuntimeError(f"fine-tuning {record.run_id} ended as {record.status}: {record.error}")
    losses = f"held-out loss {record.val_loss_before:.2f} → {record.val_loss_after:.2f} nats a token"
    return {"hash": record.run_id, "folder": str(folder), "summary": f"{record.num_conversations} conversations, {losses}"}


def demo_tasks(size: DemoSize, workspace: Workspace) -> DemoTasks:
    """The project's questions with right answers; no sum of the test files is in the training files."""
    from nanochat_model.demo_tasks import write_demo_tasks

    return write_demo_tasks(workspace.root / "tasks", num_train=size.sft_task_rows, num_test=size.chat_eval_problems)


def evaluate(size: DemoSize, workspace: Workspace, folder: Path, progress: Progress) -> Facts:
    """Accuracy of the fine-tuned model on sums that it has not seen, against guessing."""
    from nanochat_model.chat_eval import ChatEvalOptions, run_chat_eval

    found = run_chat_eval(
        folder,
        demo_tasks(size, workspace).tasks,
        device="cpu",
        options=ChatEvalOptions(max_new_tokens=size.chat_eval_max_tokens),
        progress=lambda task, done, total: progress.update(done, total, f"{task}: {done} of {total} problems"),
    )
    plain = found.as_dict()
    each = [f"{t.task} {t.num_correct} of {t.num_problems} (guessing {t.random_baseline:.0%})" for t in found.tasks]
    summary = f"score {found.score:.3f} ± {found.standard_error:.3f}: {', '.join(each)}"
    return {**plain, "hash": content_hash(plain), "summary": summary}


def reply(folder: Path, prompt: str, max_tokens: int) -> str:
    """The most likely answer of the fine-tuned model, its calculator calls between « and »."""
    from nanochat_model.chat import load_chat

    return "".join(marked(load_chat(str(folder)).reply_pieces(prompt, temperature=0.0, max_tokens=max_tokens))).strip()
