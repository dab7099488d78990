"""A head's figures against brute force."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kernel_cases import in_float64, random_hidden
from mlx.utils import tree_flatten
from oracles import dense_logits, flash_logits, float_rows, random_head

from mlx_flashhead import measure
from mlx_flashhead.config import Quantization
from mlx_flashhead.measure import (
    dense_tokens,
    head_bytes,
    head_tokens,
    measure_head,
    rounded_rows,
)

D = 64


def layer_bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_bytes_are_those_of_the_arrays(bits, dtype, has_bias):
    rows = None if bits == 16 else Quantization(bits, 64)
    head = random_head(
        rows=rows, centroids=Quantization(4, 64), dtype=dtype, has_bias=has_bias
    )
    # V = 52, 11 clusters of 5 rows, 4 of them probed.
    layer = nn.Linear(D, 52, bias=has_bias)
    layer.set_dtype(dtype)
    same_bits = layer if rows is None else layer.to_quantized(64, bits)

    actual = head_bytes(head)

    assert actual.stored == layer_bytes(head)
    assert actual.overhead == layer_bytes(head) - layer_bytes(same_bits)
    assert actual.dense_4bit == layer_bytes(layer.to_quantized(64, 4))
    bias_bytes = 52 * dtype.size * has_bias
    row_bytes = (layer_bytes(same_bits) - bias_bytes) // 52
    assert actual.read_per_token == (
        layer_bytes(head.centroids) + 4 * 5 * row_bytes + 55 * 4 + bias_bytes
    )


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_probes", [3, 5, 11])
def test_figures_match_brute_force(num_probes, has_bias):
    head = random_head(
        num_probes=num_probes, rows=Quantization(3, 64), has_bias=has_bias
    )
    # The source's rows are those from which the head's few bits were rounded, or so.
    noise = np.array(random_hidden(52, D, mx.float32, seed=9)) * 0.1
    stored = float_rows(head.rows)[np.array(head.token_slots)]
    dense_rows = (stored + noise).astype(np.float32)
    # 301 is no multiple of the positions that one call probes.
    hidden = random_hidden(301, D, mx.float32, seed=4)

    figures = measure_head(head, dense_rows, hidden)

    bias = in_float64(head.bias) if has_bias else 0
    truth = (in_float64(hidden) @ dense_rows.T + bias).argmax(axis=1)
    logits, is_probed = flash_logits(head, hidden)
    packed = mx.quantize(mx.array(dense_rows), group_size=64, bits=4)
    rounded = in_float64(mx.dequantize(*packed, group_size=64, bits=4))
    rival = (in_float64(hidden) @ rounded.T + bias).argmax(axis=1)
    assert figures.num_positions == 301
    assert figures.recall == is_probed[np.arange(301), truth].mean()
    assert figures.agreement == (logits.argmax(axis=1) == truth).mean()
    assert figures.dense_4bit_agreement == (rival == truth).mean()
    assert 0 < figures.agreement < 1
    assert figures.recall == 1 if num_probes == 11 else figures.recall < 1


def test_tokens_of_a_head_are_probed_whatever_the_number_of_positions():
    head = random_head(num_probes=3)
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
