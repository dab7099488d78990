"""Figures of a head: what it finds, and what it reads and keeps in memory."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead.clustering.similarity import largest_products
from mlx_flashhead.config import FlashHeadConfig
from mlx_flashhead.head import FlashHead
from mlx_flashhead.packing import affine, pack_rows

# What mlx-lm quantizes a head to by default: the rival.
DENSE_BITS = 4

_ROWS_PER_CHUNK = 1 << 14


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of a FlashHead and of the dense 4-bit head of the same rows.

    Attributes:
        stored: All arrays of the FlashHead.
        overhead: Those of them that a dense head of the same bits does not have:
            centroids, their bias, the two index maps, padding rows.
        read_per_token: Read for one position: the centroids and their bias, the rows
            of P clusters, the map from slots to tokens.
        dense_4bit: The dense head at 4 bits: stored, and read for each token.
    """

    stored: int
    overhead: int
    read_per_token: int
    dense_4bit: int


def head_bytes(head: FlashHead) -> HeadBytes:
    """Count the bytes of a head, from its arrays."""
    config = head.config
    rows, centroids = head.rows, head.centroids.rows
    slot_bytes = rows.nbytes // config.num_slots
    bias = head.bias.nbytes if "bias" in head else 0
    coarse = centroids.nbytes + head.centroids.bias.nbytes
    padding = (config.num_slots - config.vocab_size) * slot_bytes
    overhead = coarse + head.cluster_tokens.nbytes + head.token_slots.nbytes + padding
    probed_rows = config.num_probes * config.cluster_size * slot_bytes
    return HeadBytes(
        stored=rows.nbytes - padding + overhead + bias,
        overhead=overhead,
        read_per_token=coarse + probed_rows + head.cluster_tokens.nbytes + bias,
        dense_4bit=_dense_4bit_bytes(config) + bias,
    )


def _dense_4bit_bytes(config: FlashHeadConfig) -> int:
    """Return the bytes of ``V x D`` weights as mlx-lm quantizes them by default."""
    packing = affine(DENSE_BITS, config.hidden_size)
    scale_bytes = getattr(mx, config.dtype).size
    if packing is None:
        return config.vocab_size * config.hidden_size * scale_bytes
    groups = config.hidden_size // packing.group_size
    row_bytes = config.hidden_size * DENSE_BITS // 8 + groups * 2 * scale_bytes
    return config.vocab_size * row_bytes


@dataclass(frozen=True)
class HeadFigures:
    """How often a head finds the token of the dense float head.

    Attributes:
        num_positions: Positions looked at.
        recall: Share at which the dense arg max lies in a probed cluster.
        agreement: Share at which the head's arg max is the dense one.
        dense_4bit_agreement: The same for the dense head at 4 bits.
    """

    num_positions: int
    recall: float
    agreement: float
    dense_4bit_agreement: float


def measure_head(
    head: FlashHead, dense_rows: np.ndarray, hidden: mx.array
) -> HeadFigures:
    """Compare a head with the dense head it replaces.

    Args:
        head: The head.
        dense_rows: The source model's rows, ``(V, D)``, float32.
        hidden: Hidden states, ``(N, D)``, float32.

    Returns:
        Shares of the N positions.
    """
    bias = head.get("bias")
    truth = dense_tokens(hidden, dense_rows, bias)
    rival = dense_tokens(hidden, rounded_rows(dense_rows, DENSE_BITS), bias)
    return HeadFigures(
        num_positions=len(truth),
        recall=float(_is_probed(head, hidden, truth).mean()),
        agreement=float((head_tokens(head, hidden) == truth).mean()),
        dense_4bit_agreement=float((rival == truth).mean()),
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


def _is_probed(head: FlashHead, hidden: mx.array, token_ids: np.ndarray) -> np.ndarray:
    """Return whether each position's token lies in a cluster it probes, ``(N,)``."""
    slots = np.array(head.token_slots)[token_ids]
    clusters = slots // head.config.cluster_size
    parts = [np.array(head.probed_clusters(p)) for p in probed_parts(head, hidden)]
    probed = np.concatenate(parts)
    return probed[np.arange(len(clusters)), clusters]


def probed_parts(head: FlashHead, hidden: mx.array) -> list[mx.array]:
    """Cut hidden states ``(N, D)`` into calls that take the probing path."""
    step = head.config.max_probed_positions
    return [hidden[start : start + step] for start in range(0, len(hidden), step)]
