"""A head's figures against brute force."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kernel_cases import in_float64, random_hidden
from mlx.utils import tree_flatten
from oracles import dense_logits, flash_logits, head_shapes, random_head

from mlx_flashhead import measure
from mlx_flashhead.config import Quantization
from mlx_flashhead.measure import (
    dense_tokens,
    head_bytes,
    head_tokens,
    rounded_rows,
)

D = 64


def layer_bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


@head_shapes
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_bytes_are_those_of_the_arrays(bits, dtype, has_bias, shape):
    rows = None if bits == 16 else Quantization(bits, 64)
    options = {"rows": rows, "dtype": dtype, "has_bias": has_bias, **shape}
    head = random_head(centroids=Quantization(2, 32), **options)
    vocab_size = head.config.vocab_size
    layer = nn.Linear(D, vocab_size, bias=has_bias)
    layer.set_dtype(dtype)
    same_bits = layer if rows is None else layer.to_quantized(64, bits)

    actual = head_bytes(head)

    assert actual.stored == layer_bytes(head)
    assert actual.overhead == layer_bytes(head) - layer_bytes(same_bits)
    assert actual.dense_4bit == layer_bytes(layer.to_quantized(64, 4))
    bias_bytes = vocab_size * dtype.size * has_bias
    row_bytes = (layer_bytes(same_bits) - bias_bytes) // vocab_size
    num_rows = head.config.num_probes * head.config.cluster_size
    # Clusters of one row need no map from slots to tokens.
    map_bytes = head.config.num_slots * 4 if head.config.cluster_size > 1 else 0
    assert actual.read_per_token == (
        layer_bytes(head.centroids) + num_rows * row_bytes + map_bytes + bias_bytes
    )


def test_bytes_count_the_rows_that_blocks_add():
    # Two blocks of 4,105 and 4,096 clusters: a share of one is one in each.
    head = random_head(
        num_clusters=8201, cluster_size=1, num_probes=1, pinned=(), centroid_dims=2
    )

    read = head_bytes(head).read_per_token

    assert read == layer_bytes(head.centroids) + 2 * D * 4


@head_shapes
def test_tokens_of_a_head_are_probed_whatever_the_number_of_positions(shape):
    head = random_head(**shape)
    hidden = random_hidden(50, D, mx.float32, seed=1)

    tokens = head_tokens(head, hidden)

    expected, _ = flash_logits(head, hidden)
    np.testing.assert_array_equal(tokens, expected.argmax(axis=1))
    assert (tokens != dense_logits(head, hidden).argmax(axis=1)).any()


def test_dense_tokens_count_the_bias():
    hidden = random_hidden(40, D, mx.float32, seed=1)
    rows = np.array(random_hidden(33, D, mx.float32, seed=2))
    bias = 8 * random_hidden(1, 33, mx.float32, seed=3)[0]

    tokens = dense_tokens(hidden, rows, bias)

    product = in_float64(hidden) @ rows.T.astype(np.float64)
    np.testing.assert_array_equal(tokens, (product + in_float64(bias)).argmax(axis=1))
    np.testing.assert_array_equal(dense_tokens(hidden, rows), product.argmax(axis=1))
    assert (tokens != product.argmax(axis=1)).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("depth", [64, 96, 40])
def test_rounded_rows_are_what_mlx_stores(bits, depth, monkeypatch):
    monkeypatch.setattr(measure, "_ROWS_PER_CHUNK", 7)
    rows = np.array(random_hidden(23, depth, mx.float32, seed=2))

    actual = rounded_rows(rows, bits)

    # 96 has groups of 32; 40 has none and stays as it is.
    group_size = {64: 64, 96: 32}.get(depth)
    expected = rows
    if group_size:
        packed = mx.quantize(mx.array(rows), group_size=group_size, bits=bits)
        expected = mx.dequantize(*packed, group_size=group_size, bits=bits)
    np.testing.assert_array_equal(actual, expected)
