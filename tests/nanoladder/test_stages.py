"""Stages: skipped when done with the same parents, run again when anything above them changed or their output is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from nanoladder.cli.common import print_table
from nanoladder.display import StageDisplay
from nanoladder.stages import Facts, Stage, run_stages


class Silent:
    def __init__(self) -> None:
        self.skipped: list[str] = []

    def start(self, stage: Stage) -> Silent:
        return self

    def update(self, done: float, total: float, text: str = "") -> None:
        pass

    def finish(self, stage: Stage, facts: Facts, seconds: float) -> None:
        pass

    def skip(self, stage: Stage, facts: Facts) -> None:
        self.skipped.append(stage.name)


class Job:
    """Three stages in a row, each writing a file; `ran` is what ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.fail_at = ""

    def stages(self, **inputs: int) -> list[Stage]:
        return [self.stage("a", (), inputs), self.stage("b", ("a",), inputs), self.stage("c", ("b",), inputs)]

    def stage(self, name: str, parents: tuple[str, ...], inputs: dict[str, int]) -> Stage:
        def run(facts, progress) -> Facts:
            self.ran.append(name)
            if self.fail_at == name:
                raise KeyboardInterrupt
            (self.folder / name).write_text("x")
            return {"hash": f"{name}{inputs.get(name, 0)}", "seen": [facts[p]["hash"] for p in parents]}

        return Stage(
            name=name, title=name, run=run, parents=parents, inputs=inputs.get(name, 0), outputs=lambda f: [self.folder / name]
        )

    def run(self, **inputs: int) -> list[str]:
        self.ran = []
        run_stages(self.stages(**inputs), self.folder / "stages", Silent())
        return self.ran


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_second_run_skips_everything(job: Job) -> None:
    assert job.run() == ["a", "b", "c"]
    assert job.run() == []


def test_changed_input_runs_it_and_what_follows(job: Job) -> None:
    job.run()
    assert job.run(b=1) == ["b", "c"]
    assert job.run(b=1, c=2) == ["c"]


def test_missing_output_runs_again_but_children_of_the_same_parent_are_kept(job: Job) -> None:
    job.run()
    (job.folder / "b").unlink()
    assert job.run() == ["b"]


def test_interrupted_stage_runs_again_and_finished_ones_do_not(job: Job) -> None:
    job.fail_at = "b"
    with pytest.raises(KeyboardInterrupt):
        job.run()
    job.fail_at = ""
    assert job.run() == ["b", "c"]


def test_what_reads_like_markup_is_shown_as_it_is(capsys) -> None:
    stage = Stage(name="s", title="talk [b]", run=lambda facts, progress: {})
    with StageDisplay(1, Console(force_terminal=False, width=200)) as display:
        display.start(stage).update(1, 1)
        display.finish(stage, {"summary": "it said [/x] and [red]"}, 1.0)
        display.skip(stage, {"summary": "[/y]"})
    out = capsys.readouterr().out
    assert "talk [b]" in out and "it said [/x] and [red]" in out and "[/y]" in out
    print_table(("a",), [("[/z]",)], title="[/t]")
    out = capsys.readouterr().out
    assert "[/z]" in out and "[/t]" in out


def test_torn_stage_file_counts_as_not_done(job: Job) -> None:
    job.run()
    (job.folder / "stages" / "c.json").write_text('{"key": "')
    assert job.run() == ["c"]
