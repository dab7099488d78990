"""How high the tails stand: what is added to the logits of clusters not read."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_flashhead.centroids import StoredCentroids
from mlx_flashhead.kernels.probe_threshold import probe_threshold, probed

_VALUES_PER_CHUNK = 1 << 22


def tail_level(
    centroids: StoredCentroids,
    token_clusters: np.ndarray,
    num_probes: int,
    rows: np.ndarray,
    head_bias: np.ndarray | None,
    hidden: np.ndarray,
) -> float:
    """Return the number that makes the tails' mass right when added to them.

    A centroid's score is the mean of what it stands for, and ``exp`` of a mean is less
    than the mean of ``exp``. Of all constants, the one that makes the mean mass on
    tails the dense head's has the least mean KL divergence from it.

    Args:
        centroids: K of them.
        token_clusters: Cluster of each token, ``(V,)``.
        num_probes: P.
        rows: The dense rows, ``(V, D)``, float32.
        head_bias: The dense head's bias, ``(V,)``, or ``None``.
        hidden: Hidden states to fit on, ``(N, D)``, float32.
    """
    exact, tails, masses = [], [], []
    step = max(1, _VALUES_PER_CHUNK // len(rows))
    for start in range(0, len(hidden), step):
        part = hidden[start : start + step]
        dense = part @ rows.T
        if head_bias is not None:
            dense += head_bias
        top = dense.max(axis=1, keepdims=True)
        weights = np.exp(dense - top)
        scores = centroids.scores(part)
        passes = _probed(scores, num_probes)
        tail = np.exp(np.where(passes, -np.inf, scores - top))
        weights_read = np.where(passes[:, token_clusters], weights, 0)
        exact.append(weights_read.sum(axis=1, dtype=np.float64))
        tails.append(tail[:, token_clusters].sum(axis=1, dtype=np.float64))
        masses.append(1 - exact[-1] / weights.sum(axis=1, dtype=np.float64))
    mass = float(np.concatenate(masses).mean())
    return _balanced(np.concatenate(exact), np.concatenate(tails), mass)


def _probed(scores: np.ndarray, num_probes: int) -> np.ndarray:
    """Return which clusters pass, ``(N, K)`` bool."""
    as_array = mx.array(scores)
    threshold = probe_threshold(as_array, num_probes=num_probes)
    return np.array(probed(as_array, threshold))


def _balanced(exact: np.ndarray, tails: np.ndarray, mass: float) -> float:
    """Return the constant at which the mean share of ``tails`` is ``mass``."""
    if not tails.any() or mass <= 0:
        return 0.0
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        raised = tails * np.exp(middle)
        if (raised / (exact + raised)).mean() < mass:
            low = middle
        else:
            high = middle
    return high
