"""The head against float64 answers and against MLX's own layers."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kernel_cases import in_float64, random_hidden
from oracles import assert_logits, dense_logits, flash_logits, random_head

from mlx_flashhead.config import FlashHeadConfig, Quantization
from mlx_flashhead.head import FlashEmbedding, FlashHead, empty_head
from mlx_flashhead.packing import PackedRows, pack_rows

D = 64
FORMATS = {
    "float": None,
    **{f"affine {bits}": Quantization(bits, 32) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": Quantization(4, 32, "mxfp4"),
    "nvfp4": Quantization(4, 16, "nvfp4"),
    "mxfp8": Quantization(8, 32, "mxfp8"),
}
formats = pytest.mark.parametrize("rows", FORMATS.values(), ids=FORMATS)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def identity_head(rows: PackedRows, *, tied: bool, dtype: mx.Dtype, **arrays):
    """Return a head whose slots are in token order, in clusters of four."""
    vocab_size = rows.num_rows
    config = FlashHeadConfig(
        base_model_type="llama",
        head_path="lm_head",
        tied=tied,
        vocab_size=vocab_size,
        hidden_size=D,
        cluster_size=4,
        num_probes=2,
        num_pinned=0,
        dtype=str(dtype).removeprefix("mlx.core."),
        rows=rows.quantization,
        centroids=None,
        has_bias="bias" in arrays,
    )
    tokens = mx.arange(vocab_size, dtype=mx.uint32)
    return (FlashEmbedding if tied else FlashHead)(
        config,
        rows=rows,
        centroids=PackedRows(mx.zeros((vocab_size // 4, D), dtype)),
        centroid_bias=mx.zeros((vocab_size // 4,)),
        cluster_tokens=tokens.reshape(-1, 4),
        token_slots=tokens,
        **arrays,
    )


@formats
@dtypes
def test_logits_match_oracle(rows, dtype):
    head = random_head(rows=rows, centroids=Quantization(4, 32), dtype=dtype)
    hidden = random_hidden(2, D, dtype, seed=3)

    actual = head.logits(hidden)

    expected, is_probed = flash_logits(head, hidden)
    assert actual.dtype == dtype
    # Two clusters of five, and the pinned ones, of which padding leaves fewer.
    assert (is_probed.sum(axis=1) <= 20).all()
    assert (is_probed.sum(axis=1) >= 17).all()
    assert_logits(actual, expected, D)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_head_bias_and_centroid_bits(bits, has_bias):
    head = random_head(
        centroids=bits and Quantization(bits, 64), has_bias=has_bias, seed=5
    )
    hidden = random_hidden(2, D, mx.float32, seed=6)

    actual = head.logits(hidden)

    expected, _ = flash_logits(head, hidden)
    assert_logits(actual, expected, D)


def test_positions_choose_their_own_clusters_in_any_shape():
    head = random_head(num_clusters=29, num_probes=3, num_pinned=1, padding=4)
    hidden = random_hidden(6, D, mx.float32, seed=7)

    batched = head.logits(hidden.reshape(3, 2, D))

    expected, is_probed = flash_logits(head, hidden)
    assert len(np.unique(is_probed, axis=0)) == 6
    assert batched.shape == (3, 2, 29 * 5 - 4)
    assert_logits(batched.reshape(6, -1), expected, D)
    for position in range(6):
        alone = head.logits(hidden[position])
        assert alone.shape == (29 * 5 - 4,)
        assert_logits(alone, expected[position], D)


def test_no_position_gives_no_logits():
    head = random_head()

    assert head.logits(mx.zeros((0, D))).shape == (0, 52)
    assert head.logits(mx.zeros((2, 0, D))).shape == (2, 0, 52)


def test_tied_scores_go_to_the_smaller_cluster_id():
    # Small integers: every score is exact, and most clusters share one.
    head = random_head(num_clusters=40, num_probes=9, num_pinned=2)
    random = np.random.default_rng(0)
    centroids = np.zeros((40, D), np.float32)
    centroids[:, 0] = random.integers(-1, 2, 40)
    head.centroids.weight = mx.array(centroids)
    head.centroids.bias = mx.array(random.integers(-1, 2, 40).astype(np.float32))
    hidden = random_hidden(4, D, mx.float32, seed=1)
    hidden[:, 0] = mx.array([1.0, -1.0, 2.0, 0.0])

    actual = head.logits(hidden)

    expected, _ = flash_logits(head, hidden)
    assert_logits(actual, expected, D)
    probed = np.array(head.probed_clusters(hidden))
    assert (probed.sum(axis=1) == 9).all()
    assert probed[:, :2].all()


@pytest.mark.parametrize("num_pinned", [0, 4, 11])
@pytest.mark.parametrize("rows", [None, Quantization(8, 64)])
def test_every_cluster_probed_equals_dense(num_pinned, rows):
    head = random_head(num_probes=11, num_pinned=num_pinned, rows=rows, has_bias=True)
    hidden = random_hidden(1, D, mx.float32, seed=2)

    actual = head.logits(hidden)

    assert_logits(actual, dense_logits(head, hidden), D)


def test_only_pinned_clusters_probed():
    head = random_head(num_probes=3, num_pinned=3)
    hidden = random_hidden(2, D, mx.float32, seed=2)

    actual = head.logits(hidden)

    expected, is_probed = flash_logits(head, hidden)
    pinned_tokens = np.array(head.cluster_tokens)[:3].reshape(-1)
    assert set(np.flatnonzero(is_probed[0])) == set(pinned_tokens) - {52}
    assert_logits(actual, expected, D)


def test_pinned_clusters_are_probed_though_others_score_higher():
    head = random_head(num_clusters=401, num_probes=9, num_pinned=6)
    hidden = random_hidden(2, D, mx.float32, seed=2)
    head.centroids.bias = mx.where(mx.arange(401) < 6, -1000.0, 0.0)

    actual = head.logits(hidden)

    expected, _ = flash_logits(head, hidden)
    assert_logits(actual, expected, D)


@formats
@dtypes
def test_dense_path_is_the_layers_own_product_bit_for_bit(rows, dtype):
    packed = pack_rows(random_hidden(24, D, dtype, seed=1), rows)
    # In halves, MLX's float layer adds its bias before it rounds.
    has_bias = rows is not None or dtype == mx.float32
    bias = random_hidden(1, 24, dtype, seed=2)[0] * has_bias
    head = identity_head(packed, tied=False, dtype=dtype, bias=bias)
    if rows is None:
        layer = nn.Linear(D, 24)
    else:
        layer = nn.QuantizedLinear(D, 24, True, rows.group_size, rows.bits, rows.mode)
        layer.scales, layer.biases = packed.scales, packed.biases
    layer.weight, layer.bias = packed.weight, bias
    # Seven positions and two probes of six clusters: above the limit of three.
    hidden = random_hidden(7, D, dtype, seed=3)

    actual = head(hidden)

    assert bool(mx.array_equal(actual, layer(hidden)))


def test_dense_path_starts_above_max_probed_positions():
    head = random_head(num_probes=4)
    limit = head.config.max_probed_positions
    hidden = random_hidden(limit + 1, D, mx.float32, seed=4)

    probed, dense = head.logits(hidden[:limit]), head.logits(hidden)

    assert limit == 2
    assert_logits(probed, flash_logits(head, hidden[:limit])[0], D)
    assert_logits(dense, dense_logits(head, hidden), D)
    assert np.abs(in_float64(dense)[:limit] - in_float64(probed)).max() > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_decoding_neither_evaluates_nor_copies_to_the_host(tied):
    head = random_head(tied=tied, rows=Quantization(8, 64))
    hidden = random_hidden(2, D, mx.float32, seed=4)

    # While compile traces, MLX refuses to evaluate or to hand values to the host.
    traced = mx.compile(head.logits)(hidden)

    assert traced.shape == (2, 52)
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda h: mx.array(np.array(head.logits(h))))(hidden)


@formats
@dtypes
def test_tied_embedding_is_the_base_embedding_bit_for_bit(rows, dtype):
    weight = random_hidden(52, D, dtype, seed=8)
    layer = nn.Embedding(52, D)
    layer.weight = weight
    if rows is not None:
        layer = layer.to_quantized(rows.group_size, rows.bits, rows.mode)
    head = random_head(tied=True, rows=rows, dtype=dtype)
    slots = np.array(head.cluster_tokens).reshape(-1)
    in_slots = weight[mx.array(np.where(slots < 52, slots, 0))]
    packed = pack_rows(in_slots, rows)
    head.weight = packed.weight
    if rows is not None:
        head.scales, head.biases = packed.scales, packed.biases
    token_ids = mx.array([[0, 51, 7], [7, 30, 2]])

    actual = head(token_ids)

    assert actual.dtype == layer(token_ids).dtype
    assert bool(mx.array_equal(actual, layer(token_ids)))


def test_zero_rows_and_zero_hidden_states():
    head = random_head(has_bias=True)
    head.weight = mx.where(mx.arange(55)[:, None] % 3 == 0, 0.0, head.weight)
    hidden = mx.concatenate([mx.zeros((1, D)), random_hidden(1, D, mx.float32, seed=0)])

    actual = head.logits(hidden)

    assert_logits(actual, flash_logits(head, hidden)[0], D)
    assert bool(mx.array_equal(actual[0], head.bias))


def test_huge_logits_overflow_as_in_a_dense_head():
    head = random_head(num_probes=11, dtype=mx.float16)
    hidden = random_hidden(1, D, mx.float16, seed=0) * 10000

    actual = np.array(head.logits(hidden))

    expected = dense_logits(head, hidden)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(actual, expected.astype(np.float16), rtol=0.01)
    assert np.isposinf(actual).any()
    assert np.isneginf(actual).any()


@pytest.mark.parametrize("rows", [None, Quantization(8, 64)], ids=["float", "8-bit"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_hidden_states_that_are_not_finite_give_the_dense_heads_logits(rows, value):
    head = random_head(num_probes=11, rows=rows)
    hidden = random_hidden(1, D, mx.float32, seed=0)
    hidden[0, 9] = value

    actual, dense = head.logits(hidden), head.dense_logits(hidden)

    np.testing.assert_array_equal(np.isnan(actual), np.isnan(dense))
    np.testing.assert_array_equal(np.isposinf(actual), np.isposinf(dense))
    assert not np.isfinite(np.array(actual)).any()


def test_one_bad_position_leaves_the_others_alone():
    head = random_head(num_clusters=29, num_probes=5)
    hidden = random_hidden(3, D, mx.float32, seed=0)
    hidden[1] = mx.nan

    actual = head.logits(hidden)

    good = mx.array([0, 2])
    assert np.isnan(np.array(actual[1])).all()
    assert_logits(actual[good], flash_logits(head, hidden[good])[0], D)


@formats
def test_empty_head_has_the_arrays_of_a_real_one(rows):
    head = random_head(rows=rows, centroids=Quantization(4, 64), has_bias=True)

    empty = empty_head(head.config)

    def kinds(module):
        return nn.utils.tree_map(lambda a: (a.shape, a.dtype), module.parameters())

    assert kinds(empty) == kinds(head)
    assert type(empty) is FlashHead


def test_head_is_frozen():
    assert random_head().trainable_parameters() == {"centroids": {}}


def test_training_has_the_dense_heads_gradient():
    head = random_head(num_clusters=29, num_probes=5)
    hidden = random_hidden(1, D, mx.float32, seed=0)
    weight = head.rows.dequantize()[head.token_slots]

    head.train()
    gradient = mx.grad(lambda h: head(h).square().sum())(hidden)

    expected = mx.grad(lambda h: (h @ weight.T).square().sum())(hidden)
    error = mx.abs(gradient - expected).max() / mx.abs(expected).max()
    assert error < 1e-5
    assert not head.eval().training
