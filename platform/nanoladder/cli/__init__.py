"""The `nanoladder` command: a table of commands, each imported only when it is asked for.

A user's mistake (ConfigError, DataError) becomes one line on stderr and exit status 2; Ctrl-C becomes one line and 130.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    module: str  # under nanoladder.cli
    args: str  # the dataclass that parses its arguments and has run()
    summary: str


COMMANDS: dict[str, Command] = {
    "demo": Command("demo", "Demo", "the whole ladder on this machine, from corpus to a chat reply"),
    "data": Command("data", "Data", "text into corpus, tokenizer and token shards"),
    "data download": Command("download", "DataDownload", "parquet of a data set of text or chats, verified; goes on where it was"),
    "data mirror": Command("download", "DataMirror", "serve a folder of parquet with the hub's API"),
    "tokenizer": Command("data", "TokenizerCommand", "train a tokenizer, or look at how one cuts a text"),
    "count": Command("count", "Count", "parameters and FLOPs of a depth"),
    "train": Command("runs", "Train", "one pretraining run in this process, without Ray"),
    "sweep": Command("runs", "SweepCommand", "run a sweep file on Ray"),
    "simulate": Command("simulate", "Simulate", "a sweep on a fleet before it is booked: time, use, failures, cost"),
    "submit": Command("submit", "Submit", "a sweep file as a job on a Ray cluster"),
    "doctor": Command("doctor", "Doctor", "whether this machine, or every node of a cluster, is fit to train"),
    "status": Command("status", "Status", "how far sweeps are: running, done, failed and why, best, time left, cost"),
    "stop": Command("status", "Stop", "end a running sweep cleanly; its command goes on from there"),
    "runs": Command("runs", "Runs", "table of run records"),
    "sync": Command("sync", "Sync", "MLflow and Optuna brought up to the run records"),
    "fit": Command("laws", "Fit", "laws from run records or any table of runs"),
    "report": Command("laws", "Report", "laws and runs as one HTML page"),
    "plan": Command("plan", "Plan", "what a run takes and what loss it should reach; solves backwards too"),
    "launch": Command("plan", "Launch", "the planned run on Ray Train, then prediction against result"),
    "production": Command("production", "Production", "data, pretraining, evaluation, fine-tuning and chat, by one file"),
    "sft": Command("sft", "Sft", "fine-tune a checkpoint on conversations"),
    "eval": Command("evaluate", "Eval", "validation bpb and CORE of a checkpoint"),
    "chat-eval": Command("evaluate", "ChatEval", "ARC, MMLU, GSM8K, HumanEval and ChatCORE of a chat model"),
    "chat": Command("talk", "Chat", "talk to a checkpoint in the terminal"),
    "serve": Command("serve", "Serve", "a chat page and OpenAI's interface for a checkpoint"),
    "export": Command("convert", "Export", "write a checkpoint for use without this package"),
    "import-nanochat": Command("convert", "ImportNanochat", "read a nanochat checkpoint into this layout"),
    "export-nanochat": Command("convert", "ExportNanochat", "write a checkpoint in nanochat's layout"),
}

# Packages that `pip install nanoladder` alone leaves out, and the extra that brings each (pyproject.toml).
EXTRAS = {
    **dict.fromkeys(("torch", "tokenizers", "safetensors", "yaml", "huggingface_hub"), "model"),
    **dict.fromkeys(("ray", "optuna", "cmaes", "mlflow", "psutil", "fastapi", "uvicorn"), "platform"),
}

# What is wrong with a file or folder that a user named, not with this program.
UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nanoladder COMMAND [OPTIONS]",
            "",
            "Sweeps of a nanochat-style GPT on Ray, scaling laws with intervals, and the run those laws predict.",
            "",
            *lines,
            "",
            "nanoladder COMMAND --help shows a command's options and an example.",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `nanoladder` script; always leaves through SystemExit."""
    try:
        status = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        leave_pipe()
        status = 0
    sys.exit(status)


def leave_pipe() -> None:
    """The reader of our output (head, less) has gone: that is no error, and what is still to be written goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(argv: list[str]) -> int:
    """Run one command line and return its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"nanoladder {version('nanoladder')}")
        return 0
    name, *rest = argv
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        near = "".join(f"did you mean {c!r}? " for c in difflib.get_close_matches(name, COMMANDS, n=1))
        return fail(f"unknown command {name!r}; {near}nanoladder --help lists all")
    command = COMMANDS[name]
    try:
        return _run(name, command, rest)
    except KeyboardInterrupt:
        print(f"\nnanoladder {name}: interrupted; run it again to go on", file=sys.stderr)
        return 130
    except ModuleNotFoundError as e:
        if (extra := EXTRAS.get((e.name or "").partition(".")[0])) is None:
            raise
        return fail(f"nanoladder {name} needs {e.name}, which is not installed; pip install 'nanoladder[{extra}]' (see README.md)")
    except ValueError as e:
        if is_user_error(e):
            return fail(str(e))
        raise
    except OSError as e:
        if e.errno not in UNUSABLE or e.filename is None:
            raise
        return fail(f"{e.filename}: {e.strerror}; give another place, or see to it that this one can be used")


def _run(name: str, command: Command, rest: list[str]) -> int:
    args = getattr(import_module(f"nanoladder.cli.{command.module}"), command.args)
    if hasattr(args, "run_file"):  # what follows the file is the sweep's own command line, the same as with `python FILE`
        return int(args.run_file(rest))
    import tyro

    config: tuple = (tyro.conf.OmitArgPrefixes,)
    if name != "train":  # its flags default to true: they need their --no- form; and its --set takes one value each time
        from nanoladder.cli.common import together

        config, rest = (*config, tyro.conf.FlagCreatePairsOff), together(rest)
    parsed = tyro.cli(args, prog=f"nanoladder {name}", args=rest, config=config)
    storage = str(getattr(parsed, "storage", ""))
    if "://" not in storage or not getattr(args, "mirrored", True):
        return int(parsed.run() or 0)
    from nanoladder.storage import mirrored

    with mirrored(storage):
        return int(parsed.run() or 0)


def is_user_error(e: BaseException) -> bool:
    """Whether `e` is a mistake of the user's, told apart without importing what was not imported already."""
    return any(cls.__name__ in ("ConfigError", "DataError") for cls in type(e).__mro__)


def fail(message: str) -> int:
    print(f"nanoladder: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
