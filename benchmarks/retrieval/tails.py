"""What the tokens that are not read exactly should get.

Exact logits on the rows that the coarse stage chooses, a stand-in elsewhere; compared
with the softmax of the dense float head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from coarse import Coarse
from metric import Calibration, power

_POSITIONS_PER_CHUNK = 50


@dataclass(frozen=True)
class Tail:
    """How far a distribution is from the dense one, means over positions.

    Attributes:
        divergence: Kullback-Leibler divergence from the dense softmax, nats.
        worst_divergence: Its 99th percentile.
        total_variation: Half the sum of the absolute differences.
        mass: Probability given to tokens that are not exact.
        dense_mass: What the dense softmax gives them.
    """

    divergence: float
    worst_divergence: float
    total_variation: float
    mass: float
    dense_mass: float


def half_variance(
    rows: np.ndarray, coarse: Coarse, calibration: Calibration
) -> np.ndarray:
    """Return half the variance, over hidden states, of each token's error, ``(V,)``.

    The expected exponential of a normal error exceeds that of its mean by this much.
    """
    assert coarse.projection is not None and coarse.common is not None
    root = power(calibration.covariance, 0.5)
    approximate = coarse.vectors @ (coarse.projection.T @ root)
    errors = (rows - coarse.common) @ root - approximate[coarse.clusters]
    return 0.5 * np.einsum("vd,vd->v", errors, errors)


def fitted_constant(
    rows: np.ndarray, coarse: Coarse, hidden: np.ndarray, num_rows: int
) -> float:
    """Return the constant for all stand-ins with the least divergence on ``hidden``."""
    constants = np.arange(-2, 6.01, 0.25)
    total = np.zeros(len(constants))
    for logits, stand_ins, exact in _chunks(rows, coarse, hidden, num_rows):
        dense = np.exp(logits)
        heap = dense.sum(axis=1)
        exact_heap = (dense * exact).sum(axis=1)
        tail_heap = (np.exp(stand_ins) * ~exact).sum(axis=1)
        tail_share = 1 - exact_heap / heap
        for i, constant in enumerate(constants):
            # What does not depend on the constant is left out.
            changed = np.log(exact_heap + np.exp(constant) * tail_heap)
            total[i] += (changed - constant * tail_share).sum()
    return float(constants[total.argmin()])


def measure_tail(
    rows: np.ndarray,
    coarse: Coarse,
    hidden: np.ndarray,
    num_rows: int,
    addition: float | np.ndarray,
) -> Tail:
    """Compare stand-ins of coarse score plus ``addition`` with the dense softmax.

    Args:
        rows: The head's rows, ``(V, D)``.
        coarse: The coarse stage, with its common vector.
        hidden: ``(N, D)``.
        num_rows: Rows read exactly at each position.
        addition: One number, or one a token, ``(V,)``.
    """
    figures = []
    for logits, stand_ins, exact in _chunks(rows, coarse, hidden, num_rows):
        ours = np.where(exact, logits, stand_ins + addition)
        figures.append(_compare(logits, ours, ~exact))
    return _summary(figures)


def measure_rounded_head(
    rows: np.ndarray, rounded: np.ndarray, hidden: np.ndarray
) -> Tail:
    """Compare a dense head of rounded rows with the float one."""
    figures = []
    for start in range(0, len(hidden), _POSITIONS_PER_CHUNK):
        part = hidden[start : start + _POSITIONS_PER_CHUNK]
        logits = (part @ rows.T).astype(np.float64)
        ours = (part @ rounded.T).astype(np.float64)
        figures.append(_compare(logits, ours, np.ones_like(logits, dtype=bool)))
    return _summary(figures)


def _chunks(
    rows: np.ndarray, coarse: Coarse, hidden: np.ndarray, num_rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield dense logits, stand-ins and which tokens are exact, each ``(n, V)``."""
    num_clusters = len(coarse.vectors)
    num_probes = num_rows * num_clusters // len(rows)
    for start in range(0, len(hidden), _POSITIONS_PER_CHUNK):
        part = hidden[start : start + _POSITIONS_PER_CHUNK]
        logits = (part @ rows.T).astype(np.float64)
        scores = coarse.scores(part)
        last = num_clusters - num_probes
        threshold = np.partition(scores, last, axis=1)[:, last, None]
        exact = (scores >= threshold)[:, coarse.clusters]
        stand_ins = scores[:, coarse.clusters].astype(np.float64)
        if coarse.common is not None:
            stand_ins += (part @ coarse.common)[:, None]
        top = logits.max(axis=1, keepdims=True)
        yield logits - top, stand_ins - top, exact


def _compare(
    dense: np.ndarray, ours: np.ndarray, is_tail: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return divergence, total variation and both tail masses of each position."""
    log_dense, log_ours = _log_softmax(dense), _log_softmax(ours)
    p, q = np.exp(log_dense), np.exp(log_ours)
    return (
        (p * (log_dense - log_ours)).sum(axis=1),
        0.5 * np.abs(p - q).sum(axis=1),
        (q * is_tail).sum(axis=1),
        (p * is_tail).sum(axis=1),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return logarithms of the softmax of each row."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _summary(figures: Sequence[tuple[np.ndarray, ...]]) -> Tail:
    """Average the figures of all positions."""
    divergence, variation, mass, dense_mass = (
        np.concatenate(part) for part in zip(*figures, strict=True)
    )
    return Tail(
        float(divergence.mean()),
        float(np.quantile(divergence, 0.99)),
        float(variation.mean()),
        float(mass.mean()),
        float(dense_mass.mean()),
    )
