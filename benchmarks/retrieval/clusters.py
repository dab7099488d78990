"""Clusters of one size, and what else the coarse stage has been made of."""

from __future__ import annotations

import numpy as np

from mlx_flashhead.clustering.balance import balance_clusters
from mlx_flashhead.clustering.similarity import largest_products

_NUM_CANDIDATES = 32


def means(rows: np.ndarray, clusters: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean row of each cluster, ``(K, D)``, float32."""
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    weighted = rows[order] * weights[order, None].astype(np.float32)
    totals = np.add.reduceat(weights[order], starts)
    sums = np.add.reduceat(weighted, starts)
    return (sums / totals[:, None]).astype(np.float32)


def balanced_kmeans(
    points: np.ndarray,
    cluster_size: int,
    *,
    weights: np.ndarray | None = None,
    spherical: bool = False,
    num_iterations: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Group points into clusters of one size.

    Args:
        points: ``(N, d)``, float32; scaled to length 1 if ``spherical``.
        cluster_size: C, a divisor of N.
        weights: Of the points in the centroids and as a start, ``(N,)``; None: equal.
        spherical: Compare by cosine; otherwise by Euclidean distance.
        num_iterations: Assignments.
        seed: Of the points which the centroids start from.

    Returns:
        Cluster of each point, ``(N,)``, int64.
    """
    if weights is None:
        weights = np.ones(len(points))
    if spherical:
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
    num_clusters = len(points) // cluster_size
    room = np.full(num_clusters, cluster_size)
    chances = weights / weights.sum()
    first = np.random.default_rng(seed).choice(
        len(points), num_clusters, replace=False, p=chances
    )
    centroids = points[first]
    for _ in range(num_iterations):
        left, right = points, centroids
        if spherical:
            right = right / np.linalg.norm(right, axis=1, keepdims=True)
        else:
            left, right = _distance_factors(points, centroids)
        ids, similarities = largest_products(left, right, _NUM_CANDIDATES)
        clusters = balance_clusters(left, right, room, ids, similarities)
        centroids = means(points, clusters, weights)
    return clusters


def _distance_factors(
    points: np.ndarray, centroids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors whose products are ``-|point - centroid|^2 / 2``."""
    halves = [-0.5 * np.einsum("nd,nd->n", a, a)[:, None] for a in (points, centroids)]
    ones = [np.ones_like(half) for half in halves]
    return (
        np.hstack([points, halves[0], ones[0]]),
        np.hstack([centroids, ones[1], halves[1]]),
    )
