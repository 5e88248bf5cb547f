"""Choosing the next token: temperature, top-k and top-p for each row on its own, from numbers drawn on the host.

A row's choice depends on its logits, its settings and its own stream of uniform numbers alone, so it is the same whoever shares
the batch and on whatever device (up to rounding of the logits). B rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_model.errors import ConfigError

COLDEST = 1e-6  # divided by less, logits leave float32; and what is a ten-thousandth of a logit behind was never chosen


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one row are chosen. Temperature 0: the most likely one; top_k 0 and top_p 1: no cut."""

    temperature: float = 1.0
    top_k: int = 0  # only the k most likely (and those as likely as the k-th)
    top_p: float = 1.0  # only the most likely ones that together have at least this probability (arXiv 1904.09751)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature} must be 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} must lie above 0 and up to 1 (all tokens)")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < COLDEST

    def draws(self, row: int = 0) -> random.Random:
        """The stream of uniform numbers of one row: each sampled token takes one `.random()`."""
        return random.Random(f"{self.seed}:{row}")


def choose(logits: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """One id a row (B,), from logits (B, V) float32; `uniforms`: one number in [0, 1) a row (unused at temperature 0).

    The id is where the cumulative probability, in the order of the vocabulary, passes the uniform number.
    """
    greedy = logits.argmax(-1)
    if all(s.greedy for s in settings):
        return greedy
    device = logits.device
    temperature = torch.tensor([1.0 if s.greedy else s.temperature for s in settings], device=device).unsqueeze(1)
    scaled = logits / temperature
    scaled = scaled.masked_fill(scaled < _thresholds(scaled, settings), -torch.inf)
    total = torch.softmax(scaled, -1).double().cumsum(-1)
    target = torch.tensor(uniforms, dtype=torch.float64, device=device).unsqueeze(1) * total[:, -1:]
    target = torch.minimum(target, torch.nextafter(total[:, -1:], torch.zeros_like(target)))  # rounding must not pass the end
    sampled = torch.searchsorted(total, target, right=True).squeeze(1)
    if not any(s.greedy for s in settings):
        return sampled
    return torch.where(torch.tensor([s.greedy for s in settings], device=device), greedy, sampled)


def _thresholds(scaled: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The least scaled logit (B, 1) that each row may choose; -inf where nothing is cut."""
    num_tokens = scaled.shape[-1]
    ks = [s.top_k if 0 < s.top_k < num_tokens and not s.greedy else 0 for s in settings]
    least = torch.full_like(scaled[:, :1], -torch.inf)
    if max(ks):
        values = scaled.topk(max(ks)).values
        at = torch.tensor([max(k - 1, 0) for k in ks], device=scaled.device).unsqueeze(1)
        cut = torch.tensor([k > 0 for k in ks], device=scaled.device).unsqueeze(1)
        least = torch.where(cut, values.gather(1, at), least)
    nucleus = [i for i, s in enumerate(settings) if s.top_p < 1 and not s.greedy]
    if nucleus:  # of what top-k has left
        rows = torch.tensor(nucleus, device=scaled.device)
        ordered = scaled[rows].sort(-1, descending=True).values
        p = torch.softmax(ordered.masked_fill(ordered < least[rows], -torch.inf), -1)
        top_p = torch.tensor([settings[i].top_p for i in nucleus], device=scaled.device).unsqueeze(1)
        last = ((p.cumsum(-1) - p < top_p) & (p > 0)).sum(-1, keepdim=True) - 1
        least[rows] = ordered.gather(1, last)
    return least
