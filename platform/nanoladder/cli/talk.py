"""nanoladder sft, eval and chat: what is done with a trained checkpoint."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, print_json, print_table

if TYPE_CHECKING:
    from nanochat_model.config import Packing

Checkpoint = Annotated[str, tyro.conf.arg(metavar="PATH", help="A checkpoint, or a run's folder (its newest intact checkpoint).")]


@dataclass(frozen=True, kw_only=True)
class SftOptions:
    """Values of the fine-tuning; everything else is the base's."""

    num_epochs: float = 1.0
    """Over the training conversations."""
    num_steps: int = 0
    """Instead of epochs, if over 0."""
    batch_tokens: int = 0
    """0: the base's."""
    lr_fraction: float = 0.8
    """Of the learning rates that the base was trained with."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Fine-tune a checkpoint on conversations: jsonl of {"messages": [{"role", "content"}, …]}. Started again it goes on.

    Example: nanoladder sft --checkpoint demo/runs/0123456789abcdef --conversations chats.jsonl --out sft
    """

    checkpoint: Checkpoint
    conversations: str
    """A jsonl or parquet file, or a folder of them."""
    out: str
    """Folder of the fine-tuned checkpoint and its record."""
    options: SftOptions = field(default_factory=SftOptions)
    device: str = "auto"
    num_threads: int = 0
    """CPU threads; 0: all."""
    json: Json = False

    def run(self) -> int:
        from nanochat_model.config import RuntimeConfig
        from nanochat_model.device import tune_process
        from nanochat_model.sft import SFTConfig, sft

        tune_process(self.num_threads)
        record = sft(
            SFTConfig(**asdict(self.options)),
            RuntimeConfig(device=self.device, num_threads=self.num_threads),
            base_checkpoint=self.checkpoint,
            conversations=self.conversations,
            run_dir=self.out,
        )
        if self.json:
            print_json(record)
        elif record.val_loss_after is not None:
            change = f"{record.val_loss_before:.4f} → {record.val_loss_after:.4f} nats a token"
            print(f"{record.status}: {record.num_steps} steps, held-out loss {change}; written: {Path(self.out).absolute()}")
        else:
            print(f"{record.status}: {record.error}")
        return 0 if record.status == "complete" else 1


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
class Chat:
    """Talk to a checkpoint. /clear forgets the conversation, /quit or Ctrl-D ends it.

    Example: nanoladder chat --checkpoint demo/sft/0123456789abcdef -p "What is 7 + 5?"
    """

    checkpoint: Checkpoint
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""
    """Answer this one message and end."""
    temperature: float = 0.6
    """0 takes the most likely token."""
    top_k: int = 50
    max_tokens: int = 256
    """Of one reply."""
    seed: int = 0
    system: str = ""
    """Put before the first message."""
    device: str = "auto"
    num_threads: int = 0
    json: Json = False

    def run(self) -> None:
        from nanochat_model.chat import load_chat
        from nanochat_model.device import choose_device, tune_process

        tune_process(self.num_threads)
        chat = load_chat(self.checkpoint, device=str(choose_device(self.device)), system=self.system)
        if self.prompt:
            pieces = self.reply(chat, self.prompt, self.seed)
            if self.json:
                print_json({"prompt": self.prompt, "reply": "".join(pieces)})
            else:
                stream(pieces)
            return
        if self.json:
            raise ConfigError("--json answers one message; give it with -p")
        self.talk(chat)

    def reply(self, chat: Any, text: str, seed: int) -> Any:
        return chat.reply(text, temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_tokens, seed=seed)

    def talk(self, chat: Any) -> None:
        """The conversation in the terminal. Ctrl-C during a reply cuts it short; at the prompt it ends."""
        print("/clear forgets the conversation, /quit ends it")
        turn = 0
        while True:
            try:
                text = input("\nyou: ").strip()
            except EOFError:
                print()
                return
            if text in ("/quit", "/exit"):
                return
            if text == "/clear":
                chat.clear()
                print("(forgotten)")
            elif text.startswith("/"):
                print(f"unknown command {text.split()[0]!r}; known: /clear, /quit")
            elif text:
                self.answer(chat, text, self.seed + turn)
                turn += 1

    def answer(self, chat: Any, text: str, seed: int) -> None:
        print("assistant: ", end="", flush=True)
        try:
            stream(self.reply(chat, text, seed))
        except KeyboardInterrupt:
            print(" (cut short)")
        except ConfigError as e:  # a message too long for the context: say so and go on
            print(f"({e})")


def stream(pieces: Any) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
