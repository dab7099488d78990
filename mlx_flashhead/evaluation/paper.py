"""The paper's own method over the rows of a FlashHead, to set beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_flashhead.clustering import cluster_rows, weighted_sums
from mlx_flashhead.evaluation.sweep import Method, probe_counts
from mlx_flashhead.head import FlashHead
from mlx_flashhead.packing import (
    affine,
    cluster_major,
    pack_rows,
    slots_of_tokens,
)

PAPER = "paper's method"

_CLUSTER_SIZE = 16
_CENTROID_BITS = 4


def paper_method(
    flash: FlashHead,
    rows: np.ndarray,
    *,
    seed: int,
    on_clustering: Callable[[float, float | None], None],
) -> Method:
    """Return the paper's method, to be tried at several numbers of probes.

    Tokens that it does not read are left out: their probability is zero.

    Args:
        flash: As in ``paper_head``.
        rows: As in ``paper_head``.
        seed: As in ``paper_head``.
        on_clustering: As in ``paper_head``.
    """
    head = paper_head(flash, rows, seed=seed, on_clustering=on_clustering)
    centroids = head.centroids
    # The identity and zeros: the paper has neither a projection nor a bias.
    uncounted = centroids.projection.nbytes + centroids.bias.nbytes
    return Method(PAPER, head, sorted(probe_counts(head)), uncounted, has_tails=False)


def paper_head(
    flash: FlashHead,
    rows: np.ndarray,
    *,
    seed: int,
    on_clustering: Callable[[float, float | None], None],
) -> FlashHead:
    """Build the head of the FlashHead paper (arXiv:2603.14591) over stored rows.

    Spherical k-means on the rows as they are, clusters of 16, centroids of length 1 at
    4 bits. No calibration, nothing pinned, no bias: ``hidden . centroid`` chooses.

    Args:
        flash: Holds the rows that are read.
        rows: What is clustered: the source's rows, ``(V, D)``, float32.
        seed: Of the k-means.
        on_clustering: As ``progress`` of ``cluster_rows``.

    Returns:
        A head that probes one cluster in 32. Its projection is the identity.
    """
    vocab_size, hidden_size = rows.shape
    clusters = cluster_rows(
        rows,
        cluster_size=min(_CLUSTER_SIZE, vocab_size),
        centred=False,
        seed=seed,
        progress=on_clustering,
    ).cluster_tokens
    num_clusters, cluster_size = clusters.shape
    config = replace(
        flash.config,
        cluster_size=cluster_size,
        centroid_dims=hidden_size,
        num_probes=-(-num_clusters // 32),
        num_pinned=0,
        centroids=affine(_CENTROID_BITS, hidden_size),
        sampling="deterministic",
    )
    dtype = getattr(mx, config.dtype)
    centroids = mx.array(unit_centroids(rows, clusters)).astype(dtype)
    stored = flash.rows.take(flash.slots(mx.arange(vocab_size)))
    return FlashHead(
        config,
        rows=cluster_major(stored, clusters),
        centroids=pack_rows(centroids, config.centroids),
        centroid_bias=mx.zeros((num_clusters,), mx.float16),
        projection=mx.eye(hidden_size + 1, hidden_size),
        cluster_tokens=mx.array(clusters),
        token_slots=mx.array(slots_of_tokens(clusters, vocab_size)),
        bias=flash.get("bias"),
    )


def unit_centroids(rows: np.ndarray, cluster_tokens: np.ndarray) -> np.ndarray:
    """Return the directions of clusters, ``(K, D)``, float32, of length 1.

    Args:
        rows: ``(V, D)``, float32; each counts by its direction alone.
        cluster_tokens: Token of each slot, ``(K, C)``; V marks padding.
    """
    lengths = np.linalg.norm(rows, axis=1)
    weights = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    sums = weighted_sums(rows, cluster_tokens, weights)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
