"""What happens inside a model, off the hot path: norms of gradients and updates, dead units, attention logits, lambdas, and the
layer in which a non-finite value began.

B rows, T positions, C model_dim, H heads, K kv heads, D head_dim. Norms are Frobenius norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat_model import gpt
from nanochat_model.loop import Batch, Multipliers, StepOutcome, Stepper
from nanochat_model.ops import rms_norm, rotate
from nanochat_model.step_times import timed_step

MAX_ROWS = 2  # rows of the forward pass that looks at activations; logits (H, T, T) are made one row and layer at a time
# Healthy update-to-weight ratios are near 1e-3 a step (the common rule of thumb, e.g. Karpathy's "makemore" lectures).


def measured_step(
    stepper: Stepper, batch_of: Callable[[int], Batch], step: int, multipliers: Multipliers
) -> tuple[dict[str, float], dict[str, float], StepOutcome]:
    """One training step that also measures: metrics, this rank's seconds by part as `timed_step` gives them, and the outcome. The
    update is the one an unmeasured step would make.

    Metrics: `gradient_norm/<weight>` (mean over ranks' gradients, before the optimizer), `update_norm/<weight>`,
    `update_to_weight/<weight>`, and those of `activation_metrics` and `lambda_metrics`. Every rank must call it.
    """
    model = stepper.model
    metrics = activation_metrics(model, batch_of(step), stepper) | lambda_metrics(model)
    names = {_short(n): p for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in names.items()}

    def gradient_norms() -> None:
        for name, p in names.items():
            metrics[f"gradient_norm/{name}"] = _norm(_mean_gradient(p, stepper))

    seconds, outcome = timed_step(stepper, batch_of, step, multipliers, gradient_norms)
    for name, p in names.items():
        weight, update = _norm(before[name]), _norm(p.detach() - before[name])
        metrics[f"update_norm/{name}"] = update
        if weight > 0:  # projections start at zero
            metrics[f"update_to_weight/{name}"] = update / weight
    return metrics, seconds, outcome


def _short(name: str) -> str:
    return name.removeprefix("transformer.").removesuffix(".weight")


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32))


def _mean_gradient(p: nn.Parameter, stepper: Stepper) -> Tensor:
    gradient = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
    if stepper.ranks.world_size > 1:
        dist.all_reduce(gradient)
    return gradient / (stepper.ranks.world_size * stepper.loss_scale.value)


def lambda_metrics(model: Any) -> dict[str, float]:
    """Value of every learnable scalar: `resid_lambda/<layer>`, `x0_lambda/<layer>`, `smear_lambda`, `backout_lambda`."""
    metrics = {"smear_lambda": model.smear_lambda.item(), "backout_lambda": model.backout_lambda.item()}
    for i in range(model.config.depth):
        metrics[f"resid_lambda/{i}"] = model.resid_lambdas[i].item()
        metrics[f"x0_lambda/{i}"] = model.x0_lambdas[i].item()
    return metrics


@torch.no_grad()
def activation_metrics(model: Any, batch: Batch, stepper: Stepper) -> dict[str, float]:
    """By layer, over at most two of this rank's rows: `dead_units/<layer>`, the share of MLP units that are zero at every
    position; `saturated_units/<layer>`, the share that are positive at every position (relu² then gates nothing); and
    `attention_logit_max/<layer>`, the largest scaled query-key product inside the window."""
    inputs = stepper.to_device(batch.inputs[:MAX_ROWS])
    metrics: dict[str, float] = {}
    handles = []
    for i, block in enumerate(model.transformer["h"]):
        handles.append(block.mlp.c_fc.register_forward_hook(_unit_hook(metrics, i)))
        handles.append(block.attn.register_forward_pre_hook(_logit_hook(metrics, i)))
    try:
        gpt.GPT.features(model, inputs)  # of the class: the instance's own may be compiled, and hooks would recompile it
    finally:
        for handle in handles:
            handle.remove()
    return metrics


def _unit_hook(metrics: dict[str, float], layer: int) -> Any:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        active = (output > 0).flatten(0, -2)  # (B·T, 4C)
        metrics[f"dead_units/{layer}"] = float((~active.any(0)).float().mean())
        metrics[f"saturated_units/{layer}"] = float(active.all(0).float().mean())

    return hook


def _logit_hook(metrics: dict[str, float], layer: int) -> Any:
    def hook(module: Any, args: tuple) -> None:
        x = args[0]
        cos, sin = (t.view(t.shape[0], 1, -1) for t in args[2:4])
        q, k = (p(x).unflatten(-1, (-1, module.head_dim)) for p in (module.c_q, module.c_k))  # (B, T, H or K, D)
        q, k = (gpt.QK_SCALE * rms_norm(rotate(y, cos, sin)) for y in (q, k))
        metrics[f"attention_logit_max/{layer}"] = max(attention_logit_max(q[b], k[b], module.window) for b in range(len(q)))

    return hook


def attention_logit_max(q: Tensor, k: Tensor, window: int) -> float:
    """Largest q·k/√D over heads and allowed pairs of one row: q (T, H, D), k (T, K, D); a position sees `window` to its left."""
    T, H, D = q.shape
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    logits = torch.einsum("thd,shd->hts", q.float(), k.float()) / math.sqrt(D)
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    return float(logits.masked_fill((distance < 0) | (distance > window), -math.inf).max())


def locate_non_finite(stepper: Stepper, batch: Batch) -> str:
    """Where non-finite values begin on this rank for `batch` with the present weights: a weight, else the first module whose
    output is not finite, else the weight whose gradient the backward pass spoils first. "" if everything is finite."""
    model = stepper.model
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            return f"the weights of {name}"
    for inputs, _ in stepper.micro_batches(batch):
        found = _first_bad_output(model, inputs)
        if found:
            return f"the output of {found}"
    stepper.optimizer.zero_grad()
    stepper.forward_backward(batch)
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    stepper.optimizer.zero_grad()
    return f"the gradient of {max(bad, key=lambda n: backward_position(n, model.config.depth))}" if bad else ""


@torch.no_grad()
def _first_bad_output(model: Any, inputs: Tensor) -> str:
    found: list[str] = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    with _hooks(model, hook_for):
        features = gpt.GPT.features(model, inputs)
    if not found and not torch.isfinite(features).all():
        found.append("the final norm")
    return found[0] if found else ""


@contextmanager
def _hooks(model: nn.Module, hook_for: Any) -> Iterator[None]:
    handles = [m.register_forward_hook(hook_for(n)) for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleDict)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward_position(name: str, depth: int) -> tuple[float, float]:
    """Larger for weights that the backward pass reaches earlier: lm_head, then layers from the last to the first (in each the
    MLP before attention), then what feeds every layer, then the embedding."""
    if name.startswith("lm_head"):
        return depth + 1.0, 0.0
    parts = name.split(".")
    if name.startswith("transformer.h."):
        order = ("attn.ve_gate", "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        return int(parts[2]) + 1.0, float(order.index(".".join(parts[3:5])))
    if name.startswith("value_embeds"):
        return int(parts[1]) + 1.0, -1.0
    return {"transformer.wte.weight": 0.0}.get(name, 0.5), 0.0
