"""nanoladder chat: a conversation in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, print_json
from nanoladder.cli.sft import Checkpoint
from nanoladder.reply_text import marked

if TYPE_CHECKING:
    from nanochat_model.chat import Piece


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
        from nanochat_model.native import native_status

        tune_process(self.num_threads)
        device = choose_device(self.device)
        if device.type == "cpu":
            native_status()  # compiles, or says that it cannot, now and not in the middle of the first reply
        chat = load_chat(self.checkpoint, device=str(device), system=self.system)
        if self.prompt:
            pieces = self.reply(chat, self.prompt, self.seed)
            if self.json:
                print_json(as_facts(self.prompt, pieces))
            else:
                stream(pieces)
            return
        if self.json:
            raise ConfigError("--json answers one message; give it with -p")
        self.talk(chat)

    def reply(self, chat: Any, text: str, seed: int) -> Iterator[Piece]:
        return chat.reply_pieces(text, temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_tokens, seed=seed)

    def talk(self, chat: Any) -> None:
        """The conversation in the terminal. Ctrl-C during a reply cuts it short; at the prompt it ends."""
        with contextlib.suppress(ImportError):  # where Python has it, input() then edits lines and remembers them
            import readline  # noqa: F401
        print("/clear forgets the conversation, /quit ends it")
        turn = 0
        while True:
            try:
                text = input("\nyou: ").strip()
            except (EOFError, KeyboardInterrupt):
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


def stream(pieces: Iterable[Piece]) -> None:
    """Print a reply as it comes."""
    for text in marked(pieces):
        print(text, end="", flush=True)
    print()


def as_facts(prompt: str, pieces: Iterable[Piece]) -> dict[str, Any]:
    """A reply for a machine: its text, and its python calls with their results (null where there was none)."""
    text, calls = "", list[dict[str, str | None]]()
    kind = "text"
    for piece in pieces:
        if piece.kind == "text":
            text += piece.text
        elif piece.kind == "python":
            if kind != "python":
                calls.append({"call": "", "result": None})
            calls[-1]["call"] = f"{calls[-1]['call']}{piece.text}"
        elif calls:
            calls[-1]["result"] = f"{calls[-1]['result'] or ''}{piece.text}"
        kind = piece.kind
    return {"prompt": prompt, "reply": text, "calls": calls}
