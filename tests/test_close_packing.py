"""Packing with the least error, and rows as floats: MLX's format, better values."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import in_float64, unpack_in_numpy

from mlx_flashhead import packing
from mlx_flashhead.config import Quantization
from mlx_flashhead.packing import (
    PackedRows,
    float_rows,
    pack_rows,
    pack_rows_closely,
)

BITS = [2, 4, 8]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def squared_error(rows: PackedRows, wanted: np.ndarray) -> float:
    values, _ = unpack_in_numpy(rows)
    return float(((values - wanted) ** 2).mean())


def arrays_of(rows: PackedRows) -> list[mx.array]:
    return [a for a in (rows.weight, rows.scales, rows.biases) if a is not None]


def assert_same_bits(left: PackedRows, right: PackedRows) -> None:
    assert left.quantization == right.quantization
    for ours, theirs in zip(arrays_of(left), arrays_of(right), strict=True):
        assert ours.dtype == theirs.dtype
        views = [np.array(array.view(mx.uint8)) for array in (ours, theirs)]
        np.testing.assert_array_equal(*views)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shift", [0, 3])
def test_error_is_less_than_of_plain_quantization(bits, group_size, shift):
    rows = normal(300, 256) + np.float32(shift)
    quantization = Quantization(bits, group_size)

    packed = pack_rows_closely(rows, quantization, mx.float32)

    plain = pack_rows(mx.array(rows), quantization)
    # At 2 bits plain quantization suffers from the weights far out, of which small
    # groups have fewer.
    share = 0.7 if bits == 2 and group_size > 32 else 0.95
    assert squared_error(packed, rows) < share * squared_error(plain, rows)


@dtypes
@pytest.mark.parametrize("bits", BITS)
def test_mlx_unpacks_scale_times_integer_plus_bias_bit_for_bit(bits, dtype):
    rows = normal(23, 128)

    packed = pack_rows_closely(rows, Quantization(bits, 64), dtype)

    assert packed.weight.dtype == mx.uint32
    assert packed.weight.shape == (23, 128 * bits // 32)
    assert packed.scales.dtype == packed.biases.dtype == dtype
    assert packed.scales.shape == packed.biases.shape == (23, 2)
    # One rounding of exact products and sums: scales have at most 24 bits.
    expected = unpack_in_numpy(packed)[0].astype(np.float32)
    unpacked = np.array(packed.widened().dequantize())
    np.testing.assert_allclose(unpacked, expected, rtol=0, atol=1e-6)
    assert in_float64(packed.dequantize()).shape == rows.shape


@dtypes
@pytest.mark.parametrize("bits", BITS)
def test_integers_are_the_nearest_for_the_scales_that_are_stored(bits, dtype):
    rows = normal(11, 64)

    packed = pack_rows_closely(rows, Quantization(bits, 64), dtype)

    scales, biases = in_float64(packed.scales), in_float64(packed.biases)
    choices = scales[..., None] * np.arange(2**bits) + biases[..., None]
    least = np.abs(rows[..., None] - choices).min(axis=-1)
    values, _ = unpack_in_numpy(packed)
    np.testing.assert_allclose(np.abs(rows - values), least, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_scales_are_a_least_squares_fit(bits):
    rows = normal(40, 64)

    packed = pack_rows_closely(rows, Quantization(bits, 64), mx.float32)

    # Any line through the same integers is at best a little better.
    values, _ = unpack_in_numpy(packed)
    scales, biases = in_float64(packed.scales), in_float64(packed.biases)
    integers = np.rint((values - biases) / scales)
    for row, q, ours in zip(rows, integers, values, strict=True):
        fitted = np.polyval(np.polyfit(q, row.astype(np.float64), 1), q)
        error = ((row - ours) ** 2).sum()
        assert error <= 1.05 * ((row - fitted) ** 2).sum()


@dtypes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_equal_weights_are_stored_exactly(value, bits, dtype):
    rows = normal(5, 128)
    rows[:, 64:] = value

    packed = pack_rows_closely(rows, Quantization(bits, 64), dtype)

    values, _ = unpack_in_numpy(packed)
    assert (values[:, 64:] == value).all()
    assert not in_float64(packed.scales)[:, 1].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_tiny_and_huge_weights_stay_finite(scale, bits):
    rows = normal(5, 64) * np.float32(scale)

    packed = pack_rows_closely(rows, Quantization(bits, 64), mx.float32)

    allowed = {2: 0.2, 4: 0.02, 8: 1e-4}[bits] * rows.astype(np.float64).var()
    assert squared_error(packed, rows) < allowed


@dtypes
def test_without_quantization_rows_are_cast(dtype):
    rows = normal(3, 7)

    packed = pack_rows_closely(rows, None, dtype)

    assert_same_bits(packed, PackedRows(mx.array(rows).astype(dtype)))


@pytest.mark.parametrize(
    "quantization", [None, Quantization(2, 64), Quantization(4, 32, "mxfp4")], ids=str
)
def test_concatenated_parts_are_the_whole(quantization):
    rows = mx.array(normal(12, 64))
    parts = [pack_rows(rows[part], quantization) for part in (slice(5), slice(5, 12))]

    whole = PackedRows.concatenate(parts)

    assert_same_bits(whole, pack_rows(rows, quantization))


@dtypes
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1 << 14])
@pytest.mark.parametrize(
    "quantization", [None, Quantization(8, 64), Quantization(4, 32)], ids=str
)
def test_float_rows_are_exact(quantization, rows_per_chunk, dtype, monkeypatch):
    monkeypatch.setattr(packing, "_ROWS_PER_CHUNK", rows_per_chunk)
    packed = pack_rows(mx.array(normal(12, 128)).astype(dtype), quantization)

    floats = float_rows(packed)

    assert floats.dtype == np.float32
    # Not rounded to the type of the scales.
    expected, _ = unpack_in_numpy(packed)
    np.testing.assert_allclose(floats, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows_per_chunk", [4, 1 << 14])
def test_float_rows_count_what_is_not_finite(rows_per_chunk, monkeypatch):
    monkeypatch.setattr(packing, "_ROWS_PER_CHUNK", rows_per_chunk)
    rows = normal(12, 8)
    rows[2, 3] = np.nan
    rows[7] = np.inf
    # Infinities that cancel out.
    rows[11, :2] = np.inf, -np.inf

    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(ValueError, match="3 of the head's 12 rows hold NaN or inf"),
    ):
        float_rows(PackedRows(mx.array(rows)))
