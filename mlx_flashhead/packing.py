"""Rows of a head as packed arrays, in the names and layouts of MLX.

Packing keeps every bit of rows that come in quantized: they are only moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flashhead.config import Quantization

# What mlx-lm quantizes a head to by default: the rival.
DENSE_BITS = 4

# The best step of a 2-bit uniform quantizer of a normal distribution (Max, 1960).
_NORMAL_STEP = 0.9957
_FITTING_ROUNDS = 6

_ROWS_PER_CHUNK = 1 << 14


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

    def widened(self) -> PackedRows:
        """Return these rows with float32 in place of halves.

        MLX dequantizes in the dtype of the scales: in bfloat16 that adds two thirds of
        the error that 8-bit rows have already.
        """

        def widen(array: mx.array) -> mx.array:
            is_float = mx.issubdtype(array.dtype, mx.floating)
            return array.astype(mx.float32) if is_float else array

        return self.map(widen)

    def take(self, row_ids: mx.array | slice) -> PackedRows:
        """Return the rows ``row_ids``, of any shape, or a slice, bit for bit."""
        return self.map(lambda array: array[row_ids])

    @staticmethod
    def concatenate(parts: Sequence[PackedRows]) -> PackedRows:
        """Return rows one after the other; all parts have one quantization."""
        first = parts[0]

        def join(name: str) -> mx.array | None:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else mx.concatenate(arrays)

        weight = mx.concatenate([part.weight for part in parts])
        return PackedRows(weight, join("scales"), join("biases"), first.quantization)

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


def dense_bytes(shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    """Return the bytes of ``(V, D)`` weights as mlx-lm quantizes them by default."""
    (vocab_size, hidden_size), bits = shape, DENSE_BITS
    packing = affine(bits, hidden_size)
    if packing is None:
        return vocab_size * hidden_size * dtype.size
    groups = hidden_size // packing.group_size
    return vocab_size * (hidden_size * bits // 8 + groups * 2 * dtype.size)


def pack_rows(rows: mx.array, quantization: Quantization | None) -> PackedRows:
    """Quantize float rows ``(R, D)``; ``None`` keeps them as they are."""
    if quantization is None:
        return PackedRows(rows)
    weight, scales, *biases = mx.quantize(
        rows, quantization.group_size, quantization.bits, mode=quantization.mode
    )
    return PackedRows(weight, scales, biases[0] if biases else None, quantization)


def pack_rows_closely(
    rows: np.ndarray, quantization: Quantization | None, dtype: mx.Dtype
) -> PackedRows:
    """Quantize float32 rows ``(R, d)`` with the least squared error, or cast them.

    ``mx.quantize`` spans each group from its least to its largest weight. At 2 bits a
    narrower span takes a third off the error of normally distributed weights; the
    format is the same. Scales and biases are fitted by turns with the rounding.

    Args:
        rows: ``(R, d)``, float32.
        quantization: Affine, 2, 4 or 8 bits; ``None`` only casts.
        dtype: Of scales and biases, or of the rows.
    """
    if quantization is None:
        return PackedRows(mx.array(rows).astype(dtype))
    bits, largest = quantization.bits, (1 << quantization.bits) - 1
    groups = rows.reshape(len(rows), -1, quantization.group_size)
    mean = groups.mean(axis=-1, keepdims=True)
    if bits == 2:
        scales = _NORMAL_STEP * groups.std(axis=-1, keepdims=True)
        biases = mean - scales * largest / 2
    else:
        # With more bits, to clip a weight costs more than finer steps save.
        biases = groups.min(axis=-1, keepdims=True)
        scales = (groups.max(axis=-1, keepdims=True) - biases) / largest
    for _ in range(_FITTING_ROUNDS):
        values = _rounded(groups, scales, biases, largest)
        offsets = values - values.mean(axis=-1, keepdims=True)
        spread = (offsets**2).sum(axis=-1, keepdims=True)
        slope = (offsets * groups).sum(axis=-1, keepdims=True)
        scales = np.divide(slope, spread, out=scales, where=spread > 0)
        biases = mean - scales * values.mean(axis=-1, keepdims=True)
    stored = [mx.array(a[..., 0]).astype(dtype) for a in (scales, biases)]
    scales, biases = (np.array(a.astype(mx.float32))[..., None] for a in stored)
    values = _rounded(groups, scales, biases, largest).astype(np.uint32)
    fields = values.reshape(len(rows), -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = np.bitwise_or.reduce(fields << shifts, axis=-1)
    return PackedRows(mx.array(words), stored[0], stored[1], quantization)


def _rounded(
    groups: np.ndarray, scales: np.ndarray, biases: np.ndarray, largest: int
) -> np.ndarray:
    """Return the stored integers, as floats; a group of equal weights is all zero."""
    steps = np.divide(groups - biases, scales, where=scales != 0, out=groups * 0)
    return np.clip(np.rint(steps), 0, largest)


def float_rows(rows: PackedRows) -> np.ndarray:
    """Return rows as float32 ``(R, D)``, a chunk at a time.

    Raises:
        ValueError: If any of them holds NaN or infinity; says how many.
    """
    floats = np.empty((0, 0), np.float32)
    for start in range(0, rows.num_rows, _ROWS_PER_CHUNK):
        part = slice(start, start + _ROWS_PER_CHUNK)
        chunk = rows.take(part).widened().dequantize().astype(mx.float32)
        if start == 0:
            floats = np.empty((rows.num_rows, chunk.shape[1]), np.float32)
        floats[part] = np.array(chunk)
    # A row's sum is finite exactly if its entries are, short of overflow at 1e38.
    with np.errstate(invalid="ignore"):
        bad = int(np.count_nonzero(~np.isfinite(floats.sum(axis=1))))
    if bad:
        raise ValueError(
            f"{bad} of the head's {len(floats)} rows hold NaN or infinity; the model "
            "is damaged: download it again."
        )
    return floats


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
