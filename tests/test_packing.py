"""Packing: the bits are MLX's, and moving rows changes none of them."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flashhead.config import Quantization
from mlx_flashhead.packing import (
    PackedRows,
    affine,
    cluster_major,
    pack_rows,
    slots_of_tokens,
)

R, D = 11, 128
PACKINGS = [
    None,
    *(Quantization(bits, 64) for bits in (2, 3, 4, 5, 6, 8)),
    Quantization(4, 32),
    Quantization(4, 128),
    Quantization(4, 32, "mxfp4"),
    Quantization(4, 16, "nvfp4"),
    Quantization(8, 32, "mxfp8"),
]


def float_rows(seed: int = 0) -> mx.array:
    mx.random.seed(seed)
    return mx.random.normal((R, D))


def same_bits(left: mx.array, right: mx.array) -> bool:
    views = [np.array(array.view(mx.uint8)) for array in (left, right)]
    return left.dtype == right.dtype and np.array_equal(*views)


def plain_mlx(rows: mx.array, packing: Quantization) -> tuple[list, dict]:
    """Return MLX's own arrays and the settings they were made with."""
    settings = {
        "group_size": packing.group_size,
        "bits": packing.bits,
        "mode": packing.mode,
    }
    return list(mx.quantize(rows, **settings)), settings


def arrays_of(rows: PackedRows) -> list[mx.array]:
    return [a for a in (rows.weight, rows.scales, rows.biases) if a is not None]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_packed_rows_are_mlx_arrays(packing):
    rows = float_rows()

    packed = pack_rows(rows, packing)

    expected, settings = [rows], {}
    if packing is not None:
        expected, settings = plain_mlx(rows, packing)
    assert packed.num_rows == R
    assert packed.nbytes == sum(array.nbytes for array in expected)
    assert len(arrays_of(packed)) == len(expected)
    for array, plain in zip(arrays_of(packed), expected, strict=True):
        assert same_bits(array, plain)
    dense = rows if packing is None else mx.dequantize(*expected, **settings)
    assert same_bits(packed.dequantize(), dense)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_matmul_is_the_product_with_the_rows(packing):
    rows = pack_rows(float_rows(), packing)
    hidden = mx.random.normal((2, 3, D))

    product = rows.matmul(hidden)

    # The modes without biases come out as bfloat16, which holds them exactly.
    dense = np.array(rows.dequantize().astype(mx.float32)).astype(np.float64)
    expected = np.array(hidden).astype(np.float64) @ dense.T
    assert product.shape == (2, 3, R)
    # Rounding of a float32 dot product of unit-variance terms.
    bound = 4 * np.finfo(np.float32).eps * D
    assert np.abs(np.array(product) - expected).max() <= bound


def test_take_moves_bits():
    packed = pack_rows(float_rows(), Quantization(5, 32))
    wanted = mx.array([[3, 3], [10, 0]])

    taken = packed.take(wanted)

    for before, after in zip(arrays_of(packed), arrays_of(taken), strict=True):
        assert after.shape[:2] == (2, 2)
        assert same_bits(after, before[wanted])
    assert taken.quantization == packed.quantization


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_cluster_major_moves_bits_and_pads_with_zeros(packing):
    packed = pack_rows(float_rows(), packing)
    # 4 clusters of 3 slots for 11 rows; slot 7 is padding.
    tokens = np.array([[4, 0, 9], [1, 10, 2], [8, R, 3], [7, 5, 6]], np.uint32)

    moved = cluster_major(packed, tokens)

    assert moved.num_rows == 12
    for before, after in zip(arrays_of(packed), arrays_of(moved), strict=True):
        for slot, token in enumerate(tokens.reshape(-1).tolist()):
            if token == R:
                assert not after[slot].any()
            else:
                assert same_bits(after[slot], before[token])


def test_nan_rows_move_too():
    rows = float_rows()
    rows[4] = float("nan")
    tokens = np.arange(R, dtype=np.uint32)[::-1].reshape(1, R)

    moved = cluster_major(PackedRows(rows), tokens)

    assert same_bits(moved.weight, rows[::-1])


# 40 and 50: no group size divides them, so mlx-lm leaves such layers floats.
@pytest.mark.parametrize(
    ("bits", "hidden_size", "group_size", "expected"),
    [
        (4, 128, 64, Quantization(4, 64)),
        (8, 640, 64, Quantization(8, 64)),
        (4, 96, 64, Quantization(4, 32)),
        (4, 128, 32, Quantization(4, 32)),
        (4, 256, 128, Quantization(4, 128)),
        (4, 64, 128, Quantization(4, 32)),
        (4, 40, 64, None),
        (8, 50, 32, None),
        (16, 128, 64, None),
    ],
)
def test_affine_picks_a_group_size_that_divides(
    bits, hidden_size, group_size, expected
):
    assert affine(bits, hidden_size, group_size) == expected


@given(st.data())
def test_slots_are_the_inverse_of_any_permutation(data):
    vocab_size = data.draw(st.integers(1, 40))
    cluster_size = data.draw(st.integers(1, vocab_size))
    num_slots = -(-vocab_size // cluster_size) * cluster_size
    tokens = [*range(vocab_size), *[vocab_size] * (num_slots - vocab_size)]
    tokens = np.array(data.draw(st.permutations(tokens)), np.uint32)

    slots = slots_of_tokens(tokens.reshape(-1, cluster_size), vocab_size)

    assert slots.dtype == np.uint32
    assert slots.shape == (vocab_size,)
    assert tokens[slots].tolist() == list(range(vocab_size))


@pytest.mark.parametrize(
    "tokens",
    [
        [[0, 1], [2, 2]],  # twice
        [[0, 1], [2, 4]],  # absent, padding in its place
        [[0, 1], [2, 5]],  # beyond V
        [[0, 1], [2, 2**32 - 1]],
        [[0, 1], [3, 3]],
    ],
)
def test_no_permutation_is_refused(tokens):
    with pytest.raises(ValueError, match="cluster_tokens is no permutation"):
        slots_of_tokens(np.array(tokens, np.uint32), 4)
