"""docs/from-nanochat.md maps every option of nanochat's programs, and every option it names here exists."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from nanochat_model.train_cli import Arguments
from nanoladder.cli.convert import ExportNanochat, ImportNanochat
from nanoladder.cli.data import TokenizerCommand
from nanoladder.cli.download import DataDownload
from nanoladder.cli.evaluate import ChatEval, Eval
from nanoladder.cli.runs import Train
from nanoladder.cli.sft import Sft
from nanoladder.cli.talk import Chat

TEXT = (Path(__file__).parents[2] / "docs" / "from-nanochat.md").read_text(encoding="utf8")

# argparse options of nanochat's programs at commit 92d63d4
THEIRS = {
    "base_train": """run device-type fp8 fp8-recipe depth aspect-ratio head-dim max-seq-len window-pattern num-iterations
        target-flops target-param-data-ratio device-batch-size total-batch-size embedding-lr unembedding-lr weight-decay matrix-lr
        scalar-lr
        warmup-steps warmdown-ratio final-lr-frac resume-from-step eval-every eval-tokens core-metric-every
        core-metric-max-per-task sample-every save-every model-tag""",
    "chat_sft": """run device-type model-tag model-step load-optimizer num-iterations max-seq-len device-batch-size total-batch-size
        embedding-lr unembedding-lr matrix-lr init-lr-frac warmup-ratio warmdown-ratio final-lr-frac eval-every eval-tokens
        chatcore-every chatcore-max-cat chatcore-max-sample mmlu-epochs gsm8k-epochs""",
    "the other programs": """eval model-tag step max-per-task device-batch-size split-tokens source task-name temperature
        max-new-tokens num-samples top-k batch-size max-problems prompt device-type vocab-size max-chars doc-cap num-files""",
}
OURS: dict[str, tuple[type, ...]] = {
    "base_train": (Arguments, Train),
    "chat_sft": (Sft,),
    "the other programs": (Eval, ChatEval, Chat, TokenizerCommand, DataDownload, ImportNanochat, ExportNanochat),
}


def section(program: str) -> list[list[str]]:
    """Rows of the table of options, as their three cells."""
    text = TEXT.split(f"## Options of {program}\n", 1)[1].split("\n## ", 1)[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert all(len(row) == 3 for row in rows), [row for row in rows if len(row) != 3]
    return rows[2:]


def options(*programs: type) -> set[str]:
    """Options of the dataclasses, nested ones included."""
    found: set[str] = set()
    for program in programs:
        hints = typing.get_type_hints(program)
        for f in dataclasses.fields(program):
            if dataclasses.is_dataclass(hints[f.name]):
                found |= options(hints[f.name])
            found.add(f.name.replace("_", "-"))
    return found


@pytest.mark.parametrize("program", THEIRS)
def test_every_option_of_nanochat_is_mapped(program: str) -> None:
    mapped = {name for row in section(program) for name in re.findall(r"--([a-z0-9-]+)", row[0])}
    assert mapped >= set(THEIRS[program].split())


@pytest.mark.parametrize("program", OURS)
def test_every_option_named_here_exists(program: str) -> None:
    named = {name for row in section(program) for name in re.findall(r"--([a-z0-9-]+)", row[1])}
    known = options(*OURS[program])
    assert named - known == set() and len(named) > 8
