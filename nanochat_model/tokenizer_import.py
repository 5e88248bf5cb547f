"""nanochat's tokenizer.pkl (a pickled tiktoken Encoding) as our Tokenizer, without executing what the pickle names; and back."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_model.errors import ConfigError
from nanochat_model.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_characters
from nanochat_model.word_split import SPLIT_PATTERN


class _Encoding:
    """Stands for tiktoken.Encoding while unpickling: keeps the plain state (a dict) and does nothing."""

    state: Mapping[str, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, Mapping) else None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "Encoding" and module in ("tiktoken", "tiktoken.core"):
            return _Encoding
        raise ConfigError(f"it names {module}.{name}, which is not executed; only a pickled tiktoken Encoding is read")


def import_nanochat_tokenizer(path: str | Path) -> Tokenizer:
    """Read nanochat's tokenizer.pkl (or the folder that holds it); ids stay the same.

    Raises ConfigError when it is no such file, or has another split rule or other special tokens than nanochat's.
    """
    path = Path(path)
    path = path / "tokenizer.pkl" if path.is_dir() else path
    try:
        with path.open("rb") as f:
            found = _Unpickler(f).load()
    except FileNotFoundError:
        raise ConfigError(f"no tokenizer at {path}; give nanochat's tokenizer.pkl or its folder") from None
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError, KeyError) as e:
        raise ConfigError(f"{path}: not a pickled tiktoken Encoding ({e!r}); give nanochat's tokenizer.pkl") from None
    state = found.state if isinstance(found, _Encoding) else None
    if not state or not {"pat_str", "mergeable_ranks", "special_tokens"} <= set(state):
        raise ConfigError(f"{path}: not a pickled tiktoken Encoding of a trained vocabulary; give nanochat's tokenizer.pkl")
    if state["pat_str"] != SPLIT_PATTERN:
        raise ConfigError(f"{path}: split rule {state['pat_str']!r} differs from nanochat's present one, which alone is supported")
    tokenizer = from_ranks(state["mergeable_ranks"], f"{path}: ")
    for token, number in state["special_tokens"].items():
        if tokenizer.special_id(token) != number:
            raise ConfigError(f"{path}: special token {token!r} has id {number}, expected {tokenizer.special_id(token)}")
    return tokenizer


def nanochat_pickle(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as the content of nanochat's tokenizer.pkl; tiktoken need not be installed.

    The ids are the same. tiktoken joins any two neighbours that together are a token, where our merges name the pair; a text is
    cut otherwise only where a token can also be made of another pair than the one that it was learned from.
    """
    num_ranks = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    state = {
        "name": "nanoladder",
        "pat_str": SPLIT_PATTERN,
        "mergeable_ranks": {tokenizer.decode_bytes([i]): i for i in range(num_ranks)},
        "special_tokens": {token: tokenizer.special_id(token) for token in SPECIAL_TOKENS},
    }
    plain = pickle.dumps(state, protocol=3)
    head, end = pickle.PROTO + b"\x03", pickle.STOP
    assert plain.startswith(head) and plain.endswith(end)
    made = pickle.GLOBAL + b"tiktoken.core\nEncoding\n" + pickle.EMPTY_TUPLE + pickle.NEWOBJ  # Encoding.__new__(Encoding)
    return head + made + plain[len(head) : -len(end)] + pickle.BUILD + end  # its __setstate__(state)


def from_ranks(ranks: Mapping[bytes, int], where: str = "") -> Tokenizer:
    """The Tokenizer of a table of token bytes and ranks (= ids), as tiktoken and rustbpe hold it.

    The table says which tokens exist but not from which pair each was merged: that is found by merging its bytes with the
    tokens of lower rank. Raises ConfigError when the ranks are not 0, 1, 2, … or a token is the merge of no pair.
    """
    ordered = sorted(ranks, key=ranks.__getitem__)
    if [ranks[t] for t in ordered] != list(range(len(ordered))) or len(ordered) < 256:
        raise ConfigError(f"{where}ranks must be 0, 1, 2, … without gaps and hold the 256 bytes; found {len(ordered)} tokens")
    characters = byte_characters()
    text = {t: "".join(characters[b] for b in t) for t in ordered}
    merges = []
    for token in ordered:
        if len(token) == 1:
            continue
        parts = _merged(token, ranks, ranks[token])
        if len(parts) != 2:
            raise ConfigError(f"{where}token {token!r} (id {ranks[token]}) is not the merge of two tokens of lower rank")
        merges.append((text[parts[0]], text[parts[1]]))
    return Tokenizer({text[t]: ranks[t] for t in ordered}, merges)


def _merged(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """`token`'s bytes after all merges of rank under `limit`, lowest rank first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
