"""From data to a model that one can talk to, in stages that are skipped when their output with the same parents exists."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from nanochat_model.config import DataConfig
from nanochat_model.errors import ConfigError
from nanochat_model.horizon import Horizon
from nanoladder.demo import wide_console
from nanoladder.display import StageDisplay
from nanoladder.plan import BYTES_PER_TOKEN, LaunchPlan, make_plan
from nanoladder.production_config import DEMO_CONVERSATIONS, ProductionConfig
from nanoladder.production_stages import CARD_FILE, ChatStages, DataStages, TrainingStages
from nanoladder.recipes import find_recipe
from nanoladder.stages import Facts, Stage, run_stages
from nanoladder.workspace import Workspace


def plan_production(config: ProductionConfig, workspace: Workspace, *, built: bool = False) -> LaunchPlan:
    """The plan of the pretraining run. `built`: its shards exist, so bytes a token and the vocabulary are measured; before that
    they are assumed. Raises ConfigError."""
    from analysis.laws import Laws

    p = config.pretraining
    horizon = None
    if (p.tokens_per_param, p.num_tokens, p.train_flops) != (None, None, None):
        horizon = Horizon(tokens_per_param=p.tokens_per_param, num_tokens=p.num_tokens, train_flops=p.train_flops)
    vocab = workspace.vocab_size if built else config.data.vocab_size
    return make_plan(
        config.model.build(vocab),
        horizon=horizon,
        laws=Laws.load(p.laws).as_dict() if p.laws else None,
        recipe=find_recipe(p.recipe, p.laws),
        target=config.device.target(),
        records=workspace.records(),
        data=workspace.data_config(p.packing) if built else DataConfig(packing=p.packing),
        bytes_per_token=workspace.bytes_per_token if built else BYTES_PER_TOKEN,
        overrides=p.overrides,
        seed=p.seed,
        accept=p.accept_law,
        without=p.without_law,
    )


def missing_inputs(config: ProductionConfig) -> list[str]:
    """What evaluation, fine-tuning and chat evaluation will want and is not there, to be said before pretraining, not after it."""
    from nanochat_model.core_bundle import locate
    from nanochat_model.tasks.catalog import source_files

    folder, missing = config.sft.tasks_dir, []
    wanted = [*conversation_sources(config), *question_sources(config)]
    checks: list[Callable[[], object]] = [partial(source_files, source, tasks_dir=folder, split=split) for source, split in wanted]
    bundle = config.evaluation.core_bundle
    if bundle and bundle != "download" and "://" not in bundle:
        checks.append(partial(locate, bundle))
    for check in checks:
        try:
            check()
        except ConfigError as e:
            missing.append(str(e))
    return list(dict.fromkeys(missing))


def conversation_sources(config: ProductionConfig) -> list[tuple[str, str]]:
    """Source and split of what fine-tuning is given, but for the project's own."""
    from nanochat_model.mixture import parse_sources

    given = parse_sources([s for s in config.sft.conversations if s != DEMO_CONVERSATIONS])
    return [(s.data, s.training_split) for s in given]


def question_sources(config: ProductionConfig) -> list[tuple[str, str]]:
    """The same of the chat evaluation."""
    from nanochat_model.chat_eval import named_task

    return [(named_task(task)[1], "") for task in config.chat.tasks if task != DEMO_CONVERSATIONS]


def file_facts(sources: Sequence[tuple[str, str]], tasks_dir: str) -> list[list[str | int]]:
    """Path, size and time of every file of these sources: one that was edited is another input. Of a source that is gone nothing
    (`missing_inputs` says so)."""
    from nanochat_model.tasks.catalog import source_files

    found: list[list[str | int]] = []
    for source, split in sources:
        try:
            files = source_files(source, tasks_dir=tasks_dir, split=split)
        except ConfigError:
            continue
        found += [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return found


def production_stages(
    config: ProductionConfig, workspace: Workspace, *, address: str | None = None, say: Callable[[str], None] = print
) -> list[Stage]:
    """Every stage with its parents and what else its result depends on."""
    ws, c = workspace, config
    data = DataStages(c, ws, address, needed_bytes=lambda: plan_production(c, ws).data_bytes)
    training = TrainingStages(c, ws, address, say, plan=lambda: plan_production(c, ws, built=True))
    chat = ChatStages(c, ws, address)
    download = [] if c.data.source else [
        Stage(
            name="download", title=f"download of {c.data.dataset}", run=data.download, outputs=data.download_outputs,
            inputs=[c.data.dataset, c.data.revision, c.data.shards or round(data.needed_bytes())],
        )
    ]  # fmt: skip
    parents = ("download",) if download else ()
    trained = [asdict(c.model), {**asdict(c.pretraining), "webhook": ""}, c.device.num_devices]
    return [
        *download,
        Stage(
            name="corpus", title="corpus", run=data.corpus, parents=parents, inputs=[c.data.source, c.data.val_fraction],
            outputs=lambda f: [ws.corpus_dir / "corpus.json"],
        ),
        Stage(
            name="tokenizer", title="tokenizer", run=data.tokenizer, parents=("corpus",), inputs=c.data.vocab_size,
            outputs=lambda f: [ws.tokenizer_dir / "tokenizer.json"],
        ),
        Stage(
            name="shards", title="token shards", run=data.shards, parents=("tokenizer",),
            outputs=lambda f: [ws.shards_dir / "manifest.json"],
        ),
        Stage(
            name="pretraining", title="pretraining on Ray Train", run=training.pretrain, parents=("shards",),
            inputs=[*trained, law_hash(c)], outputs=training.outputs,
        ),
        Stage(
            name="evaluation", title="base evaluation", run=training.evaluate, parents=("pretraining",), inputs=asdict(c.evaluation)
        ),
        Stage(
            name="sft", title="fine-tuning on conversations", run=chat.sft, parents=("pretraining",),
            inputs=[asdict(c.sft), *file_facts(conversation_sources(c), c.sft.tasks_dir)],
            outputs=lambda f: [Path(f["folder"])],
        ),
        Stage(
            name="chat", title="chat evaluation", run=chat.evaluate, parents=("sft",),
            inputs=[asdict(c.chat), *file_facts(question_sources(c), c.sft.tasks_dir)],
        ),
        Stage(
            name="report", title="report", run=chat.report, parents=("pretraining", "evaluation", "sft", "chat"),
            inputs=[c.name, c.device.price], outputs=lambda f: [ws.root / CARD_FILE],
        ),
    ]  # fmt: skip


def law_hash(config: ProductionConfig) -> str:
    """Of the laws' file: other laws, another run."""
    path = config.pretraining.laws
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else ""


def run_production(
    config: ProductionConfig, workspace: Workspace, *, address: str | None = None, console: Console | None = None, until: str = ""
) -> dict[str, Facts]:
    """Run (or go on with) every stage up to `until` (all, when empty); returns the stages' facts."""
    console = console or wide_console()
    stages = production_stages(config, workspace, address=address, say=lambda text: console.print(text, markup=False))
    if until:
        stages = stages[: [s.name for s in stages].index(until) + 1]
    started = time.perf_counter()
    with StageDisplay(len(stages), console) as display:
        facts = run_stages(stages, workspace.stages_dir / "production", display)
    if "report" in facts:
        console.print()
        console.print((workspace.root / CARD_FILE).read_text(encoding="utf8"), markup=False, soft_wrap=True)
    console.print(f"[dim]{time.perf_counter() - started:.0f} s[/]")
    return facts
