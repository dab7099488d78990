"""Bytes of a head, and the tokens that heads pick."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead.clustering.similarity import largest_products
from mlx_flashhead.head import INDEX_MAPS, FlashHead
from mlx_flashhead.packing import affine, dense_bytes, pack_rows

_ROWS_PER_CHUNK = 1 << 14


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of a FlashHead and of the dense 4-bit head of the same rows.

    Attributes:
        stored: All arrays of the FlashHead.
        overhead: Those of them that a dense head of the same bits does not have:
            centroids, their bias and projection, index maps, padding rows.
        read_per_token: Read for one position: the centroids, their bias and
            projection, the rows of probed clusters, the map from slots to tokens.
            Scores on their way between the steps, 12 bytes a cluster, are not counted.
        dense_4bit: The dense head at 4 bits: stored, and read for each token.
    """

    stored: int
    overhead: int
    read_per_token: int
    dense_4bit: int


def head_bytes(head: FlashHead) -> HeadBytes:
    """Count the bytes of a head, from its arrays."""
    config, centroids = head.config, head.centroids
    slot_bytes = head.rows.nbytes // config.num_slots
    bias = head.bias.nbytes if "bias" in head else 0
    maps = [head[name].nbytes for name in INDEX_MAPS if name in head]
    coarse = centroids.rows.nbytes + centroids.bias.nbytes + centroids.projection.nbytes
    padding = (config.num_slots - config.vocab_size) * slot_bytes
    overhead = coarse + sum(maps) + padding
    probed = config.num_probed * config.cluster_size * slot_bytes
    dtype = getattr(mx, config.dtype)
    return HeadBytes(
        stored=head.rows.nbytes - padding + overhead + bias,
        overhead=overhead,
        read_per_token=coarse + probed + sum(maps[:1]) + bias,
        dense_4bit=dense_bytes((config.vocab_size, config.hidden_size), dtype) + bias,
    )


def dense_tokens(
    hidden: mx.array, rows: np.ndarray, bias: mx.array | None = None
) -> np.ndarray:
    """Return the token with the largest dense logit at each position, ``(N,)``.

    Args:
        hidden: Hidden states, ``(N, D)``, float32.
        rows: Rows of a dense head, ``(V, D)``, float32.
        bias: Its bias, ``(V,)``, or ``None``.
    """
    positions = np.array(hidden)
    if bias is not None:
        rows = np.hstack([rows, np.array(bias.astype(mx.float32))[:, None]])
        positions = np.pad(positions, ((0, 0), (0, 1)), constant_values=1)
    token_ids, _ = largest_products(positions, rows, 1)
    return token_ids[:, 0]


def head_tokens(head: FlashHead, hidden: mx.array) -> np.ndarray:
    """Return the token with the largest FlashHead logit at each position, ``(N,)``."""
    parts = probed_parts(head, hidden)
    tokens = [np.array(mx.argmax(head.logits(part), axis=-1)) for part in parts]
    return np.concatenate(tokens)


def rounded_rows(rows: np.ndarray, bits: int) -> np.ndarray:
    """Return rows ``(V, D)`` as a dense head of ``bits`` bits holds them, float32."""
    packing = affine(bits, rows.shape[1])
    rounded = np.empty_like(rows)
    for start in range(0, len(rows), _ROWS_PER_CHUNK):
        part = slice(start, start + _ROWS_PER_CHUNK)
        rounded[part] = np.array(pack_rows(mx.array(rows[part]), packing).dequantize())
    return rounded


def probed_parts(head: FlashHead, hidden: mx.array) -> list[mx.array]:
    """Cut hidden states ``(N, D)`` into calls that take the probing path."""
    step = head.config.max_probed_positions
    return [hidden[start : start + step] for start in range(0, len(hidden), step)]
