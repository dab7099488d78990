"""Step 2: the score that a cluster must reach to be scored exactly."""

import mlx.core as mx

from mlx_flashhead.kernels._launch import build_kernel, metal_ready, scalars

# As in the kernel. Each thread has its clusters in registers: with 512 threads a
# core of an Apple GPU gives each about a hundred, 64 of which are clusters at most.
_NUM_THREADS = 512
_MAX_CLUSTERS = 64 * _NUM_THREADS

NOTHING_PASSES = (1 << 63) - 1


def probe_threshold(
    centroid_logits: mx.array, bias: mx.array, *, num_pinned: int, num_probes: int
) -> mx.array:
    """Find the key of the last cluster that is still probed, for each position.

    Clusters ``[0, num_pinned)`` are probed in any case; of the others the
    ``num_probes - num_pinned`` with the largest keys are (see ``cluster_keys``).

    Args:
        centroid_logits: ``(N, K)``, float32.
        bias: Added to the logits for choosing only, ``(K,)``, float32.
        num_pinned: Pinned clusters, in ``[0, K]``.
        num_probes: Clusters to probe, P, in ``[num_pinned, K]``.

    Returns:
        The smallest key that passes, ``(N,)``, int64; the largest int64, which no key
        reaches, if only pinned clusters are probed.
    """
    if num_probes == num_pinned:
        return mx.full(centroid_logits.shape[:1], NOTHING_PASSES, mx.int64)
    use_metal = metal_ready() and bias.size <= _MAX_CLUSTERS
    find = _metal if use_metal else _ops
    return find(centroid_logits, bias, num_pinned, num_probes)


def cluster_keys(centroid_logits: mx.array, bias: mx.array) -> mx.array:
    """Return distinct integers that order clusters by score, ``(N, K)``, int64.

    The upper half orders as the float32 score ``centroid_logits + bias`` does, with
    -0 equal to 0; the lower half puts the smaller cluster id first, so that no two
    keys of a position are equal and exactly P clusters pass.
    """
    score = centroid_logits + bias
    bits = mx.where(score == 0, 0.0, score).view(mx.int32)
    # Negative floats order backwards as integers: flip all bits but the sign.
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    first_wins = 0xFFFFFFFF - mx.arange(score.shape[-1], dtype=mx.int64)
    return (ordered << 32) | first_wins


def _metal(
    centroid_logits: mx.array, bias: mx.array, num_pinned: int, num_probes: int
) -> mx.array:
    """Launch ``metal/probe_threshold.metal``: one threadgroup a position."""
    num_positions, num_clusters = centroid_logits.shape
    kernel = build_kernel("probe_threshold", ("centroid_logits", "bias", "limits"))
    (threshold,) = kernel(
        inputs=[centroid_logits, bias, scalars(num_pinned, num_probes - num_pinned)],
        template=[("PerThread", -(-num_clusters // _NUM_THREADS))],
        grid=(_NUM_THREADS * num_positions, 1, 1),
        threadgroup=(_NUM_THREADS, 1, 1),
        output_shapes=[(num_positions,)],
        output_dtypes=[mx.int64],
    )
    return threshold


def _ops(
    centroid_logits: mx.array, bias: mx.array, num_pinned: int, num_probes: int
) -> mx.array:
    """Twin of the kernel in MLX ops, for any device."""
    keys = cluster_keys(centroid_logits, bias)[:, num_pinned:]
    last = keys.shape[-1] - (num_probes - num_pinned)
    return mx.partition(keys, last, axis=-1)[:, last]
