"""Assignment of rows to clusters that hold a fixed number of them."""

import numpy as np

from mlx_flashhead.clustering.similarity import largest_products


def balance_clusters(
    rows: np.ndarray,
    centroids: np.ndarray,
    room: np.ndarray,
    ids: np.ndarray,
    similarities: np.ndarray,
) -> np.ndarray:
    """Assign each row to a similar centroid, no cluster beyond its room.

    Rows ask for their candidates in the order of similarity, and a full cluster keeps
    the most similar askers (deferred acceptance, Gale & Shapley 1962). Rows that all
    refused get as many new candidates among the clusters which still have room.

    Args:
        rows: ``(N, D)``, float32.
        centroids: ``(K, D)``, float32.
        room: Rows each cluster takes, ``(K,)``; they sum to at least N.
        ids: Candidate clusters of each row, ``(N, m)``, best first.
        similarities: Their dot products with the row, ``(N, m)``, descending.

    Returns:
        Cluster id of each row, ``(N,)``, int64.
    """
    clusters = _match(ids, similarities, room)
    while len(refused := np.flatnonzero(clusters < 0)):
        taken = np.bincount(clusters[clusters >= 0], minlength=len(room))
        is_open = np.flatnonzero(room > taken)
        new_ids, new_similarities = largest_products(
            rows[refused], centroids[is_open], ids.shape[1]
        )
        accepted = _match(new_ids, new_similarities, (room - taken)[is_open])
        placed = accepted >= 0
        clusters[refused[placed]] = is_open[accepted[placed]]
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
