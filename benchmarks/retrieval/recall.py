"""Recall of the dense arg max, with intervals that respect the texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Exact rows read, as shares of V.
SHARES = (128, 64, 32, 16, 8)
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Result:
    """What a method needs at each test position.

    Attributes:
        name: The method, as the table shows it.
        rows_needed: Exact rows read until the dense arg max is among them, ``(N,)``.
        coarse_bytes: Bytes of the coarse stage per row of the head.
    """

    name: str
    rows_needed: np.ndarray
    coarse_bytes: float


def interval(hits: np.ndarray, text: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of ``hits``.

    Whole texts are drawn: the positions of one text are not independent.

    Args:
        hits: ``(N,)``, 0 or 1.
        text: Id of each position's text, ``(N,)``.
        seed: Seed of the draws.
    """
    _, inverse = np.unique(text, return_inverse=True)
    hits_of, size_of = np.bincount(inverse, hits), np.bincount(inverse)
    draws = np.random.default_rng(seed).integers(
        0, len(size_of), (NUM_RESAMPLES, len(size_of))
    )
    means = hits_of[draws].sum(axis=1) / size_of[draws].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def worst_kind(hits: np.ndarray, kind: np.ndarray) -> tuple[str, float]:
    """Return the kind of text with the lowest mean of ``hits``, and that mean."""
    return min(
        ((str(name), float(hits[kind == name].mean())) for name in np.unique(kind)),
        key=lambda pair: pair[1],
    )
