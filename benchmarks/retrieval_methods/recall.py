"""Recall of the dense arg max, with intervals that respect the texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlx_flashhead.evaluation.comparison import share_of
from retrieval_methods.subject import States, Subject

# Exact rows read, as shares of V.
SHARES = (128, 64, 32, 16, 8)
# Bits of the rows read exactly in the column of bytes, and of the dense head.
EXACT_BITS, DENSE_BITS = 8, 4

_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Result:
    """What a method needs at each test position.

    Attributes:
        name: The method, as the table shows it.
        rows_needed: Exact rows read until the dense arg max is among them, ``(N,)``.
        coarse_bytes: What the coarse stage reads for a position.
    """

    name: str
    rows_needed: np.ndarray
    coarse_bytes: float


def print_recall(subject: Subject, results: Iterable[Result]) -> None:
    """Print a Markdown table as results come in."""
    vocab_size, hidden_size = subject.rows.shape
    shares = " | ".join(f"V/{share}" for share in SHARES)
    print(f"| method | coarse bytes a row | {shares} | worst kind at V/32 | bytes |")
    print("|---" * (len(SHARES) + 4) + "|")
    for result in results:
        needed = result.rows_needed
        cells = [
            recall_cell(needed <= vocab_size // share, subject.test) for share in SHARES
        ]
        name, worst = worst_kind(needed <= vocab_size // 32, subject.test.kind)
        coarse = result.coarse_bytes / vocab_size
        read = coarse + row_bytes(hidden_size, EXACT_BITS) / 32
        share = read / row_bytes(hidden_size, DENSE_BITS)
        print(
            f"| {result.name} | {coarse:.1f} | {' | '.join(cells)} "
            f"| {name} {100 * worst:.1f} | {share:.1%} |",
            flush=True,
        )


def row_bytes(hidden_size: int, bits: int) -> float:
    """Return the bytes of a row, with 16-bit scale and bias for each 64 weights."""
    return hidden_size * (bits + 0.5) / 8


def recall_cell(hits: np.ndarray, states: States) -> str:
    """Return a share in %, and its interval: the wider end of two.

    That of the bootstrap over texts, and Wilson's, which knows that no miss among N
    positions does not mean none at all.
    """
    low, high = interval(hits, states.text)
    alone = share_of(hits)
    low, high = min(low, alone.low), max(high, alone.high)
    return f"{100 * hits.mean():.2f} ({100 * low:.2f}–{100 * high:.2f})"


def interval(values: np.ndarray, text: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of ``values`` ``(N,)``.

    Whole texts are drawn: the positions of one text are not independent.

    Args:
        values: One a position.
        text: Id of each position's text, ``(N,)``.
    """
    _, inverse = np.unique(text, return_inverse=True)
    sum_of, size_of = np.bincount(inverse, values), np.bincount(inverse)
    draws = np.random.default_rng(0).integers(
        0, len(size_of), (_NUM_RESAMPLES, len(size_of))
    )
    means = sum_of[draws].sum(axis=1) / size_of[draws].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def worst_kind(hits: np.ndarray, kind: np.ndarray) -> tuple[str, float]:
    """Return the kind of text with the lowest mean of ``hits``, and that mean."""
    return min(
        ((str(name), float(hits[kind == name].mean())) for name in np.unique(kind)),
        key=lambda pair: pair[1],
    )
