"""Step 3, kernel and twin, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (  # noqa: F401
    FLOATS,
    Answer,
    chosen_clusters,
    harness_kernels,
    in_float64,
    metal,
    product,
    random_clusters,
    random_hidden,
    reorder_threads,
    twins,
)

from mlx_flashhead.kernels import cluster_logits as step
from mlx_flashhead.kernels._launch import build_kernel
from mlx_flashhead.kernels.probe_threshold import probe_threshold


class Case:
    """One call of step 3 with its answer in float64."""

    def __init__(self, text, dtype, *, N, K, C, D, padding, pinned, probes, seed=0):
        random = np.random.default_rng(seed)
        self.hidden = random_hidden(N, D, FLOATS[dtype], seed + 1)
        self.clusters = random_clusters(K, C, padding, D, text, seed + 2)
        self.centroid_logits = random.normal(size=(N, K)).astype(np.float32)
        self.bias = random.normal(size=K).astype(np.float32)
        self.pinned, self.probes = pinned, probes

    def run(self) -> mx.array:
        """Return the logits of the path in force."""
        logits, bias = mx.array(self.centroid_logits), mx.array(self.bias)
        counts = {"num_pinned": self.pinned, "num_probes": self.probes}
        with twins():
            threshold = probe_threshold(logits, bias, **counts)
        return step.cluster_logits(
            self.hidden,
            self.clusters.rows,
            mx.array(self.clusters.cluster_tokens),
            mx.array(self.clusters.token_slots),
            logits,
            bias,
            threshold,
            **counts,
        )

    def answer(self) -> Answer:
        """Return the logits in float64 with their bound."""
        cluster_size = self.clusters.cluster_tokens.shape[1]
        chosen = chosen_clusters(
            self.centroid_logits, self.bias, self.pinned, self.probes
        )
        by_slot = np.repeat(chosen, cluster_size, axis=1)
        tails = np.repeat(self.centroid_logits, cluster_size, axis=1)
        exact = product(self.hidden, self.clusters.rows)
        values = np.where(by_slot, exact.values, tails)
        allowed = np.where(by_slot, exact.allowed, 0)
        to_tokens = self.clusters.token_order
        return Answer(to_tokens(values), to_tokens(allowed))


SHAPE = {"N": 2, "K": 37, "C": 16, "D": 192, "padding": 5, "pinned": 2, "probes": 7}
CASES = {
    "8-bit rows of SmolLM2": ("8/64", "f32", {"D": 576}),
    "4-bit rows, one position": ("4/64", "f32", {"N": 1, "D": 640}),
    "bfloat16 throughout": ("8/64 bf16", "bf16", {}),
    "float16 throughout": ("4/32 f16", "f16", {"D": 96}),
    "float rows": ("f32", "f32", {"D": 320}),
    "bfloat16 rows": ("bf16", "bf16", {"D": 1024, "K": 5, "probes": 3}),
    "float16 rows for bfloat16": ("f16", "bf16", {"D": 64}),
    "clusters of 8": ("8/32", "f32", {"C": 8, "D": 1056, "padding": 3}),
    "clusters of 32": ("4/128", "f32", {"C": 32, "D": 896, "K": 5, "probes": 3}),
    "two groups of positions": ("8/64", "f32", {"N": 20}),
    "no pinned cluster": ("6/64", "f32", {"pinned": 0}),
    "only pinned clusters": ("3/64", "f32", {"pinned": 7}),
    "every cluster": ("5/64", "f32", {"probes": 37}),
    "one cluster": ("2/64", "f32", {"K": 1, "pinned": 0, "probes": 1}),
    "long rows": ("8/64", "f32", {"D": 2048, "K": 4, "probes": 2, "pinned": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_twin_match_float64(metal, name):  # noqa: F811
    text, dtype, changes = CASES[name]
    case = Case(text, dtype, **{**SHAPE, **changes})
    answer = case.answer()

    actual = case.run()
    with twins():
        twin = case.run()

    assert actual.dtype == twin.dtype == FLOATS[dtype]
    answer.assert_matches(actual)
    answer.assert_matches(twin)


def test_kernel_gives_the_same_bits_for_all_orders_of_threads(metal):  # noqa: F811
    case = Case("8/64 bf16", "bf16", **SHAPE)

    results = set()
    for seed in range(4):
        reorder_threads(build_kernel("cluster_logits", step._INPUTS), seed)
        results.add(in_float64(case.run()).tobytes())

    assert len(results) == 1


def test_kernel_writes_every_logit():
    case = Case("8/64", "f32", **{**SHAPE, "N": 3})

    with harness_kernels():
        case.run()
        report = build_kernel("cluster_logits", step._INPUTS).report

    out = report.buffers["out"]
    assert out.bytes_unwritten == 0
    assert out.bytes_written == 3 * case.clusters.token_slots.size * 4


@pytest.mark.parametrize("text", ["8/64", "f32"])
def test_infinite_and_huge_hidden_states_stay_in_their_position(metal, text):  # noqa: F811
    case = Case(text, "f32", **{**SHAPE, "N": 3, "probes": 37})
    hidden = np.array(case.hidden)
    hidden[0, 7], hidden[1] = np.inf, hidden[1] * 1e35
    case.hidden = mx.array(hidden)

    actual = np.array(case.run())

    weight = np.array(case.clusters.rows.dequantize())[case.clusters.token_slots]
    clear = np.abs(weight[:, 7]) > 1e-3
    assert np.isinf(actual[0, clear]).all()
    np.testing.assert_array_equal(np.sign(actual[0, clear]), np.sign(weight[clear, 7]))
    expected = hidden[2].astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(actual[2], expected, atol=1e-3)
    assert np.isfinite(actual[1]).all()


@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernel_matches_float64_for_any_shape(data):
    bits = data.draw(st.sampled_from([4, 8]))
    group_size = data.draw(st.sampled_from([32, 64, 128]))
    num_clusters = data.draw(st.integers(1, 60))
    pinned = data.draw(st.integers(0, num_clusters))
    cluster_size = data.draw(st.sampled_from([8, 16, 32]))
    case = Case(
        f"{bits}/{group_size}",
        "f32",
        N=data.draw(st.integers(1, 18)),
        K=num_clusters,
        C=cluster_size,
        D=group_size * data.draw(st.integers(1, 6)),
        padding=data.draw(st.integers(0, cluster_size - 1)),
        pinned=pinned,
        probes=data.draw(st.integers(max(pinned, 1), num_clusters)),
    )
    answer = case.answer()

    with harness_kernels():
        actual = case.run()

    answer.assert_matches(actual)
