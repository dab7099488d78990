"""Assignment of rows to clusters that hold a fixed number of them."""

from collections.abc import Callable

import numpy as np

from mlx_flashhead.clustering.similarity import best_clusters

# Clusters a row may ask for before it is scored again against those with room.
_NUM_CANDIDATES = 16


def balance_clusters(
    rows: np.ndarray,
    centroids: np.ndarray,
    room: np.ndarray,
    on_rows: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Assign each row to a similar centroid, no cluster beyond its room.

    Rows ask for clusters in the order of similarity and a full cluster keeps the most
    similar askers (deferred acceptance, Gale & Shapley 1962). Rows that all their
    candidates refused are scored again against the clusters which still have room.

    Args:
        rows: ``(N, D)``, float32.
        centroids: ``(K, D)``, float32.
        room: Rows each cluster takes, ``(K,)``; they sum to at least N.
        on_rows: Called with the numbers of rows scored in the first search.

    Returns:
        Cluster id of each row, ``(N,)``, int64.
    """
    clusters = np.full(len(rows), -1)
    waiting = np.arange(len(rows))
    while len(waiting):
        taken = np.bincount(clusters[clusters >= 0], minlength=len(room))
        is_open = np.flatnonzero(room > taken)
        ids, similarities = best_clusters(
            rows[waiting] if len(waiting) < len(rows) else rows,
            centroids[is_open],
            _NUM_CANDIDATES,
            on_rows,
        )
        on_rows = None
        accepted = _match(ids, similarities, (room - taken)[is_open])
        placed = accepted >= 0
        clusters[waiting[placed]] = is_open[accepted[placed]]
        waiting = waiting[~placed]
    return clusters


def _match(ids: np.ndarray, similarities: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Return the cluster that keeps each row, or -1 where all candidates refused."""
    clusters = np.full(len(ids), -1)
    offers = np.zeros(len(ids), dtype=np.float32)
    asked = np.zeros(len(ids), dtype=np.int64)
    asking = np.arange(len(ids))
    while len(asking):
        clusters[asking] = ids[asking, asked[asking]]
        offers[asking] = similarities[asking, asked[asking]]
        asked[asking] += 1
        changed = np.zeros(len(room) + 1, dtype=bool)  # the last one serves id -1
        changed[clusters[asking]] = True
        rivals = np.flatnonzero(changed[clusters])
        refused = rivals[_is_surplus(clusters[rivals], offers[rivals], room)]
        clusters[refused] = -1
        asking = refused[asked[refused] < ids.shape[1]]
    return clusters


def _is_surplus(
    clusters: np.ndarray, offers: np.ndarray, room: np.ndarray
) -> np.ndarray:
    """Return which rows are not among the best their cluster has room for."""
    order = np.lexsort((-offers, clusters))
    in_order = clusters[order]
    rank = np.arange(len(order)) - np.searchsorted(in_order, in_order)
    surplus = np.empty(len(order), dtype=bool)
    surplus[order] = rank >= room[in_order]
    return surplus
