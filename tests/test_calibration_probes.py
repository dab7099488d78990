"""The number of probes: what a position needs, and what so many positions show."""

import time
from dataclasses import replace
from fractions import Fraction
from math import comb

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import random_hidden
from oracles import HEAD_SHAPES, random_head

from mlx_flashhead.calibration.probes import (
    choose_probes,
    judge_probes,
    least_share,
    misses_allowed,
    probes_needed,
)
from mlx_flashhead.centroids import StoredCentroids
from mlx_flashhead.head import FlashHead

D = 64
# Two blocks of 4,105 and 4,096 clusters.
TWO_BLOCKS = {"num_clusters": 8201, "cluster_size": 1, "centroid_dims": 4}


def probed_with(head: FlashHead, num_probes: int, hidden: mx.array) -> np.ndarray:
    """Return which tokens a head of so many probes scores exactly, ``(N, V)``."""
    head.config = replace(head.config, num_probes=num_probes)
    return np.array(head.probed_tokens(hidden))


@pytest.mark.parametrize(
    ("shape", "pinned"),
    [
        (HEAD_SHAPES["single rows"], (52, 7)),
        (HEAD_SHAPES["single rows"], ()),
        ({}, (0, 1)),
        (TWO_BLOCKS, (3, 40, 5)),
    ],
    ids=["single rows", "none pinned", "clusters of 5", "two blocks"],
)
def test_a_position_is_a_hit_with_as_many_probes_as_it_needs_and_not_with_less(
    shape, pinned
):
    head = random_head(**shape | {"pinned": pinned, "num_probes": 6})
    hidden = random_hidden(60, D, mx.float32, seed=3)
    vocab_size = head.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, 60)
    tokens[:2] = [0, vocab_size - 1]
    clusters = np.array(head.slots(mx.array(tokens))) // head.config.cluster_size
    clusters[2 : 2 + len(pinned)] = pinned
    tokens = np.array([token_of(head, cluster) for cluster in clusters])
    centroids = StoredCentroids(
        head.centroids.rows,
        np.array(head.centroids.bias).astype(np.float32),
        head.centroids.projection,
    )

    needed = probes_needed(centroids, np.array(hidden), clusters)

    least = max(1, len(pinned))
    assert needed.shape == (60,)
    assert needed.min() >= 1 and needed.max() <= head.config.num_clusters
    assert len(set(needed)) > 5
    for position, (token, count) in enumerate(zip(tokens, needed, strict=True)):
        one = hidden[position : position + 1]
        assert probed_with(head, max(int(count), least), one)[0, token]
        if count > least:
            assert not probed_with(head, int(count) - 1, one)[0, token]
    assert (needed[2 : 2 + len(pinned)] <= least).all()


def token_of(head: FlashHead, cluster: int) -> int:
    """Return the first token of a cluster."""
    if head.config.cluster_size == 1:
        return int(cluster)
    return int(np.array(head.cluster_tokens)[cluster, 0])


def test_no_position_needs_anything():
    head = random_head()
    bias = np.array(head.centroids.bias).astype(np.float32)
    rows, projection = head.centroids.rows, head.centroids.projection

    needed = probes_needed(
        StoredCentroids(rows, bias, projection),
        np.empty((0, D), np.float32),
        np.empty(0, np.int64),
    )

    assert needed.shape == (0,)


def chance_of_at_most(misses: int, count: int, share: Fraction) -> Fraction:
    """Return the exact binomial probability; ``share`` is of hits."""
    return sum(
        (
            comb(count, k) * (1 - share) ** k * share ** (count - k)
            for k in range(misses + 1)
        ),
        Fraction(0),
    )


CONFIDENCE = Fraction(95, 100)


def test_without_a_hit_nothing_is_shown():
    assert least_share(1, 1) == least_share(59, 59) == 0


@pytest.mark.parametrize(
    ("misses", "count"),
    [(0, 1), (0, 2), (1, 2), (7, 59), (0, 200), (1, 200), (150, 200)],
)
def test_lower_bound_is_exact(misses, count):
    bound = least_share(misses, count)

    # So many misses are unlikely just below the bound, and not just above it.
    below, above = (Fraction(bound) * Fraction(f) for f in ("0.999999", "1.000001"))
    assert chance_of_at_most(misses, count, below) < 1 - CONFIDENCE
    assert above > 1 or chance_of_at_most(misses, count, above) > 1 - CONFIDENCE


@pytest.mark.parametrize(
    ("misses", "count", "bound"),
    [
        # The rule of three, and tables of Clopper and Pearson.
        (0, 10, 0.7411),
        (1, 10, 0.6058),
        (5, 10, 0.2224),
        (0, 3000, 0.9990),
        (10, 100, 0.8363),
    ],
)
def test_lower_bound_is_clopper_and_pearsons(misses, count, bound):
    assert least_share(misses, count) == pytest.approx(bound, abs=6e-5)


@pytest.mark.parametrize("count", [1, 19, 58, 59, 300, 473, 474])
@pytest.mark.parametrize("target", ["0.3", "0.9", "0.95", "0.99"])
def test_misses_allowed_are_the_most_that_show_the_target(count, target):
    misses = misses_allowed(count, float(target))

    share = Fraction(target)
    assert -1 <= misses < count
    if misses >= 0:
        assert chance_of_at_most(misses, count, share) <= 1 - CONFIDENCE
        assert least_share(misses, count) >= float(target) - 1e-12
    assert chance_of_at_most(misses + 1, count, share) > 1 - CONFIDENCE
    assert least_share(misses + 1, count) < float(target)


# log(0.05) / log(0.999) = 2994.2, and with one miss 4742.
@pytest.mark.parametrize(
    ("count", "misses"), [(2994, -1), (2995, 0), (4741, 0), (4742, 1), (6144, 1)]
)
def test_positions_that_the_default_target_takes(count, misses):
    assert misses_allowed(count, 0.999) == misses


@pytest.mark.parametrize("target", [1e-20, 0.01, 0.5, 1 - 1e-15])
def test_any_target_takes_no_time(target):
    started = time.perf_counter()

    misses = misses_allowed(20_000, target)

    assert -1 <= misses < 20_000
    assert time.perf_counter() - started < 2


def test_choice_is_the_least_number_that_shows_the_target():
    needed = np.random.default_rng(0).integers(1, 1000, 500)

    choice = choose_probes(needed, 0.9, least=1, most=1000)

    fewer = judge_probes(needed, choice.num_probes - 1, 0.9)
    assert choice.num_probes in needed
    assert choice.is_reached and choice.least_recall >= 0.9
    assert not fewer.is_reached and fewer.least_recall < 0.9
    misses = (needed > choice.num_probes).sum()
    assert choice.recall == pytest.approx(1 - misses / 500)
    assert choice.least_recall == least_share(misses, 500)
    assert (choice.num_positions, choice.target) == (500, 0.9)


@pytest.mark.parametrize(
    ("least", "most", "num_probes", "is_reached"),
    [(1, 99, 99, False), (980, 1000, 980, True), (990, 990, 990, True)],
)
def test_choice_keeps_to_its_bounds(least, most, num_probes, is_reached):
    needed = np.random.default_rng(0).integers(1, 950, 500)

    choice = choose_probes(needed, 0.9, least=least, most=most)

    assert choice.num_probes == num_probes
    assert choice.is_reached == is_reached
    assert choice.recall == pytest.approx((needed <= num_probes).mean())


def test_too_few_positions_miss_none_and_show_no_target():
    needed = np.array([3, 1, 8, 5])

    choice = choose_probes(needed, 0.999, least=1, most=100)

    assert choice.num_probes == 8
    assert choice.recall == 1
    assert choice.least_recall == pytest.approx(0.05 ** (1 / 4))
    assert not choice.is_reached


def test_a_given_number_is_judged_without_a_target():
    choice = judge_probes(np.array([3, 1, 8, 5]), 5)

    assert (choice.num_probes, choice.recall, choice.num_positions) == (5, 0.75, 4)
    assert choice.target is None
    assert choice.is_reached
