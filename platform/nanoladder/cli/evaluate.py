"""nanoladder eval and chat-eval: what a checkpoint can do, in numbers."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, print_json, print_table
from nanoladder.cli.sft import Checkpoint, TasksDir

if TYPE_CHECKING:
    from nanochat_model.config import Packing


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Validation loss (bits per byte) of a checkpoint over token shards, and CORE over its bundle.

    Example: nanoladder eval --checkpoint demo/runs/0123456789abcdef --num-tokens 262144
    """

    checkpoint: Checkpoint
    shards: str = ""
    """Folder of token shards; left out: those it was trained on."""
    num_tokens: int = 0
    """Validation tokens; 0: as many as in training."""
    packing: str = ""
    """best_fit or keep_remainder; left out: as in training. Losses under different packings are not comparable."""
    core_bundle: str = ""
    """Folder, zip or address of the CORE bundle; left out: bpb only."""
    core_max_per_task: int = 0
    """Examples a task; 0: all."""
    device: str = "auto"
    num_threads: int = 0
    json: Json = False

    def run(self) -> None:
        from nanochat_model.checkpoint import checkpoint_hash, load_model, read_state, resolve
        from nanochat_model.device import choose_device, tune_process

        tune_process(self.num_threads)
        path = resolve(self.checkpoint)
        state = read_state(path)
        device = str(choose_device(self.device))
        model = load_model(path, device=device)
        facts: dict[str, Any] = {"checkpoint": str(path), "hash": checkpoint_hash(path), "step": state.step, "device": device}
        facts |= self.bpb(model, state)
        if self.core_bundle:
            facts["core"] = asdict(self.core(model, path))
        if self.json:
            print_json(facts)
            return
        print_table(("eval", ""), [(k, f"{v:.6f}" if isinstance(v, float) else str(v)) for k, v in facts.items() if k != "core"])
        if self.core_bundle:
            tasks = facts["core"]["tasks"]
            rows = [(t["label"], f"{t['accuracy']:.4f}", f"{t['centered']:.4f}") for t in tasks]
            print_table(("task", "accuracy", "centred"), rows, right=("accuracy", "centred"))
            print(f"CORE {facts['core']['core']:.6f} ± {facts['core']['standard_error']:.6f} (standard error)")

    def bpb(self, model: Any, state: Any) -> dict[str, Any]:
        """Loss over the first validation tokens of the shards, and what it was measured on."""
        from nanochat_model.evaluate import evaluate_bpb
        from nanochat_model.loader import Loader
        from nanochat_model.shard_set import ShardSet

        data = state.config.data if state.config is not None else None
        shards_path = self.shards or (data.path if data is not None else "")
        if not shards_path:
            raise ConfigError(f"{self.checkpoint} does not say what it was trained on; give --shards with a folder of token shards")
        packing = self.packing or (data.packing if data is not None else "best_fit")
        if packing not in ("best_fit", "keep_remainder"):
            raise ConfigError(f"packing {packing!r} must be best_fit or keep_remainder")
        shards = ShardSet.open(shards_path)
        if shards.vocab_size != model.config.vocab_size:
            raise ConfigError(
                f"shards at {shards_path} have {shards.vocab_size} ids, the model {model.config.vocab_size}; give its own"
            )
        wanted = self.num_tokens or (state.config.eval.num_tokens if state.config is not None else 0) or 1 << 20
        loader = Loader(
            shards, split="val", packing=cast("Packing", packing), sequence_len=model.config.sequence_len, rows_per_batch=1, seed=0
        )
        rows = loader.validation(wanted)
        value = evaluate_bpb(model.eval(), rows, shards.token_bytes)
        return {"val_bpb": value, "num_tokens": int(rows[0].size), "packing": packing, "manifest_hash": shards.manifest_hash}

    def core(self, model: Any, path: Path) -> Any:
        from nanochat_model.checkpoint import tokenizer_dir
        from nanochat_model.core import evaluate_core
        from nanochat_model.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(tokenizer_dir(path))
        return evaluate_core(model, tokenizer, self.core_bundle, max_per_task=self.core_max_per_task)


@dataclass(frozen=True, kw_only=True)
class ChatEval:
    """Accuracy on ARC-Easy, ARC-Challenge, MMLU, GSM8K (with a calculator) and HumanEval (programs run in a sandbox), and
    ChatCORE, the mean of the centred accuracies of these five.

    Example: nanoladder chat-eval --checkpoint sft --tasks-dir tasks --tasks ARC-Easy GSM8K --max-problems 200

    Example: nanoladder chat-eval --checkpoint demo/sft/0123456789abcdef --tasks sums=demo/tasks/sums-test.jsonl --json
    """

    checkpoint: Checkpoint
    tasks: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="TASK ...", help="Names of datasets, or name=path of a file; left out: the five.")
    ] = ()
    tasks_dir: TasksDir = ""
    max_problems: int = 0
    """Of each task; 0: all."""
    max_new_tokens: int = 512
    """Of a generated answer."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 50
    seed: int = 0
    batch_rows: int = 0
    """Problems at a time; 0: what suits the device."""
    template: str = ""
    """JSON file with head, choice and tail of a question with choices, in place of the built-in ones."""
    out: str = ""
    """Also write the result as JSON into this file."""
    device: str = "auto"
    num_threads: int = 0
    json: Json = False

    def run(self) -> None:
        from nanochat_model.chat_eval import CHAT_TASKS, ChatEvalOptions, run_chat_eval
        from nanochat_model.device import tune_process
        from nanochat_model.tasks.layouts import Template

        tune_process(self.num_threads)
        options = ChatEvalOptions(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            batch_rows=self.batch_rows,
            template=Template.load(self.template) if self.template else Template(),
        )
        result = run_chat_eval(
            self.checkpoint,
            self.tasks or CHAT_TASKS,
            tasks_dir=self.tasks_dir,
            max_problems=self.max_problems,
            device=self.device,
            options=options,
            progress=self.progress,
        )
        if self.out:
            from nanochat_model.identity import write_atomic

            write_atomic(self.out, json_text(result.as_dict()))
        if self.json:
            print_json(result)
        else:
            self.show(result)

    def progress(self, task: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{task}: {done:,} of {total:,}", end=end, file=sys.stderr, flush=True)

    def show(self, result: Any) -> None:
        columns = ("task", "kind", "problems", "accuracy", "guessing", "centred", "±")
        rows = [
            (t.task, t.kind, f"{t.num_problems:,}", f"{t.accuracy:.4f}", f"{t.random_baseline:.2f}", f"{t.centered:.4f}",
             f"{t.standard_error:.4f}")
            for t in result.tasks
        ]  # fmt: skip
        print_table(columns, rows, right=columns[2:])
        for t in result.tasks:
            if t.num_cropped:
                print(f"{t.task}: {t.num_cropped:,} questions are longer than the context and were cut at their beginning")
        name = "ChatCORE" if result.chatcore is not None else "mean of the centred accuracies"
        print(f"{name} {result.score:.4f} ± {result.standard_error:.4f} (standard error)")


def json_text(value: Any) -> str:
    import json

    return json.dumps(value, indent=1)
