"""The optimizer: contiguous buffers per group, sharded over the ranks of the process group if there is one.

A group's parameters become views of one tensor, their gradients views of another. Over several ranks every buffer is cut into
equal chunks (padded at the end, so nothing needs to divide): gradients are summed, each rank updates its chunk and keeps the
states of its chunk only, then the chunks are gathered. One rank does the same without communication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_model.config import OptimizerConfig
from nanochat_model.device import compile_fixed
from nanochat_model.gpt import GPT
from nanochat_model.native import muon as native_muon
from nanochat_model.optim.exchange import all_gather, make_exchanges
from nanochat_model.optim.groups import Group, parameter_groups
from nanochat_model.optim.muon import POLAR_EXPRESS, muon_step


def build_optimizer(model: GPT, config: OptimizerConfig, *, group: dist.ProcessGroup | None = None) -> MuonAdamW:
    """Optimizer of `model`, which must be on its device already: its parameters become views of the optimizer's buffers.

    With torch.distributed initialised, gradients are averaged and states sharded over `group` (default: all ranks).
    """
    groups = parameter_groups(model.named_parameters(), model.config.model_dim, config)
    polar_dtype = torch.bfloat16 if model.compute_dtype == torch.bfloat16 else torch.float32
    return MuonAdamW(groups, polar_dtype=polar_dtype, group=group)


@dataclass(frozen=True)
class Split:
    """How units are dealt to ranks: `chunk` units each, the last ranks getting padding."""

    num_units: int
    rank: int
    world_size: int

    @property
    def chunk(self) -> int:
        return -(-self.num_units // self.world_size)

    @property
    def padded(self) -> int:
        return self.chunk * self.world_size

    @property
    def own(self) -> slice:
        return slice(self.rank * self.chunk, (self.rank + 1) * self.chunk)


class Buffer:
    """Values and gradients of one group in two contiguous tensors of `padded` units (scalars, or matrices of one shape)."""

    def __init__(self, spec: Group, rank: int, world_size: int) -> None:
        self.spec = spec
        first = spec.params[0]
        muon = spec.kind == "muon"
        self.unit = spec.shape if muon else ()
        self.split = Split(len(spec.params) if muon else sum(p.numel() for p in spec.params), rank, world_size)
        shape = (self.split.padded, *self.unit)
        self.values = torch.zeros(shape, dtype=torch.float32, device=first.device)
        self.grads = torch.zeros_like(self.values)
        self.value_views = self._views(self.values)
        self.grad_views = self._views(self.grads)
        for p, view in zip(spec.params, self.value_views, strict=True):
            view.copy_(p.detach())
            p.data = view
        self.attach_grads()

    def _views(self, flat: Tensor) -> list[Tensor]:
        """One view of `flat` (or of a state of the same layout) a parameter, in the parameter's shape."""
        if self.unit:
            return list(flat.unbind(0))[: len(self.spec.params)]
        sizes = [p.numel() for p in self.spec.params]
        return [v.view(p.shape) for v, p in zip(flat[: sum(sizes)].split(sizes), self.spec.params, strict=True)]

    def attach_grads(self) -> None:
        """Make every .grad the buffer's view; one that somebody replaced is copied in."""
        for p, view in zip(self.spec.params, self.grad_views, strict=True):
            if p.grad is None:
                p.grad = view
            elif p.grad.data_ptr() != view.data_ptr():
                view.copy_(p.grad)
                p.grad = view

    def own(self, flat: Tensor) -> Tensor:
        return flat[self.split.own]


class MuonAdamW:
    """See the module. Learning rates are fixed; each step is given its multipliers."""

    def __init__(self, groups: list[Group], *, polar_dtype: torch.dtype, group: dist.ProcessGroup | None = None) -> None:
        self.polar_dtype = polar_dtype
        on_gpu = any(g.params[0].is_cuda for g in groups)
        self._muon_step = compile_fixed(muon_step, fullgraph=True) if on_gpu else muon_step
        self._as_scalar = torch.tensor if on_gpu else float  # 0-d tensors: a float that changes would compile again every step
        self.process_group = group
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if distributed else 0
        self.world_size = dist.get_world_size(group) if distributed else 1
        with torch.no_grad():
            self.buffers = [Buffer(g, self.rank, self.world_size) for g in groups]
        self.exchanges = make_exchanges(self.buffers, self.world_size, group)
        self.num_steps = 0
        self.states: list[dict[str, Tensor]] = [_new_state(b) for b in self.buffers]

    @torch.no_grad()
    def step(
        self, lr_multiplier: float, momentum: float, weight_decay_multiplier: float, mark: Callable[[str], None] | None = None
    ) -> None:
        """One update from the accumulated gradients. All AdamW rates and decays scale with lr_multiplier; Muon's decay also
        with weight_decay_multiplier; `momentum` is Muon's. `mark`, for timing, is told "communication" and "optimizer" as each
        part ends; communication then does not overlap with updates."""
        self.num_steps += 1
        for b in self.buffers:
            b.attach_grads()
        for exchange in self.exchanges:
            exchange.start_reduce()
        if mark is not None:
            for exchange in self.exchanges:
                exchange.finish_reduce()
            mark("communication")
        states = iter(self.states)
        for exchange in self.exchanges:
            exchange.finish_reduce()
            for buffer in exchange.buffers:
                if buffer.spec.kind == "adamw":
                    self._adamw(buffer, next(states), lr_multiplier)
                else:
                    self._muon(buffer, next(states), lr_multiplier, momentum, weight_decay_multiplier)
            if mark is None:
                exchange.start_gather()
        if mark is not None:
            mark("optimizer")
            for exchange in self.exchanges:
                exchange.start_gather()
        for exchange in self.exchanges:
            exchange.finish_gather()
        if mark is not None:
            mark("communication")

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Set all gradients to zero (their storage is kept)."""
        for b in self.buffers:
            b.attach_grads()
            b.grads.zero_()

    def _adamw(self, buffer: Buffer, state: dict[str, Tensor], lr_multiplier: float) -> None:
        spec = buffer.spec
        torch._fused_adamw_(
            [buffer.own(buffer.values)],
            [buffer.own(buffer.grads)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [torch.full((), float(self.num_steps), device=buffer.values.device)],  # torch.tensor would wait for a GPU
            lr=spec.lr * lr_multiplier,
            beta1=spec.betas[0],
            beta2=spec.betas[1],
            weight_decay=spec.weight_decay,
            eps=spec.eps,
            amsgrad=False,
            maximize=False,
        )

    def _muon(self, buffer: Buffer, state: dict[str, Tensor], lr: float, momentum: float, decay: float) -> None:
        spec = buffer.spec
        values, grads = buffer.own(buffer.values), buffer.own(buffer.grads)
        update: Any = self._muon_step
        as_scalar, options = self._as_scalar, {"polar_steps": spec.polar_steps, "dtype": self.polar_dtype}
        if native_muon.usable(values, self.polar_dtype):
            update, as_scalar, options = native_muon.muon_step, float, {"coefficients": POLAR_EXPRESS[: spec.polar_steps]}
        update(
            values,
            grads,
            state["momentum"],
            state["second_moment"],
            momentum=as_scalar(momentum),
            lr=as_scalar(spec.lr * lr),
            weight_decay=as_scalar(spec.weight_decay * decay),
            beta2=spec.beta2,
            **options,
        )

    def state_dict(self) -> dict[str, Any]:
        """This rank's states; for the same world size only. `consolidated_state` gives one for any."""
        return {"num_steps": self.num_steps, "world_size": self.world_size, "rank": self.rank, "states": self.states}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` gave on this rank at this world size."""
        if (state["world_size"], state["rank"]) != (self.world_size, self.rank):
            raise ValueError(
                f"optimizer state of rank {state['rank']} of {state['world_size']} given to rank {self.rank} of {self.world_size}; "
                "use consolidated_state and load_consolidated to change the number of ranks"
            )
        self.num_steps = int(state["num_steps"])
        for own, given in zip(self.states, state["states"], strict=True):
            for key, value in own.items():
                value.copy_(given[key])

    @torch.no_grad()
    def consolidated_state(self, dst: int = 0) -> dict[str, Any] | None:
        """States of all ranks by parameter name, on the CPU, independent of the world size; None on ranks other than `dst`.
        Every rank must call it."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for buffer, state in zip(self.buffers, self.states, strict=True):
            for key, value in state.items():
                full = self._gather_full(value)
                if self.rank == dst:
                    for name, view in zip(buffer.spec.names, buffer._views(full), strict=True):
                        tensors.setdefault(name, {})[key] = view.cpu().clone()
        return {"num_steps": self.num_steps, "params": tensors} if self.rank == dst else None

    def _gather_full(self, own: Tensor) -> Tensor:
        if self.world_size == 1:
            return own
        full = own.new_empty((own.shape[0] * self.world_size, *own.shape[1:]))
        all_gather(full, own.contiguous(), group=self.process_group)
        return full

    @torch.no_grad()
    def load_consolidated(self, state: dict[str, Any]) -> None:
        """Load what `consolidated_state` gave, at any world size; every rank is given the whole."""
        self.num_steps = int(state["num_steps"])
        for buffer, own in zip(self.buffers, self.states, strict=True):
            for key, value in own.items():
                full = value.new_zeros((buffer.split.padded, *value.shape[1:]))
                for name, view in zip(buffer.spec.names, buffer._views(full), strict=True):
                    view.copy_(state["params"][name][key])
                value.copy_(full[buffer.split.own])


def _new_state(buffer: Buffer) -> dict[str, Tensor]:
    own = buffer.own(buffer.values)
    if buffer.spec.kind == "adamw":
        return {"exp_avg": torch.zeros_like(own), "exp_avg_sq": torch.zeros_like(own)}
    m, n = buffer.unit
    return {"momentum": torch.zeros_like(own), "second_moment": own.new_zeros((len(own), m, 1) if m >= n else (len(own), 1, n))}
