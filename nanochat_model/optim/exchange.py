"""Gradients out to the ranks and weights back: the collectives of the optimizer's buffers.

A collective costs a round trip however little it carries, and a small model has a dozen small buffers. So buffers that follow one
another travel together up to PACK_BYTES; a larger one travels alone, and its collective overlaps with the updates of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

# Copying 8 MB costs under 2 ms on a CPU, summing it through Gloo on one machine over 5 ms (1.5 GB/s, by `nanoladder doctor`).
PACK_BYTES = 8 << 20
# torch 2.13 renamed them; before, only the old names exist.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def make_exchanges(buffers: Sequence[Any], world_size: int, group: dist.ProcessGroup | None) -> list[Exchange]:
    """Every Buffer (of muon_adamw) in one exchange, in order."""
    packs: list[list[Any]] = []
    room = 0
    for buffer in buffers:
        size = buffer.values.numel() * buffer.values.element_size()
        if not packs or size > room:
            packs.append([])
            room = PACK_BYTES
        packs[-1].append(buffer)
        room -= size
    return [Exchange(pack, world_size, group) for pack in packs]


class Exchange:
    """The collectives of one large buffer, or of several small ones at once. With one rank they do nothing."""

    def __init__(self, buffers: Sequence[Any], world_size: int, group: dist.ProcessGroup | None) -> None:
        self.buffers: Sequence[Any] = buffers
        self._world_size = world_size
        self._group = group
        self._work: Any = None
        self._flat = torch.empty(0)

    def start_reduce(self) -> None:
        """Start summing the gradients over ranks."""
        if self._world_size == 1:
            return
        first = self.buffers[0]
        if len(self.buffers) > 1:
            self._flat = torch.cat([b.grads.flatten() for b in self.buffers])
            self._work = dist.all_reduce(self._flat, group=self._group, async_op=True)
        elif first.grads.is_cuda:
            self._work = reduce_scatter(first.own(first.grads), first.grads, group=self._group, async_op=True)
        else:  # Gloo has no reduce_scatter into a chunk
            self._work = dist.all_reduce(first.grads, group=self._group, async_op=True)

    def finish_reduce(self) -> None:
        """Wait; then this rank's chunks of `grads` hold the mean. The other chunks are undefined."""
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        if len(self.buffers) > 1:
            parts = self._flat.split([b.grads.numel() for b in self.buffers])
            for buffer, part in zip(self.buffers, parts, strict=True):
                buffer.own(buffer.grads).copy_(buffer.own(part.view_as(buffer.grads)))
            self._flat = torch.empty(0)
        for buffer in self.buffers:
            buffer.own(buffer.grads).mul_(1.0 / self._world_size)

    def start_gather(self) -> None:
        """Start collecting every rank's chunk of `values`."""
        if self._world_size == 1:
            return
        first = self.buffers[0]
        if len(self.buffers) > 1:
            own = torch.cat([b.own(b.values).flatten() for b in self.buffers])
            self._flat = own.new_empty(self._world_size * own.numel())
            self._work = all_gather(self._flat, own, group=self._group, async_op=True)
        else:
            own = first.own(first.values)
            own = own if own.is_cuda else own.clone()
            self._work = all_gather(first.values, own, group=self._group, async_op=True)

    def finish_gather(self) -> None:
        """Wait; then `values` is whole on every rank."""
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        if len(self.buffers) > 1:
            sizes = [b.values.numel() // self._world_size for b in self.buffers]
            parts = self._flat.view(self._world_size, -1).split(sizes, dim=1)
            for buffer, part in zip(self.buffers, parts, strict=True):
                buffer.values.view(self._world_size, -1).copy_(part)
            self._flat = torch.empty(0)
