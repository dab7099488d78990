"""Moments of hidden states, and the metric they make, against plain NumPy."""

import numpy as np
import pytest

from mlx_flashhead.statistics import (
    HiddenStatistics,
    hidden_statistics,
    mean_statistics,
)

D = 12


def skewed(count: int, seed: int = 0) -> np.ndarray:
    """Return hidden states that vary most in a few directions, far from zero."""
    random = np.random.default_rng(seed)
    turn = random.normal(size=(D, D)) * 3.0 ** -np.arange(D)
    return (random.normal(size=(count, D)) @ turn.T + 50).astype(np.float32)


def statistics_of(hidden: np.ndarray) -> HiddenStatistics:
    return hidden_statistics(hidden, np.full(7, 1 / 7))


def test_moments_are_numpys():
    hidden = skewed(400)
    probabilities = np.random.default_rng(1).dirichlet(np.ones(7))

    statistics = hidden_statistics(hidden, probabilities)

    exact = hidden.astype(np.float64)
    covariance = np.cov(exact, rowvar=False, bias=True)
    np.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        statistics.covariance, covariance, rtol=0, atol=1e-5 * covariance.max()
    )
    assert statistics.covariance.dtype == statistics.mean.dtype == np.float64
    np.testing.assert_array_equal(statistics.token_probabilities, probabilities)


# Fewer positions than dimensions leave directions without any variance.
@pytest.mark.parametrize("count", [2, 5, 12, 400])
def test_roots_multiply_to_the_damped_covariance(count):
    statistics = statistics_of(skewed(count))

    root, inverse = statistics.metric()

    covariance = statistics.covariance
    damped = covariance + 0.01 * np.trace(covariance) / D * np.eye(D)
    np.testing.assert_allclose(root @ root, damped, rtol=0, atol=1e-9 * damped.max())
    np.testing.assert_allclose(root @ inverse, np.eye(D), rtol=0, atol=1e-9)
    np.testing.assert_allclose(root, root.T, atol=1e-12 * root.max())
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-12 * inverse.max())


def test_one_position_has_a_metric():
    root, inverse = statistics_of(skewed(1)).metric()

    assert np.isfinite(root).all() and np.isfinite(inverse).all()
    np.testing.assert_allclose(root @ inverse, np.eye(D), atol=1e-9)


def test_hidden_states_are_white_in_the_metric():
    # Damping is to bend directions with hardly any variance; here are none.
    noise = np.random.default_rng(3).normal(size=(4000, D))
    hidden = (skewed(4000) + 30 * noise).astype(np.float32)

    _, inverse = statistics_of(hidden).metric()

    white = np.cov(hidden.astype(np.float64) @ inverse, rowvar=False)
    np.testing.assert_allclose(white, np.eye(D), rtol=0, atol=0.02)


def test_sets_count_alike_whatever_their_size():
    few, many = skewed(10, seed=1), skewed(500, seed=2) + np.float32(9)
    sets = [
        hidden_statistics(few, np.array([1.0, 0.0])),
        hidden_statistics(many, np.array([0.5, 0.5])),
    ]

    mean = mean_statistics(sets)

    exact = [hidden.astype(np.float64) for hidden in (few, many)]
    expected = np.mean([h.mean(axis=0) for h in exact], axis=0)
    np.testing.assert_allclose(mean.mean, expected, rtol=1e-6)
    # Each about its own mean: the distance of the two is no variance.
    expected = np.mean([np.cov(h, rowvar=False, bias=True) for h in exact], axis=0)
    np.testing.assert_allclose(
        mean.covariance, expected, rtol=0, atol=1e-4 * expected.max()
    )
    np.testing.assert_allclose(mean.token_probabilities, [0.75, 0.25])
