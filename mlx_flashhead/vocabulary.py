"""What a tokenizer tells about its tokens that matters to a head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNUSED = re.compile(r"unused|reserved", re.IGNORECASE)


@dataclass(frozen=True)
class Vocabulary:
    """Token ids that are treated apart.

    Attributes:
        pinned: End-of-sequence and special tokens, which must never be missed.
        unlikely: Special, byte and unused tokens, which an id-based prior skips.
    """

    pinned: frozenset[int]
    unlikely: frozenset[int]


def read_vocabulary(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """Sort a tokenizer's ids.

    Tokens reserved for later use are special by name only: no model emits them, so
    they are not pinned.

    Args:
        tokenizer: From mlx-lm or transformers.
        vocab_size: Rows of the head, V. A head may have fewer or more rows than the
            tokenizer has tokens.
    """
    names = {token_id: name for name, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    special = {id for id, token in added.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    unused = {id for id, name in names.items() if _UNUSED.search(name) and id in added}
    unused |= set(range(vocab_size)) - set(names)
    single_bytes = {id for id, name in names.items() if _BYTE.fullmatch(name)}
    ends = getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id}

    def in_head(token_ids: set[int]) -> frozenset[int]:
        return frozenset(id for id in token_ids if id is not None and id < vocab_size)

    return Vocabulary(
        pinned=in_head((special - unused) | set(ends)),
        unlikely=in_head(special | unused | single_bytes),
    )
