"""Step 2: the score that a cluster must reach to be scored exactly."""

import mlx.core as mx

from mlx_flashhead.blocks import (
    CHUNK_SIZE,
    block_sizes,
    num_blocks,
    probes_per_block,
)
from mlx_flashhead.kernels._launch import build_kernel, metal_ready, scalars

_NUM_THREADS = 512

# Smaller and larger than any key.
_LEAST = -(1 << 63)
_LARGEST = (1 << 63) - 1


def probe_threshold(centroid_logits: mx.array, *, num_probes: int) -> mx.array:
    """Find the key of the last cluster that is still probed, block by block.

    Of each of the T blocks the ``probes_per_block`` clusters with the largest keys are
    probed, or all of them if it has fewer (see ``blocks``). A pinned cluster has the
    score +inf: it passes if its block has no more of them than that.

    Args:
        centroid_logits: ``(N, K)``, float32; K up to ``2**31 - 1``.
        num_probes: P, in ``[1, K]``.

    Returns:
        The smallest key that passes in each block, ``(N, T)``, int64.
    """
    find = _metal if metal_ready() else _ops
    return find(centroid_logits, num_probes)


def probed(centroid_logits: mx.array, threshold: mx.array) -> mx.array:
    """Return which clusters are scored exactly, ``(N, K)``, bool.

    Args:
        centroid_logits: ``(N, K)``, float32.
        threshold: From ``probe_threshold``, ``(N, T)``, int64.
    """
    keys = _deal(_keys(centroid_logits), threshold.shape[-1])
    passes = keys >= threshold[:, None, :, None]
    num_positions, num_clusters = centroid_logits.shape
    return passes.reshape(num_positions, -1)[:, :num_clusters]


def _keys(centroid_logits: mx.array) -> mx.array:
    """Return distinct integers that order clusters by score, ``(N, K)``, int64.

    The upper half orders as the float32 score does, with -0 equal to 0; of equal scores
    the smaller cluster id has the larger key, so that no two keys of a position are
    equal and the number of clusters that pass is known.
    """
    bits = centroid_logits.view(mx.int32)
    # Floats are a sign and a magnitude, integers a two's complement.
    sign = bits >> 31
    score = ((bits & 0x7FFFFFFF) ^ sign) - sign
    return (score.astype(mx.int64) << 32) - mx.arange(bits.shape[-1])


def _deal(keys: mx.array, blocks: int) -> mx.array:
    """Return keys by round, block and place, ``(N, rounds, T, 32)``, filled up."""
    num_positions, num_clusters = keys.shape
    missing = -num_clusters % (blocks * CHUNK_SIZE)
    if missing:
        filling = mx.full((num_positions, missing), _LEAST, mx.int64)
        keys = mx.concatenate([keys, filling], axis=-1)
    return keys.reshape(num_positions, -1, blocks, CHUNK_SIZE)


def _metal(centroid_logits: mx.array, num_probes: int) -> mx.array:
    """Launch ``metal/probe_threshold.metal``: a threadgroup for each block."""
    num_positions, num_clusters = centroid_logits.shape
    blocks = num_blocks(num_clusters)
    limits = scalars(probes_per_block(num_clusters, num_probes), blocks)
    largest_block = max(block_sizes(num_clusters))
    kernel = build_kernel("probe_threshold", ("centroid_logits", "limits"))
    (threshold,) = kernel(
        inputs=[centroid_logits, limits],
        template=[("PerThread", -(-largest_block // _NUM_THREADS))],
        grid=(_NUM_THREADS * blocks, num_positions, 1),
        threadgroup=(_NUM_THREADS, 1, 1),
        output_shapes=[(num_positions, blocks)],
        output_dtypes=[mx.int64],
    )
    return threshold


def _ops(centroid_logits: mx.array, num_probes: int) -> mx.array:
    """Twin of the kernel in MLX ops, for any device."""
    num_positions, num_clusters = centroid_logits.shape
    blocks = num_blocks(num_clusters)
    dealt = _deal(_keys(centroid_logits), blocks)
    keys = dealt.swapaxes(1, 2).reshape(num_positions, blocks, -1)
    first = max(keys.shape[-1] - probes_per_block(num_clusters, num_probes), 0)
    passing = mx.partition(keys, first, axis=-1)[..., first:]
    return mx.where(passing == _LEAST, _LARGEST, passing).min(axis=-1)
