"""Step 3: exact logits of the probed clusters, centroid logits for the others."""

import mlx.core as mx

from mlx_flashhead.kernels._launch import (
    build_kernel,
    has_kernel,
    metal_ready,
    row_inputs,
    row_template,
    scalars,
    storage_bits,
    tile_shape,
)
from mlx_flashhead.kernels._precision import exact_operands
from mlx_flashhead.kernels.probe_threshold import cluster_keys
from mlx_flashhead.packing import PackedRows

# Clusters of one threadgroup. Of 16 about two are probed at the usual share of 1/8:
# fewer would start threads for nothing, more would leave some threadgroups with
# much more work than others.
_CLUSTERS_PER_THREADGROUP = 16
# Positions that share one reading of the rows; one bit each in the kernel.
_POSITIONS_PER_THREADGROUP = 16

_INPUTS = (
    "hidden",
    "weight",
    "scales",
    "biases",
    "cluster_tokens",
    "centroid_logits",
    "bias",
    "threshold",
    "num_pinned",
)


def cluster_logits(
    hidden: mx.array,
    rows: PackedRows,
    cluster_tokens: mx.array,
    token_slots: mx.array,
    centroid_logits: mx.array,
    bias: mx.array,
    threshold: mx.array,
    *,
    num_pinned: int,
    num_probes: int,
) -> mx.array:
    """Write logits in token order, reading the rows of probed clusters only.

    A token of a pinned cluster, or of one whose key reaches ``threshold``, gets
    ``<hidden[n], row>``; any other gets its cluster's centroid logit.

    Args:
        hidden: Final hidden states, ``(N, D)``, float16, bfloat16 or float32.
        rows: K * C rows of length D in slot order.
        cluster_tokens: Token of each slot, ``(K, C)``, uint32; V marks padding.
        token_slots: Slot of each token, ``(V,)``, uint32.
        centroid_logits: ``(N, K)``, float32.
        bias: As in ``probe_threshold``, ``(K,)``, float32.
        threshold: From ``probe_threshold``, ``(N,)``, int64.
        num_pinned: As in ``probe_threshold``.
        num_probes: As in ``probe_threshold``.

    Returns:
        Logits, ``(N, V)``, in the dtype of ``hidden``.
    """
    if metal_ready() and has_kernel(hidden, rows) and cluster_tokens.shape[1] % 8 == 0:
        return _metal(
            hidden,
            rows,
            cluster_tokens,
            token_slots.size,
            centroid_logits,
            bias,
            threshold,
            num_pinned,
        )
    return _ops(
        hidden,
        rows,
        cluster_tokens,
        token_slots,
        centroid_logits,
        _probed_clusters(centroid_logits, bias, threshold, num_pinned, num_probes),
    )


def _probed_clusters(
    centroid_logits: mx.array,
    bias: mx.array,
    threshold: mx.array,
    num_pinned: int,
    num_probes: int,
) -> mx.array:
    """Return the ids of the P clusters that pass, ``(N, P)``, in no order."""
    keys = cluster_keys(centroid_logits, bias)
    is_pinned = mx.arange(keys.shape[-1]) < num_pinned
    fails = ~is_pinned & (keys < threshold[:, None])
    # Exactly P pass, so they are the P smallest of "fails".
    order = mx.argpartition(fails.astype(mx.int32), num_probes - 1, axis=-1)
    return order[:, :num_probes]


def _metal(
    hidden: mx.array,
    rows: PackedRows,
    cluster_tokens: mx.array,
    vocab_size: int,
    centroid_logits: mx.array,
    bias: mx.array,
    threshold: mx.array,
    num_pinned: int,
) -> mx.array:
    """Launch ``metal/cluster_logits.metal``: a threadgroup for 16 clusters."""
    num_positions, depth = hidden.shape
    num_clusters, cluster_size = cluster_tokens.shape
    tile = tile_shape(storage_bits(rows), depth, cluster_size)
    num_groups = -(-num_clusters // _CLUSTERS_PER_THREADGROUP)
    kernel = build_kernel("cluster_logits", _INPUTS)
    (logits,) = kernel(
        inputs=[
            hidden,
            *row_inputs(rows),
            cluster_tokens,
            centroid_logits,
            bias,
            threshold,
            scalars(num_pinned),
        ],
        template=[
            *row_template(hidden, rows, tile),
            ("VocabSize", vocab_size),
            ("C", cluster_size),
            ("Clusters", _CLUSTERS_PER_THREADGROUP),
            ("Positions", _POSITIONS_PER_THREADGROUP),
        ],
        grid=(
            tile.num_threads * num_groups,
            -(-num_positions // _POSITIONS_PER_THREADGROUP),
            1,
        ),
        threadgroup=(tile.num_threads, 1, 1),
        output_shapes=[(num_positions, vocab_size)],
        output_dtypes=[hidden.dtype],
    )
    return logits


def _ops(
    hidden: mx.array,
    rows: PackedRows,
    cluster_tokens: mx.array,
    token_slots: mx.array,
    centroid_logits: mx.array,
    cluster_ids: mx.array,
) -> mx.array:
    """Twin of the kernel in MLX ops, for any device."""
    (vocab_size,), (_, cluster_size) = token_slots.shape, cluster_tokens.shape
    exact = _gathered_logits(hidden, rows, cluster_ids, cluster_size)
    tokens = cluster_tokens[cluster_ids]
    # A padding slot has no token to write to: it repeats what slot 0 writes.
    is_padding = tokens == vocab_size
    tokens = mx.where(is_padding, tokens[..., :1], tokens)
    exact = mx.where(is_padding, exact[..., :1], exact)
    num_positions = hidden.shape[0]
    return mx.put_along_axis(
        mx.take(centroid_logits, token_slots // cluster_size, axis=-1),
        tokens.reshape(num_positions, -1),
        exact.reshape(num_positions, -1),
        axis=-1,
    ).astype(hidden.dtype)


def _gathered_logits(
    hidden: mx.array, rows: PackedRows, cluster_ids: mx.array, cluster_size: int
) -> mx.array:
    """Return exact logits of whole clusters, ``(N, P, C)``, float32."""
    clusters = rows.map(lambda a: a.reshape(-1, cluster_size, a.shape[-1]))
    if rows.quantization is None and mx.default_device() == mx.cpu:
        # gather_mm takes only float32 on the CPU; widening after the gather keeps
        # the copy to the probed rows.
        hidden, gathered = exact_operands(hidden, clusters.take(cluster_ids))
        return (gathered.weight * hidden[:, None, None, :]).sum(axis=-1)
    hidden, clusters = exact_operands(hidden, clusters)
    operand = hidden[:, None, None, :]
    if clusters.quantization is None:
        weight = clusters.weight.swapaxes(-1, -2)
        logits = mx.gather_mm(operand, weight, rhs_indices=cluster_ids)
    else:
        logits = mx.gather_qmm(
            operand,
            clusters.weight,
            rhs_indices=cluster_ids,
            transpose=True,
            **clusters.mlx_arguments,
        )
    return logits.squeeze(-2).astype(mx.float32)
