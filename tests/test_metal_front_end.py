"""Clang's front end accepts the kernels, address spaces and all."""

from __future__ import annotations

import mlx.core as mx
import pytest
from kernel_cases import harness_kernels, random_hidden, random_rows
from metal_on_cpu import front_end, kernels
from test_kernels_cluster_logits import SHAPE, SINGLE, Case

from mlx_flashhead.kernels.centroid_scores import centroid_scores
from mlx_flashhead.kernels.probe_threshold import probe_threshold

cindex = pytest.importorskip("clang.cindex", reason="needs the package libclang")

FORMATS = [
    ("2/64 bf16", "f32"),
    ("4/64 bf16", "bf16"),
    ("8/32 f16", "f16"),
    ("6/64", "f32"),
    ("3/64", "f32"),
    ("f32", "f32"),
    ("bf16", "f16"),
    ("f16", "bf16"),
]


@pytest.fixture
def variants(monkeypatch):
    """Collect the text of every variant that is built: text, name, arguments."""
    found = []
    build = kernels.build_library

    def record(text, name, arguments, file_name):
        found.append((text, name, arguments))
        return build(text, name, arguments, file_name)

    monkeypatch.setattr(kernels, "build_library", record)
    with harness_kernels():
        yield found


def assert_well_formed(variants, kernel):
    assert variants
    for text, name, arguments in variants:
        assert kernel in name
        assert front_end.complaints(cindex, text, name, arguments) == []


# Few rows or clusters make inputs of fewer than 8 elements, which are `constant`.
@pytest.mark.parametrize("num_rows", [2, 70])
@pytest.mark.parametrize(("text", "dtype"), FORMATS)
def test_centroid_scores_is_well_formed(variants, text, dtype, num_rows):
    hidden = random_hidden(1, 64, mx.float32, 1).astype(
        {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}[dtype]
    )

    added = mx.zeros((num_rows,), mx.float16), mx.zeros((1,))
    centroid_scores(hidden, random_rows(num_rows, 64, text, 2), *added)

    assert_well_formed(variants, "centroid_scores")


@pytest.mark.parametrize("shape", [SHAPE, SINGLE], ids=["C=16", "C=1"])
@pytest.mark.parametrize("num_clusters", [2, 70])
@pytest.mark.parametrize(("text", "dtype"), FORMATS)
def test_cluster_logits_is_well_formed(variants, text, dtype, num_clusters, shape):
    bias = "bf16" if num_clusters == 70 else None
    shape = {**shape, "D": 64, "K": num_clusters, "probes": 1, "bias": bias}

    Case(text, dtype, **shape).run()

    assert_well_formed(variants, "cluster_logits")


@pytest.mark.parametrize("num_clusters", [1, 7, 700])
def test_probe_threshold_is_well_formed(variants, num_clusters):
    probe_threshold(mx.zeros((1, num_clusters)), num_probes=1)

    assert_well_formed(variants, "probe_threshold")


BROKEN = {
    "a pointer changes its address space": "thread float* p = out;",
    "a device pointer to constant memory": "const device float* p = few;",
    "an implicit float to bfloat": "bfloat b; b = 1.0f;",
    "an unknown name": "out[0] = simd_summ(1.0f);",
    "a shuffle without a lane": "out[0] = simd_shuffle(1.0f);",
}


@pytest.mark.parametrize("bug", BROKEN)
def test_front_end_rejects(bug):
    name, text = kernels.write_kernel(
        "broken",
        BROKEN[bug],
        "",
        {"few": mx.zeros((3,))},
        {"out": mx.float32},
        [],
    )

    assert front_end.complaints(cindex, text, name, "")
