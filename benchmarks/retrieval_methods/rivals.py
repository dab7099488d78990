"""What the product is compared with: the paper's clusters, and faiss's lists."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_flashhead.centroids import StoredCentroids
from mlx_flashhead.clustering import cluster_rows, weighted_sums
from mlx_flashhead.config import Quantization
from mlx_flashhead.evaluation.paper import unit_centroids
from mlx_flashhead.packing import pack_rows, slots_of_tokens
from retrieval_methods.candidates import DTYPE, Candidate

CLUSTER_SIZE = 16
# faiss's default is 25; it takes hours for a large vocabulary on one core.
_FAISS_ITERATIONS = 10
_BYTES_OF_A_FLOAT16 = 2


def paper_candidates(rows: np.ndarray) -> tuple[Candidate, Candidate]:
    """Return the paper's method, and its clusters with mean rows for centroids."""
    clusters = cluster_rows(rows, cluster_size=CLUSTER_SIZE, centred=False)
    tokens = clusters.cluster_tokens
    sums = weighted_sums(rows, tokens, np.ones(len(rows), np.float32))
    return (
        _plain_candidate(unit_centroids(rows, tokens), tokens),
        _plain_candidate(sums / CLUSTER_SIZE, tokens),
    )


def _plain_candidate(vectors: np.ndarray, cluster_tokens: np.ndarray) -> Candidate:
    """Return centroids ``(K, D)`` at 4 bits that score hidden states as they are."""
    num_clusters, size = vectors.shape
    packed = pack_rows(mx.array(vectors).astype(DTYPE), Quantization(4, 64))
    bias = np.zeros(num_clusters, np.float32)
    slots = slots_of_tokens(cluster_tokens, cluster_tokens.size)
    return Candidate(
        StoredCentroids(packed, bias, mx.eye(size + 1, size)),
        slots.astype(np.int64) // CLUSTER_SIZE,
        CLUSTER_SIZE,
        packed.nbytes,
        block_size=num_clusters,
    )


def inverted_file(
    rows: np.ndarray, num_lists: int, hidden: np.ndarray, best: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return how many rows faiss reads until ``best`` is among them, coarse bytes too.

    Lists differ in size: a number of probed lists counts as the mean of the rows that
    it reads over all positions. Centroids count at 16 bits.

    Args:
        rows: The head's rows, ``(V, D)``, float32.
        num_lists: Lists (k-means cells, inner product).
        hidden: ``(N, D)``, float32.
        best: The token to be found, ``(N,)``.
    """
    import faiss  # here because it is optional

    quantizer = faiss.IndexFlatIP(rows.shape[1])
    index = faiss.IndexIVFFlat(
        quantizer, rows.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter = _FAISS_ITERATIONS
    index.train(rows)
    list_of = quantizer.search(rows, 1)[1][:, 0]
    size_of = np.bincount(list_of, minlength=num_lists)
    read = np.zeros(num_lists)
    ranks = np.empty(len(hidden), dtype=np.int64)
    centroids = quantizer.reconstruct_n(0, num_lists)
    step = max(1, (1 << 24) // num_lists)
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        order = np.argsort(-(hidden[part] @ centroids.T), axis=1)
        ranks[part] = (order == list_of[best[part]][:, None]).argmax(axis=1)
        read += size_of[order].cumsum(axis=1).sum(axis=0)
    coarse_bytes = num_lists * rows.shape[1] * _BYTES_OF_A_FLOAT16
    return (read / len(hidden))[ranks], coarse_bytes
