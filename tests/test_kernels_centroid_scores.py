"""Step 1, kernel and twin, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (  # noqa: F401
    FLOATS,
    Answer,
    harness_kernels,
    metal,
    product,
    random_hidden,
    random_rows,
    reorder_threads,
    twins,
)

from mlx_flashhead.kernels import centroid_scores as step
from mlx_flashhead.kernels._launch import build_kernel
from mlx_flashhead.packing import PackedRows

# Every format; 37 and 70 are no multiples of a tile. 96, 1056 and 3232 are odd
# multiples of 32: rows without a power of two of chunks.
CASES = [
    ("2/64 bf16", "f32", 1, 300, 192),
    ("2/64 bf16", "bf16", 3, 37, 384),
    ("2/32", "f16", 2, 37, 96),
    ("2/128", "f32", 33, 5, 256),
    ("4/64", "f32", 1, 70, 576),
    ("4/64 bf16", "bf16", 3, 37, 576),
    ("4/64 f16", "f16", 2, 37, 1152),
    ("4/32", "f32", 1, 37, 1056),
    ("4/32", "bf16", 33, 5, 32),
    ("4/64", "f32", 1, 1, 64),
    ("8/64 bf16", "bf16", 1, 37, 896),
    ("8/32", "f32", 2, 37, 96),
    ("8/128", "f16", 1, 37, 2304),
    ("3/32 bf16", "bf16", 2, 37, 96),
    ("5/64", "f32", 1, 37, 128),
    ("6/128", "f32", 2, 37, 384),
    ("f32", "f32", 2, 37, 3072),
    ("bf16", "bf16", 1, 37, 3232),
    ("f16", "f16", 2, 37, 1536),
]


class Case:
    """One call of step 1 with its answer in float64."""

    def __init__(self, text, dtype, num_positions, num_rows, depth):
        random = np.random.default_rng(3)
        self.projected = random_hidden(num_positions, depth, FLOATS[dtype], seed=1)
        self.centroids = random_rows(num_rows, depth, text, seed=2)
        # As in a converted model: half a float for a cluster, a float for a position.
        self.bias = random.normal(size=num_rows).astype(np.float16)
        self.offset = random.normal(size=num_positions).astype(np.float32)

    def run(self) -> mx.array:
        """Return the scores of the path in force."""
        added = mx.array(self.bias), mx.array(self.offset)
        return step.centroid_scores(self.projected, self.centroids, *added)

    def answer(self) -> Answer:
        """Return the scores in float64 with their bound."""
        added = self.bias.astype(float), self.offset.astype(float)[:, None]
        return product(self.projected, self.centroids, *added)


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_kernel_and_twin_match_float64(metal, shape):  # noqa: F811
    case = Case(*shape)
    answer = case.answer()

    actual = case.run()
    with twins():
        twin = case.run()

    assert actual.dtype == twin.dtype == mx.float32
    answer.assert_matches(actual)
    answer.assert_matches(twin)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_and_offset_may_be_any_float(metal, dtype):  # noqa: F811
    rows = random_rows(37, 64, "2/64", seed=2)
    bias, offset = (mx.full((size,), 0.375, FLOATS[dtype]) for size in (37, 3))

    actual = step.centroid_scores(mx.zeros((3, 64)), rows, bias, offset)
    with twins():
        twin = step.centroid_scores(mx.zeros((3, 64)), rows, bias, offset)

    np.testing.assert_array_equal(np.array(actual), np.full((3, 37), 0.75))
    np.testing.assert_array_equal(np.array(twin), np.full((3, 37), 0.75))


def test_pinned_clusters_score_infinity(metal):  # noqa: F811
    case = Case("2/64", "f32", 2, 37, 192)
    unpinned = case.answer()
    case.bias[[0, 5, 36]] = np.inf

    actual = np.array(case.run())
    with twins():
        twin = np.array(case.run())

    for scores in (actual, twin):
        assert (scores[:, [0, 5, 36]] == np.inf).all()
        error = np.abs(np.delete(scores - unpinned.values, [0, 5, 36], axis=1))
        assert (error <= np.delete(unpinned.allowed, [0, 5, 36], axis=1)).all()


def test_kernel_gives_the_same_bits_for_all_orders_of_threads(metal):  # noqa: F811
    case = Case("2/64 bf16", "bf16", 3, 70, 192)

    results = set()
    for seed in range(4):
        reorder_threads(build_kernel("centroid_scores", step._INPUTS), seed)
        results.add(np.array(case.run()).tobytes())

    assert len(results) == 1


def score_plainly(projected: mx.array, centroids: PackedRows) -> mx.array:
    """Return the products alone: bias and offset 0."""
    zeros = mx.zeros((centroids.num_rows,)), mx.zeros((len(projected),))
    return step.centroid_scores(projected, centroids, *zeros)


def test_kernel_scores_zero_rows_as_zero(metal):  # noqa: F811
    hidden = random_hidden(2, 64, mx.float32, seed=1)
    centroids = random_rows(5, 64, "f32", seed=2).map(mx.zeros_like)

    assert (np.array(score_plainly(hidden, centroids)) == 0).all()


@pytest.mark.parametrize("text", ["2/64", "4/64", "8/64", "6/64", "f32"])
def test_infinity_in_hidden_gives_the_sign_of_the_weight(metal, text):  # noqa: F811
    hidden = np.array(random_hidden(2, 128, mx.float32, seed=1))
    hidden[0, 77], hidden[1, 3] = np.inf, -np.inf
    centroids = random_rows(37, 128, text, seed=2)

    actual = np.array(score_plainly(mx.array(hidden), centroids))

    weight = np.array(centroids.dequantize())
    clear = np.abs(weight) > 1e-3  # a zero weight makes it nan, in the dense head too
    expected = np.stack([np.sign(weight[:, 77]), -np.sign(weight[:, 3])])
    sure = np.stack([clear[:, 77], clear[:, 3]])
    assert np.isinf(actual[sure]).all()
    np.testing.assert_array_equal(np.sign(actual[sure]), expected[sure])
    assert sure.mean() > 0.5  # of 2-bit weights a third is zero


def test_logits_near_the_largest_float_stay_finite(metal):  # noqa: F811
    hidden = mx.full((1, 64), 1e30)
    centroids = random_rows(5, 64, "4/64", seed=2).map(
        lambda a: a if a.dtype == mx.uint32 else a * 1e5
    )
    answer = product(hidden, centroids)

    actual = score_plainly(hidden, centroids)

    assert np.isfinite(answer.values).all()
    answer.assert_matches(actual)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernel_matches_float64_for_any_shape(data):
    bits = data.draw(st.sampled_from([2, 4, 8]))
    group_size = data.draw(st.sampled_from([32, 64, 128]))
    depth = group_size * data.draw(st.integers(1, 9))
    num_rows = data.draw(st.integers(1, 300))
    num_positions = data.draw(st.integers(1, 5))
    case = Case(f"{bits}/{group_size}", "f32", num_positions, num_rows, depth)
    answer = case.answer()

    with harness_kernels():
        actual = case.run()

    answer.assert_matches(actual)
