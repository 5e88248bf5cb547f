"""Generation with a cache of keys and values: a batch of prompts of any lengths, one token a row and step, streamed.

B rows, T new positions, S cached positions, K kv heads, D head_dim, C model_dim, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanochat_model.config import GPTConfig
from nanochat_model.errors import ConfigError
from nanochat_model.sampling import Sampling, choose

if TYPE_CHECKING:
    from nanochat_model.gpt import GPT


class KVCache:
    """Keys and values of every layer for rows that may have different lengths, and what smear needs of the last token."""

    def __init__(self, config: GPTConfig, num_rows: int, max_tokens: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.depth, num_rows, max_tokens, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)  # tokens cached, by row
        self.longest = 0  # of them, known to the host without asking the device
        self.last = torch.zeros(
            (num_rows, 1, config.model_dim), dtype=dtype, device=device
        )  # embedding before smear; 0 at the start

    @property
    def max_tokens(self) -> int:
        return self.keys.shape[2]

    def rows(self, start: int, stop: int, longest: int) -> KVCache:
        """Rows start..stop-1 as a cache of its own that shares keys and values; `longest`: the greatest of their lengths.

        Its `lengths` and `last` are set anew by a forward pass, so the caller writes them back.
        """
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, start:stop], self.values[:, start:stop]
        part.lengths, part.last, part.longest = self.lengths[start:stop], self.last[start:stop], longest
        return part

    def positions(self, num_new: int) -> Tensor:
        """Positions (B, T) of the next `num_new` tokens of each row."""
        return self.lengths.unsqueeze(1) + torch.arange(num_new, device=self.lengths.device)

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, D) at `positions` (B, T) of `layer`; returns all keys and values so far, (B, S, K, D) each."""
        rows = torch.arange(len(k), device=k.device).unsqueeze(1)
        self.keys[layer][rows, positions] = k
        self.values[layer][rows, positions] = v
        stop = self.longest + k.shape[1]
        return self.keys[layer][:, :stop], self.values[layer][:, :stop]

    def advance(self, num_new: Tensor | int, longest: int) -> None:
        """Count `num_new` tokens (all rows alike, or (B,)) as cached; `longest` is the greatest length then."""
        self.lengths = self.lengths + num_new
        self.longest = longest


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> Iterator[list[int]]:
    """Yield one new token a row and step, at most `max_tokens` times, until every row has produced one of `stop_ids`.

    A row that has stopped repeats its stop id. Temperature 0 takes the most likely token; top_k 0 samples from all. The same
    seed and arguments give the same tokens; the rows of one call are independent samples. Raises ConfigError for an empty
    prompt, an id outside the vocabulary, a setting out of range, or a length over model.max_tokens.
    """
    check_prompts(model, prompts, max_tokens)
    settings = [Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)] * len(prompts)
    draws = [s.draws(row) for row, s in enumerate(settings)]
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(len(p) for p in prompts)
    cache = KVCache(model.config, len(prompts), longest + max_tokens, dtype=model.compute_dtype, device=device)
    padded = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    logits = model.next_logits(padded, cache, lengths)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    tokens = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    for step in range(max_tokens):
        if step:
            logits = model.next_logits(tokens.unsqueeze(1), cache)
        tokens = torch.where(stopped, tokens, choose(logits, settings, [d.random() for d in draws]))
        stopped |= torch.isin(tokens, stops)
        yield tokens.tolist()
        if bool(stopped.all()):
            return


def check_prompts(model: GPT, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Raise ConfigError unless each prompt has ids, all of the vocabulary, and `max_tokens` more fit the model's positions."""
    if not prompts or not all(prompts):
        raise ConfigError("a prompt is empty; begin each with the BOS id")
    ids = [i for p in prompts for i in p]
    if min(ids) < 0 or max(ids) >= model.config.vocab_size:
        raise ConfigError(
            f"prompt ids {min(ids)}..{max(ids)} leave the vocabulary 0..{model.config.vocab_size - 1}; use its tokenizer"
        )
    longest = max(map(len, prompts))
    if longest + max_tokens > model.max_tokens:
        raise ConfigError(
            f"prompt of {longest} and max_tokens {max_tokens} exceed the model's {model.max_tokens} positions; shorten one of them"
        )


def prepare_inference(model: GPT) -> GPT:
    """Hold every matrix in the compute dtype, in place, and stop training: saves the cast in each step. Returns the model.

    The tables of embeddings stay float32: they are looked up, not multiplied.
    """
    from nanochat_model.gpt import Linear  # which imports this module for its types

    for module in model.modules():
        if isinstance(module, Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().to(model.compute_dtype), requires_grad=False)
    return model.requires_grad_(False).eval()
