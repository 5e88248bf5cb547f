"""What can be known of the GPU code without a GPU: shapes, strides and types by torch's own rules for CUDA (fake tensors), what a
compiler traces, and the choices made from what a machine says of itself."""

from __future__ import annotations

import importlib.machinery
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import RUNTIME, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_model import attention, attention_backends, device, distributed, fp8, gpt, loss, memory
from nanochat_model.config import GPTConfig
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.native import ops as native
from nanochat_model.optim import muon
from nanochat_model.train import pretrain

torch.set_num_threads(1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """torch.compile traces, but nothing is compiled. What comes back is torch's own."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: original(f, **{**kwargs, "backend": "eager"}))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield original
    torch._dynamo.reset()


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def like_on_cuda(t: torch.Tensor) -> torch.Tensor:
    """A fake of its shape, strides and type: torch checks what is done with it as on a GPU (all but autograd and indexing)."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_every_fp8_product_of_a_step_is_one_that_cuda_takes(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own rules: row-major times column-major, sizes divisible by 16, float32 scales of a tensor or of its rows."""
    monkeypatch.setitem(fp8._FORMATS, "cpu", (E4M3, E5M2))
    products: list[tuple[torch.dtype, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._scaled_mm.default:
                products.append((args[0].dtype, args[1].dtype))
                assert torch.bfloat16 in (*args, *kwargs.values()), "all that rowwise scales allow"
                with FakeTensorMode():
                    func(*(like_on_cuda(a) if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(native, "usable", lambda *tensors: False)  # as on a GPU
    config = GPTConfig(depth=2, model_dim=128, num_heads=2, num_kv_heads=1, sequence_len=48, vocab_size=64)
    model = GPT(config, compute_dtype=torch.bfloat16, fp8=recipe).init_weights(0)
    ids = torch.zeros(1, 48, dtype=torch.int64)
    with Watch():
        model.loss(ids, ids).backward()
    eligible = sum(module.fp8 != "off" for module in model.modules() if isinstance(module, gpt.Linear))
    gradient = E5M2 if recipe == "tensorwise" else E4M3
    assert eligible == 4 * config.depth, "kv_dim is 64, and gates are small"
    assert sorted(map(str, products)) == sorted(map(str, [(E4M3, E4M3)] * eligible + [(gradient, E4M3)] * 2 * eligible))


def test_the_optimizer_takes_its_schedules_from_the_host() -> None:
    """Zero-dimensional CPU tensors among CUDA's, which torch allows for some operations only; and AdamW's step count on the GPU."""
    with FakeTensorMode():
        for shape in ((3, 256, 64), (2, 64, 64), (2, 4, 12)):
            stack, states = (torch.empty(shape, device="cuda") for _ in range(2)), torch.empty(shape, device="cuda")
            second = torch.empty((shape[0], shape[1], 1) if shape[1] >= shape[2] else (shape[0], 1, shape[2]), device="cuda")
            scheduled = {name: torch.tensor(0.5) for name in ("momentum", "lr", "weight_decay")}
            muon.muon_step(*stack, states, second, **scheduled, beta2=0.9, polar_steps=5, dtype=torch.bfloat16)
        flat = [[torch.empty(100, device="cuda")] for _ in range(4)]
        torch._fused_adamw_(
            *flat, [], [torch.full((), 3.0, device="cuda")], lr=0.1, beta1=0.8, beta2=0.9, weight_decay=0.1, eps=1e-10,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        assert torch.stack(torch._foreach_norm(flat[0], dtype=torch.float32)).sum().device == CUDA


def test_fp8_is_traced_whole_and_once(uncompiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fp8._FORMATS, "cpu", (E4M3, E5M2))
    for recipe in fp8.RECIPES:
        config = GPTConfig(depth=1, model_dim=128, num_heads=2, num_kv_heads=2, sequence_len=64, vocab_size=64)
        model = GPT(config, compute_dtype=torch.bfloat16, fp8=recipe, attention="sdpa").init_weights(0)
        model.choose_attention(CPU)
        run = torch.compile(model.features, dynamic=False, fullgraph=True)
        before = num_graphs()
        for seed in range(2):
            ids = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(seed))
            run(ids).float().square().sum().backward()
        assert num_graphs() == before + 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"device": CPU}, "needs a GPU with fp8 units, the device is cpu"),
        ({"compute_dtype": "float16"}, "come out in bfloat16"),
        ({"sequence_len": 100}, "divisible by 16, not 100"),
    ],
)
def test_what_fp8_cannot_do_is_said_before_the_first_step(changes: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fp8._FORMATS, "cuda", (E4M3, E5M2))
    given = {"device": CUDA, "compute_dtype": "bfloat16", "sequence_len": 2048}
    fp8.check_fp8("rowwise", **given)
    with pytest.raises(ConfigError, match=message):
        fp8.check_fp8("rowwise", **given | changes)
    fp8.check_fp8("off", **given | changes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_kernel_is_checked_whoever_needs_it_first(mode: Callable[[], Any]) -> None:
    """An evaluation or a chat is the first to use a loaded model, under a mode without gradients."""
    with mode():
        attention_backends.check_against_sdpa(attention.sdpa, "cpu", torch.float32)


def test_fa3_is_asked_for_by_version_and_on_the_right_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def get_kernel(repo_id: str, revision: str | None = None, version: int | None = None) -> Any:
        if (version is None) == (revision is None):
            raise ValueError("Either a revision or a version must be specified.")  # as `kernels` does since 0.15
        asked.append((repo_id, version or 0))

        def flash_attn_func(
            q: Any, k: Any, v: Any, softmax_scale: float | None = None, causal: bool = False, *, window_size: Any
        ) -> Any:
            assert causal and window_size[1] == 0
            return attention.sdpa(q, k, v, window_size[0]), None

        return types.SimpleNamespace(flash_attn_func=flash_attn_func)

    package = types.ModuleType("kernels")
    package.__spec__ = importlib.machinery.ModuleSpec("kernels", None)
    package.get_kernel = get_kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", package)
    card = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: card[0])
    attention_backends.check_against_sdpa(attention_backends._load_fa3("cuda", torch.bfloat16), "cpu", torch.float32)
    assert asked == [("kernels-community/flash-attn3", 1)]
    for card[0] in ((7, 0), (10, 0)):
        with pytest.raises(attention_backends._Unfit, match="Hopper"):
            attention_backends._load_fa3("cuda", torch.bfloat16)
    card[0] = (9, 4)  # an MI300X
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(attention_backends._Unfit, match="Hopper"):
        attention_backends._load_fa3("cuda", torch.bfloat16)


@pytest.mark.parametrize("length, window", [(256, 128), (300, 128), (300, 300)])
def test_flex_sees_what_sdpa_sees(length: int, window: int, uncompiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "_BLOCK_MASKS", {})
    kernel = attention_backends.flex_kernel()
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 16, generator=g) for heads in (4, 2, 2))
    attention_backends.make_block_mask(length, window, CPU)
    with torch.no_grad():
        torch.testing.assert_close(kernel(q, k, v, window), attention.sdpa(q, k, v, window), atol=1e-5, rtol=1e-4)
    assert num_graphs() == 1


def test_flex_masks_are_no_part_of_what_is_compiled_and_other_lengths_compile_nothing(
    uncompiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that traced the making of a mask would make one, length × length, in each layer of each step."""
    monkeypatch.setattr(attention_backends, "_BLOCK_MASKS", {})
    backend = attention_backends.Backend("flex", attention_backends.flex_kernel(), "")
    monkeypatch.setattr(attention_backends, "_choose", lambda *args: backend)
    config = GPTConfig(depth=2, model_dim=32, num_heads=2, num_kv_heads=1, sequence_len=512, vocab_size=64, window_pattern="SL")
    model = GPT(config).init_weights(0).requires_grad_(False)
    assert model.choose_attention(CPU) == "flex" and len(attention_backends._BLOCK_MASKS) == 2
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    traced = uncompiled(model.features, dynamic=False, fullgraph=True, backend=keep)
    for seed in range(2):
        ids = torch.randint(0, 64, (1, 512), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(traced(ids), model.features(ids), atol=1e-4, rtol=1e-3)
    assert len(graphs) == 1
    called = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert sum("flex_attention" in name for name in called) == config.depth and not any("vmap" in name for name in called)
    before = num_graphs()
    for length in (77, 511):
        model.features(torch.zeros(1, length, dtype=torch.int64))
    assert num_graphs() == before


def test_every_model_of_a_process_is_compiled(uncompiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past eight shapes torch would leave a function uncompiled, or under fullgraph raise, whichever model they belong to."""
    for n in range(2, 12):
        run = device.compile_fixed(loss.whole_chunk, fullgraph=True)
        run(torch.zeros(3, n), torch.zeros(3, dtype=torch.int64))
        assert num_graphs() == n - 1
    asked: list[str] = []
    monkeypatch.setattr(gpt, "compile_fixed", lambda function: asked.append(function.__name__))
    gpt.compile_training(GPT(GPTConfig(depth=1, model_dim=32, num_heads=2, num_kv_heads=2, sequence_len=16, vocab_size=64)))
    assert asked == ["features"]


def test_nothing_of_an_attempt_that_ran_out_of_memory_is_left_when_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights, gradients and graph would take the memory that the halved micro-batch needs."""
    held: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []
    calls = 0
    init_weights, real_loss = GPT.init_weights, GPT.loss

    def init(self: GPT, seed: int) -> GPT:
        alive.append([ref() is not None for ref in held])
        held.append(weakref.ref(self.lm_head.weight))
        return init_weights(self, seed)

    def failing(self: GPT, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        result = real_loss(self, *args, **kwargs)
        if calls == 5:
            held.append(weakref.ref(result))
            raise torch.OutOfMemoryError("no memory for more")
        return result

    monkeypatch.setattr(GPT, "init_weights", init)
    monkeypatch.setattr(GPT, "loss", failing)
    record = pretrain(tiny_config(num_steps=3), RUNTIME, run_dir=tmp_path)
    assert record.status == "complete" and record.micro_batch_rows == 2
    assert alive == [[], [False, False]]


def test_estimates_count_the_logits_that_a_gpu_holds() -> None:
    assert memory.LOGIT_CHUNK_TOKENS == loss.GPU_CHUNK_TOKENS


def test_ranks_without_a_local_rank_fill_one_machine_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [distributed._local_rank(rank) for rank in (0, 7, 8, 11)] == [0, 7, 0, 3]
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert distributed._local_rank(3) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_that_a_gpu_compiles_is_the_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    raw = (20 * torch.randn(40, 70, generator=g)).to(dtype)
    targets = torch.randint(-1, 70, (40,), generator=g)
    raw_64 = raw.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(15 * torch.tanh(raw_64 / 15), targets, ignore_index=-1, reduction="sum")
    expected.backward()
    with FakeTensorMode():
        assert [t.dtype for t in loss.whole_chunk(like_on_cuda(raw), like_on_cuda(targets))] == [torch.float32, dtype]
    found, gradient = loss.whole_chunk(raw, targets)
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), raw_64.grad, atol=1e-5 if dtype == torch.float32 else 4e-3, rtol=1e-3)
