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

    def __init__(self, text, dtype, *, N, K, C, D, padding, probes, bias=None, seed=0):
        random = np.random.default_rng(seed)
        self.hidden = random_hidden(N, D, FLOATS[dtype], seed + 1)
        self.clusters = random_clusters(K, C, padding, D, text, seed + 2)
        self.centroid_logits = random.normal(size=(N, K)).astype(np.float32)
        self.head_bias = None
        if bias is not None:
            terms = random.normal(size=self.clusters.vocab_size).astype(np.float32)
            self.head_bias = mx.array(terms).astype(FLOATS[bias])
        self.probes = probes

    def run(self) -> mx.array:
        """Return the logits of the path in force."""
        logits = mx.array(self.centroid_logits)
        with twins():
            threshold = probe_threshold(logits, num_probes=self.probes)
        return step.cluster_logits(
            self.hidden,
            self.clusters.rows,
            logits,
            threshold,
            num_probes=self.probes,
            vocab_size=self.clusters.vocab_size,
            head_bias=self.head_bias,
            **self.clusters.maps,
        )

    def answer(self) -> Answer:
        """Return the logits in float64 with their bound."""
        cluster_size, to_tokens = self.clusters.cluster_size, self.clusters.token_order
        chosen = chosen_clusters(self.centroid_logits, self.probes)
        chosen, tails = (
            to_tokens(np.repeat(by_cluster, cluster_size, axis=1))
            for by_cluster in (chosen, self.centroid_logits)
        )
        rows = self.clusters.rows
        if self.clusters.token_slots is not None:
            rows = rows.take(mx.array(self.clusters.token_slots))
        terms = [] if self.head_bias is None else [in_float64(self.head_bias)]
        exact = product(self.hidden, rows, *terms)
        return Answer(
            np.where(chosen, exact.values, tails), np.where(chosen, exact.allowed, 0)
        )


SHAPE = {"N": 2, "K": 37, "C": 16, "D": 192, "padding": 5, "probes": 7}
SINGLE = {"N": 2, "K": 700, "C": 1, "D": 192, "padding": 0, "probes": 31}
CASES = {
    "8-bit rows of SmolLM2": ("8/64", "f32", {**SINGLE, "D": 576}),
    "4-bit rows, one position": ("4/64", "f32", {**SINGLE, "N": 1, "D": 640}),
    "bfloat16 throughout": ("8/64 bf16", "bf16", {**SINGLE, "bias": "bf16"}),
    "single float rows": ("f32", "f32", {**SINGLE, "D": 320, "bias": "f16"}),
    "every single row": ("4/32", "f32", {**SINGLE, "probes": 700}),
    "one single row": ("2/64", "f32", {**SINGLE, "K": 1, "probes": 1}),
    "two groups of positions": ("8/64", "f32", {**SINGLE, "N": 35, "bias": "f32"}),
    "two blocks": ("8/32", "f32", {**SINGLE, "K": 8244, "D": 32, "probes": 300}),
    "clusters of 16": ("8/64", "f32", {**SHAPE, "D": 576, "bias": "f32"}),
    "float16 throughout": ("4/32 f16", "f16", {**SHAPE, "D": 96}),
    "float rows": ("f32", "f32", {**SHAPE, "D": 320}),
    "bfloat16 rows": ("bf16", "bf16", {**SHAPE, "D": 1024, "K": 5, "probes": 3}),
    "float16 rows for bfloat16": ("f16", "bf16", {**SHAPE, "D": 64}),
    "clusters of 2": ("8/32", "f32", {**SHAPE, "C": 2, "D": 1056, "K": 150}),
    "clusters of 7": ("4/128", "f32", {**SHAPE, "C": 7, "D": 896, "padding": 3}),
    "clusters of 300": ("6/64", "f32", {**SHAPE, "C": 300, "K": 4, "probes": 2}),
    "every cluster": ("5/64", "f32", {**SHAPE, "probes": 37}),
    "one cluster": ("3/64", "f32", {**SHAPE, "K": 1, "probes": 1}),
    "long rows": ("8/64", "f32", {**SHAPE, "D": 2048, "K": 4, "probes": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_twin_match_float64(metal, name):  # noqa: F811
    text, dtype, shape = CASES[name]
    case = Case(text, dtype, **shape)
    answer = case.answer()

    actual = case.run()
    with twins():
        twin = case.run()

    assert actual.dtype == twin.dtype == FLOATS[dtype]
    answer.assert_matches(actual)
    answer.assert_matches(twin)


@pytest.mark.parametrize("shape", [SHAPE, {**SINGLE, "N": 5}], ids=["C=16", "C=1"])
def test_kernel_gives_the_same_bits_for_all_orders_of_threads(metal, shape):  # noqa: F811
    case = Case("8/64 bf16", "bf16", **shape)

    results = set()
    for seed in range(4):
        reorder_threads(build_kernel("cluster_logits", step._INPUTS), seed)
        results.add(in_float64(case.run()).tobytes())

    assert len(results) == 1


@pytest.mark.parametrize("shape", [SHAPE, SINGLE], ids=["C=16", "C=1"])
def test_kernel_writes_every_logit_once(shape):
    case = Case("8/64", "f32", **{**shape, "N": 3})

    with harness_kernels():
        case.run()
        report = build_kernel("cluster_logits", step._INPUTS).report

    out = report.buffers["out"]
    assert out.bytes_unwritten == 0
    assert out.bytes_written == 3 * case.clusters.vocab_size * 4


def test_logits_of_a_position_do_not_depend_on_the_others(metal):  # noqa: F811
    case = Case("4/64", "f32", **{**SINGLE, "N": 33})
    together = np.array(case.run())

    for n in (0, 31, 32):
        alone = Case("4/64", "f32", **{**SINGLE, "N": 33})
        alone.hidden = case.hidden[n : n + 1]
        alone.centroid_logits = case.centroid_logits[n : n + 1]
        np.testing.assert_array_equal(np.array(alone.run())[0], together[n])


@pytest.mark.parametrize("shape", [SHAPE, SINGLE], ids=["C=16", "C=1"])
@pytest.mark.parametrize("text", ["8/64", "f32"])
def test_infinite_and_huge_hidden_states_stay_in_their_position(
    metal,  # noqa: F811
    text,
    shape,
):
    case = Case(text, "f32", **{**shape, "N": 3, "probes": shape["K"]})
    hidden = np.array(case.hidden)
    hidden[0, 7], hidden[1] = np.inf, hidden[1] * 1e35
    case.hidden = mx.array(hidden)

    actual = np.array(case.run())

    weight = case.clusters.token_order(np.array(case.clusters.rows.dequantize()).T).T
    clear = np.abs(weight[:, 7]) > 1e-3
    assert np.isinf(actual[0, clear]).all()
    np.testing.assert_array_equal(np.sign(actual[0, clear]), np.sign(weight[clear, 7]))
    expected = hidden[2].astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(actual[2], expected, atol=1e-3)
    assert np.isfinite(actual[1]).all()


@pytest.mark.parametrize("shape", [SHAPE, SINGLE], ids=["C=16", "C=1"])
def test_a_position_of_nan_leaves_the_others_alone(metal, shape):  # noqa: F811
    """Its scores are nan as well: as many clusters pass, whichever they are."""
    case, sound = (Case("8/64", "f32", **{**shape, "N": 3}) for _ in range(2))
    sound.hidden, sound.centroid_logits = case.hidden[1:], case.centroid_logits[1:]
    expected = sound.answer()
    case.centroid_logits[0] = np.nan
    case.hidden = mx.concatenate([mx.full((1, shape["D"]), mx.nan), sound.hidden])

    actual = case.run()
    with twins():
        twin = case.run()

    for logits in (actual, twin):
        assert np.isnan(np.array(logits[0])).all()
        expected.assert_matches(logits[1:])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernel_matches_float64_for_any_shape(data):
    bits = data.draw(st.sampled_from([4, 8]))
    group_size = data.draw(st.sampled_from([32, 64, 128]))
    num_clusters = data.draw(st.integers(1, 300))
    cluster_size = data.draw(st.sampled_from([1, 1, 3, 8, 16]))
    case = Case(
        f"{bits}/{group_size}",
        "f32",
        N=data.draw(st.integers(1, 36)),
        K=num_clusters,
        C=cluster_size,
        D=group_size * data.draw(st.integers(1, 6)),
        padding=data.draw(st.integers(0, cluster_size - 1)),
        probes=data.draw(st.integers(1, num_clusters)),
        bias=data.draw(st.sampled_from([None, "f32", "bf16"])),
    )
    answer = case.answer()

    with harness_kernels():
        actual = case.run()

    answer.assert_matches(actual)
