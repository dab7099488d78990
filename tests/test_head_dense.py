"""Where a head does as MLX's own layers do: dense path, embedding, training, limits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kernel_cases import in_float64, random_hidden
from oracles import (
    HEAD_SHAPES,
    assert_logits,
    dense_logits,
    flash_logits,
    head_shapes,
    random_head,
)
from test_head import D, dtypes, formats

from mlx_flashhead.config import FlashHeadConfig, Quantization
from mlx_flashhead.head import FlashHead, empty_head
from mlx_flashhead.packing import PackedRows, pack_rows


def identity_head(rows: PackedRows, cluster_size: int, dtype: mx.Dtype, bias: mx.array):
    """Return a head whose slots are in token order, with a third of it probed."""
    vocab_size = rows.num_rows
    num_clusters = vocab_size // cluster_size
    config = FlashHeadConfig(
        base_model_type="llama",
        head_path="lm_head",
        tied=False,
        vocab_size=vocab_size,
        hidden_size=D,
        cluster_size=cluster_size,
        centroid_dims=3,
        num_probes=num_clusters // 3,
        num_pinned=0,
        dtype=str(dtype).removeprefix("mlx.core."),
        rows=rows.quantization,
        centroids=None,
        has_bias=True,
    )
    tokens = mx.arange(vocab_size, dtype=mx.uint32)
    maps = {"cluster_tokens": tokens.reshape(-1, cluster_size), "token_slots": tokens}
    return FlashHead(
        config,
        rows=rows,
        centroids=PackedRows(mx.zeros((num_clusters, 3), dtype)),
        centroid_bias=mx.zeros((num_clusters,)),
        projection=mx.zeros((4, D), dtype),
        bias=bias,
        **maps if cluster_size > 1 else {},
    )


@pytest.mark.parametrize("cluster_size", [1, 4])
@formats
@dtypes
def test_dense_path_is_the_layers_own_product_bit_for_bit(rows, dtype, cluster_size):
    packed = pack_rows(random_hidden(24, D, dtype, seed=1), rows)
    # In halves, MLX's float layer adds its bias before it rounds.
    has_bias = rows is not None or dtype == mx.float32
    bias = random_hidden(1, 24, dtype, seed=2)[0] * has_bias
    head = identity_head(packed, cluster_size, dtype, bias)
    if rows is None:
        layer = nn.Linear(D, 24)
    else:
        layer = nn.QuantizedLinear(D, 24, True, rows.group_size, rows.bits, rows.mode)
        layer.scales, layer.biases = packed.scales, packed.biases
    layer.weight, layer.bias = packed.weight, bias
    # Above the limit of three positions.
    hidden = random_hidden(7, D, dtype, seed=3)

    actual = head(hidden)

    assert bool(mx.array_equal(actual, layer(hidden)))


@head_shapes
def test_dense_path_starts_above_max_probed_positions(shape):
    head = random_head(has_bias=True, **shape)
    limit = head.config.max_probed_positions
    hidden = random_hidden(limit + 1, D, mx.float32, seed=4)

    probed, dense = head.logits(hidden[:limit]), head.logits(hidden)

    assert limit == head.config.num_clusters // head.config.num_probes > 1
    assert_logits(probed, flash_logits(head, hidden[:limit])[0], D)
    assert_logits(dense, dense_logits(head, hidden), D)
    assert np.abs(in_float64(dense)[:limit] - in_float64(probed)).max() > 0.1


@head_shapes
@pytest.mark.parametrize("tied", [False, True])
def test_decoding_neither_evaluates_nor_copies_to_the_host(tied, shape):
    head = random_head(tied=tied, rows=Quantization(8, 64), **shape)
    hidden = random_hidden(2, D, mx.float32, seed=4)

    # While compile traces, MLX refuses to evaluate or to hand values to the host.
    traced = mx.compile(head.logits)(hidden)

    assert traced.shape == (2, head.config.vocab_size)
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda h: mx.array(np.array(head.logits(h))))(hidden)


@head_shapes
@formats
@dtypes
def test_tied_embedding_is_the_base_embedding_bit_for_bit(rows, dtype, shape):
    head = random_head(tied=True, rows=rows, dtype=dtype, **shape)
    vocab_size = head.config.vocab_size
    weight = random_hidden(vocab_size, D, dtype, seed=8)
    layer = nn.Embedding(vocab_size, D)
    layer.weight = weight
    if rows is not None:
        layer = layer.to_quantized(rows.group_size, rows.bits, rows.mode)
    in_slots = weight
    if "cluster_tokens" in head:
        tokens = np.array(head.cluster_tokens).reshape(-1)
        in_slots = weight[mx.array(np.where(tokens < vocab_size, tokens, 0))]
    packed = pack_rows(in_slots, rows)
    head.weight = packed.weight
    if rows is not None:
        head.scales, head.biases = packed.scales, packed.biases
    token_ids = mx.array([[0, vocab_size - 1, 7], [7, 30, 2]])

    actual = head(token_ids)

    assert actual.dtype == layer(token_ids).dtype
    assert bool(mx.array_equal(actual, layer(token_ids)))


@head_shapes
def test_zero_rows_and_zero_hidden_states(shape):
    head = random_head(has_bias=True, **shape)
    rows = mx.arange(head.config.num_slots)[:, None]
    head.weight = mx.where(rows % 3 == 0, 0.0, head.weight)
    hidden = mx.concatenate([mx.zeros((1, D)), random_hidden(1, D, mx.float32, seed=0)])

    actual = head.logits(hidden)

    expected, is_probed = flash_logits(head, hidden)
    assert_logits(actual, expected, D)
    # Where a row is read, the head's bias is left; elsewhere its centroid's.
    probed = np.flatnonzero(is_probed[0])
    bias = np.array(head.bias)
    np.testing.assert_array_equal(np.array(actual[0])[probed], bias[probed])
    others = np.flatnonzero(~is_probed[0])
    clusters = np.array(head.slots(mx.array(others))) // head.config.cluster_size
    of_clusters = np.array(head.centroids.bias)[clusters]
    np.testing.assert_array_equal(np.array(actual[0])[others], of_clusters)


def all_probed(shape: str, **options) -> FlashHead:
    shape = HEAD_SHAPES[shape]
    num_clusters = shape.get("num_clusters", 11)
    return random_head(**shape | {"num_probes": num_clusters}, **options)


@pytest.mark.parametrize("shape", HEAD_SHAPES)
def test_huge_logits_overflow_as_in_a_dense_head(shape):
    head = all_probed(shape, dtype=mx.float16)
    hidden = random_hidden(1, D, mx.float16, seed=0) * 10000

    actual = np.array(head.logits(hidden))

    expected = dense_logits(head, hidden)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(actual, expected.astype(np.float16), rtol=0.01)
    assert np.isposinf(actual).any()
    assert np.isneginf(actual).any()


@pytest.mark.parametrize("shape", HEAD_SHAPES)
@pytest.mark.parametrize("rows", [None, Quantization(8, 64)], ids=["float", "8-bit"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_hidden_states_that_are_not_finite_give_the_dense_heads_logits(
    rows, value, shape
):
    head = all_probed(shape, rows=rows)
    hidden = random_hidden(1, D, mx.float32, seed=0)
    hidden[0, 9] = value

    actual, dense = head.logits(hidden), head.dense_logits(hidden)

    np.testing.assert_array_equal(np.isnan(actual), np.isnan(dense))
    np.testing.assert_array_equal(np.isposinf(actual), np.isposinf(dense))
    assert not np.isfinite(np.array(actual)).any()


@head_shapes
def test_one_bad_position_leaves_the_others_alone(shape):
    # Few enough probes that three positions take the probing path.
    head = random_head(**shape | {"num_probes": 3, "num_clusters": 29, "pinned": [7]})
    hidden = random_hidden(3, D, mx.float32, seed=0)
    hidden[1] = mx.nan

    actual = head.logits(hidden)

    good = mx.array([0, 2])
    assert np.isnan(np.array(actual[1])).all()
    assert_logits(actual[good], flash_logits(head, hidden[good])[0], D)


@head_shapes
@formats
def test_empty_head_has_the_arrays_of_a_real_one(rows, shape):
    head = random_head(rows=rows, centroids=Quantization(2, 32), has_bias=True, **shape)

    empty = empty_head(head.config)

    def kinds(module):
        return nn.utils.tree_map(lambda a: (a.shape, a.dtype), module.parameters())

    assert kinds(empty) == kinds(head)
    assert type(empty) is FlashHead
    assert ("cluster_tokens" in empty) == (head.config.cluster_size > 1)


@head_shapes
def test_head_is_frozen(shape):
    assert random_head(**shape).trainable_parameters() == {"centroids": {}}


@head_shapes
def test_training_has_the_dense_heads_gradient(shape):
    head = random_head(**shape)
    hidden = random_hidden(1, D, mx.float32, seed=0)
    tokens = mx.arange(head.config.vocab_size)
    weight = head.rows.dequantize()[head.slots(tokens)]

    head.train()
    gradient = mx.grad(lambda h: head(h).square().sum())(hidden)

    expected = mx.grad(lambda h: (h @ weight.T).square().sum())(hidden)
    error = mx.abs(gradient - expected).max() / mx.abs(expected).max()
    assert error < 1e-5
    assert not head.eval().training
