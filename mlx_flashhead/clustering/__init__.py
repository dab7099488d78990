"""Equal-sized clusters of a vocabulary head's rows.

Needs arrays only: it knows nothing of models, of packing or of files.
"""

from mlx_flashhead.clustering.centroids import prior_weights, weighted_sums
from mlx_flashhead.clustering.kmeans import Clustering, cluster_rows
from mlx_flashhead.clustering.prior import token_prior

__all__ = [
    "Clustering",
    "cluster_rows",
    "prior_weights",
    "token_prior",
    "weighted_sums",
]
