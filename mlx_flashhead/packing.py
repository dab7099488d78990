"""Rows of a head as packed arrays, in the names and layouts of MLX.

Packing keeps every bit of rows that come in quantized: they are only moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashhead.config import Quantization


@dataclass(frozen=True)
class PackedRows:
    """R rows of length D, quantized as by ``mx.quantize`` or plain.

    Attributes:
        weight: ``(R, D * bits / 32)`` uint32, or ``(R, D)`` floats if unquantized.
        scales: ``(R, D / group_size)``; ``None`` if unquantized.
        biases: As ``scales``; ``None`` if unquantized or the mode has none.
        quantization: Bits, group size and mode; ``None`` if unquantized.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    quantization: Quantization | None = None

    @property
    def num_rows(self) -> int:
        """R."""
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        arrays = (self.weight, self.scales, self.biases)
        return sum(a.nbytes for a in arrays if a is not None)

    @property
    def mlx_arguments(self) -> dict[str, Any]:
        """What MLX's operations on quantized arrays take besides ``weight``."""
        if self.quantization is None:
            raise ValueError("These rows are not quantized.")
        arrays = {"scales": self.scales, "biases": self.biases}
        return arrays | asdict(self.quantization)

    def map(self, function: Callable[[mx.array], mx.array]) -> PackedRows:
        """Return these rows with ``function`` applied to each of their arrays."""
        return replace(
            self,
            weight=function(self.weight),
            scales=None if self.scales is None else function(self.scales),
            biases=None if self.biases is None else function(self.biases),
        )

    def take(self, row_ids: mx.array | slice) -> PackedRows:
        """Return the rows ``row_ids``, of any shape, or a slice, bit for bit."""
        return self.map(lambda array: array[row_ids])

    def dequantize(self) -> mx.array:
        """Return the rows as floats, ``(R, D)``, in the dtype MLX gives them."""
        if self.quantization is None:
            return self.weight
        return mx.dequantize(self.weight, **self.mlx_arguments)

    def matmul(self, hidden: mx.array) -> mx.array:
        """Return ``hidden @ rows.T``, ``(..., R)``, as MLX's own layers compute it."""
        if self.quantization is None:
            return hidden @ self.weight.T
        return mx.quantized_matmul(
            hidden, self.weight, transpose=True, **self.mlx_arguments
        )


def affine(bits: int, hidden_size: int, group_size: int = 64) -> Quantization | None:
    """Return the affine packing of rows of length D, ``None`` where they stay floats.

    As in mlx-lm, rows whose length no group size divides are not quantized; at 16 bits
    there is nothing to pack.
    """
    if bits == 16:
        return None
    sizes = [size for size in (group_size, 32) if hidden_size % size == 0]
    return Quantization(bits, sizes[0]) if sizes else None


def pack_rows(rows: mx.array, quantization: Quantization | None) -> PackedRows:
    """Quantize float rows ``(R, D)``; ``None`` keeps them as they are."""
    if quantization is None:
        return PackedRows(rows)
    weight, scales, *biases = mx.quantize(
        rows, quantization.group_size, quantization.bits, mode=quantization.mode
    )
    return PackedRows(weight, scales, biases[0] if biases else None, quantization)


def cluster_major(rows: PackedRows, cluster_tokens: np.ndarray) -> PackedRows:
    """Move rows ``(V, ...)`` into slot order, ``(K * C, ...)``; padding is zero.

    Args:
        rows: The head's rows in token order.
        cluster_tokens: Token of each slot, ``(K, C)``; V marks padding.

    Returns:
        The same bits in slot order.
    """
    slots = mx.array(cluster_tokens.reshape(-1).astype(np.uint32))
    is_padding = slots == rows.num_rows
    source = mx.where(is_padding, 0, slots)

    def move(array: mx.array) -> mx.array:
        moved = array[source]
        return mx.where(is_padding[:, None], mx.zeros((), array.dtype), moved)

    return rows.map(move)


def slots_of_tokens(cluster_tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return ``token_slots`` ``(V,)`` uint32, the inverse of ``cluster_tokens``.

    Raises:
        ValueError: If ``cluster_tokens`` does not hold each token exactly once.
    """
    tokens = cluster_tokens.reshape(-1).astype(np.int64)
    slots = np.flatnonzero(tokens != vocab_size)
    held = tokens[slots]
    if not np.array_equal(np.sort(held), np.arange(vocab_size)):
        raise ValueError(
            f"cluster_tokens is no permutation: its {held.size} tokens are not "
            f"0 to {vocab_size - 1} once each; convert the model again."
        )
    token_slots = np.empty(vocab_size, np.uint32)
    token_slots[held] = slots
    return token_slots
