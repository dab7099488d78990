"""The steps of the clustering: similarity, balance, prior, sums."""

import numpy as np
import pytest

from mlx_flashhead.clustering import centroids as cluster_sums
from mlx_flashhead.clustering import (
    prior_weights,
    similarity,
    token_prior,
    weighted_sums,
)
from mlx_flashhead.clustering.balance import balance_clusters


# 1, 13: fewer centroids than wanted or hardly more; 1000, 1031: strips with and
# without columns left over.
@pytest.mark.parametrize("num_clusters", [1, 13, 60, 1000, 1031])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_largest_products_equals_brute_force(num_clusters, on_gpu, monkeypatch):
    # The MLX branch runs on any device; only the choice is by GPU.
    monkeypatch.setattr(similarity, "_gpu_ready", lambda: on_gpu)
    monkeypatch.setattr(similarity, "_VALUES_PER_CHUNK", 40 * num_clusters)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((101, 7), dtype=np.float32)
    centroids = rng.standard_normal((num_clusters, 7), dtype=np.float32)
    reports = []

    ids, values = similarity.largest_products(rows, centroids, 12, reports.append)

    products = rows.astype(np.float64) @ centroids.astype(np.float64).T
    expected = np.argsort(-products, axis=1)[:, :12]
    assert np.array_equal(ids, expected)
    np.testing.assert_allclose(
        values, np.take_along_axis(products, expected, axis=1), rtol=0, atol=1e-5
    )
    assert reports == [40, 40, 21]


def test_largest_products_copes_with_equal_centroids():
    ids, values = similarity.largest_products(
        np.ones((3, 2), np.float32), np.ones((500, 2), np.float32), 9
    )

    assert [len(set(row)) for row in ids.tolist()] == [9, 9, 9]
    assert (values == 2).all()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_rescore_clusters_orders_the_candidates_by_brute_force(on_gpu, monkeypatch):
    monkeypatch.setattr(similarity, "_gpu_ready", lambda: on_gpu)
    monkeypatch.setattr(similarity, "_VALUES_PER_CHUNK", 10 * 6 * 7)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((23, 7), dtype=np.float32)
    centroids = rng.standard_normal((50, 7), dtype=np.float32)
    ids = rng.permuted(np.tile(np.arange(50, dtype=np.int32), (23, 1)), axis=1)[:, :6]
    reports = []

    ordered, values = similarity.rescore_clusters(rows, centroids, ids, reports.append)

    for row in range(23):
        products = centroids[ids[row]].astype(np.float64) @ rows[row]
        best_first = np.argsort(-products)
        assert ordered[row].tolist() == ids[row][best_first].tolist()
        np.testing.assert_allclose(values[row], products[best_first], rtol=0, atol=1e-5)
    assert reports == [10, 10, 3]


@pytest.mark.parametrize("num_candidates", [12, 100])
def test_balance_clusters_equals_greedy_over_all_pairs(num_candidates):
    # A stable matching by one similarity is what the greedy rule yields: take
    # the most similar pair, as long as the cluster has room, and go on.
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((47, 5), dtype=np.float32)
    centroids = rng.standard_normal((12, 5), dtype=np.float32)
    room = np.array([4] * 11 + [3])

    candidates = similarity.largest_products(rows, centroids, num_candidates)
    actual = balance_clusters(rows, centroids, room, *candidates)

    products = rows @ centroids.T
    expected, left = np.full(47, -1), room.copy()
    for pair in np.argsort(-products, axis=None):
        row, cluster = divmod(int(pair), 12)
        if expected[row] < 0 and left[cluster]:
            expected[row] = cluster
            left[cluster] -= 1
    assert np.array_equal(actual, expected)


def test_balance_clusters_fills_each_when_all_rows_want_the_same():
    rows = np.ones((1000, 3), dtype=np.float32)
    centroids = np.random.default_rng(0).standard_normal((100, 3), dtype=np.float32)

    candidates = similarity.largest_products(rows, centroids, 4)
    clusters = balance_clusters(rows, centroids, np.full(100, 10), *candidates)

    assert (np.bincount(clusters, minlength=100) == 10).all()


def test_token_prior_counts_only_used_tokens():
    prior = token_prior(8, skip=[0, 1, 4, 4])

    ranks = np.array([5, 5, 0, 1, 5, 2, 3, 4])  # skipped ones come last
    assert prior.dtype == np.float32
    np.testing.assert_allclose(prior, 1 / (ranks + 200), rtol=1e-6)


def test_token_prior_counts_from_zero_without_skipped_tokens():
    np.testing.assert_allclose(token_prior(3), [1 / 200, 1 / 201, 1 / 202], rtol=1e-6)


def test_token_prior_of_skipped_tokens_only_is_flat():
    assert len(set(token_prior(4, skip=range(4)).tolist())) == 1


@pytest.mark.parametrize("skip", [[5], [-1, 2]])
def test_token_prior_refuses_ids_outside_the_vocabulary(skip):
    with pytest.raises(ValueError, match=r"must be in \[0, 5\)"):
        token_prior(5, skip=skip)


def test_prior_weights_are_the_priors_power():
    prior = np.random.default_rng(2).uniform(1e-6, 1.0, 11).astype(np.float32)

    weights = prior_weights(prior)

    expected = prior.astype(np.float64) ** 0.75
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_prior_weights_do_not_depend_on_the_priors_scale(dtype):
    prior = np.arange(1, 9, dtype=dtype)

    tiny = prior_weights(prior * dtype(1e-37))

    np.testing.assert_allclose(tiny, prior_weights(prior), rtol=1e-5)


def test_prior_weights_of_very_unlikely_tokens_are_positive():
    weights = prior_weights(np.array([1.0, 1e-300]))

    assert weights[1] > 0
    assert weights[0] == 1


@pytest.mark.parametrize(
    "prior", [np.array([1, 1, 0, 1.0]), np.array([1, -1.0]), np.array([1, np.nan])]
)
def test_prior_weights_refuse_what_is_not_positive(prior):
    with pytest.raises(ValueError, match="positive"):
        prior_weights(prior)


# Chunks of one cluster, of two, and one for all.
@pytest.mark.parametrize("rows_per_chunk", [1, 8, 4096])
def test_weighted_sums_equal_brute_force(rows_per_chunk, monkeypatch):
    monkeypatch.setattr(cluster_sums, "_ROWS_PER_CHUNK", rows_per_chunk)
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((11, 5), dtype=np.float32)
    weights = rng.uniform(0, 1, 11).astype(np.float32)
    tokens = np.array([[3, 0, 7, 9], [1, 10, 2, 4], [5, 6, 8, 11]], dtype=np.uint32)

    sums = weighted_sums(rows, tokens, weights)

    assert sums.dtype == np.float32
    for actual, members in zip(sums, tokens.tolist(), strict=True):
        kept = [token for token in members if token < 11]
        expected = weights[kept].astype(np.float64) @ rows[kept].astype(np.float64)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
