"""Numbers and nouns in messages for people."""

from __future__ import annotations

BITS_PER_BYTE = "validation bpb"  # the loss of records, MLflow and nanochat's tables


def plural(number: int, noun: str, many: str | None = None) -> str:
    """1 run, 2 runs, 1,000 runs; `many` where the plural is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def is_are(number: int) -> str:
    return "is" if number == 1 else "are"


def was_were(number: int) -> str:
    return "was" if number == 1 else "were"
