"""Sums and means of the rows of each cluster."""

import numpy as np

from mlx_flashhead.clustering.prior import check_prior

# Rows gathered at a time: 16 MiB at D = 1024.
_ROWS_PER_CHUNK = 4096

# Equal weights (0) lose frequent tokens among their cluster's other rows, the full
# expected frequency (1) loses the others.
_PRIOR_EXPONENT = 0.75


def weighted_sums(
    rows: np.ndarray, cluster_tokens: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Add up the weighted rows of each cluster, a chunk of clusters at a time.

    Args:
        rows: ``(N, D)``, float32.
        cluster_tokens: Row ids, ``(K, C)``; N marks padding.
        weights: One weight a row, ``(N,)``, float32.

    Returns:
        Sums, ``(K, D)``, float32.
    """
    num_clusters, cluster_size = cluster_tokens.shape
    padded = np.append(weights, np.float32(0))
    sums = np.empty((num_clusters, rows.shape[1]), dtype=np.float32)
    step = max(1, _ROWS_PER_CHUNK // cluster_size)
    for start in range(0, num_clusters, step):
        slots = cluster_tokens[start : start + step]
        # Padding reads the last row, with weight 0.
        members = rows[np.minimum(slots, len(rows) - 1)]
        sums[start : start + step] = (padded[slots][:, None, :] @ members)[:, 0]
    return sums


def prior_weights(prior: np.ndarray) -> np.ndarray:
    """Return ``prior ** 0.75``, ``(V,)``, float32, summing to 1.

    Raises:
        ValueError: If a weight is not positive.
    """
    check_prior(prior, len(prior))
    # Scaled so that the smallest prior cannot underflow.
    weights = (prior / prior.max()) ** _PRIOR_EXPONENT
    weights /= weights.sum()
    return np.maximum(weights, np.finfo(np.float32).tiny).astype(np.float32)
