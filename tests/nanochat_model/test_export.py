"""The exported folder, run where this package cannot be imported: the same logits, the same tokens, the same text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference_model as ref
import torch
from tiny_run import VOCAB_SIZE, tiny_shards

from nanochat_model.checkpoint import CheckpointState, load_model, save_checkpoint
from nanochat_model.engine import generate
from nanochat_model.errors import ConfigError
from nanochat_model.export import MODELING_FILE, export_standalone
from nanochat_model.interop import config_from_nanochat
from nanochat_model.modeling_nanoladder import NanoladderModel, NanoladderTokenizer
from nanochat_model.tokenizer import SPECIAL_TOKENS, Tokenizer

torch.set_num_threads(1)
TEXT = "ab cde é 1234 <|bos|> \n  fgh"
SHAPES = [
    {"depth": 4, "dim": 64, "heads": 4, "kv_heads": 2, "T": 150, "pattern": "SSL"},
    {"depth": 1, "dim": 32, "heads": 2, "kv_heads": 2, "T": 32, "pattern": "L"},
    {"depth": 3, "dim": 48, "heads": 3, "kv_heads": 1, "T": 600, "pattern": "S"},
]
ISOLATED = """
import json, sys
sys.modules["nanochat_model"] = sys.modules["nanoladder"] = None  # importing them is an error
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from modeling_nanoladder import load
model, tokenizer = load(sys.argv[1])
ids, text = json.loads(sys.argv[2])
with torch.inference_mode():
    torch.save(model(torch.tensor([ids])), sys.argv[3])
said = list(model.generate(ids[:20], max_tokens=10, temperature=0))
print(json.dumps({"ids": tokenizer.encode(text), "chat": tokenizer.chat_prompt(text), "said": said,
                  "text": tokenizer.decode_bytes(tokenizer.encode(text)).decode()}))
"""


def write_checkpoint(folder: Path, shape: dict) -> Path:
    """Random weights that leave no part idle, with the tiny tokenizer."""
    config = ref.model_config(**shape, vocab=VOCAB_SIZE)
    state = CheckpointState(kind="sft", step=3, model=config_from_nanochat(config), run_id="abc")
    tiny_shards().tokenizer.save(folder / "tokenizer")
    return save_checkpoint(folder / "checkpoints", state, ref.random_weights(config))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_single_file_computes_what_the_model_computes(tmp_path: Path, shape: dict) -> None:
    """In one piece, and through its cache in several."""
    model = load_model(write_checkpoint(tmp_path, shape))
    single = NanoladderModel(json.loads(json.dumps(model.config.__dict__))).eval()
    single.load_state_dict(model.state_dict())
    idx = torch.randint(0, VOCAB_SIZE, (2, shape["T"]), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, past = model(idx), {}
        assert (single(idx) - expected).abs().max() < 1e-5
        pieces = [single(part, past) for part in idx.split([1, 20, shape["T"] - 21], dim=1)]
        assert (torch.cat(pieces, 1) - expected).abs().max() < 1e-5


def test_a_token_that_begins_like_a_special_one_is_its_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["<|——<|—— " * 9], 256 + len(SPECIAL_TOKENS) + 7)
    tokenizer.save(tmp_path)
    single, tokens = NanoladderTokenizer(tmp_path / "tokenizer.json"), range(tokenizer.vocab_size)
    expected = [tokenizer.decode_bytes([i]) for i in tokens]
    assert any(b.startswith(b"<|\xe2") for b in expected)
    assert [single.decode_bytes([i]) for i in tokens] == expected


def test_an_exported_folder_works_where_the_package_is_hidden(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model, tokenizer = load_model(write_checkpoint(run, SHAPES[0])), tiny_shards().tokenizer
    out = export_standalone(run, tmp_path / "out")
    ids = torch.randint(0, VOCAB_SIZE, (140,), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = [str(out), json.dumps([ids, TEXT]), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with torch.inference_mode():
        assert (torch.load(tmp_path / "logits.pt") - model(torch.tensor([ids]))).abs().max() < 1e-5
    assert found["said"] == [t[0] for t in generate(model, [ids[:20]], max_tokens=10, temperature=0.0)]
    assert found["ids"] == tokenizer.encode(TEXT) and found["text"] == TEXT
    special = tokenizer.special_id
    start, end = [tokenizer.bos_id, special("<|user_start|>")], [special("<|user_end|>"), special("<|assistant_start|>")]
    assert found["chat"] == [*start, *tokenizer.encode(TEXT), *end]
    config = json.loads((out / "config.json").read_text())
    assert config["depth"] == 4 and config["special_tokens"]["bos"] == tokenizer.bos_id and config["source"]["step"] == 3


def test_the_file_is_a_program(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, SHAPES[1])
    out = export_standalone(run, tmp_path / "out", dtype="bfloat16")
    command = [sys.executable, "-I", str(out / MODELING_FILE), "ab", "--max-tokens", "5", "--temperature", "0", "--raw"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONIOENCODING": "utf8"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    rounded = load_model(run)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.bfloat16())
    tokenizer = tiny_shards().tokenizer
    steps = generate(rounded, [[tokenizer.bos_id, *tokenizer.encode("ab")]], max_tokens=5, temperature=0.0)
    assert done.stdout == tokenizer.decode([s[0] for s in steps]) + "\n"


def test_it_can_be_written_again_but_not_over_other_things(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, SHAPES[1])
    assert export_standalone(run, tmp_path / "out") == export_standalone(run, tmp_path / "out")
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(letter.txt\)"):
        export_standalone(run, tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        export_standalone(run, tmp_path / "out2", dtype="int8")
    with pytest.raises(ConfigError, match="no checkpoint at"):
        export_standalone(tmp_path / "nothing", tmp_path / "out2")
