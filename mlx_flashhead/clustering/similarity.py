"""The costly step: similarities of rows and centroids.

It runs in MLX on a GPU and in NumPy on a CPU: MLX's CPU backend multiplies float32
matrices at 2 GFLOP/s where NumPy's BLAS reaches 110 (two x86-64 cores).
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

# Values held at a time, 32 MiB: a V x K matrix would take 17 GB for
# 262144 rows and 16384 clusters.
_VALUES_PER_CHUNK = 1 << 23


def largest_products(
    vectors: np.ndarray,
    candidates: np.ndarray,
    count: int,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the ``count`` candidates with the largest dot product with each vector.

    Args:
        vectors: ``(N, D)``, float32.
        candidates: ``(K, D)``, float32.
        count: Candidates wanted a vector, m; at most K are returned.
        on_rows: Called after each chunk with the number of vectors it held.

    Returns:
        Candidate ids ``(N, m)`` int32 and dot products ``(N, m)`` float32, best first.
    """
    count = min(count, len(candidates))
    ids = np.empty((len(vectors), count), dtype=np.int32)
    products = np.empty((len(vectors), count), dtype=np.float32)
    xp: Any = mx if _gpu_ready() else np
    transposed = xp.array(candidates).T
    step = max(1, _VALUES_PER_CHUNK // len(candidates))
    for start in range(0, len(vectors), step):
        chunk = slice(start, start + step)
        values = xp.array(vectors[chunk]) @ transposed
        columns = _largest_columns(xp, values, count)
        ids[chunk] = columns
        products[chunk] = xp.take_along_axis(values, columns, axis=1)
        if on_rows:
            on_rows(len(ids[chunk]))
    return ids, products


def rescore_clusters(
    rows: np.ndarray,
    centroids: np.ndarray,
    ids: np.ndarray,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Put each row's candidate centroids in order again after these have moved.

    Args:
        rows: ``(N, D)``, float32.
        centroids: ``(K, D)``, float32.
        ids: Candidate clusters of each row, ``(N, m)``, int32.
        on_rows: Called after each chunk with the number of rows it held.

    Returns:
        The same ids ``(N, m)`` int32 and dot products ``(N, m)`` float32, best first.
    """
    ordered = np.empty_like(ids)
    similarities = np.empty(ids.shape, dtype=np.float32)
    xp: Any = mx if _gpu_ready() else np
    all_centroids = xp.array(centroids)
    step = max(1, _VALUES_PER_CHUNK // (ids.shape[1] * rows.shape[1]))
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        columns = xp.array(ids[chunk])
        candidates = all_centroids[columns]
        values = (candidates @ xp.array(rows[chunk])[:, :, None])[:, :, 0]
        order = xp.argsort(-values, axis=1)
        ordered[chunk] = xp.take_along_axis(columns, order, axis=1)
        similarities[chunk] = xp.take_along_axis(values, order, axis=1)
        if on_rows:
            on_rows(len(columns))
    return ordered, similarities


def _gpu_ready() -> bool:
    """Return whether MLX computes on a GPU by default."""
    return mx.default_device() == mx.gpu


def _largest_columns(xp: Any, values: Any, count: int) -> Any:
    """Return the columns of the ``count`` largest values of each row, best first.

    The columns are dealt into strips; the wanted ones lie in the ``count`` strips with
    the largest maxima, so only those are searched. A plain argpartition over 16384
    columns takes longer than the matrix product before it.
    """
    num_columns = values.shape[1]
    depth = int((num_columns / count) ** 0.5)
    if depth < 4:
        return _sorted_columns(xp, values, count)
    width = num_columns // depth
    strips = values[:, : depth * width].reshape(-1, depth, width).max(axis=1)
    best = xp.argpartition(strips, width - count, axis=1)[:, width - count :]
    inside = best[:, None, :] + width * xp.arange(depth)[:, None]
    rest = xp.arange(depth * width, num_columns)
    columns = xp.concatenate(
        [
            inside.reshape(len(values), depth * count),
            xp.broadcast_to(rest, (len(values), len(rest))),
        ],
        axis=1,
    )
    found = _sorted_columns(xp, xp.take_along_axis(values, columns, axis=1), count)
    return xp.take_along_axis(columns, found, axis=1)


def _sorted_columns(xp: Any, values: Any, count: int) -> Any:
    """Return the columns of the ``count`` largest values of each row, best first."""
    kth = values.shape[1] - count
    columns = xp.argpartition(values, kth, axis=1)[:, kth:]
    order = xp.argsort(-xp.take_along_axis(values, columns, axis=1), axis=1)
    return xp.take_along_axis(columns, order, axis=1)
