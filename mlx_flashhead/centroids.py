"""Centroids as they are stored: few dimensions, few bits, one bias each.

A centroid estimates its rows' logits: ``hidden . mean row + (hidden @ projection.T) .
centroid + bias``. The projection keeps the directions in which the expected rows differ
most, measured where hidden states vary (docs/retrieval.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead.clustering import prior_weights, weighted_sums
from mlx_flashhead.config import Quantization
from mlx_flashhead.packing import PackedRows, pack_rows_closely
from mlx_flashhead.statistics import HiddenStatistics

_ROWS_PER_CHUNK = 1 << 14


@dataclass(frozen=True)
class StoredCentroids:
    """What a FlashHead needs to score clusters.

    Attributes:
        rows: K centroids of length d.
        bias: ``(K,)``, float32; infinity pins a cluster.
        projection: ``(d + 1, D)``; the last row is the mean row.
    """

    rows: PackedRows
    bias: np.ndarray
    projection: mx.array

    def scores(
        self, hidden: np.ndarray, clusters: np.ndarray | slice = slice(None)
    ) -> np.ndarray:
        """Return the scores of some clusters for hidden states ``(N, D)``, float32.

        In NumPy: MLX's CPU backend takes its time for each of many positions.
        """
        projection = np.array(self.projection.astype(mx.float32))
        projected = hidden @ projection.T
        vectors = _floats(self.rows.take(_indices(clusters)))
        scores = projected[:, :-1] @ vectors.T
        scores += projected[:, -1:] + self.bias[clusters]
        return scores


class ClusterMeans:
    """Mean rows of clusters, weighted by expected frequency, about their common mean.

    Args:
        rows: The head's rows, ``(V, D)``, float32.
        prior: Expected frequency of each token, ``(V,)``, positive.
        cluster_tokens: Token of each slot, ``(K, C)``, V for padding; ``None`` if
            every row is a cluster.

    Attributes:
        common: The mean of all rows, ``(D,)``, float32.
        weights: Share of each cluster, ``(K,)``, float32, summing to 1.
    """

    def __init__(
        self, rows: np.ndarray, prior: np.ndarray, cluster_tokens: np.ndarray | None
    ) -> None:
        of_rows = prior_weights(prior)
        self.common: np.ndarray = of_rows @ rows
        self.weights = of_rows
        self._means = rows
        if cluster_tokens is not None:
            self.weights = np.append(of_rows, np.float32(0))[cluster_tokens].sum(axis=1)
            sums = weighted_sums(rows, cluster_tokens, of_rows)
            self._means = sums / self.weights[:, None]

    def __len__(self) -> int:
        return len(self._means)

    def chunks(self) -> list[slice]:
        """Return slices that cover all clusters."""
        starts = range(0, len(self), _ROWS_PER_CHUNK)
        return [slice(start, start + _ROWS_PER_CHUNK) for start in starts]

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return mean rows less ``common``, a copy, ``(n, D)``, float32."""
        return self._means[part] - self.common

    def moment(self) -> np.ndarray:
        """Return their weighted second moment, ``(D, D)``, float64."""
        size = len(self.common)
        moment = np.zeros((size, size))
        for part in self.chunks():
            offsets = self[part]
            moment += (offsets.T * self.weights[part]) @ offsets
        return moment


def store_centroids(
    means: ClusterMeans,
    statistics: HiddenStatistics | None,
    *,
    dims: int,
    quantization: Quantization | None,
    dtype: mx.Dtype,
    seed: int,
) -> StoredCentroids:
    """Bring the mean rows of clusters in the form in which they are scored.

    Args:
        means: Of K clusters.
        statistics: Of the model's hidden states; ``None`` takes every direction for
            equally likely.
        dims: Length of a centroid, d, in ``[1, D]``.
        quantization: Of the centroids; ``None`` stores them in ``dtype``.
        dtype: Of the projection and of the groups' scales.
        seed: Of the rotation.

    Returns:
        Centroids whose score is exact at the mean hidden state.
    """
    size = len(means.common)
    if statistics is None:
        root = inverse = np.eye(size)
        mean_state = np.zeros(size)
    else:
        root, inverse = statistics.metric()
        mean_state = statistics.mean
    directions = _main_directions(root @ means.moment() @ root, dims, seed)
    basis = (root @ directions).astype(np.float32)
    projection = mx.array(
        np.vstack([(inverse @ directions).T, means.common]).astype(np.float32)
    ).astype(dtype)
    # Of the stored projection: the bias makes up for its rounding as well.
    at_mean = np.array(projection.astype(mx.float32)) @ mean_state
    packed, bias = [], []
    for part in means.chunks():
        rows = pack_rows_closely(means[part] @ basis, quantization, dtype)
        estimates = _floats(rows) @ at_mean[:-1] + at_mean[-1]
        bias.append((means[part] + means.common) @ mean_state - estimates)
        packed.append(rows)
    return StoredCentroids(
        PackedRows.concatenate(packed),
        np.concatenate(bias).astype(np.float32),
        projection,
    )


def _main_directions(moment: np.ndarray, dims: int, seed: int) -> np.ndarray:
    """Return the ``dims`` main axes of a moment, turned at random, ``(D, dims)``.

    Turned, so that all dimensions count alike: the weights of a group share a scale.
    """
    axes = np.linalg.eigh(moment)[1][:, ::-1][:, :dims]
    noise = np.random.default_rng(seed).standard_normal((dims, dims))
    turned: np.ndarray = axes @ np.linalg.qr(noise)[0]
    return turned


def _indices(clusters: np.ndarray | slice) -> mx.array | slice:
    return clusters if isinstance(clusters, slice) else mx.array(clusters)


def _floats(rows: PackedRows) -> np.ndarray:
    """Return rows as float32, not rounded to halves where scales are."""
    return np.array(rows.widened().dequantize())
