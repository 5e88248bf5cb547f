"""What the stages of `nanoladder production` do. Each returns plain facts for the next ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_model.config import RuntimeConfig
from nanochat_model.identity import content_hash, run_id, write_atomic
from nanochat_model.record import RECORD_FILE
from nanoladder.data_stages import corpus_stage, shards_stage, tokenizer_stage
from nanoladder.live_run import step_line
from nanoladder.plan import LaunchPlan
from nanoladder.plan_text import plan_as_dict
from nanoladder.production_config import DEMO_CONVERSATIONS, ProductionConfig
from nanoladder.stages import Facts, Progress
from nanoladder.workspace import Workspace

CARD_FILE = "production.md"
CARD_JSON = "production.json"
PLAN_FILE = "plan.json"  # in the run's folder


@dataclass(frozen=True)
class DataStages:
    """Download to token shards."""

    config: ProductionConfig
    workspace: Workspace
    address: str | None
    needed_bytes: Callable[[], float]  # of training text, by the plan

    def download(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        from nanoladder.cli.download import Rate, state_text
        from nanoladder.download import State, dataset_folder, download, find_source, stored_revision
        from nanoladder.shards_needed import fetch_needed

        data, rate = self.config.data, Rate()
        folder = dataset_folder(self.workspace.root, data.dataset)

        def show(state: State) -> None:
            rate.add(state.done_bytes)
            progress.update(state.done_bytes, state.total_bytes, state_text(state, rate.per_second))

        source = find_source(data.dataset, revision=data.revision or stored_revision(folder), endpoint=data.endpoint)
        if data.shards:
            done = download(source, folder, num_files=data.shards, progress=show)
        else:
            done, _ = fetch_needed(source, folder, self.needed_bytes(), val_fraction=data.val_fraction, progress=show)
        summary = f"{len(done.files)} of {done.num_offered} files, {done.num_bytes / 1e6:,.1f} MB, verified"
        names = [f["name"] for f in done.files]
        return {"hash": done.hash, "folder": done.folder, "files": names, "revision": done.revision, "summary": summary}

    def download_outputs(self, facts: Facts) -> list[Path]:
        return [Path(facts["folder"]) / name for name in facts["files"]]

    def corpus(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        source = self.config.data.source or facts["download"]["folder"]
        return corpus_stage(source, self.workspace, self.config.data.val_fraction, progress)

    def tokenizer(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        return tokenizer_stage(self.workspace, self.config.data.vocab_size, progress)

    def shards(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        """On the cluster's CPUs where an address is given, else by processes here."""
        if not self.address:
            return shards_stage(self.workspace, self.config.data.num_workers or os.cpu_count() or 1, progress)
        from nanoladder.ray_executor import RayExecutor
        from nanoladder.ray_init import ensure_ray, shutdown_ray

        ensure_ray(self.workspace, address=self.address)
        try:
            executor = RayExecutor()
            return shards_stage(self.workspace, executor.num_cpus, progress, executor)
        finally:
            shutdown_ray()


@dataclass(frozen=True)
class TrainingStages:
    """The planned run, and what its checkpoint is worth."""

    config: ProductionConfig
    workspace: Workspace
    address: str | None
    say: Callable[[str], None]
    plan: Callable[[], LaunchPlan]  # with the shards that were built

    def pretrain(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        from nanoladder.launch import LaunchOptions, launch

        plan, p, bpb = self.plan(), self.config.pretraining, [None]
        folder = self.workspace.run_dir(run_id(plan.config))

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                progress.update(event["step"], plan.config.num_steps, step_line(event, plan, bpb[0]))
            elif event["event"] == "eval":
                bpb[0] = event["val_bpb"]
            elif event["event"] == "alert":
                self.say(f"ALERT {event['line']}")

        write_atomic(folder / PLAN_FILE, json.dumps(plan_as_dict(plan), indent=1))
        options = LaunchOptions(
            address=self.address,
            quiet=True,
            webhook=p.webhook,
            sample_every_steps=p.sample_every_steps,
            core_every_steps=p.core_every_steps,
            core_bundle=self.config.evaluation.core_bundle if p.core_every_steps else "",
            checkpoint_every_seconds=60 * p.checkpoint_minutes,
        )
        verdict = launch(plan, self.workspace, options, progress=show)
        if verdict["status"] != "complete":
            raise RuntimeError(verdict["text"])
        return {
            "hash": content_hash([verdict["run_id"], verdict["measured"]]),
            "folder": str(folder),
            "verdict": verdict,
            "plan": {
                "parameters": plan.params.total,
                "tokens": plan.config.num_tokens,
                "flops": plan.train_flops,
                "hours": verdict["predicted_hours"],
            },
            "summary": verdict["text"],
        }

    def outputs(self, facts: Facts) -> list[Path]:
        folder = Path(facts["folder"])
        return [folder / RECORD_FILE, folder / "checkpoints"]

    def evaluate(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        from nanoladder.base_evaluation import evaluate_base

        e = self.config.evaluation
        progress.update(0, 1, "bits per byte, and CORE" if e.core_bundle else "bits per byte")
        found = evaluate_base(
            facts["pretraining"]["folder"],
            num_tokens=e.num_tokens,
            core_bundle=e.core_bundle,
            core_max_per_task=e.core_max_per_task,
            device=torch_device(self.config),
        )
        core = f", CORE {found['core']['core']:.4f}" if found["core"] else ""
        summary = f"{found['val_bpb']:.4f} bpb over {found['num_tokens']:,} tokens{core}"
        return {**found, "hash": content_hash([found["hash"], found["val_bpb"], found["core"]]), "summary": summary}


@dataclass(frozen=True)
class ChatStages:
    """Fine-tuning, chat evaluation and the report."""

    config: ProductionConfig
    workspace: Workspace
    address: str | None

    def sft(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        """In this process on one device or a CPU, through Ray Train on several."""
        from nanochat_model.sft import SFTConfig, SFTRecord, finetune, plan_sft

        s, base = self.config.sft, facts["pretraining"]["folder"]
        options = SFTConfig(num_epochs=s.num_epochs, num_steps=s.num_steps, batch_tokens=s.batch_tokens, lr_fraction=s.lr_fraction)
        progress.update(0, 1, "rendering conversations")
        plan = plan_sft(options, base, self.sources(), self.workspace.root / "sft-data", tasks_dir=s.tasks_dir)
        folder = self.workspace.root / "sft" / run_id(plan.config)
        labels: dict[str, Any] = {"name": self.config.name, "stage": "sft"}
        if torch_device(self.config) == "cpu" or self.config.device.num_devices == 1:
            from nanochat_model.device import tune_process
            from nanoladder.demo_chat import ShowSteps

            if self.threads:
                tune_process(self.threads)
            runtime = replace(self.runtime, num_threads=self.threads)
            finetune(plan.config, runtime, run_dir=folder, start_from=plan.base, callbacks=[ShowSteps(progress)], **labels)
        else:
            self.finetune_on_ray(plan, folder, labels, progress)
        record = SFTRecord.load(folder)
        if record.status != "complete":
            raise RuntimeError(f"fine-tuning {record.run_id} ended as {record.status}: {record.error}")
        losses = f"held-out loss {record.val_loss_before:.3f} → {record.val_loss_after:.3f} nats a token"
        return {
            "hash": record.run_id,
            "folder": str(folder),
            "before": record.val_loss_before,
            "after": record.val_loss_after,
            "summary": f"{record.num_conversations:,} conversations, {losses}",
        }

    def finetune_on_ray(self, plan: Any, folder: Path, labels: dict[str, Any], progress: Progress) -> None:
        from nanochat_model.sft_recipe import TRAIN_FUNCTION
        from nanoladder.ray_init import ensure_ray, shutdown_ray
        from nanoladder.train_backend import run_training_on_ray_train

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                progress.update(event["step"], event["num_steps"], f"step {event['step']}, loss {event['train_loss']:.3f}")

        ensure_ray(self.workspace, address=self.address)
        try:
            run_training_on_ray_train(
                plan.config,
                self.runtime,
                run_dir=folder,
                workspace=self.workspace,
                num_workers=self.config.device.num_devices,
                use_gpu=True,
                train_function=TRAIN_FUNCTION,
                start_from=str(plan.base.absolute()),
                progress=show,
                **labels,
            )
        finally:
            shutdown_ray()

    @property
    def runtime(self) -> RuntimeConfig:
        """Fine-tuning is saved as often as pretraining is."""
        seconds = 60 * self.config.pretraining.checkpoint_minutes
        return RuntimeConfig(device=torch_device(self.config), checkpoint_every_seconds=seconds)

    @property
    def threads(self) -> int:
        """CPU threads of this process's own training: as many as pretraining used; 0 on a GPU."""
        return self.config.device.num_devices if torch_device(self.config) == "cpu" else 0

    def sources(self) -> list[str]:
        """The mixture, with the project's own conversations and questions written where "demo" asks for them."""
        from nanochat_model.demo_conversations import write_demo_conversations
        from nanochat_model.demo_tasks import write_demo_tasks

        found: list[str] = []
        for source in self.config.sft.conversations:
            if source == DEMO_CONVERSATIONS:
                folder = self.workspace.root / "conversations"
                train_file, _ = write_demo_conversations(folder, self.config.sft.num_demo_conversations)
                found += [str(train_file), *write_demo_tasks(self.workspace.root / "tasks").sources]
            else:
                found.append(source)
        return found

    def evaluate(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        from nanochat_model.chat_eval import ChatEvalOptions, run_chat_eval
        from nanochat_model.demo_tasks import write_demo_tasks
        from nanoladder.demo_chat import reply

        c, folder = self.config.chat, facts["sft"]["folder"]
        tasks: list[str] = []
        for task in c.tasks:
            tasks += write_demo_tasks(self.workspace.root / "tasks").tasks if task == DEMO_CONVERSATIONS else [task]
        found: dict[str, Any] = {"tasks": [], "score": None, "chatcore": None}
        if tasks:
            found = run_chat_eval(
                folder,
                tasks,
                tasks_dir=self.config.sft.tasks_dir,
                max_problems=c.max_problems,
                device=torch_device(self.config),
                options=ChatEvalOptions(max_new_tokens=c.max_new_tokens),
                progress=lambda task, done, total: progress.update(done, total, task),
            ).as_dict()
        text = reply(Path(folder), c.prompt, 60)
        name = "ChatCORE" if found["chatcore"] is not None else "score"
        score = f"{name} {found['score']:.4f}, " if found["score"] is not None else ""
        summary = f"{score}{c.prompt!r} → {' '.join(text.split())[:60]!r}"
        return {**found, "prompt": c.prompt, "reply": text, "hash": content_hash([found["tasks"], text]), "summary": summary}

    def report(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        from nanoladder.production_card import production_card

        card = production_card(self.config, facts)
        write_atomic(self.workspace.root / CARD_JSON, json.dumps({"config": asdict(self.config), "stages": dict(facts)}, indent=1))
        write_atomic(self.workspace.root / CARD_FILE, card)
        self.html()
        return {"hash": content_hash(card), "summary": str(self.workspace.root / CARD_FILE)}

    def html(self) -> None:
        """The laws' report with the run in it, where the run came from laws."""
        from analysis.laws import Laws
        from analysis.report import write_report
        from analysis.table import load_records
        from nanoladder.outcomes import read_production

        path = self.config.pretraining.laws
        if path:
            write_report(
                Laws.load(path),
                load_records(self.workspace.record_paths()),
                self.workspace.report_path,
                production=read_production(self.workspace),
                title=self.config.name,
            )


def torch_device(config: ProductionConfig) -> str:
    """The device of what this process itself computes."""
    from nanochat_model.hardware import find_device

    return "auto" if find_device(config.device.device) else "cpu"
