"""Centroids as they are stored, against exact logits in float64."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import in_float64
from oracles import float_rows

from mlx_flashhead import centroids as module
from mlx_flashhead.centroids import ClusterMeans, StoredCentroids, store_centroids
from mlx_flashhead.config import Quantization
from mlx_flashhead.statistics import HiddenStatistics, hidden_statistics

V, D = 83, 64


def random_rows(seed: int = 0) -> np.ndarray:
    """Return rows that share a mean and vary more in some directions."""
    random = np.random.default_rng(seed)
    turn = random.normal(size=(D, D)) * 0.93 ** np.arange(D)
    return (random.normal(size=(V, D)) @ turn.T + random.normal(size=D)).astype("f4")


def random_hidden(count: int = 200, seed: int = 5) -> np.ndarray:
    random = np.random.default_rng(seed)
    turn = random.normal(size=(D, D)) * 0.9 ** np.arange(D)
    states = random.normal(size=(count, D)) @ turn.T + 2 * random.normal(size=D)
    return (states / 4).astype(np.float32)


def random_prior(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(V, 0.3)) + 1e-6


def known(hidden: np.ndarray) -> HiddenStatistics:
    return hidden_statistics(hidden, random_prior())


def stored(
    means: ClusterMeans,
    statistics: HiddenStatistics | None,
    dims: int = D,
    quantization: Quantization | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> StoredCentroids:
    return store_centroids(
        means,
        statistics,
        dims=dims,
        quantization=quantization,
        dtype=dtype,
        seed=seed,
    )


def exact_scores(centroids: StoredCentroids, hidden: np.ndarray) -> np.ndarray:
    """Return the scores of what is stored, ``(N, K)`` float64."""
    projected = hidden.astype(np.float64) @ in_float64(centroids.projection).T
    scores = projected[:, :-1] @ float_rows(centroids.rows).T
    return scores + centroids.bias + projected[:, -1:]


def clusters_of_five() -> np.ndarray:
    """Return 17 clusters of 83 shuffled tokens, two slots of padding."""
    tokens = np.random.default_rng(3).permutation(V)
    return np.append(tokens, [V, V]).astype(np.uint32).reshape(17, 5)


def weighted_means(rows: np.ndarray, prior: np.ndarray) -> np.ndarray:
    means = []
    for members in clusters_of_five().tolist():
        kept = [token for token in members if token < V]
        weights = prior[kept].astype(np.float64) ** 0.75
        means.append(weights @ rows[kept].astype(np.float64) / weights.sum())
    return np.array(means)


@pytest.mark.parametrize("rows_per_chunk", [7, 1 << 14])
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_in_all_dimensions_scores_are_the_rows_logits(
    is_calibrated, rows_per_chunk, monkeypatch
):
    monkeypatch.setattr(module, "_ROWS_PER_CHUNK", rows_per_chunk)
    rows, hidden = random_rows(), random_hidden()
    statistics = known(hidden[:100]) if is_calibrated else None

    centroids = stored(ClusterMeans(rows, random_prior(), None), statistics)

    expected = hidden.astype(np.float64) @ rows.T.astype(np.float64)
    allowed = 1e-5 * np.abs(expected).max()
    scores = exact_scores(centroids, hidden)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=allowed)
    # In float32, with products of some hundreds that nearly cancel out.
    actual = centroids.scores(hidden)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=10 * allowed)
    assert centroids.bias.dtype == np.float32
    assert centroids.projection.shape == (D + 1, D)
    weights = random_prior() ** 0.75
    mean_row = weights @ rows / weights.sum()
    np.testing.assert_allclose(np.array(centroids.projection)[-1], mean_row, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("quantization", [None, Quantization(2, 32)], ids=str)
@pytest.mark.parametrize("dims", [32, 64])
def test_scores_are_exact_at_the_mean_hidden_state(dims, quantization, dtype):
    rows, hidden = random_rows(), random_hidden()
    means = ClusterMeans(rows, random_prior(), None)

    centroids = stored(means, known(hidden), dims, quantization, dtype)

    mean = hidden.mean(axis=0, dtype=np.float64)[None]
    exact = mean @ rows.T.astype(np.float64)
    scores = exact_scores(centroids, mean)
    np.testing.assert_allclose(scores, exact, rtol=0, atol=1e-4)
    # Not by chance: where anything is rounded or left out, the bias makes up for it.
    is_exact = dims == D and quantization is None and dtype == mx.float32
    assert is_exact or np.abs(scores - centroids.bias - exact).max() > 0.01
    assert centroids.rows.num_rows == V
    assert centroids.projection.dtype == dtype


def test_centroids_of_clusters_stand_for_weighted_means():
    rows, hidden, prior = random_rows(), random_hidden(), random_prior()
    means = ClusterMeans(rows, prior, clusters_of_five())

    centroids = stored(means, known(hidden))

    expected = weighted_means(rows, prior)
    assert len(means) == 17
    weights = [
        (prior[[t for t in members if t < V]] ** 0.75).sum()
        for members in clusters_of_five().tolist()
    ]
    np.testing.assert_allclose(means.weights, weights / np.sum(weights), rtol=1e-5)
    np.testing.assert_allclose(means[:] + means.common, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        exact_scores(centroids, hidden),
        hidden.astype(np.float64) @ expected.T,
        rtol=0,
        atol=1e-4,
    )


def test_clusters_of_one_are_the_rows():
    rows, prior = random_rows(), random_prior()
    single = ClusterMeans(rows, prior, None)
    mapped = ClusterMeans(rows, prior, np.arange(V, dtype=np.uint32)[:, None])

    np.testing.assert_allclose(single[:], mapped[:], rtol=0, atol=1e-6)
    np.testing.assert_allclose(single.weights, mapped.weights, rtol=1e-6)
    np.testing.assert_allclose(single.moment(), mapped.moment(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows_per_chunk", [7, 1 << 14])
def test_moment_is_the_weighted_covariance_of_rows(rows_per_chunk, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_PER_CHUNK", rows_per_chunk)
    rows, prior = random_rows(), random_prior()

    moment = ClusterMeans(rows, prior, None).moment()

    expected = np.cov(rows.astype("f8"), rowvar=False, bias=True, aweights=prior**0.75)
    np.testing.assert_allclose(moment, expected, rtol=0, atol=1e-5 * expected.max())


def test_scores_of_some_clusters_are_those_of_all():
    hidden = random_hidden()
    means = ClusterMeans(random_rows(), random_prior(), None)
    centroids = stored(means, None, 32, Quantization(2, 32))
    some = np.array([80, 3, 3, 41])

    scores = centroids.scores(hidden)

    np.testing.assert_allclose(
        centroids.scores(hidden, some), scores[:, some], rtol=0, atol=1e-5
    )
    expected = exact_scores(centroids, hidden)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def test_rows_of_few_dimensions_need_no_more():
    random = np.random.default_rng(0)
    rows = random.normal(size=(V, 8)) @ random.normal(size=(8, D)) + 3
    rows, hidden = rows.astype(np.float32), random_hidden()
    means = ClusterMeans(rows, random_prior(), None)

    centroids = stored(means, known(hidden), 8)

    expected = hidden.astype(np.float64) @ rows.T.astype(np.float64)
    scores = exact_scores(centroids, hidden)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-2)


def test_no_other_directions_lose_less():
    """The chosen ones make the least expected squared error of any of their number."""
    rows, prior = random_rows(), random_prior()
    hidden = random_hidden(4000)
    mean = hidden.mean(axis=0, dtype=np.float64)
    deviations = hidden - mean
    weights = prior**0.75 / (prior**0.75).sum()
    offsets = rows - weights @ rows
    logits = deviations @ offsets.T

    def error(estimate: np.ndarray) -> float:
        return float((weights * (estimate - logits) ** 2).mean(axis=0).sum())

    def best_of(directions: np.ndarray) -> float:
        """Regress logits on what some directions of hidden states show."""
        seen = deviations @ directions
        return error(seen @ np.linalg.lstsq(seen, logits, rcond=None)[0])

    centroids = stored(ClusterMeans(rows, prior, None), known(hidden), 10)

    ours = error(
        exact_scores(centroids, hidden)
        - mean @ rows.T
        - deviations @ (weights @ rows)[:, None]
    )
    random = np.random.default_rng(0)
    others = [random.normal(size=(D, 10)) for _ in range(10)]
    main_of_rows = np.linalg.svd(offsets * weights[:, None] ** 0.5)[2][:10].T
    main_of_states = np.linalg.eigh(np.cov(deviations.T))[1][:, -10:]
    for directions in (*others, main_of_rows, main_of_states):
        assert ours < 1.02 * best_of(directions)
    # The best there is, but for the damping: the main axes of the logits themselves.
    values = np.linalg.svd(logits * weights**0.5, compute_uv=False) ** 2 / len(hidden)
    assert ours < 1.1 * values[10:].sum()


def test_a_seed_turns_centroids_and_changes_no_score():
    means = ClusterMeans(random_rows(), random_prior(), None)
    hidden = random_hidden()

    first, second, other = (stored(means, None, 32, seed=s) for s in (4, 4, 5))

    arrays = [np.array(c.rows.weight) for c in (first, second, other)]
    np.testing.assert_array_equal(arrays[0], arrays[1])
    assert np.abs(arrays[0] - arrays[2]).max() > 0.1
    np.testing.assert_allclose(
        exact_scores(first, hidden), exact_scores(other, hidden), rtol=0, atol=1e-4
    )
    # Turned, all dimensions vary about as much.
    spread = arrays[0].std(axis=0)
    assert spread.max() < 3 * spread.min()
