"""The coarse stage of a head: what is known, and what calibration leaves out."""

import mlx.core as mx
import numpy as np
import pytest
from test_centroids import (
    D,
    V,
    clusters_of_five,
    exact_scores,
    random_hidden,
    random_rows,
    weighted_means,
)

from mlx_flashhead.blocks import least_probes, probes_per_block
from mlx_flashhead.calibration import CalibrationSet
from mlx_flashhead.coarse import CoarseStage, known_from, pinned_clusters
from mlx_flashhead.config import Quantization
from mlx_flashhead.vocabulary import Vocabulary

ID_PRIOR = 1 / (np.arange(V) + 200.0)


def calibration_set(count: int, seed: int) -> CalibrationSet:
    """Return positions of random folds; the dense head's answers are those to them."""
    hidden = random_hidden(count, seed)
    logits = hidden.astype(np.float64) @ random_rows().T
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = weights / weights.sum(axis=1, keepdims=True)
    fold = np.random.default_rng(seed).integers(0, 4, count)
    sums = np.array([softmax[fold == f].sum(axis=0) for f in range(4)])
    return CalibrationSet(hidden, logits.argmax(axis=1), fold, sums)


SETS = [calibration_set(150, 1), calibration_set(60, 2)]


def stage_of(cluster_size: int = 1, **changes) -> CoarseStage:
    values = {
        "rows": random_rows(),
        "cluster_tokens": clusters_of_five() if cluster_size > 1 else None,
        "pinned": [2, 9],
        "head_bias": None,
        "dims": 32,
        "quantization": Quantization(2, 32),
        "dtype": mx.float32,
        "seed": 0,
    }
    return CoarseStage(**values | changes)


@pytest.mark.parametrize("held_out", [None, 0, 3])
def test_prior_and_moments_are_the_means_of_the_sets(held_out):
    known = known_from(SETS, ID_PRIOR, held_out)

    guess = ID_PRIOR / ID_PRIOR.sum()
    seen, means, covariances = [guess], [], []
    for positions in SETS:
        is_in = positions.fold != held_out
        kept = [fold for fold in range(4) if fold != held_out]
        seen.append(positions.softmax_sums[kept].sum(axis=0) / is_in.sum())
        hidden = positions.hidden[is_in].astype(np.float64)
        means.append(hidden.mean(axis=0))
        covariances.append(np.cov(hidden, rowvar=False, bias=True))
    np.testing.assert_allclose(known.prior, np.mean(seen, axis=0), rtol=1e-9)
    assert known.prior.sum() == pytest.approx(1)
    np.testing.assert_allclose(known.statistics.mean, np.mean(means, axis=0), atol=1e-5)
    np.testing.assert_allclose(
        known.statistics.covariance, np.mean(covariances, axis=0), atol=1e-5
    )


def test_without_calibration_the_ids_are_all_there_is():
    known = known_from([], ID_PRIOR)

    assert known.statistics is None
    np.testing.assert_allclose(known.prior, ID_PRIOR / ID_PRIOR.sum())
    rows = random_rows()
    assert known.scored_rows(rows) is rows


def test_rows_are_clustered_in_the_metric_of_the_hidden_states():
    known, rows = known_from(SETS, ID_PRIOR), random_rows()

    turned = known.scored_rows(rows).astype(np.float64)

    # Products of rows in the metric are covariances of their logits.
    covariance = known.statistics.covariance
    damped = covariance + 0.01 * np.trace(covariance) / D * np.eye(D)
    expected = rows @ damped @ rows.T
    np.testing.assert_allclose(
        turned @ turned.T, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("cluster_size", [1, 5])
def test_the_dense_heads_bias_is_part_of_the_score(cluster_size):
    bias = np.random.default_rng(8).normal(size=V).astype(np.float32)
    known, hidden = known_from(SETS, ID_PRIOR), random_hidden()
    options = {"pinned": [], "dims": D, "quantization": None}

    plain, biased = (
        stage_of(cluster_size, head_bias=b, **options).centroids(known)
        for b in (None, bias)
    )

    added = exact_scores(biased, hidden) - exact_scores(plain, hidden)
    expected = bias.astype(np.float64)
    if cluster_size > 1:
        expected = weighted_means(bias[:, None], known.prior)[:, 0]
    np.testing.assert_allclose(added, np.tile(expected, (200, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cluster_size", [1, 5])
def test_pinned_clusters_have_an_infinite_score(cluster_size):
    centroids = stage_of(cluster_size).centroids(known_from([], ID_PRIOR))

    assert np.flatnonzero(np.isposinf(centroids.bias)).tolist() == [2, 9]
    assert np.isfinite(np.delete(centroids.bias, [2, 9])).all()


@pytest.mark.parametrize("cluster_size", [1, 5])
def test_tokens_know_their_clusters(cluster_size):
    stage = stage_of(cluster_size)

    clusters = stage.token_clusters

    assert stage.num_clusters == (V if cluster_size == 1 else 17)
    assert len(clusters) == V
    for token, cluster in enumerate(clusters):
        members = [token] if cluster_size == 1 else clusters_of_five()[cluster]
        assert token in members
        assert cluster_size > 1 or cluster == token


@pytest.mark.parametrize("cluster_size", [1, 5])
def test_probes_needed_are_of_centroids_that_did_not_see_the_position(cluster_size):
    stage = stage_of(cluster_size)
    shares = []

    needed = stage.probes_needed(SETS, ID_PRIOR, shares.append)

    expected = []
    for fold in range(4):
        # The same stage, of the other folds' positions alone.
        others = [
            CalibrationSet(
                s.hidden[s.fold != fold],
                s.best_tokens[s.fold != fold],
                s.fold[s.fold != fold],
                np.where(np.arange(4)[:, None] == fold, 0, s.softmax_sums),
            )
            for s in SETS
        ]
        centroids = stage.centroids(known_from(others, ID_PRIOR))
        for s in SETS:
            scores = exact_scores(centroids, s.hidden[s.fold == fold])
            best = stage.token_clusters[s.best_tokens[s.fold == fold]]
            own = np.take_along_axis(scores, best[:, None], axis=1)
            expected.extend(1 + (scores > own).sum(axis=1))
    assert len(needed) == 210
    # One block: a position needs as many probes as its cluster's rank. Scores are
    # float32, so now and then two of them change places.
    assert (needed == expected).mean() > 0.98
    assert np.abs(needed - expected).max() <= 1
    assert shares == [0.25, 0.5, 0.75, 1]
    # It makes a difference.
    seen = stage.centroids(known_from(SETS, ID_PRIOR))
    of_seen = [
        1 + (scores > scores[best]).sum()
        for s in SETS
        for scores, best in zip(
            exact_scores(seen, s.hidden),
            stage.token_clusters[s.best_tokens],
            strict=True,
        )
    ]
    assert sum(of_seen) != needed.sum()


@pytest.mark.parametrize(
    ("cluster_size", "clusters"), [(1, [3, 4, 9, 70, 71]), (2, [0, 1, 2]), (5, [0])]
)
def test_pinned_clusters_hold_the_pinned_tokens(cluster_size, clusters):
    vocabulary = Vocabulary(frozenset({9, 3, 71, 70, 4}), frozenset())

    assert list(pinned_clusters(vocabulary, cluster_size)) == clusters


@pytest.mark.parametrize("num_clusters", [40, 8192, 8193, 20_000, 49_152])
@pytest.mark.parametrize("pinned", [[], [0], [0, 1, 2, 35], list(range(17)), [31, 32]])
def test_least_probes_have_room_for_the_pinned_clusters(num_clusters, pinned):
    least = least_probes(pinned, num_clusters)

    block = np.array(pinned, int) // 32 % -(-num_clusters // 8192)
    most = np.bincount(block, minlength=1).max()
    assert least >= max(1, len(pinned))
    assert probes_per_block(num_clusters, least) >= most
    if least > max(1, len(pinned)):
        assert probes_per_block(num_clusters, least - 1) < most


def test_seeds_are_of_the_rotation():
    known = known_from(SETS, ID_PRIOR)

    arrays = [
        np.array(stage_of(seed=seed).centroids(known).projection) for seed in (0, 0, 1)
    ]

    np.testing.assert_array_equal(arrays[0], arrays[1])
    assert np.abs(arrays[0] - arrays[2]).max() > 0.01
