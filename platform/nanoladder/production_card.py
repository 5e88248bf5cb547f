"""What a production run made, on one page of Markdown: predicted against actual, what each stage reached, how to talk to it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from nanoladder.production_config import ProductionConfig
from nanoladder.stages import Facts


def production_card(config: ProductionConfig, facts: Mapping[str, Facts]) -> str:
    """`facts`: of every stage but the report."""
    pretraining, chat = facts["pretraining"], facts["chat"]
    verdict, plan, m = pretraining["verdict"], pretraining["plan"], config.model
    lines = [
        f"# {config.name}",
        "",
        f"d{m.depth}, {plan['parameters']:,} parameters, {plan['tokens']:,} tokens, {plan['flops']:.3g} FLOPs on "
        f"{config.device.num_devices} × {config.device.device}.",
        "",
        "| | planned | actual |",
        "|---|---|---|",
        f"| bits per byte | {_predicted(verdict)} | {verdict['measured']:.4f} |",
        f"| hours | {plan['hours']:.2f} | {verdict['hours']:.2f} |",
    ]
    if config.device.price is not None:
        hourly = config.device.price * config.device.num_devices
        lines.append(f"| cost | ${plan['hours'] * hourly:,.2f} | ${verdict['hours'] * hourly:,.2f} |")
    lines += ["", f"Laws: {verdict['text']}.", ""]
    lines += [*(f"- alert: {line}" for line in verdict["alerts"]), ""] if verdict["alerts"] else []
    lines += ["| stage | result |", "|---|---|"]
    lines += [f"| {name} | {_cell(each['summary'])} |" for name, each in facts.items() if name != "report"]
    if chat["tasks"]:
        lines += ["", "| chat task | problems | accuracy | guessing | centred |", "|---|---|---|---|---|"]
        lines += [
            f"| {t['task']} | {t['num_problems']} | {t['accuracy']:.3f} | {t['random_baseline']:.3f} | "
            f"{t['centered']:.3f} ± {t['standard_error']:.3f} |"
            for t in chat["tasks"]
        ]
    reply = [f"    {line}" for line in (chat["reply"] or "(nothing)").splitlines()]  # as it is: "#### 55" is no heading here
    lines += ["", f"> {chat['prompt']}", "", *reply, "", "Talk to it:", ""]
    lines += [f"    {command}" for command in talk_commands(Path(facts["sft"]["folder"]))]
    return "\n".join(lines) + "\n"


def talk_commands(model: Path) -> list[str]:
    """Commands for the terminal and for the page, ready to paste."""
    return [
        shlex.join(["nanoladder", "chat", "--checkpoint", str(model)]),
        shlex.join(["nanoladder", "serve", str(model), "--port", "8000"]),
    ]


def _predicted(verdict: Facts) -> str:
    if verdict["predicted"] is None:
        return "–"
    interval = f" [{verdict['low']:.4f}, {verdict['high']:.4f}]" if verdict["low"] is not None else ""
    return f"{verdict['predicted']:.4f}{interval}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
