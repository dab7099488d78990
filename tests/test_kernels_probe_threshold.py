"""Step 2, kernel and twin, against a sort."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (  # noqa: F401
    chosen_by_block,
    chosen_clusters,
    harness_kernels,
    metal,
    reorder_threads,
    twins,
)

from mlx_flashhead.kernels._launch import build_kernel
from mlx_flashhead.kernels.probe_threshold import probe_threshold, probed

INPUTS = ("centroid_logits", "limits")
SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38]),
    st.floats(width=32, allow_nan=False),
)


def expected_keys(logits, num_probes):
    """Return the keys as Python integers ``[N][T]``, from a sort in NumPy."""

    def key(score, cluster):
        bits = int(np.float32(score).view(np.int32))
        ordered = bits if bits >= 0 else -(bits & 0x7FFFFFFF)
        return ordered * 2**32 - int(cluster)

    return [
        [key(row[chosen[-1]], chosen[-1]) for chosen in blocks]
        for row, blocks in zip(logits, chosen_by_block(logits, num_probes), strict=True)
    ]


def find(logits, num_probes):
    """Return the thresholds as lists."""
    return probe_threshold(mx.array(logits), num_probes=num_probes).tolist()


def passing(logits, num_probes):
    """Return which clusters pass."""
    logits = mx.array(logits)
    return np.array(probed(logits, probe_threshold(logits, num_probes=num_probes)))


SHAPES = [
    (1, 1, 1),
    (3, 37, 9),
    (2, 511, 511),
    (2, 513, 1),
    (5, 3072, 96),
    (1, 8192, 256),
    # Two blocks of 4097 and 4096, then of 4128 and 4116.
    (1, 8193, 257),
    (2, 8244, 8244),
    # Three, of which the last cluster lies in the first.
    (1, 16390, 50),
    (1, 2**20, 2**15),
]


@pytest.mark.parametrize(("num_positions", "num_clusters", "num_probes"), SHAPES)
def test_kernel_and_twin_match_a_sort(
    metal,  # noqa: F811
    num_positions,
    num_clusters,
    num_probes,
):
    random = np.random.default_rng(num_clusters)
    logits = random.normal(size=(num_positions, num_clusters)).astype(np.float32)
    expected = expected_keys(logits, num_probes)

    actual = find(logits, num_probes)
    with twins():
        twin = find(logits, num_probes)

    assert actual == expected
    assert twin == expected


@pytest.mark.parametrize(("num_positions", "num_clusters", "num_probes"), SHAPES)
def test_probed_are_the_clusters_that_a_sort_chooses(
    num_positions, num_clusters, num_probes
):
    random = np.random.default_rng(num_clusters)
    # Few distinct scores: most thresholds lie within a tie.
    logits = random.integers(-3, 3, (num_positions, num_clusters)).astype(np.float32)

    with twins():
        actual = passing(logits, num_probes)

    np.testing.assert_array_equal(actual, chosen_clusters(logits, num_probes))
    assert actual.all() or num_probes < num_clusters


# All ids from 0 to 700 take part: ties are decided in the last digits of the key.
@pytest.mark.parametrize("num_probes", [1, 350, 700])
@pytest.mark.parametrize("scores", ["all equal", "two values", "signed zeros"])
def test_ties_go_to_the_smaller_id(metal, scores, num_probes):  # noqa: F811
    values = {
        "all equal": [2.5],
        "two values": [-1.0, 3.0],
        "signed zeros": [0.0, -0.0],
    }
    logits = np.resize(np.float32(values[scores]), (1, 700))
    expected = expected_keys(logits, num_probes)

    assert find(logits, num_probes) == expected


def test_ties_are_decided_in_each_block_by_itself(metal):  # noqa: F811
    logits = np.zeros((1, 8300), np.float32)
    logits[0, [5, 8299]] = 1.0  # of block 0 and of block 1

    chosen = np.flatnonzero(passing(logits, 100)).tolist()

    # 51 of each: of block 0 the chunk from 0 and part of that from 64, number 5 among
    # them; of block 1 the last cluster and 50 of the chunks from 32 and from 96.
    assert chosen == [*range(64), *range(64, 83), *range(96, 114), 8299]


def test_pinned_clusters_pass_however_good_the_others(metal):  # noqa: F811
    logits = np.full((2, 8300), 3e38, np.float32)
    pinned = [1, 33, 4000, 8299]
    logits[:, pinned] = np.inf

    chosen = passing(logits, 4)

    assert chosen[:, pinned].all()


def test_kernel_finds_the_same_in_all_orders_of_threads(metal):  # noqa: F811
    logits = np.random.default_rng(0).integers(-3, 3, (2, 900)).astype(np.float32)

    results = []
    for seed in range(4):
        reorder_threads(build_kernel("probe_threshold", INPUTS), seed)
        results.append(find(logits, 77))

    assert results == [results[0]] * 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernel_matches_a_sort_for_any_scores(data):
    num_clusters = data.draw(st.integers(1, 512))
    pool = data.draw(st.lists(SCORES, min_size=1, max_size=40))
    picks = np.random.default_rng(data.draw(st.integers(0, 99))).choice(
        np.float32(pool), num_clusters
    )
    num_probes = data.draw(st.integers(1, num_clusters))
    expected = expected_keys(picks[None], num_probes)

    with harness_kernels():
        actual = find(picks[None], num_probes)
    with twins():
        twin = find(picks[None], num_probes)

    assert actual == expected
    assert twin == expected


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernel_matches_a_sort_for_any_number_of_blocks(data):
    num_clusters = data.draw(st.integers(8100, 33000))
    num_probes = data.draw(st.integers(1, num_clusters))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    logits = random.integers(-99, 99, (1, num_clusters)).astype(np.float32)

    with harness_kernels():
        actual = find(logits, num_probes)

    assert actual == expected_keys(logits, num_probes)
    np.testing.assert_array_equal(
        passing(logits, num_probes), chosen_clusters(logits, num_probes)
    )
