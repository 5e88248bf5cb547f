"""The model in one file: PyTorch, safetensors and tokenizers, nothing else.

    python modeling_nanoladder.py "What is 7 + 5?"            (answers; --raw continues the text instead)

    from modeling_nanoladder import load
    model, tokenizer = load("FOLDER")                         (model.safetensors, config.json and tokenizer.json)
    logits = model(torch.tensor([[…ids…]]))                   (float32, (rows, positions, vocabulary))

A GPT with rotary positions, normalized queries and keys, grouped keys, left windows, value embeddings, squared ReLU, smear (each
embedding takes a share of the one before it) and backout (the middle layer's stream is subtracted at the end). B rows, T
positions, C width, H heads, K kv heads, D head width.
"""

from __future__ import annotations

import argparse
import codecs
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = float(torch.finfo(torch.float32).eps)
ROTARY_BASE = 100_000.0
QK_SCALE = 1.2  # on queries and on keys, after their norm
SOFTCAP = 15.0
SMEAR_CHANNELS, VE_GATE_CHANNELS, VE_GATE_RANGE = 24, 12, 3.0
VOCAB_MULTIPLE, WINDOW_TILE = 64, 128


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


class Linear(nn.Linear):
    """Weights of float32, product in the input's dtype, no bias."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: dict, layer: int) -> None:
        super().__init__()
        C, self.head_dim = config["model_dim"], config["model_dim"] // config["num_heads"]
        kv_dim = config["num_kv_heads"] * self.head_dim
        self.window = windows(config)[layer]
        self.c_q, self.c_k, self.c_v, self.c_proj = Linear(C, C), Linear(C, kv_dim), Linear(C, kv_dim), Linear(C, C)
        has_ve = layer in value_embed_layers(config)
        self.ve_gate = Linear(VE_GATE_CHANNELS, config["num_kv_heads"]) if has_ve else None

    def forward(self, x: Tensor, ve: Tensor | None, start: int, past: dict) -> Tensor:
        """x (B, T, C) at positions start, start + 1, …; `past` holds this layer's keys and values before them."""
        B, T, C = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.c_q, self.c_k, self.c_v))
        if ve is not None and self.ve_gate is not None:
            gate = VE_GATE_RANGE * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * ve.to(v.dtype).view_as(v)
        q, k = (QK_SCALE * norm(rotate(y, start)) for y in (q, k))
        if past:
            k, v = torch.cat([past["k"], k], 1), torch.cat([past["v"], v], 1)
        past["k"], past["v"] = k, v
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        distance = torch.arange(start, start + T, device=x.device)[:, None] - torch.arange(k.shape[2], device=x.device)
        visible = (distance >= 0) & (distance <= self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def rotate(x: Tensor, start: int) -> Tensor:
    """Rotary embedding of x (B, T, H, D): the halves of D are paired and turned by minus the angle of the position."""
    T, D = x.shape[1], x.shape[-1]
    frequency = ROTARY_BASE ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = torch.outer(torch.arange(start, start + T, dtype=torch.float32), frequency).unsqueeze(1).to(x.device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class MLP(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Linear(C, 4 * C), Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: dict, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config["model_dim"])


def windows(config: dict) -> list[int]:
    """How many positions to its left a position of each layer sees; the last layer sees sequence_len."""
    T, pattern, depth = config["sequence_len"], config["window_pattern"], config["depth"]
    short = math.ceil(math.ceil(T / 4) / WINDOW_TILE) * WINDOW_TILE
    return [T if pattern[i % len(pattern)] == "L" or i == depth - 1 else short for i in range(depth)]


def value_embed_layers(config: dict) -> list[int]:
    return [i for i in range(config["depth"]) if i % 2 == (config["depth"] - 1) % 2]


class NanoladderModel(nn.Module):
    """`config`: depth, model_dim, num_heads, num_kv_heads, sequence_len, vocab_size, window_pattern."""

    def __init__(self, config: dict, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        depth, C, V = config["depth"], config["model_dim"], math.ceil(config["vocab_size"] / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        kv_dim = config["num_kv_heads"] * (C // config["num_heads"])
        blocks = nn.ModuleList([Block(config, i) for i in range(depth)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, C), "h": blocks})
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(V, kv_dim) for i in value_embed_layers(config)})
        self.lm_head = Linear(C, V)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(depth)), nn.Parameter(torch.zeros(depth))
        self.smear_gate, self.smear_lambda = Linear(SMEAR_CHANNELS, 1), nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))

    def forward(self, idx: Tensor, past: dict | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T). `past`: an empty dict at first; handed in again, ids follow what it holds."""
        past = {} if past is None else past
        start = past.get("length", 0)
        embedded = norm(self.transformer["wte"](idx)).to(self.dtype)
        before = torch.cat([past.get("last", torch.zeros_like(embedded[:, :1])), embedded[:, :-1]], 1)
        gate = self.smear_lambda.to(self.dtype) * torch.sigmoid(self.smear_gate(embedded[..., :SMEAR_CHANNELS]))
        x = x0 = middle = embedded + gate * before
        blocks: list[Block] = list(self.transformer["h"])  # type: ignore[arg-type, call-overload]
        for i, block in enumerate(blocks):
            ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            x = x + block.attn(norm(x), ve, start, past.setdefault(i, {}))
            x = x + block.mlp(norm(x))
            if i == len(blocks) // 2:
                middle = x
        past["length"], past["last"] = start + idx.shape[1], embedded[:, -1:]
        raw = F.linear(norm(x - self.backout_lambda[0] * middle), self.lm_head.weight[: self.config["vocab_size"]].to(self.dtype))
        return SOFTCAP * torch.tanh(raw.float() / SOFTCAP)

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], *, max_tokens: int, temperature: float = 0.6, top_k: int = 50, seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[int]:  # fmt: skip
        """New ids one by one, up to one of `stop_ids` (not given out). Temperature 0: the most likely; top_k 0: no cut."""
        device = self.lm_head.weight.device
        generator = torch.Generator(device=device).manual_seed(seed)
        past: dict = {}
        idx = torch.tensor([list(prompt)], device=device)
        for _ in range(max_tokens):
            logits = self(idx, past)[0, -1]
            if temperature == 0:
                token = int(logits.argmax())
            else:
                if 0 < top_k < len(logits):
                    logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
                token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
            if token in stop_ids:
                return
            yield token
            idx = torch.tensor([[token]], device=device)


class NanoladderTokenizer:
    """tokenizer.json, whose special tokens are never read from a text."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.encode_special_tokens = True
        self._bytes = {c: b for b, c in enumerate(_byte_characters())}
        self._special = {i: t.content.encode() for i, t in self._tokenizer.get_added_tokens_decoder().items()}

    def special(self, name: str) -> int:
        """Id of a special token by its bare name, such as bos or user_start."""
        number = self._tokenizer.token_to_id(f"<|{name}|>")
        assert number is not None, f"tokenizer.json has no {name}"
        return number

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 of ids; a single id may stand for a part of a character."""
        return b"".join(self._special.get(i) or bytes(self._bytes[c] for c in self._tokenizer.id_to_token(i) or "") for i in ids)

    def chat_prompt(self, message: str) -> list[int]:
        """Ids after which the model answers `message`."""
        before, after = (
            [self.special("bos"), self.special("user_start")],
            [self.special("user_end"), self.special("assistant_start")],
        )
        return [*before, *self.encode(message), *after]

    @property
    def stop_ids(self) -> list[int]:
        return [self.special(n) for n in ("assistant_end", "bos", "user_start")]


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(rest)) for b in range(256)]


def load(
    folder: str | Path = ".", *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[NanoladderModel, NanoladderTokenizer]:
    """Model in evaluation mode, computing in `dtype`, and tokenizer of a folder."""
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    model = NanoladderModel(config, dtype)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device).eval(), NanoladderTokenizer(folder / "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the model of this folder.")
    parser.add_argument("prompt")
    parser.add_argument("--folder", default=str(Path(__file__).resolve().parent))
    parser.add_argument("--raw", action="store_true", help="continue the text instead of answering it")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model, tokenizer = load(args.folder, device=args.device, dtype=dtype)
    prompt = [tokenizer.special("bos"), *tokenizer.encode(args.prompt)] if args.raw else tokenizer.chat_prompt(args.prompt)
    decoder = codecs.getincrementaldecoder("utf8")(errors="replace")
    settings = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    for token in model.generate(prompt, stop_ids=tokenizer.stop_ids, **settings):
        sys.stdout.write(decoder.decode(tokenizer.decode_bytes([token])))
        sys.stdout.flush()
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    main()
