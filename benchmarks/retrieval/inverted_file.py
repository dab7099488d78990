"""faiss's inverted file over the head's rows, for comparison."""

from __future__ import annotations

import faiss
import numpy as np

_BYTES_OF_A_FLOAT16 = 2


def rows_needed(
    rows: np.ndarray, num_lists: int, hidden: np.ndarray, best: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return how many rows are read until ``best`` is among them, and coarse bytes.

    Lists differ in size: a number of probed lists counts as the mean of the rows that
    it reads over all positions.

    Args:
        rows: The head's rows, ``(V, D)``, float32.
        num_lists: Lists (k-means cells, inner product).
        hidden: ``(N, D)``, float32.
        best: The token to be found, ``(N,)``.

    Returns:
        Mean rows read with as many lists as the position needs, ``(N,)``, and the
        bytes of the cells' centroids, at 16 bits, per row of the head.
    """
    quantizer = faiss.IndexFlatIP(rows.shape[1])
    index = faiss.IndexIVFFlat(
        quantizer, rows.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT
    )
    index.train(rows)
    list_of = quantizer.search(rows, 1)[1][:, 0]
    size_of = np.bincount(list_of, minlength=num_lists)
    read = np.zeros(num_lists)
    ranks = np.empty(len(hidden), dtype=np.int64)
    step = max(1, (1 << 24) // num_lists)
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        order = quantizer.search(hidden[part], num_lists)[1]
        ranks[part] = (order == list_of[best[part]][:, None]).argmax(axis=1)
        read += size_of[order].cumsum(axis=1).sum(axis=0)
    coarse_bytes = num_lists * rows.shape[1] * _BYTES_OF_A_FLOAT16 / len(rows)
    return (read / len(hidden))[ranks], coarse_bytes
