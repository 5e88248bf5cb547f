"""The demo's stages after the laws: prediction, production run, fine-tuning, chat and its score, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.horizon import Horizon
from nanochat_model.identity import content_hash, from_dict, run_id, write_atomic
from nanochat_model.record import RECORD_FILE, RunRecord
from nanoladder.demo_stages import DemoStages
from nanoladder.laws_to_recipe import best_model
from nanoladder.outcomes import PRODUCTION, prediction_facts, read_prediction, read_production, read_promotions
from nanoladder.plan import LossPrediction, predict
from nanoladder.stages import Facts, Progress


@dataclass(frozen=True)
class ProductionStages:
    """Stages that share the ladder's sizes and folder."""

    ladder: DemoStages

    def predict(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        """Choose the production run from laws.json and write down what it should reach, before it starts."""
        from analysis.laws import Laws

        size, workspace = self.ladder.size, self.ladder.workspace
        laws = Laws.load(workspace.laws_path)
        resolved = self.ladder.tuned_recipe(laws)
        flops = size.production_factor * size.largest_budget
        models = [size.model(shape) for shape in size.production_shapes]
        model = best_model(flops, models, allocation=resolved.allocation, tokens_per_param=resolved.recipe.tokens_per_param)
        config = resolved.recipe.resolve(model, Horizon(train_flops=flops), data=self.ladder.data())
        every = max(1, config.num_steps // size.curve_points)
        config = replace(config, eval=replace(config.eval, every_steps=every))
        prediction = predict(laws.as_dict()["allocation"], config)
        laws_hash = facts["laws"]["hash"]
        text = json.dumps(prediction_facts(config, prediction, resolved.uses, laws_hash), indent=1)
        write_atomic(workspace.prediction_path, text)
        shape = f"d{model.depth} width {model.model_dim}, {config.num_tokens / 1e6:.1f}M tokens"
        return {"hash": hashlib.sha256(text.encode()).hexdigest()[:16], "summary": f"{shape}: {interval_text(prediction)}"}

    def production(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        """The planned run through Ray Train, with checkpoints."""
        from nanoladder.train_backend import run_training_on_ray_train

        size, workspace = self.ladder.size, self.ladder.workspace
        config = self.planned_config()

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                speed = f", {event['tokens_per_second']:,.0f} tokens/s" if event["tokens_per_second"] else ""
                text = f"step {event['step']} of {config.num_steps}, loss {event['train_loss']:.3f}{speed}"
                progress.update(event["step"], config.num_steps, text)

        record = run_training_on_ray_train(
            config,
            RuntimeConfig(
                device="cpu",
                num_threads=size.threads_per_worker,
                checkpoint_every_steps=max(1, config.num_steps // size.production_checkpoints),
                diagnostics_every_steps=max(1, config.num_steps // size.curve_points),
            ),
            workspace=workspace,
            num_workers=size.num_workers,
            threads_per_worker=size.threads_per_worker,
            name=PRODUCTION,
            sweep=PRODUCTION,
            stage=PRODUCTION,
            tags={"purpose": PRODUCTION},
            progress=show,
        )
        if record.status != "complete":
            raise RuntimeError(f"production run {record.run_id} ended as {record.status}: {record.error}")
        measured = f"measured {record.val_bpb:.4f} bpb, {record.train_flops:.2g} FLOPs"
        return {"hash": content_hash([record.run_id, record.val_bpb]), "run_ids": [record.run_id], "summary": measured}

    def planned_config(self) -> TrainConfig:
        """The config that prediction.json names."""
        return from_dict(TrainConfig, read_prediction(self.ladder.workspace.prediction_path)["config"])

    def record(self) -> RunRecord:
        return RunRecord.load(self.ladder.workspace.run_dir(run_id(self.planned_config())))

    def sft(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        from nanoladder.demo_chat import finetune

        return finetune(self.ladder.size, self.ladder.workspace, self.record(), progress)

    def evaluate_chat(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        from nanoladder.demo_chat import evaluate

        return evaluate(self.ladder.size, self.ladder.workspace, Path(facts["sft"]["folder"]), progress)

    def chat(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        from nanoladder.demo_chat import reply

        size = self.ladder.size
        text = reply(Path(facts["sft"]["folder"]), size.chat_prompt, size.chat_max_tokens)
        return {"hash": content_hash(text), "prompt": size.chat_prompt, "reply": text, "summary": " ".join(text.split())[:60]}

    def report(self, facts: Mapping[str, Facts], progress: Progress) -> Facts:
        from analysis.laws import Laws
        from analysis.report import write_report
        from analysis.table import load_records
        from nanoladder.mlflow_page import local_page

        workspace = self.ladder.workspace
        write_report(
            Laws.load(workspace.laws_path),
            load_records(workspace.record_paths()),
            workspace.report_path,
            production=read_production(workspace),
            promotions=read_promotions(workspace),
            title="nanoladder demo",
            **local_page(workspace),
        )
        size = workspace.report_path.stat().st_size
        return {"hash": content_hash([size]), "summary": f"{workspace.report_path} ({size / 1e6:.1f} MB)"}

    def outputs(self, facts: Facts) -> list[Path]:
        return [self.ladder.workspace.run_dir(run) / RECORD_FILE for run in facts["run_ids"]]


def interval_text(prediction: LossPrediction | None) -> str:
    if prediction is None:
        return "no prediction"
    interval = f" [{prediction.low:.4f}, {prediction.high:.4f}]" if prediction.low is not None else " without an interval"
    return f"predicted {prediction.loss:.4f}{interval} bpb"
