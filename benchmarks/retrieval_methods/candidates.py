"""Coarse stages as the product builds them, and what the variants change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_flashhead import blocks, centroids
from mlx_flashhead.calibration import CalibrationSet, probes_needed
from mlx_flashhead.centroids import StoredCentroids
from mlx_flashhead.clustering import cluster_rows
from mlx_flashhead.coarse import CoarseStage, Knowledge, known_from, pinned_clusters
from mlx_flashhead.config import Quantization
from mlx_flashhead.options import HeadOptions
from mlx_flashhead.packing import PackedRows, affine, pack_rows
from retrieval_methods.subject import Subject

# What most models are published in, and the coarser of the two halves.
DTYPE = mx.bfloat16
# The exponent that the product raises the prior to.
PRODUCT_EXPONENT = 0.75

_POSITIONS_PER_CHUNK = 512


@dataclass(frozen=True)
class Candidate:
    """A coarse stage that is ready to choose clusters.

    Attributes:
        centroids: K of them.
        token_clusters: Cluster of each token, ``(V,)``.
        cluster_size: Rows of a cluster, C.
        coarse_bytes: What it reads for a position.
        block_size: Clusters of a block, at most.
    """

    centroids: StoredCentroids
    token_clusters: np.ndarray
    cluster_size: int
    coarse_bytes: int
    block_size: int = blocks.MAX_BLOCK_SIZE

    def rows_needed(self, hidden: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Return the rows that are read if the cluster of ``best`` just passes."""
        wanted = self.token_clusters[best]
        needed = []
        with blocks_of(self.block_size):
            for start in range(0, len(hidden), _POSITIONS_PER_CHUNK):
                part = slice(start, start + _POSITIONS_PER_CHUNK)
                needed.append(probes_needed(self.centroids, hidden[part], wanted[part]))
        return np.concatenate(needed) * self.cluster_size


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Deal clusters to blocks of another size."""
    blocks.block_sizes.cache_clear()
    with patch.object(blocks, "MAX_BLOCK_SIZE", size):
        yield
    blocks.block_sizes.cache_clear()


def known(subject: Subject, sets: list[CalibrationSet]) -> Knowledge:
    """Return what calibration sets tell, or the token ids if there are none."""
    return known_from(sets, subject.id_prior)


def coarse_stage(
    subject: Subject,
    knowledge: Knowledge,
    options: HeadOptions | None = None,
    *,
    dims: int | None = None,
) -> CoarseStage:
    """Return the product's coarse stage; ``dims`` overrules its choice of d."""
    options = options or HeadOptions()
    rows, vocabulary = subject.rows, subject.vocabulary
    cluster_tokens = None
    if options.cluster_size > 1:
        cluster_tokens = cluster_rows(
            knowledge.scored_rows(rows),
            cluster_size=options.cluster_size,
            prior=knowledge.prior.astype(np.float32),
            pinned_tokens=vocabulary.pinned,
            seed=options.seed,
        ).cluster_tokens
    dims = dims or options.centroid_dims(
        rows.shape[1], is_calibrated=knowledge.statistics is not None
    )
    return CoarseStage(
        rows=rows,
        cluster_tokens=cluster_tokens,
        pinned=pinned_clusters(vocabulary, options.cluster_size),
        head_bias=None,
        dims=dims,
        quantization=affine(options.stored_centroid_bits, dims),
        dtype=DTYPE,
        seed=options.seed,
    )


def candidate(stage: CoarseStage, knowledge: Knowledge) -> Candidate:
    """Fit a stage's centroids; biases are rounded as they are stored."""
    found = stage.centroids(knowledge)
    bias = found.bias.astype(np.float16)
    return Candidate(
        replace(found, bias=bias.astype(np.float32)),
        stage.token_clusters,
        1 if stage.cluster_tokens is None else stage.cluster_tokens.shape[1],
        found.rows.nbytes + bias.nbytes + found.projection.nbytes,
    )


def with_bias(chosen: Candidate, bias: np.ndarray) -> Candidate:
    """Return a candidate with other biases ``(K,)`` for all but pinned clusters."""
    own = chosen.centroids.bias
    bias = np.where(np.isinf(own), own, bias).astype(np.float32)
    return replace(chosen, centroids=replace(chosen.centroids, bias=bias))


def with_exponent(knowledge: Knowledge, exponent: float) -> Knowledge:
    """Return what makes the product raise the prior to another power."""
    prior = knowledge.prior ** (exponent / PRODUCT_EXPONENT)
    return replace(knowledge, prior=prior / prior.sum())


def with_second_moment(knowledge: Knowledge, sets: list[CalibrationSet]) -> Knowledge:
    """Return the same with the second moment in place of the covariance."""
    means = [s.statistics().mean for s in sets]
    squares = np.mean([np.outer(m, m) for m in means], axis=0)
    statistics = knowledge.statistics
    assert statistics is not None
    moment = statistics.covariance + squares
    return replace(knowledge, statistics=replace(statistics, covariance=moment))


@dataclass(frozen=True)
class HalfProjected(StoredCentroids):
    """Centroids scored as on a GPU: hidden states, projected or not, are halves."""

    def scores(
        self, hidden: np.ndarray, clusters: np.ndarray | slice = slice(None)
    ) -> np.ndarray:
        """Return scores as ``StoredCentroids`` does."""

        def halved(array: np.ndarray) -> np.ndarray:
            return np.array(mx.array(array).astype(DTYPE).astype(mx.float32))

        projection = np.array(self.projection.astype(mx.float32))
        projected = halved(halved(hidden) @ projection.T)
        stored = StoredCentroids(self.rows, self.bias, mx.eye(projected.shape[1]))
        return stored.scores(projected, clusters)


def half_projected(chosen: Candidate) -> Candidate:
    """Return the same candidate with its hidden states rounded to bfloat16."""
    return replace(chosen, centroids=HalfProjected(**vars(chosen.centroids)))


def half_variance(
    chosen: Candidate, stage: CoarseStage, knowledge: Knowledge
) -> np.ndarray:
    """Return half the variance, over hidden states, of each token's error, ``(V,)``.

    The expected exponential of a normal error exceeds that of its mean by this much.
    """
    statistics, stored = knowledge.statistics, chosen.centroids
    assert statistics is not None
    projection = np.array(stored.projection.astype(mx.float32))
    vectors = np.array(stored.rows.dequantize().astype(mx.float32))
    root = statistics.metric()[0].astype(np.float32)
    estimates = vectors @ (projection[:-1] @ root)
    errors = (stage.rows - projection[-1]) @ root - estimates[chosen.token_clusters]
    half: np.ndarray = 0.5 * np.einsum("vd,vd->v", errors, errors)
    return half


@contextmanager
def unrotated() -> Iterator[None]:
    """Leave the main directions as they are."""

    def main_directions(moment: np.ndarray, dims: int, seed: int) -> np.ndarray:
        return np.linalg.eigh(moment)[1][:, ::-1][:, :dims]

    with patch.object(centroids, "_main_directions", main_directions):
        yield


@contextmanager
def packed_by_mlx() -> Iterator[None]:
    """Pack centroids by ``mx.quantize``, which knows 3 bits too."""

    def pack(
        rows: np.ndarray, quantization: Quantization | None, dtype: mx.Dtype
    ) -> PackedRows:
        return pack_rows(mx.array(rows).astype(dtype), quantization)

    with patch.object(centroids, "pack_rows_closely", pack):
        yield
