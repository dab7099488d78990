"""Step 1: score every centroid against every hidden state."""

import mlx.core as mx

from mlx_flashhead.kernels._launch import (
    build_kernel,
    has_kernel,
    metal_ready,
    row_inputs,
    row_template,
    storage_bits,
    tile_shape,
)
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
    use_metal = metal_ready() and has_kernel(hidden, centroids)
    score = _metal if use_metal else _ops
    return score(hidden, centroids)


def _metal(hidden: mx.array, centroids: PackedRows) -> mx.array:
    """Launch ``metal/centroid_scores.metal``: one threadgroup a tile of centroids."""
    num_positions, depth = hidden.shape
    tile = tile_shape(storage_bits(centroids), depth)
    num_tiles = -(-centroids.num_rows // tile.num_rows)
    kernel = build_kernel("centroid_scores", ("hidden", "weight", "scales", "biases"))
    (scores,) = kernel(
        inputs=[hidden, *row_inputs(centroids)],
        template=row_template(hidden, centroids, tile),
        grid=(tile.num_threads * num_tiles, 1, 1),
        threadgroup=(tile.num_threads, 1, 1),
        output_shapes=[(num_positions, centroids.num_rows)],
        output_dtypes=[mx.float32],
    )
    return scores


def _ops(hidden: mx.array, centroids: PackedRows) -> mx.array:
    """Twin of the kernel in MLX ops, for any device."""
    hidden, centroids = exact_operands(hidden, centroids)
    return centroids.matmul(hidden).astype(mx.float32)
