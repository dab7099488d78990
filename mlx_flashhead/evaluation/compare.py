"""Heads beside the truth at many positions, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Contest:
    """Heads, and what is right.

    Attributes:
        truth_name: What to call the truth.
        truth: What is right.
        heads: What is compared with it.
    """

    truth_name: str
    truth: Head
    heads: Sequence[Head]


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
    contest = Contest("", truth, heads)
    return compare_contests([contest], positions, finish, on_share)[0]


def compare_contests(
    contests: Sequence[Contest],
    positions: Positions,
    finish: Finish,
    on_share: Callable[[float], None],
) -> list[tuple[float, list[Comparison]]]:
    """Return each truth's perplexity, and the figures of its heads.

    Args:
        contests: At least one. A head may occur in several: it is asked once.
        positions: As in ``compare_heads``.
        finish: As in ``compare_heads``.
        on_share: As in ``compare_heads``.
    """
    tallies = [[Tally() for _ in contest.heads] for contest in contests]
    losses: list[list[np.ndarray]] = [[] for _ in contests]
    heads = {head for c in contests for head in (c.truth, *c.heads)}
    vocab_size = contests[0].truth.vocab_size
    for part, share in parts_of(len(positions.next_tokens), vocab_size):
        hidden, next_tokens = positions.hidden[part], positions.next_tokens[part]
        found, exact = {}, {}
        for head in heads:
            found[head] = Distributions(finished_logits(head, hidden, finish))
            exact[head] = head.exact_tokens(hidden) if head.exact_tokens else None
        for contest, own, loss in zip(contests, tallies, losses, strict=True):
            right = found[contest.truth]
            loss.append(right.losses(next_tokens))
            for head, tally in zip(contest.heads, own, strict=True):
                tally.add(right, found[head], next_tokens, exact[head])
        on_share(share)
    return [
        (perplexity(np.concatenate(loss)), [tally.result() for tally in own])
        for loss, own in zip(losses, tallies, strict=True)
    ]


def finished_logits(head: Head, hidden: mx.array, finish: Finish) -> np.ndarray:
    """Return a model's logits with this head, ``(N, V)``, float32."""
    return np.array(finish(head.logits(hidden)).astype(mx.float32))


def parts_of(count: int, vocab_size: int) -> Iterator[tuple[slice, float]]:
    """Cut positions into slices; give the share done after each as well."""
    step = max(1, _VALUES_PER_CHUNK // vocab_size)
    for start in range(0, count, step):
        yield slice(start, start + step), min(1.0, (start + step) / count)
