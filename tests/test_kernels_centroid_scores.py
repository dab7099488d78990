"""Step 1, kernel and twin, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (  # noqa: F401
    FLOATS,
    harness_kernels,
    metal,
    product,
    random_hidden,
    random_rows,
    reorder_threads,
    twins,
)

from mlx_flashhead.kernels._launch import build_kernel
from mlx_flashhead.kernels.centroid_scores import centroid_scores

INPUTS = ("hidden", "weight", "scales", "biases")

# Every format; 37 and 70 are no multiples of a tile. 96, 1056 and 3232 are odd
# multiples of 32: rows without a power of two of chunks.
CASES = [
    ("4/64", "f32", 1, 70, 576),
    ("4/64 bf16", "bf16", 3, 37, 576),
    ("4/64 f16", "f16", 2, 37, 1152),
    ("4/32", "f32", 1, 37, 1056),
    ("4/128 bf16", "bf16", 1, 70, 640),
    ("4/32", "bf16", 33, 5, 32),
    ("4/64", "f32", 1, 1, 64),
    ("8/64 bf16", "bf16", 1, 37, 896),
    ("8/32", "f32", 2, 37, 96),
    ("8/128", "f16", 1, 37, 2304),
    ("2/64", "f32", 2, 37, 192),
    ("3/32 bf16", "bf16", 2, 37, 96),
    ("5/64", "f32", 1, 37, 128),
    ("6/128", "f32", 2, 37, 384),
    ("f32", "f32", 2, 37, 3072),
    ("bf16", "bf16", 1, 37, 3232),
    ("f16", "f16", 2, 37, 1536),
    ("bf16", "f32", 1, 37, 2560),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_and_twin_match_float64(metal, case):  # noqa: F811
    text, dtype, num_positions, num_rows, depth = case
    hidden = random_hidden(num_positions, depth, FLOATS[dtype], seed=1)
    centroids = random_rows(num_rows, depth, text, seed=2)
    answer = product(hidden, centroids)

    actual = centroid_scores(hidden, centroids)
    with twins():
        twin = centroid_scores(hidden, centroids)

    assert actual.dtype == twin.dtype == mx.float32
    answer.assert_matches(actual)
    answer.assert_matches(twin)


def test_kernel_gives_the_same_bits_for_all_orders_of_threads(metal):  # noqa: F811
    hidden = random_hidden(3, 576, mx.bfloat16, seed=1)
    centroids = random_rows(70, 576, "4/64 bf16", seed=2)

    results = set()
    for seed in range(4):
        reorder_threads(build_kernel("centroid_scores", INPUTS), seed)
        results.add(np.array(centroid_scores(hidden, centroids)).tobytes())

    assert len(results) == 1


def test_kernel_scores_zero_rows_as_zero(metal):  # noqa: F811
    hidden = random_hidden(2, 64, mx.float32, seed=1)
    centroids = random_rows(5, 64, "f32", seed=2).map(mx.zeros_like)

    assert (np.array(centroid_scores(hidden, centroids)) == 0).all()


@pytest.mark.parametrize("text", ["4/64", "8/64", "6/64", "f32"])
def test_infinity_in_hidden_gives_the_sign_of_the_weight(metal, text):  # noqa: F811
    hidden = np.array(random_hidden(2, 128, mx.float32, seed=1))
    hidden[0, 77], hidden[1, 3] = np.inf, -np.inf
    centroids = random_rows(37, 128, text, seed=2)

    actual = np.array(centroid_scores(mx.array(hidden), centroids))

    weight = np.array(centroids.dequantize())
    clear = np.abs(weight) > 1e-3  # a zero weight makes it nan, in the dense head too
    expected = np.stack([np.sign(weight[:, 77]), -np.sign(weight[:, 3])])
    sure = np.stack([clear[:, 77], clear[:, 3]])
    assert np.isinf(actual[sure]).all()
    np.testing.assert_array_equal(np.sign(actual[sure]), expected[sure])
    assert sure.mean() > 0.8


def test_logits_near_the_largest_float_stay_finite(metal):  # noqa: F811
    hidden = mx.full((1, 64), 1e30)
    centroids = random_rows(5, 64, "4/64", seed=2).map(
        lambda a: a if a.dtype == mx.uint32 else a * 1e5
    )
    answer = product(hidden, centroids)

    actual = centroid_scores(hidden, centroids)

    assert np.isfinite(answer.values).all()
    answer.assert_matches(actual)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernel_matches_float64_for_any_shape(data):
    bits = data.draw(st.sampled_from([4, 8]))
    group_size = data.draw(st.sampled_from([32, 64, 128]))
    depth = group_size * data.draw(st.integers(1, 9))
    num_rows = data.draw(st.integers(1, 300))
    num_positions = data.draw(st.integers(1, 5))
    hidden = random_hidden(num_positions, depth, mx.float32, seed=3)
    centroids = random_rows(num_rows, depth, f"{bits}/{group_size}", seed=4)

    with harness_kernels():
        actual = centroid_scores(hidden, centroids)

    product(hidden, centroids).assert_matches(actual)
