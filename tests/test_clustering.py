"""Clusters of one size: valid for every input, and good ones where there are any."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flashhead.clustering import cluster_rows


def gaussian_rows(vocab_size, depth, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((vocab_size, depth), dtype=np.float32)


def planted_rows(num_groups, group_size, depth, noise=0.2, seed=0):
    """Return rows around random directions, shuffled, and each row's group."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_groups, depth)) / np.sqrt(depth)
    groups = rng.permutation(np.repeat(np.arange(num_groups), group_size))
    spread = noise * rng.standard_normal((len(groups), depth)) / np.sqrt(depth)
    return (centres[groups] + spread).astype(np.float32), groups


def assert_valid(clustering, vocab_size, cluster_size):
    slots = clustering.cluster_tokens
    assert slots.dtype == np.uint32
    assert slots.shape == (-(-vocab_size // cluster_size), cluster_size)
    padding = slots.size - vocab_size
    assert sorted(slots.ravel().tolist()) == sorted(
        [*range(vocab_size), *[vocab_size] * padding]
    )
    # Padding only at the very end, tokens ascending within a cluster.
    assert (slots.ravel()[slots.size - padding :] == vocab_size).all()
    assert (np.diff(slots.astype(np.int64), axis=1) >= 0).all()


def mean_cosine(rows, cluster_tokens):
    """Return the objective from its definition, in float64."""
    directions = rows - rows.mean(axis=0, dtype=np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = []
    for tokens in cluster_tokens:
        members = directions[tokens[tokens < len(rows)]]
        centre = members.sum(axis=0)
        cosines.extend(members @ centre / np.linalg.norm(centre))
    return np.mean(cosines)


@settings(max_examples=60, deadline=None)
@given(
    vocab_size=st.integers(1, 150),
    cluster_size=st.integers(1, 20),
    num_pinned=st.integers(0, 150),
    levels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_cluster_rows_places_every_token_once(
    vocab_size, cluster_size, num_pinned, levels, seed
):
    rng = np.random.default_rng(seed)
    # Few levels make zero rows and duplicates common.
    rows = rng.integers(0, levels, (vocab_size, 3)).astype(np.float32)
    pinned = rng.permutation(vocab_size)[:num_pinned]

    clustering = cluster_rows(
        rows,
        cluster_size=cluster_size,
        num_iterations=2,
        pinned_tokens=pinned,
        seed=seed,
    )

    assert_valid(clustering, vocab_size, cluster_size)
    assert clustering.num_pinned == -(-len(pinned) // cluster_size)
    assert np.isin(pinned, clustering.cluster_tokens[: clustering.num_pinned]).all()


def test_cluster_rows_recovers_planted_clusters():
    rows, groups = planted_rows(num_groups=40, group_size=7, depth=24)

    clustering = cluster_rows(rows, cluster_size=7, num_iterations=12)

    # A few groups start without a seed and are shared out: k-means is local.
    together = groups[clustering.cluster_tokens]
    share = [np.bincount(row).max() / 7 for row in together]
    assert np.mean(share) > 0.7


def test_cluster_rows_finds_planted_clusters_when_each_has_a_seed():
    # Two opposite groups: every start but one in a few has a seed in each.
    rows, groups = planted_rows(num_groups=2, group_size=9, depth=5)

    clustering = cluster_rows(rows, cluster_size=9, num_iterations=5)

    assert all(len(set(groups[row])) == 1 for row in clustering.cluster_tokens)


def test_cluster_rows_improves_on_its_first_assignment_and_on_chance():
    rows = gaussian_rows(1003, 11) + 3.0

    clustering = cluster_rows(rows, cluster_size=8, num_iterations=6)

    cosines = clustering.mean_cosines
    chance = np.append(np.random.default_rng(1).permutation(1003), [1003] * 5)
    assert len(cosines) == 6
    assert cosines[-1] > cosines[0] + 0.01
    assert cosines[-1] > mean_cosine(rows, chance.reshape(-1, 8)) + 0.3


def test_cluster_rows_reports_the_cosine_of_the_clusters_it_returns():
    rows = gaussian_rows(203, 9)

    clustering = cluster_rows(rows, cluster_size=6, num_iterations=3)

    expected = mean_cosine(rows, clustering.cluster_tokens)
    assert clustering.mean_cosines[-1] == pytest.approx(expected, abs=1e-5)


def test_cluster_rows_ignores_the_common_mean_and_the_lengths():
    rows, _ = planted_rows(num_groups=9, group_size=5, depth=16)
    rows -= rows.mean(axis=0)

    plain = cluster_rows(rows, cluster_size=5)
    shifted = cluster_rows(4 * (rows + 2), cluster_size=5)

    assert np.array_equal(plain.cluster_tokens, shifted.cluster_tokens)


def test_cluster_rows_is_the_same_for_a_seed():
    rows = gaussian_rows(307, 10)

    first, second, other = (
        cluster_rows(rows, cluster_size=8, num_iterations=3, seed=seed)
        for seed in (5, 5, 6)
    )

    assert np.array_equal(first.cluster_tokens, second.cluster_tokens)
    assert first.mean_cosines == second.mean_cosines
    assert not np.array_equal(first.cluster_tokens, other.cluster_tokens)


def test_cluster_rows_leaves_its_input_alone():
    rows = gaussian_rows(50, 6)
    before = rows.copy()

    cluster_rows(rows, cluster_size=4, pinned_tokens=[3])

    assert np.array_equal(rows, before)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_cluster_rows_copes_with_thousands_of_equal_rows(value):
    rows = gaussian_rows(3001, 12)
    rows[500:2500] = value

    clustering = cluster_rows(rows, cluster_size=16, num_iterations=2)

    assert_valid(clustering, 3001, 16)
    # Most clusters of equal rows hold nothing else.
    same = (clustering.cluster_tokens >= 500) & (clustering.cluster_tokens < 2500)
    assert np.count_nonzero(same.all(axis=1)) > 0.9 * 2000 / 16


@pytest.mark.parametrize(("vocab_size", "cluster_size"), [(1, 16), (5, 16), (16, 16)])
def test_cluster_rows_puts_a_small_vocabulary_into_one_cluster(
    vocab_size, cluster_size
):
    clustering = cluster_rows(gaussian_rows(vocab_size, 3), cluster_size=cluster_size)

    assert_valid(clustering, vocab_size, cluster_size)
    assert clustering.num_pinned == 0


def test_cluster_rows_fills_the_pinned_clusters_with_the_likeliest_tokens():
    rows = gaussian_rows(61, 5)
    prior = np.ones(61, dtype=np.float32)
    prior[[17, 40]] = 9, 8

    clustering = cluster_rows(
        rows, cluster_size=4, prior=prior, pinned_tokens=[60, 2, 2, 33, 8, 51]
    )

    assert clustering.num_pinned == 2
    # 0 is the first of the equally likely ones.
    assert clustering.cluster_tokens[:2].ravel().tolist() == [
        *[0, 2, 8, 17],
        *[33, 40, 51, 60],
    ]


def test_cluster_rows_can_pin_every_token():
    clustering = cluster_rows(
        gaussian_rows(10, 5), cluster_size=4, pinned_tokens=range(10)
    )

    assert clustering.num_pinned == 3
    assert_valid(clustering, 10, 4)
    assert clustering.mean_cosines == ()


def test_cluster_rows_reports_progress_to_the_end():
    reports = []

    clustering = cluster_rows(
        gaussian_rows(300, 7),
        cluster_size=8,
        num_iterations=3,
        progress=lambda share, cosine: reports.append((share, cosine)),
    )

    shares = [share for share, _ in reports]
    assert shares == sorted(shares)
    assert shares[0] > 0 and shares[-1] == 1.0
    cosines = tuple(cosine for _, cosine in reports if cosine is not None)
    assert cosines == clustering.mean_cosines


def test_cluster_rows_never_holds_a_row_by_cluster_matrix():
    rows = gaussian_rows(12_000, 8)
    matrix_bytes = 12_000 * 6_000 * 4

    tracemalloc.start()
    cluster_rows(rows, cluster_size=2, num_iterations=2)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak_bytes < matrix_bytes / 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.ones((4, 3))}, "float64"),
        ({"rows": np.ones(4, dtype=np.float32)}, "shape"),
        ({"rows": np.ones((0, 3), dtype=np.float32)}, "at least 1"),
        ({"cluster_size": 0}, "cluster_size=0"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"prior": np.ones(5, dtype=np.float32)}, "prior has shape"),
        ({"prior": np.zeros(9, dtype=np.float32)}, "positive"),
        ({"pinned_tokens": [9]}, "pinned_tokens"),
        ({"pinned_tokens": [-1]}, "pinned_tokens"),
    ],
)
def test_cluster_rows_refuses_arguments_that_do_not_fit(changes, message):
    arguments = {"rows": gaussian_rows(9, 3), "cluster_size": 4} | changes
    rows = arguments.pop("rows")

    with pytest.raises(ValueError, match=message):
        cluster_rows(rows, **arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_cluster_rows_counts_rows_that_are_not_finite(value):
    rows = gaussian_rows(30, 4)
    rows[[3, 7], 1] = value

    with pytest.raises(ValueError, match="2 of 30 rows"):
        cluster_rows(rows, cluster_size=4)
