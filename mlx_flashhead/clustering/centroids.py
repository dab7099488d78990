"""Sums and means of the rows of each cluster."""

import numpy as np

from mlx_flashhead.clustering.prior import check_prior

# Rows gathered at a time: 16 MiB at D = 1024.
_ROWS_PER_CHUNK = 4096

# Equal weights (0) lose frequent tokens among their cluster's other rows, the full
# expected frequency (1) loses the others.
_PRIOR_EXPONENT = 0.5


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


def weighted_centroids(
    rows: np.ndarray, cluster_tokens: np.ndarray, prior: np.ndarray | None
) -> np.ndarray:
    """Return each cluster's mean row, weighted by ``prior ** 0.5``.

    Args:
        rows: The head's rows as they are stored (dequantized), ``(V, D)``, float32.
        cluster_tokens: Token ids, ``(K, C)``; V marks padding, which has weight 0.
        prior: Expected frequency of each token, ``(V,)``, positive; None for equal
            weights.

    Returns:
        Centroids, ``(K, D)``, float32.

    Raises:
        ValueError: If ``prior`` has another shape or a weight that is not positive.
    """
    if prior is None:
        weights = np.ones(len(rows), dtype=np.float32)
    else:
        check_prior(prior, len(rows))
        # Scaled so that the smallest prior cannot underflow in the sums.
        weights = ((prior / prior.max()) ** _PRIOR_EXPONENT).astype(np.float32)
    totals = np.append(weights, np.float32(0))[cluster_tokens].sum(axis=1)
    return weighted_sums(rows, cluster_tokens, weights) / totals[:, None]
