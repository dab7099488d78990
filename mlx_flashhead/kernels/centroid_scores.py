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

_INPUTS = ("projected", "weight", "scales", "biases", "bias", "offset")


def centroid_scores(
    projected: mx.array, centroids: PackedRows, bias: mx.array, offset: mx.array
) -> mx.array:
    """Score K packed centroids against N projected hidden states.

    Computes ``out[n, k] = <projected[n], centroid[k]> + bias[k] + offset[n]`` without
    unpacking the centroids in memory (FlashHead, arXiv:2603.14591, coarse stage).

    Args:
        projected: Hidden states in the centroids' space, ``(N, d)``, float16, bfloat16
            or float32.
        centroids: K rows of length d.
        bias: ``(K,)``, any float; +inf pins a cluster.
        offset: Logit of the mean row, ``(N,)``, any float.

    Returns:
        Centroid logits, ``(N, K)``, float32.
    """
    use_metal = metal_ready() and has_kernel(projected, centroids)
    score = _metal if use_metal else _ops
    return score(projected, centroids, bias, offset)


def _metal(
    projected: mx.array, centroids: PackedRows, bias: mx.array, offset: mx.array
) -> mx.array:
    """Launch ``metal/centroid_scores.metal``: one threadgroup a tile of centroids."""
    num_positions, depth = projected.shape
    tile = tile_shape(storage_bits(centroids), depth)
    num_tiles = -(-centroids.num_rows // tile.num_rows)
    kernel = build_kernel("centroid_scores", _INPUTS)
    (scores,) = kernel(
        inputs=[projected, *row_inputs(centroids), bias, offset],
        template=row_template(projected, centroids, tile),
        grid=(tile.num_threads * num_tiles, 1, 1),
        threadgroup=(tile.num_threads, 1, 1),
        output_shapes=[(num_positions, centroids.num_rows)],
        output_dtypes=[mx.float32],
    )
    return scores


def _ops(
    projected: mx.array, centroids: PackedRows, bias: mx.array, offset: mx.array
) -> mx.array:
    """Twin of the kernel in MLX ops, for any device."""
    projected, centroids = exact_operands(projected, centroids)
    products = centroids.matmul(projected).astype(mx.float32)
    return products + bias.astype(mx.float32) + offset.astype(mx.float32)[:, None]
