"""A plan as text for people and as plain data for machines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from analysis.words import plural
from nanochat_model.identity import run_id
from nanoladder.cli.common import duration
from nanoladder.plan import LaunchPlan

Section = tuple[str, list[tuple[str, str]]]


def plan_sections(plan: LaunchPlan) -> list[Section]:
    """(title, [(name, value)]) in the order of the questions people ask."""
    c, p = plan.config, plan.params
    uses = {u.quantity: f"{u.kind}{'' if u.kind == 'given' else f' ({u.status})'}: {u.source}" for u in plan.uses}
    return [
        (
            "Model",
            [
                (
                    "depth × width",
                    f"{c.model.depth} × {c.model.model_dim}, {c.model.num_heads} heads, T = {c.model.sequence_len:,}",
                ),
                ("parameters", f"{p.total:,} (embeddings {p.embedding_share:.0%})"),
                ("  matrices", f"{p.transformer_matrices:,}"),
                ("  lm_head", f"{p.lm_head:,}"),
                ("  wte", f"{p.wte:,}"),
                ("  value embeddings", f"{p.value_embeds:,}"),
                ("  scalars", f"{p.scalars:,}"),
                ("N (matrices + lm_head)", f"{p.scaling:,}"),
            ],
        ),
        (
            "Training",
            [
                ("recipe", f"{plan.recipe}; packing {c.data.packing}"),
                ("tokens D", f"{c.num_tokens:,} ({plan.tokens_per_param:.1f} per N)  ← {uses['allocation']}"),
                ("batch", f"{c.batch_tokens:,} tokens, {c.num_steps:,} steps  ← {uses['batch_size']}"),
                (
                    "micro-batch",
                    f"{plan.micro_batch_rows} rows × {plan.accumulation_steps} accumulated × {plan.target.num_devices} devices",
                ),
                ("matrix learning rate", f"{c.optimizer.matrix_lr:.4g}  ← {uses['learning_rate']}"),
                ("other rates", _rates(plan)),
                ("weight decay", f"{c.optimizer.weight_decay:.4g}  ← {uses['weight_decay']}"),
                ("FLOPs", f"{plan.train_flops:.3g} ({plan.flops_per_token:.3g} a token)"),
                (f"predicted {plan.prediction.loss_name if plan.prediction else 'loss'}", predicted_text(plan)),
            ],
        ),
        ("Time and money", _time_rows(plan)),
        (
            f"Memory of one device ({plan.memory_bytes / 1e9:.0f} GB{'' if plan.memory_known else ' assumed'})",
            _memory_rows(plan),
        ),
        (
            "Storage",
            [
                ("checkpoint", size_text(plan.checkpoint_bytes)),
                ("text", f"{size_text(plan.data_bytes)}, {plan.data_shards} shards of 250 MB of text (one for validation)"),
                ("token shards", size_text(plan.token_bytes)),
            ],
        ),
    ]


def size_text(num_bytes: float) -> str:
    """Bytes as "744.0 MB" or "5.54 GB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _rates(plan: LaunchPlan) -> str:
    o = plan.config.optimizer
    return f"embedding {o.embedding_lr:.4g}, unembedding {o.unembedding_lr:.4g}, scalars {o.scalar_lr:.4g}"


def predicted_text(plan: LaunchPlan) -> str:
    p = plan.prediction
    if p is None:
        return "none (no usable allocation law)"
    interval = f" [{p.low:.4f}, {p.high:.4f}]" if p.low is not None else " (no interval)"
    distance = f", {p.extrapolation:.1f}× the largest fitted compute" if p.extrapolation else ""
    surface = f", surface {p.surface_loss:.4f}" if p.surface_loss is not None else ""
    return f"{p.loss:.4f}{interval}, verdict {p.verdict}{distance}{surface}"


def _time_rows(plan: LaunchPlan) -> list[tuple[str, str]]:
    speed = plan.throughput
    if speed.mfu is None or speed.peak_flops_per_device is None:
        mfu = f"unknown peak; {speed.flops_per_second / 1e9:.0f} GFLOP/s in all"
    else:
        mfu = f"{speed.mfu:.1%} of {speed.peak_flops_per_device / 1e12:.0f} TFLOP/s a device"
    price = plan.target.price_per_device_hour
    nodes = plan.target.num_nodes
    averaged = f"; averaged between nodes in {plan.all_reduce_seconds:.2f} s a step" if nodes > 1 else ""
    averaged += " (in the speed already)" if speed.includes_network and nodes > 1 else ""
    rows = [
        ("devices", f"{plan.target.num_devices} × {plan.target.device} on {plural(nodes, 'node')}"),
        ("speed", f"{speed.tokens_per_second:,.0f} tokens/s  ← {speed.source}"),
        ("MFU", mfu),
        ("step", f"{plan.step_seconds:.2f} s" if plan.step_seconds >= 0.1 else f"{1000 * plan.step_seconds:.1f} ms"),
        ("gradients", f"{plan.gradient_bytes / 1e6:,.0f} MB in fp32{averaged}"),
        ("time", f"{plan.hours:.2f} h" if plan.hours >= 0.1 else duration(3600 * plan.hours)),
    ]
    if plan.dollars is not None:
        rows.append(("cost", f"${plan.dollars:,.2f} at ${price:g} a device and hour"))
    return rows


def _memory_rows(plan: LaunchPlan) -> list[tuple[str, str]]:
    rows = [(name, size_text(value)) for name, value in plan.memory.as_dict().items()]
    share = plan.memory.total / plan.memory_bytes
    return [*rows[:-1], ("total", f"{rows[-1][1]} = {share:.0%}")]


def plan_as_dict(plan: LaunchPlan) -> dict[str, Any]:
    """The whole plan as plain data."""
    return {
        **asdict(plan),
        "run_id": run_id(plan.config),
        "num_tokens": plan.config.num_tokens,
        "params": plan.params.as_dict(),
        "memory": plan.memory.as_dict(),
    }


def print_plan(plan: LaunchPlan) -> None:
    """The plan on stdout, then what stops or should worry."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    for title, rows in plan_sections(plan):
        console.print(title, style="bold", markup=False)  # not as the table's title, which would be wrapped to its width
        table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
        for name, value in rows:
            table.add_row(name, escape(value))  # a path may hold what reads like markup
        console.print(table)
    for line in plan.warnings:
        console.print(f"warning: {line}", soft_wrap=True, markup=False)
    for line in plan.blocking:
        console.print(f"stops a launch: {line}", soft_wrap=True, markup=False)
