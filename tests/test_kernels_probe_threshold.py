"""Step 2, kernel and twin, against a sort."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (  # noqa: F401
    harness_kernels,
    metal,
    ranking,
    reorder_threads,
    twins,
)

from mlx_flashhead.kernels._launch import build_kernel
from mlx_flashhead.kernels.probe_threshold import probe_threshold

INPUTS = ("centroid_logits", "bias", "limits")
SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38]),
    st.floats(width=32, allow_nan=False),
)


def expected_keys(logits, bias, num_pinned, num_probes):
    """Return the keys as Python integers, from a sort in NumPy."""
    keys = []
    score = logits + bias
    for row, order in zip(score, ranking(logits, bias), strict=True):
        last = order[order >= num_pinned][num_probes - num_pinned - 1]
        bits = int(np.float32(row[last] + 0.0).view(np.int32))
        ordered = bits if bits >= 0 else -(bits & 0x7FFFFFFF) - 1
        keys.append(ordered * 2**32 + 0xFFFFFFFF - int(last))
    return keys


def find(logits, bias, num_pinned, num_probes):
    """Return the thresholds as a list."""
    return probe_threshold(
        mx.array(logits), mx.array(bias), num_pinned=num_pinned, num_probes=num_probes
    ).tolist()


@pytest.mark.parametrize(
    ("num_positions", "num_clusters", "num_pinned", "num_probes"),
    [
        (1, 1, 0, 1),
        (3, 37, 2, 9),
        (2, 511, 0, 511),
        (2, 513, 512, 513),
        (5, 3072, 11, 96),
        (1, 16384, 4, 512),
    ],
)
def test_kernel_and_twin_match_a_sort(
    metal,  # noqa: F811
    num_positions,
    num_clusters,
    num_pinned,
    num_probes,
):
    random = np.random.default_rng(num_clusters)
    logits = random.normal(size=(num_positions, num_clusters)).astype(np.float32)
    bias = random.normal(size=num_clusters).astype(np.float32)
    expected = expected_keys(logits, bias, num_pinned, num_probes)

    actual = find(logits, bias, num_pinned, num_probes)
    with twins():
        twin = find(logits, bias, num_pinned, num_probes)

    assert actual == expected
    assert twin == expected


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
    bias = np.zeros(700, np.float32)
    expected = expected_keys(logits, bias, 0, num_probes)

    assert find(logits, bias, 0, num_probes) == expected


def test_only_pinned_clusters_pass_when_there_are_no_other_probes(metal):  # noqa: F811
    logits = np.zeros((2, 40), np.float32)

    assert find(logits, logits[0], 5, 5) == [2**63 - 1] * 2


def test_kernel_finds_the_same_in_all_orders_of_threads(metal):  # noqa: F811
    logits = np.random.default_rng(0).integers(-3, 3, (2, 900)).astype(np.float32)

    results = []
    for seed in range(4):
        reorder_threads(build_kernel("probe_threshold", INPUTS), seed)
        results.append(find(logits, np.zeros(900, np.float32), 3, 77))

    assert results == [results[0]] * 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernel_matches_a_sort_for_any_scores(data):
    num_clusters = data.draw(st.integers(1, 512))
    pool = data.draw(st.lists(SCORES, min_size=1, max_size=40))
    picks = np.random.default_rng(data.draw(st.integers(0, 99))).choice(
        np.float32(pool), num_clusters
    )
    num_pinned = data.draw(st.integers(0, num_clusters - 1))
    num_probes = data.draw(st.integers(num_pinned + 1, num_clusters))
    bias = np.zeros(num_clusters, np.float32)
    expected = expected_keys(picks[None], bias, num_pinned, num_probes)

    with harness_kernels():
        actual = find(picks[None], bias, num_pinned, num_probes)
    with twins():
        twin = find(picks[None], bias, num_pinned, num_probes)

    assert actual == expected
    assert twin == expected
