"""The sharded optimizer on three ranks (which divides nothing here evenly) is the optimizer of one process."""

from __future__ import annotations

import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ports import free_port

from nanochat_model.config import GPTConfig, OptimizerConfig
from nanochat_model.gpt import GPT
from nanochat_model.optim import build_optimizer

CONFIG = GPTConfig(depth=2, model_dim=32, num_heads=2, num_kv_heads=1, sequence_len=16, vocab_size=100)
WORLD = 3


def gradients(model, step, rank):
    g = torch.Generator().manual_seed(100 * step + rank)
    return {n: torch.randn(p.shape, generator=g) for n, p in model.named_parameters()}


def train(model, optimizer, steps, rank=None):
    """Steps with the gradients of `rank`, or with the mean over ranks."""
    for step in steps:
        mine = [gradients(model, step, r) for r in (range(WORLD) if rank is None else [rank])]
        for n, p in model.named_parameters():
            p.grad += sum(g[n] for g in mine) / len(mine)
        optimizer.step(1.0, 0.9, 0.5)
        optimizer.zero_grad()


def run_rank(rank, port, folder, resume_from):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    model = GPT(CONFIG).init_weights(0)
    optimizer = build_optimizer(model, OptimizerConfig())
    saved = torch.load(resume_from, weights_only=True)
    train(model, optimizer, range(2), rank)
    at_two = optimizer.consolidated_state()
    train(model, optimizer, range(2, 4), rank)
    held = sum(t.numel() for s in optimizer.states for t in s.values())
    out = {"weights": model.state_dict(), "held": held, "at_two": at_two}
    # a second life: the state that one process saved after two steps
    model.load_state_dict(saved["weights"])
    optimizer.load_consolidated(saved["optimizer"])
    train(model, optimizer, range(2, 4), rank)
    out["resumed"] = model.state_dict()
    torch.save(out, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_three_ranks_equal_one_and_resume_each_other(tmp_path):
    torch.set_num_threads(1)
    model = GPT(CONFIG).init_weights(0)
    optimizer = build_optimizer(model, OptimizerConfig())
    train(model, optimizer, range(2))
    saved = {"weights": model.state_dict(), "optimizer": optimizer.consolidated_state()}
    torch.save(saved, tmp_path / "one.pt")
    train(model, optimizer, range(2, 4))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.distributed"])  # imported once for all ranks
    arguments = (free_port(), str(tmp_path), str(tmp_path / "one.pt"))
    mp.start_processes(run_rank, args=arguments, nprocs=WORLD, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(WORLD)]

    expected = model.state_dict()
    for name, value in expected.items():
        assert all(torch.equal(r["weights"][name], ranks[0]["weights"][name]) for r in ranks), f"{name} differs between ranks"
        for kind in ("weights", "resumed"):
            torch.testing.assert_close(ranks[0][kind][name], value, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    # states are sharded: no rank holds much over its third
    whole = sum(t.numel() for s in optimizer.states for t in s.values())
    assert max(r["held"] for r in ranks) < 0.45 * whole
    # only rank 0 has the consolidated state, and it is the one of a single process
    assert ranks[1]["at_two"] is None
    for name, state in saved["optimizer"]["params"].items():
        for key, value in state.items():
            torch.testing.assert_close(ranks[0]["at_two"]["params"][name][key], value, atol=1e-5, rtol=1e-4)
