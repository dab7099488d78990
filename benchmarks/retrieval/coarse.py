"""Coarse stages: vectors whose scores choose the rows that are read exactly."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead.config import Quantization
from mlx_flashhead.packing import pack_rows

_SCORES_PER_CHUNK = 1 << 24


@dataclass(frozen=True)
class Coarse:
    """A coarse stage: ``score = vectors @ (hidden @ projection) + bias``.

    Attributes:
        vectors: ``(K, d)``, float32, dequantized.
        projection: ``(D, d)``, float32; None where d = D and there is none.
        bias: ``(K,)``, float32, or None.
        clusters: Cluster of each token, ``(V,)``.
        common: What was subtracted from all rows, ``(D,)``, or None: it adds one
            number to all scores of a position, which matters to the tail only.
        size_bytes: Bytes of the packed vectors and the bias.
    """

    vectors: np.ndarray
    projection: np.ndarray | None
    bias: np.ndarray | None
    clusters: np.ndarray
    common: np.ndarray | None
    size_bytes: int

    def scores(self, hidden: np.ndarray) -> np.ndarray:
        """Return the scores of ``(N, D)`` hidden states, ``(N, K)``."""
        if self.projection is not None:
            hidden = hidden @ self.projection
        scores = hidden @ self.vectors.T
        if self.bias is not None:
            scores += self.bias
        return scores

    def rows_needed(self, hidden: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Return how many rows are read until the token ``best`` is among them."""
        cluster_size = -(-len(self.clusters) // len(self.vectors))
        ranks = np.empty(len(hidden), dtype=np.int64)
        step = max(1, _SCORES_PER_CHUNK // len(self.vectors))
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            scores = self.scores(hidden[part])
            own = np.take_along_axis(scores, self.clusters[best[part]][:, None], 1)
            ranks[part] = (scores > own).sum(axis=1)
        return (ranks + 1) * cluster_size


def quantize(
    vectors: np.ndarray, bits: int, dtype: mx.Dtype = mx.float16, group_size: int = 64
) -> tuple[np.ndarray, int]:
    """Round vectors as MLX packs them.

    Args:
        vectors: ``(K, d)``, float32.
        bits: Bits of a weight.
        dtype: Type of the scales and biases of the groups.
        group_size: Weights that share a scale; 32 where it does not divide d.

    Returns:
        The rounded vectors, ``(K, d)`` float32, and the bytes of the packed ones.
    """
    if vectors.shape[1] % group_size:
        group_size = 32
    packed = pack_rows(mx.array(vectors).astype(dtype), Quantization(bits, group_size))
    wide = packed.map(lambda a: a if a.dtype == mx.uint32 else a.astype(mx.float32))
    return np.array(wide.dequantize()), packed.nbytes


def plain(rows_like: np.ndarray, clusters: np.ndarray, bits: int = 4) -> Coarse:
    """Return the coarse stage of centroids ``(K, D)`` that score hidden states."""
    vectors, size_bytes = quantize(rows_like, bits)
    return Coarse(vectors, None, None, clusters, None, size_bytes)
