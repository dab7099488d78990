"""The number of probes that reaches a recall, as held-out positions show it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlx_flashhead.blocks import CHUNK_SIZE, block_sizes, num_blocks
from mlx_flashhead.centroids import StoredCentroids

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ProbeChoice:
    """A number of probes, and what it does on held-out positions.

    Attributes:
        num_probes: P.
        recall: Share of the positions whose dense arg max lies in a probed cluster.
        least_recall: What recall is at least, with 95 % confidence, if positions
            were independent of each other (Clopper & Pearson, 1934, one-sided).
        num_positions: N.
        target: The recall that was asked for, ``None`` if P was given.
    """

    num_probes: int
    recall: float
    least_recall: float
    num_positions: int
    target: float | None

    @property
    def is_reached(self) -> bool:
        """Whether the target, if there is one, is reached with the confidence."""
        return self.target is None or self.least_recall >= self.target


def probes_needed(
    centroids: StoredCentroids, hidden: np.ndarray, best_clusters: np.ndarray
) -> np.ndarray:
    """Return the least P that probes each position's cluster, ``(N,)``, int64.

    Args:
        centroids: K of them, biases of pinned ones infinite.
        hidden: ``(N, D)``, float32.
        best_clusters: Cluster of the dense arg max, ``(N,)``.
    """
    num_clusters = centroids.rows.num_rows
    blocks = num_blocks(num_clusters)
    block = np.arange(num_clusters) // CHUNK_SIZE % blocks
    rank = np.empty(len(hidden), np.int64)
    for number in range(blocks):
        members = np.flatnonzero(block == number)
        own = np.flatnonzero(block[best_clusters] == number)
        scores = centroids.scores(hidden[own], members)
        place = np.searchsorted(members, best_clusters[own])
        best = np.take_along_axis(scores, place[:, None], axis=1)
        rank[own] = (scores > best).sum(axis=1)
    # The least P whose share of the largest block is more than `rank` clusters.
    return rank * num_clusters // max(block_sizes(num_clusters)) + 1


def choose_probes(
    needed: np.ndarray, target: float, *, least: int, most: int
) -> ProbeChoice:
    """Choose the least P whose recall is at least ``target`` with 95 % confidence.

    Args:
        needed: From ``probes_needed``, on positions that had no part in the centroids.
        target: Recall, in (0, 1).
        least: Bounds of P; where they keep the target out of reach, ``is_reached`` of
        most: the answer is false.
    """
    misses = misses_allowed(len(needed), target)
    # With too few positions to show the target, at least miss none of them.
    wanted = np.sort(needed)[len(needed) - 1 - max(misses, 0)]
    return judge_probes(needed, int(np.clip(wanted, least, most)), target)


def judge_probes(
    needed: np.ndarray, num_probes: int, target: float | None = None
) -> ProbeChoice:
    """Return what a given P does on held-out positions."""
    misses = int((needed > num_probes).sum())
    count = len(needed)
    return ProbeChoice(
        num_probes, 1 - misses / count, least_share(misses, count), count, target
    )


def misses_allowed(count: int, target: float) -> int:
    """Return the most misses of ``count`` that show ``target``; -1 if none do."""
    misses, chance = -1, 0.0
    while chance <= 1 - CONFIDENCE:
        misses += 1
        chance += _chance_of(misses, count, target)
    return misses - 1


def least_share(misses: int, count: int) -> float:
    """Return the lower 95 % bound of a share of hits, seen ``misses`` misses."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _chance_of_at_most(misses, count, middle) > 1 - CONFIDENCE:
            high = middle
        else:
            low = middle
    return low


def _chance_of_at_most(misses: int, count: int, share: float) -> float:
    """Return the binomial probability of at most ``misses``; ``share`` is of hits."""
    if misses >= count:
        return 1.0
    return math.fsum(_chance_of(k, count, share) for k in range(misses + 1))


def _chance_of(misses: int, count: int, share: float) -> float:
    """Return the binomial probability of exactly ``misses``."""
    return math.exp(
        math.lgamma(count + 1)
        - math.lgamma(misses + 1)
        - math.lgamma(count - misses + 1)
        + misses * math.log1p(-share)
        + (count - misses) * math.log(share)
    )
