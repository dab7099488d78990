"""Step 3: exact logits of the probed clusters, centroid logits for the others."""

import mlx.core as mx

from mlx_flashhead.blocks import probed_count
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
from mlx_flashhead.kernels.probe_threshold import probed
from mlx_flashhead.packing import PackedRows

# Slots of one threadgroup. At the usual share of 1/32 eight of them are probed, about
# half a tile of rows: fewer would start threads for nothing, more would leave some
# threadgroups with much more work than others.
_SLOTS_PER_THREADGROUP = 256
# Positions that share one reading of the rows; one bit each in the kernel.
_POSITIONS_PER_THREADGROUP = 32

_INPUTS = (
    "hidden",
    "weight",
    "scales",
    "biases",
    "centroid_logits",
    "threshold",
    "cluster_tokens",
    "head_bias",
)


def cluster_logits(
    hidden: mx.array,
    rows: PackedRows,
    centroid_logits: mx.array,
    threshold: mx.array,
    *,
    num_probes: int,
    vocab_size: int,
    cluster_tokens: mx.array | None,
    token_slots: mx.array | None,
    head_bias: mx.array | None,
) -> mx.array:
    """Write logits in token order, reading the rows of probed clusters only.

    A token of a cluster whose key reaches its block's threshold gets
    ``<hidden[n], row> + head_bias[token]``; any other its cluster's centroid logit.

    Args:
        hidden: Final hidden states, ``(N, D)``, float16, bfloat16 or float32.
        rows: K * C rows of length D in slot order.
        centroid_logits: ``(N, K)``, float32.
        threshold: From ``probe_threshold``, ``(N, T)``, int64.
        num_probes: As in ``probe_threshold``.
        vocab_size: V.
        cluster_tokens: Token of each slot, ``(K, C)``, uint32; V marks padding, which
            never stands in a cluster's first slot. ``None``: clusters of one row, and
            slot, cluster and token are the same.
        token_slots: Slot of each token, ``(V,)``, uint32; ``None`` with
            ``cluster_tokens``.
        head_bias: The dense head's own bias in token order, ``(V,)``, or ``None``.

    Returns:
        Logits, ``(N, V)``, in the dtype of ``hidden``.
    """
    if metal_ready() and has_kernel(hidden, rows):
        return _metal(
            hidden,
            rows,
            centroid_logits,
            threshold,
            vocab_size,
            cluster_tokens,
            head_bias,
        )
    count = probed_count(centroid_logits.shape[-1], num_probes)
    fails = ~probed(centroid_logits, threshold)
    # Exactly `count` pass, so they are the smallest of "fails".
    cluster_ids = mx.argpartition(fails, count - 1, axis=-1)[:, :count]
    return _ops(
        hidden,
        rows,
        centroid_logits,
        cluster_ids,
        cluster_tokens,
        token_slots,
        head_bias,
    )


def _metal(
    hidden: mx.array,
    rows: PackedRows,
    centroid_logits: mx.array,
    threshold: mx.array,
    vocab_size: int,
    cluster_tokens: mx.array | None,
    head_bias: mx.array | None,
) -> mx.array:
    """Launch ``metal/cluster_logits.metal``: a threadgroup for some 256 slots."""
    num_positions, num_clusters = centroid_logits.shape
    cluster_size = 1 if cluster_tokens is None else cluster_tokens.shape[1]
    tile = tile_shape(storage_bits(rows), hidden.shape[-1])
    clusters = max(1, _SLOTS_PER_THREADGROUP // cluster_size)
    kernel = build_kernel("cluster_logits", _INPUTS)
    (logits,) = kernel(
        inputs=[
            hidden,
            *row_inputs(rows),
            centroid_logits,
            threshold,
            scalars(0) if cluster_tokens is None else cluster_tokens,
            scalars(0) if head_bias is None else head_bias,
        ],
        template=[
            *row_template(hidden, rows, tile),
            ("VocabSize", vocab_size),
            ("C", cluster_size),
            ("Clusters", clusters),
            ("Positions", _POSITIONS_PER_THREADGROUP),
            ("HasMap", cluster_tokens is not None),
            ("HasBias", head_bias is not None),
        ],
        grid=(
            tile.num_threads * -(-num_clusters // clusters),
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
    centroid_logits: mx.array,
    cluster_ids: mx.array,
    cluster_tokens: mx.array | None,
    token_slots: mx.array | None,
    head_bias: mx.array | None,
) -> mx.array:
    """Twin of the kernel in MLX ops, for any device."""
    if cluster_tokens is None or token_slots is None:
        tokens, tails = cluster_ids, centroid_logits
        exact = _gathered_logits(hidden, rows, cluster_ids)
    else:
        (vocab_size,), (_, cluster_size) = token_slots.shape, cluster_tokens.shape
        slots = cluster_ids[..., None] * cluster_size + mx.arange(cluster_size)
        exact = _gathered_logits(hidden, rows, slots.reshape(len(slots), -1))
        tails = mx.take(centroid_logits, token_slots // cluster_size, axis=-1)
        # A padding slot has no token to write to: it repeats what slot 0 writes.
        tokens = cluster_tokens[cluster_ids]
        is_padding = tokens == vocab_size
        tokens = mx.where(is_padding, tokens[..., :1], tokens).reshape(exact.shape)
        exact = exact.reshape(is_padding.shape)
        exact = mx.where(is_padding, exact[..., :1], exact).reshape(tokens.shape)
    if head_bias is not None:
        exact = exact + head_bias[tokens].astype(mx.float32)
    return mx.put_along_axis(tails, tokens, exact, axis=-1).astype(hidden.dtype)


def _gathered_logits(hidden: mx.array, rows: PackedRows, slots: mx.array) -> mx.array:
    """Return exact logits of each position's own rows, ``(N, S)``, float32.

    Copying the rows and one product for each position took 8 ms on one x86 core for
    8192 rows of 640 8-bit values with bfloat16 scales; ``mx.gather_qmm`` took 20 ms,
    as it needs all scales of the head widened first.

    Args:
        hidden: ``(N, D)``.
        rows: Rows of length D.
        slots: Which of them, ``(N, S)``.
    """
    operand, gathered = exact_operands(hidden[:, None], rows.take(slots))
    if gathered.quantization is None:
        logits = operand @ gathered.weight.swapaxes(-1, -2)
    else:
        logits = gathered.matmul(operand)
    return logits.squeeze(1).astype(mx.float32)
