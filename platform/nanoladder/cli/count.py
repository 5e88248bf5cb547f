"""nanoladder count: parameters and FLOPs by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_model.config import GPTConfig
from nanochat_model.counts import count_params, count_params_2025, flops_per_token
from nanoladder.cli.common import Json, human, print_json, print_table


@dataclass(frozen=True, kw_only=True)
class Count:
    """Parameters by group and FLOPs of the model of one depth, by arithmetic.

    Example: nanoladder count --depth 24 --json
    """

    depth: int
    """Layers; the width follows as 64 × depth, rounded up to a multiple of 128."""
    vocab_size: int = 32768
    """Vocabulary of the tokenizer; tables are padded to a multiple of 64."""
    sequence_len: int = 2048
    """Context length in tokens."""
    window_pattern: str = "SSSL"
    """Attention windows tiled over the layers: S short, L long."""
    json: Json = False

    def run(self) -> None:
        facts = count_facts(self)
        if self.json:
            print_json(facts)
            return
        rows = [(name, f"{value:,}" if isinstance(value, int) else f"{value:.3f}") for name, value in facts.items()]
        print_table(("d" + str(self.depth), ""), rows, right=("",))
        scaling, flops = human(facts["scaling"]), human(facts["flops_per_token"])
        print(f"N for the laws (matrices + lm_head): {scaling}; training FLOPs a token: {flops}")


def count_facts(args: Count) -> dict[str, int | float]:
    """What `count` prints. `older_total` is the older public counting: 12·C²·L + 2·V·C."""
    model = GPTConfig.from_depth(
        args.depth, vocab_size=args.vocab_size, sequence_len=args.sequence_len, window_pattern=args.window_pattern
    )
    counts = count_params(model)
    return {
        "depth": args.depth,
        "model_dim": model.model_dim,
        "num_heads": model.num_heads,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "sequence_len": model.sequence_len,
        **counts.as_dict(),
        "embedding_share": round(counts.embedding_share, 4),
        "flops_per_token": flops_per_token(model),
        "older_total": count_params_2025(args.depth, vocab_size=args.vocab_size),
    }
