"""Step 1: score every centroid against every hidden state."""

import mlx.core as mx

from mlx_flashhead.kernels._precision import exact_operands
from mlx_flashhead.packing import PackedRows


def centroid_scores(hidden: mx.array, centroids: PackedRows) -> mx.array:
    """Score K packed centroids against N hidden states.

    Computes ``out[n, k] = <hidden[n], centroid[k]>`` without unpacking the centroids
    in memory (FlashHead, arXiv:2603.14591, coarse stage).

    Args:
        hidden: Final hidden states, ``(N, D)``, float16, bfloat16 or float32.
        centroids: K rows of length D.

    Returns:
        Centroid logits, ``(N, K)``, float32.
    """
    return _ops(hidden, centroids)


def _ops(hidden: mx.array, centroids: PackedRows) -> mx.array:
    """Twin of the kernel in MLX ops, for any device."""
    hidden, centroids = exact_operands(hidden, centroids)
    return centroids.matmul(hidden).astype(mx.float32)
