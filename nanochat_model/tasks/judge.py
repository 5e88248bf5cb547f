"""Whether a generated reply is right: by its number, or by running its program against the problem's tests."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from nanochat_model.sandbox import run_program
from nanochat_model.tasks.layouts import final_number
from nanochat_model.tasks.problem import Problem

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_IMPORT = re.compile(r"(?:import|from)\s")


def judge(problems: Sequence[Problem], replies: Sequence[str]) -> list[bool]:
    """Verdict of each reply. Programs run in sandboxes, as many at a time as there are CPUs (eight at most)."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="judge") as pool:
        return list(pool.map(_judge, problems, replies))


def _judge(problem: Problem, reply: str) -> bool:
    if problem.judge == "number":
        return final_number(reply) == problem.reference["number"]
    assert problem.judge == "program", problem.judge
    return run_program(checked_program(problem, reply)).passed


def checked_program(problem: Problem, reply: str) -> str:
    """What is run: the reply's code, the problem's tests, and the call that checks. A reply that only continues the prompt's
    function is put after the prompt; one that defines it anew gets the prompt's imports."""
    prompt, name = problem.reference["prompt"], problem.reference["entry_point"]
    code = extract_code(reply)
    if re.search(rf"^\s*def {re.escape(name)}\b", code, re.MULTILINE):
        imports = [line for line in prompt.splitlines() if _IMPORT.match(line)]
        code = "\n".join([*imports, code])
    else:
        code = prompt + code
    return f"{code}\n\n{problem.reference['test']}\n\ncheck({name})\n"


def extract_code(reply: str) -> str:
    """The first fenced block of a reply, or all of it."""
    found = _FENCED.search(reply)
    return found[1] if found is not None else reply
