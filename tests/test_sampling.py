"""Clusters drawn at random, and what becomes of their tokens' logits."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from draws import block_size, draw, sampling_head, samplings  # noqa: F401
from kernel_cases import random_hidden
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from oracles import (
    HEAD_SHAPES,
    assert_logits,
    centroid_logits,
    dense_logits,
    flash_logits,
    head_shapes,
    random_head,
    slots_of,
)

from mlx_flashhead import convert
from mlx_flashhead.head import FlashHead
from mlx_flashhead.sampling import drawn_logits, drawn_scores

D = 64


def oracle(head: FlashHead, hidden: mx.array, uniform: np.ndarray, largest: int):
    """Return the logits ``(N, V)`` that uniform numbers ``(N, K)`` lead to, float64.

    Blocks have ``largest`` clusters at most.
    """
    estimates, dense = centroid_logits(head, hidden), dense_logits(head, hidden)
    corrects = head.config.sampling == "corrected"
    scores = estimates - np.log(uniform if corrects else -np.log(1 - uniform))
    num_clusters = scores.shape[1]
    num_blocks = -(-num_clusters // largest)
    block_of = np.arange(num_clusters) // 32 % num_blocks
    largest_block = np.bincount(block_of).max()
    quota = -(-head.config.num_probes * largest_block // num_clusters)
    logits = np.full(dense.shape, np.nan)
    for position, row in enumerate(scores):
        for _, cluster, token in slots_of(head):
            others = np.sort(row[block_of == block_of[cluster]])[::-1]
            estimate = estimates[position, cluster]
            if row[cluster] < others[:quota][-1]:
                logits[position, token] = estimate - 20
                continue
            logits[position, token] = dense[position, token]
            if corrects and len(others) > quota:
                chance = min(1, np.exp(estimate - others[quota]))
                logits[position, token] -= np.log(chance)
    return logits


@head_shapes
@samplings
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_logits_match_oracle(shape, sampling, dtype, block_size, monkeypatch):  # noqa: F811
    head = sampling_head(sampling, **shape, dtype=dtype, has_bias=True)
    num_positions = head.config.max_probed_positions
    hidden = random_hidden(num_positions, D, dtype, seed=3) / 4
    random = np.random.default_rng(4)
    uniform = random.uniform(size=(num_positions, head.config.num_clusters))
    given = mx.array(uniform.astype(np.float32))
    monkeypatch.setattr(mx.random, "uniform", lambda *_, shape: given.reshape(shape))

    actual = head.logits(hidden)

    assert actual.dtype == dtype
    assert_logits(actual, oracle(head, hidden, np.array(given), block_size), D)


@samplings
def test_seed_of_mlx_decides_the_draw(sampling):
    head = sampling_head(sampling, **HEAD_SHAPES["single rows"])
    hidden = random_hidden(1, D, mx.float32, seed=3) / 8

    def drawn(seed: int) -> list[mx.array]:
        mx.random.seed(seed)
        return [head.logits(hidden), head.logits(hidden)]

    first, again, other = drawn(1), drawn(1), drawn(2)

    assert mx.array_equal(first[0], again[0]) and mx.array_equal(first[1], again[1])
    assert not mx.array_equal(first[0], first[1])
    assert not mx.array_equal(first[0], other[0])


def test_positions_draw_for_themselves():
    head = sampling_head("corrected", **HEAD_SHAPES["single rows"])
    hidden = mx.broadcast_to(random_hidden(1, D, mx.float32, seed=3) / 8, (4, D))

    logits = head.logits(hidden)

    assert len(np.unique(np.array(logits), axis=0)) == 4


def test_deterministic_head_takes_no_random_numbers():
    head = random_head()
    mx.random.seed(5)
    expected = mx.random.uniform()
    mx.random.seed(5)

    mx.eval(head.logits(random_hidden(1, D, mx.float32, seed=3)))

    assert mx.random.uniform() == expected


@samplings
def test_dense_path_and_best_clusters_are_not_drawn(sampling):
    head, best = sampling_head(sampling), random_head()
    many = random_hidden(head.config.max_probed_positions + 1, D, mx.float32, seed=3)

    assert mx.array_equal(head.logits(many), best.logits(many))
    np.testing.assert_array_equal(head.probed_tokens(many), flash_logits(best, many)[1])
    head.train()
    assert mx.array_equal(head.logits(many[:1]), best.dense_logits(many[:1]))


@head_shapes
@samplings
def test_every_cluster_drawn_equals_dense(shape, sampling, block_size):  # noqa: F811
    head = sampling_head(
        sampling, **shape | {"num_probes": shape.get("num_clusters", 11)}
    )
    hidden = random_hidden(1, D, mx.float32, seed=3)

    actual = head.logits(hidden)

    assert_logits(actual, dense_logits(head, hidden), D)


@samplings
@pytest.mark.parametrize("place", ["least", "largest"])
def test_scores_are_finite_at_the_ends_of_the_uniform_numbers(
    sampling, place, monkeypatch
):
    def extreme(low: float, *, shape: tuple[int, ...]) -> mx.array:
        return mx.full(shape, low if place == "least" else 1 - 2.0**-24)

    monkeypatch.setattr(mx.random, "uniform", extreme)

    scores = drawn_scores(mx.array([[1.0, -3.0]]), sampling)

    assert np.isfinite(np.array(scores)).all()
    assert np.array(scores[0, 0] - scores[0, 1]) == pytest.approx(4)


@samplings
def test_every_token_can_be_drawn_and_reached(sampling, block_size):  # noqa: F811
    scores = np.random.default_rng(1).normal(size=53).astype(np.float32)
    scores[[7, 52]] = np.inf
    estimates, noisy, is_drawn = draw(mx.array(scores), 12, sampling, 4000)

    logits = drawn_logits(
        mx.zeros(noisy.shape), estimates, noisy, is_drawn, sampling=sampling
    )

    assert np.array(is_drawn).any(axis=0).all()
    assert np.array(is_drawn)[:, [7, 52]].all()
    assert np.isfinite(np.array(logits)).all()


def test_converted_model_draws_and_follows_the_seed(tiny_llama, tmp_path):
    options = {"num_probes": 24, "calibrate": False, "sampling": "corrected"}
    model, _ = mlx_lm.load(str(convert(tiny_llama, tmp_path / "to", **options).path))

    def generated(seed: int, **options) -> list[int]:
        mx.random.seed(seed)
        options = {"sampler": make_sampler(1.0), "max_tokens": 12} | options
        return [t for t, _ in generate_step(mx.array([17, 90]), model, **options)]

    assert generated(1) == generated(1) != generated(2)
    # Drawn or not: a bias of 100 is enough for any token.
    biased = make_logits_processors(logit_bias={150: 100.0})
    assert generated(3, logits_processors=biased) == 12 * [150]
