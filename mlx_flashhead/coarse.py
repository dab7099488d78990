"""The coarse stage of one head: which clusters there are and how they are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead.calibration import NUM_FOLDS, CalibrationSet, probes_needed
from mlx_flashhead.centroids import ClusterMeans, StoredCentroids, store_centroids
from mlx_flashhead.config import Quantization
from mlx_flashhead.packing import slots_of_tokens
from mlx_flashhead.statistics import HiddenStatistics, mean_statistics
from mlx_flashhead.vocabulary import Vocabulary


@dataclass(frozen=True)
class Knowledge:
    """What calibration positions tell, or the token ids alone.

    Attributes:
        statistics: Of the hidden states; ``None`` without calibration.
        prior: Expected frequency of each token, ``(V,)``, summing to 1.
    """

    statistics: HiddenStatistics | None
    prior: np.ndarray

    def scored_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return rows ``(V, D)`` in the metric of the hidden states."""
        if self.statistics is None:
            return rows
        turned: np.ndarray = rows @ self.statistics.metric()[0].astype(np.float32)
        return turned


def known_from(
    calibration: Sequence[CalibrationSet],
    id_prior: np.ndarray,
    held_out: int | None = None,
) -> Knowledge:
    """Gather what the calibration positions tell, all of them or all but a fold.

    The prior is the mean of the sets' mean softmax and of the guess from token ids.
    """
    guess = id_prior / id_prior.sum(dtype=np.float64)
    if not calibration:
        return Knowledge(None, guess)
    sets = [positions.statistics(held_out) for positions in calibration]
    prior = np.mean([*(s.token_probabilities for s in sets), guess], axis=0)
    return Knowledge(mean_statistics(sets), prior)


def pinned_clusters(vocabulary: Vocabulary, cluster_size: int) -> range | list[int]:
    """Return the ids of the clusters that hold pinned tokens, ascending."""
    if cluster_size == 1:
        return sorted(vocabulary.pinned)
    return range(-(-len(vocabulary.pinned) // cluster_size))


@dataclass(frozen=True)
class CoarseStage:
    """Clusters, and everything but calibration that their centroids depend on.

    Attributes:
        rows: The head's rows, ``(V, D)``, float32.
        cluster_tokens: Token of each slot, ``(K, C)``; ``None`` if C is 1.
        pinned: Ids of the clusters that always pass.
        head_bias: The dense head's bias, ``(V,)``, float32, or ``None``.
        dims: Length of a centroid, d.
        quantization: Of the centroids.
        dtype: Of the projection and of the groups' scales.
        seed: Of the centroids' rotation.
    """

    rows: np.ndarray
    cluster_tokens: np.ndarray | None
    pinned: Sequence[int]
    head_bias: np.ndarray | None
    dims: int
    quantization: Quantization | None
    dtype: mx.Dtype
    seed: int

    @property
    def num_clusters(self) -> int:
        """K."""
        tokens = self.cluster_tokens
        return len(self.rows) if tokens is None else len(tokens)

    @property
    def token_clusters(self) -> np.ndarray:
        """Cluster of each token, ``(V,)``."""
        if self.cluster_tokens is None:
            return np.arange(len(self.rows))
        slots = slots_of_tokens(self.cluster_tokens, len(self.rows))
        return slots.astype(np.int64) // self.cluster_tokens.shape[1]

    def centroids(self, known: Knowledge) -> StoredCentroids:
        """Return centroids, the biases of the pinned ones infinite."""
        means = ClusterMeans(self.rows, known.prior, self.cluster_tokens)
        centroids = store_centroids(
            means,
            known.statistics,
            dims=self.dims,
            quantization=self.quantization,
            dtype=self.dtype,
            seed=self.seed,
        )
        if self.head_bias is not None:
            column = self.head_bias[:, None]
            of_clusters = ClusterMeans(column, known.prior, self.cluster_tokens)
            bias = of_clusters[:] + of_clusters.common
            centroids.bias[:] += bias[:, 0]
        centroids.bias[list(self.pinned)] = np.inf
        return centroids

    def probes_needed(
        self,
        calibration: Sequence[CalibrationSet],
        id_prior: np.ndarray,
        on_share: Callable[[float], None],
    ) -> np.ndarray:
        """Return the least P for each position, of centroids from the other folds.

        The clusters themselves, if C is more than 1, may have seen all folds.
        """
        needed = []
        clusters = self.token_clusters
        for fold in range(NUM_FOLDS):
            centroids = self.centroids(known_from(calibration, id_prior, fold))
            for positions in calibration:
                own = positions.fold == fold
                best = clusters[positions.best_tokens[own]]
                needed.append(probes_needed(centroids, positions.hidden[own], best))
            on_share((fold + 1) / NUM_FOLDS)
        return np.concatenate(needed)
