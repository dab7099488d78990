"""Heads beside the truth at many positions, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_flashhead.evaluation.comparison import (
    Comparison,
    Distributions,
    Tally,
    perplexity,
)
from mlx_flashhead.heads import Head
from mlx_flashhead.positions import Positions

# Logits held at a time, 16 MiB a head.
_VALUES_PER_CHUNK = 1 << 22

Finish = Callable[[mx.array], mx.array]


def compare_heads(
    truth: Head,
    heads: Sequence[Head],
    positions: Positions,
    finish: Finish,
    on_share: Callable[[float], None],
) -> tuple[float, list[Comparison]]:
    """Return the truth's perplexity, and each head's figures against it.

    Args:
        truth: What is right.
        heads: What is compared with it.
        positions: N of them, at least one.
        finish: What the model does to its head's logits (``heads.after_head``).
        on_share: Called with the share done.
    """
    tallies = [Tally() for _ in heads]
    losses = []
    for part, share in parts_of(len(positions.next_tokens), truth.vocab_size):
        hidden, next_tokens = positions.hidden[part], positions.next_tokens[part]
        right = Distributions(finished_logits(truth, hidden, finish))
        losses.append(right.losses(next_tokens))
        for head, tally in zip(heads, tallies, strict=True):
            is_exact = head.exact_tokens and head.exact_tokens(hidden)
            found = Distributions(finished_logits(head, hidden, finish))
            tally.add(right, found, next_tokens, is_exact)
        on_share(share)
    return perplexity(np.concatenate(losses)), [tally.result() for tally in tallies]


def finished_logits(head: Head, hidden: mx.array, finish: Finish) -> np.ndarray:
    """Return a model's logits with this head, ``(N, V)``, float32."""
    return np.array(finish(head.logits(hidden)).astype(mx.float32))


def parts_of(count: int, vocab_size: int) -> Iterator[tuple[slice, float]]:
    """Cut positions into slices; give the share done after each as well."""
    step = max(1, _VALUES_PER_CHUNK // vocab_size)
    for start in range(0, count, step):
        yield slice(start, start + step), min(1.0, (start + step) / count)
