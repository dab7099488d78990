"""The head against float64 answers: which clusters it reads, and its logits."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import in_float64, random_hidden
from oracles import (
    HEAD_SHAPES,
    assert_logits,
    centroid_logits,
    dense_logits,
    flash_logits,
    head_shapes,
    random_head,
)

from mlx_flashhead.config import Quantization

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


@head_shapes
@formats
@dtypes
def test_logits_match_oracle(rows, dtype, shape):
    head = random_head(rows=rows, centroids=Quantization(2, 32), dtype=dtype, **shape)
    hidden = random_hidden(2, D, dtype, seed=3)

    actual = head.logits(hidden)

    expected, is_probed = flash_logits(head, hidden)
    assert actual.dtype == dtype
    # Of padding there are three slots.
    config = head.config
    num_rows = config.num_probes * config.cluster_size
    assert (is_probed.sum(axis=1) <= num_rows).all()
    assert (is_probed.sum(axis=1) >= num_rows - 3).all()
    assert num_rows < config.vocab_size / 2
    assert_logits(actual, expected, D)


@head_shapes
@pytest.mark.parametrize("bits", [None, 2, 4, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_head_bias_and_centroid_bits(bits, has_bias, shape):
    head = random_head(
        centroids=bits and Quantization(bits, 32), has_bias=has_bias, seed=5, **shape
    )
    hidden = random_hidden(2, D, mx.float32, seed=6)

    actual = head.logits(hidden)

    expected, _ = flash_logits(head, hidden)
    assert_logits(actual, expected, D)


@pytest.mark.parametrize("centroid_dims", [1, 7, 64])
def test_centroids_of_any_length(centroid_dims):
    head = random_head(centroid_dims=centroid_dims, **HEAD_SHAPES["single rows"])
    hidden = random_hidden(2, D, mx.float32, seed=6)

    actual = head.logits(hidden)

    assert head.centroids.weight.shape == (53, centroid_dims)
    assert_logits(actual, flash_logits(head, hidden)[0], D)


# More clusters than one block holds: two blocks of 4,105 and 4,096.
@pytest.mark.parametrize("cluster_size", [1, 2])
def test_every_block_chooses_its_own_clusters(cluster_size):
    # Chunks of 32 are dealt in turn: 31 is in the first block, 40 in the second.
    head = random_head(
        num_clusters=8201,
        cluster_size=cluster_size,
        num_probes=201,
        padding=1,
        pinned=(31, 40, 8200),
        centroid_dims=3,
    )
    hidden = random_hidden(3, D, mx.float32, seed=6)

    actual = head.logits(hidden)

    expected, is_probed = flash_logits(head, hidden)
    assert head.config.num_probed == 202 > head.config.num_probes
    np.testing.assert_array_equal(np.array(head.probed_tokens(hidden)), is_probed)
    assert_logits(actual, expected, D)
    # Among all clusters others would be the best.
    best = np.argsort(-centroid_logits(head, hidden), axis=1)[:, :202]
    tokens = best if cluster_size == 1 else np.array(head.cluster_tokens)[best, 0]
    assert not np.take_along_axis(is_probed, tokens, axis=1).all()


@head_shapes
def test_positions_choose_their_own_clusters_in_any_shape(shape):
    head = random_head(**shape | {"num_clusters": 59, "num_probes": 6})
    hidden = random_hidden(6, D, mx.float32, seed=7)

    batched = head.logits(hidden.reshape(3, 2, D))

    expected, is_probed = flash_logits(head, hidden)
    vocab_size = head.config.vocab_size
    assert len(np.unique(is_probed, axis=0)) == 6
    assert batched.shape == (3, 2, vocab_size)
    assert_logits(batched.reshape(6, -1), expected, D)
    for position in range(6):
        alone = head.logits(hidden[position])
        assert alone.shape == (vocab_size,)
        assert_logits(alone, expected[position], D)


@head_shapes
def test_probed_tokens_are_those_of_the_best_clusters(shape):
    head = random_head(**shape)
    hidden = random_hidden(40, D, mx.float32, seed=7)

    actual = np.array(head.probed_tokens(hidden))

    _, is_probed = flash_logits(head, hidden)
    np.testing.assert_array_equal(actual, is_probed)
    assert len(np.unique(is_probed, axis=0)) > 3


def test_no_position_gives_no_logits():
    head = random_head()

    assert head.logits(mx.zeros((0, D))).shape == (0, 52)
    assert head.logits(mx.zeros((2, 0, D))).shape == (2, 0, 52)


@pytest.mark.parametrize("pinned", [[], [0, 1, 2, 3], list(range(11)), [10, 4]])
@pytest.mark.parametrize("rows", [None, Quantization(8, 64)])
@pytest.mark.parametrize("cluster_size", [1, 5])
def test_every_cluster_probed_equals_dense(pinned, rows, cluster_size):
    head = random_head(
        num_probes=11,
        pinned=pinned,
        rows=rows,
        has_bias=True,
        cluster_size=cluster_size,
    )
    hidden = random_hidden(1, D, mx.float32, seed=2)

    actual = head.logits(hidden)

    assert np.array(head.probed_tokens(hidden)).all()
    assert_logits(actual, dense_logits(head, hidden), D)


@pytest.mark.parametrize("cluster_size", [1, 5])
def test_only_pinned_clusters_probed(cluster_size):
    pinned = [9, 2, 5]
    head = random_head(num_probes=3, pinned=pinned, cluster_size=cluster_size)
    hidden = random_hidden(2, D, mx.float32, seed=2)

    actual = head.logits(hidden)

    expected, is_probed = flash_logits(head, hidden)
    tokens = set(pinned)
    if cluster_size > 1:
        tokens = set(np.array(head.cluster_tokens)[pinned].reshape(-1)) - {52}
    assert set(np.flatnonzero(is_probed[0])) == tokens
    assert (is_probed[0] == is_probed[1]).all()
    assert_logits(actual, expected, D)


@pytest.mark.parametrize("cluster_size", [1, 5])
def test_pinned_clusters_are_probed_though_others_score_higher(cluster_size):
    head = random_head(
        num_clusters=401,
        num_probes=9,
        pinned=range(400, 388, -2),
        cluster_size=cluster_size,
    )
    hidden = random_hidden(2, D, mx.float32, seed=2)
    # Far below all others, but for the infinite bias.
    weight = np.array(head.centroids.weight)
    weight[400:388:-2] = -1000 * np.sign(np.array(hidden[0]).sum())
    head.centroids.weight = mx.array(weight)

    actual = head.logits(hidden)

    expected, is_probed = flash_logits(head, hidden)
    clusters = np.array(head.slots(mx.arange(head.config.vocab_size))) // cluster_size
    assert is_probed[:, np.isin(clusters, range(400, 388, -2))].all()
    assert_logits(actual, expected, D)


@pytest.mark.parametrize("cluster_size", [1, 5])
def test_tied_scores_go_to_the_smaller_cluster_id(cluster_size):
    # Small integers: every score is exact, and most clusters share one.
    head = random_head(num_clusters=40, num_probes=9, cluster_size=cluster_size)
    random = np.random.default_rng(0)
    centroids = np.zeros((40, 32), np.float32)
    centroids[:, 0] = random.integers(-1, 2, 40)
    head.centroids.weight = mx.array(centroids)
    bias = random.integers(-1, 2, 40).astype(np.float16)
    bias[:2] = np.inf
    head.centroids.bias = mx.array(bias)
    projection = np.zeros((33, D), np.float32)
    projection[[0, -1], [0, 1]] = 1
    head.centroids.projection = mx.array(projection)
    hidden = random_hidden(4, D, mx.float32, seed=1)
    hidden[:, 0] = mx.array([1.0, -1.0, 2.0, 0.0])
    hidden[:, 1] = mx.array([0.0, 3.0, -2.0, 0.0])

    actual = head.logits(hidden)

    expected, is_probed = flash_logits(head, hidden)
    assert_logits(actual, expected, D)
    np.testing.assert_array_equal(np.array(head.probed_tokens(hidden)), is_probed)
    scores = in_float64(hidden[:, :1]) * centroids[:, 0] + bias
    for row, passes in zip(scores, is_probed, strict=True):
        best = sorted(range(40), key=lambda k, row=row: (-row[k], k))[:9]
        clusters = np.array(head.slots(mx.arange(len(passes)))) // cluster_size
        assert set(clusters[passes]) == set(best)
        assert row[best[-1]] in np.delete(row, best)
