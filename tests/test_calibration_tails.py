"""The level of the tails: the mass is right, and the divergence least."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import chosen_clusters, in_float64
from oracles import float_rows

from mlx_flashhead.calibration import tail_level, tails
from mlx_flashhead.centroids import ClusterMeans, StoredCentroids, store_centroids
from mlx_flashhead.config import Quantization
from mlx_flashhead.statistics import hidden_statistics

V, D, N = 331, 64, 90


class Case:
    """A head with coarse centroids, and hidden states whose tails have mass."""

    def __init__(self, cluster_size: int, has_bias: bool, num_probes: int) -> None:
        random = np.random.default_rng(cluster_size)
        self.rows = random.normal(size=(V, D)).astype(np.float32)
        self.hidden = (random.normal(size=(N, D)) / 6).astype(np.float32)
        self.bias = random.normal(size=V).astype(np.float32) if has_bias else None
        self.num_probes = num_probes
        prior = np.full(V, 1 / V)
        tokens = None
        self.token_clusters = np.arange(V)
        if cluster_size > 1:
            slots = np.append(random.permutation(V), [V] * (-V % cluster_size))
            tokens = slots.reshape(-1, cluster_size).astype(np.uint32)
            self.token_clusters = np.empty(V, np.int64)
            self.token_clusters[slots[:V]] = np.arange(V) // cluster_size
        self.centroids = store_centroids(
            ClusterMeans(self.rows, prior, tokens),
            hidden_statistics(self.hidden, prior),
            dims=32,
            quantization=Quantization(2, 32),
            dtype=mx.float32,
            seed=0,
        )
        self.centroids.bias[[3, 11]] = np.inf

    def level(self) -> float:
        return tail_level(
            self.centroids,
            self.token_clusters,
            self.num_probes,
            self.rows,
            self.bias,
            self.hidden,
        )

    def logits(self, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return dense and FlashHead logits, and which are exact, by brute force."""
        x = self.hidden.astype(np.float64)
        dense = x @ self.rows.T.astype(np.float64)
        if self.bias is not None:
            dense += self.bias
        scores = scores_of(self.centroids, x)
        chosen = chosen_clusters(scores, self.num_probes)[:, self.token_clusters]
        tail = scores[:, self.token_clusters] + level
        return dense, np.where(chosen, dense, tail), chosen


def scores_of(centroids: StoredCentroids, x: np.ndarray) -> np.ndarray:
    projected = x @ in_float64(centroids.projection).T
    scores = projected[:, :-1] @ float_rows(centroids.rows).T
    return scores + centroids.bias + projected[:, -1:]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def divergence(case: Case, level: float) -> float:
    dense, flash, _ = case.logits(level)
    p, q = softmax(dense), softmax(flash)
    return float((p * np.log(p / q)).sum(axis=1).mean())


cases = pytest.mark.parametrize("cluster_size", [1, 5])
biases = pytest.mark.parametrize("has_bias", [False, True])


# One position at a time, some, all at once.
@pytest.mark.parametrize("values_per_chunk", [1, 20 * V, 1 << 22])
@cases
@biases
def test_tails_have_the_dense_heads_mass(
    has_bias, cluster_size, values_per_chunk, monkeypatch
):
    monkeypatch.setattr(tails, "_VALUES_PER_CHUNK", values_per_chunk)
    case = Case(cluster_size, has_bias, num_probes=20 // cluster_size + 2)

    level = case.level()

    dense, flash, is_exact = case.logits(level)
    mass = np.where(is_exact, 0, softmax(flash)).sum(axis=1).mean()
    expected = np.where(is_exact, 0, softmax(dense)).sum(axis=1).mean()
    assert 0.2 < expected < 0.98
    assert mass == pytest.approx(expected, rel=1e-4)
    # A score is a mean, and exp of a mean is too little.
    assert level > 0.1


@cases
@biases
def test_no_other_level_diverges_less(has_bias, cluster_size):
    case = Case(cluster_size, has_bias, num_probes=20 // cluster_size + 2)

    level = case.level()

    least = divergence(case, level)
    for change in (-level, -0.3, -0.03, 0.03, 0.3):
        assert divergence(case, level + change) > least


@cases
def test_without_tails_there_is_no_level(cluster_size):
    num_clusters = -(-V // cluster_size)
    case = Case(cluster_size, False, num_probes=num_clusters)

    assert case.level() == 0


def test_tails_without_mass_stay_in_bounds():
    case = Case(1, False, num_probes=3)
    # The two pinned tokens have all of it.
    case.rows[[3, 11]] = 1000 * case.hidden[0]
    case.hidden[:] = case.hidden[0]

    level = case.level()

    assert -20 <= level <= 20
    _, flash, is_exact = case.logits(level)
    assert np.where(is_exact, 0, softmax(flash)).sum(axis=1).max() < 1e-6
