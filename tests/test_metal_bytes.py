"""What the kernels ask of memory, counted by the harness.

Decoding is bound by memory: these counts are the kernels' speed as far as it can be
told without a GPU.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import (
    FLOATS,
    chosen_clusters,
    harness_kernels,
    random_clusters,
    random_hidden,
    random_rows,
)
from metal_on_cpu import sees_whole_vectors

from mlx_flashhead.kernels import cluster_logits as step_3
from mlx_flashhead.kernels._launch import build_kernel
from mlx_flashhead.kernels.centroid_scores import centroid_scores
from mlx_flashhead.kernels.probe_threshold import probe_threshold

FORMATS = [
    ("4/32 bf16", "bf16", 576),
    ("4/64 bf16", "bf16", 640),
    ("4/128 f16", "f16", 896),
    ("8/32 bf16", "bf16", 1152),
    ("8/64", "f32", 1088),
    ("8/128 bf16", "bf16", 640),
    ("bf16", "bf16", 1024),
    ("f16", "f16", 2304),
    ("f32", "f32", 576),
    ("2/64 bf16", "bf16", 640),
    ("3/64 bf16", "bf16", 640),
    ("5/64 bf16", "bf16", 640),
    ("6/64 bf16", "bf16", 640),
]
WEIGHTS = ("weight", "scales", "biases")


def weight_buffers(report, rows):
    """Return the reports of the buffers that hold the rows."""
    names = WEIGHTS if rows.quantization else WEIGHTS[:1]
    return [report.buffers[name] for name in names]


def expected_counts(rows, is_read):
    """Return for each buffer how often each byte should be read: 1 for chosen rows."""
    arrays = [rows.weight, rows.scales, rows.biases][: 3 if rows.quantization else 1]
    return [np.repeat(is_read, a.nbytes // rows.num_rows) for a in arrays]


def line_share(buffers):
    """Return the share of 128-byte lines of which every byte is used."""
    return sum(b.lines_read_fully for b in buffers) / sum(b.lines_read for b in buffers)


@pytest.mark.parametrize("num_positions", [1, 5])
@pytest.mark.parametrize(("text", "dtype", "depth"), FORMATS)
def test_centroids_are_read_exactly_once(text, dtype, depth, num_positions):
    hidden = random_hidden(num_positions, depth, FLOATS[dtype], seed=1)
    rows = random_rows(203, depth, text, seed=2)

    with harness_kernels():
        mx.eval(centroid_scores(hidden, rows))
        names = ("hidden", *WEIGHTS)
        report = build_kernel("centroid_scores", names).report

    buffers = weight_buffers(report, rows)
    counts = expected_counts(rows, np.ones(203, np.uint8))
    for buffer, expected in zip(buffers, counts, strict=True):
        np.testing.assert_array_equal(buffer.read_counts, expected)
    assert sum(b.bytes_read for b in buffers) == rows.nbytes
    # All but the ends of the three arrays.
    assert line_share(buffers) > 0.95
    assert report.threadgroup_bytes <= 32768


@pytest.mark.parametrize("num_positions", [1, 5])
@pytest.mark.parametrize(("text", "dtype", "depth"), FORMATS)
def test_only_rows_of_probed_clusters_are_read_and_once(
    text, dtype, depth, num_positions
):
    hidden = random_hidden(num_positions, depth, FLOATS[dtype], seed=1)
    clusters = random_clusters(33, 16, 3, depth, text, seed=2)
    random = np.random.default_rng(3)
    logits = random.normal(size=(num_positions, 33)).astype(np.float32)
    bias = random.normal(size=33).astype(np.float32)
    counts = {"num_pinned": 2, "num_probes": 6}
    chosen = chosen_clusters(logits, bias, 2, 6).any(axis=0)

    with harness_kernels():
        threshold = probe_threshold(mx.array(logits), mx.array(bias), **counts)
        step_3.cluster_logits(
            hidden,
            clusters.rows,
            mx.array(clusters.cluster_tokens),
            mx.array(clusters.token_slots),
            mx.array(logits),
            mx.array(bias),
            threshold,
            **counts,
        )
        report = build_kernel("cluster_logits", step_3._INPUTS).report

    buffers = weight_buffers(report, clusters.rows)
    is_read = np.repeat(chosen.astype(np.uint8), 16)
    counts = expected_counts(clusters.rows, is_read)
    for buffer, expected in zip(buffers, counts, strict=True):
        np.testing.assert_array_equal(buffer.read_counts, expected)
    # Words come in whole lines; 16 scales of a group share lines with the next cluster.
    assert line_share(buffers[:1]) == 1.0
    assert line_share(buffers) > 0.85
    assert report.threadgroup_bytes <= 32768


@pytest.mark.skipif(
    not sees_whole_vectors(), reason="clang splits the load of a vector"
)
@pytest.mark.parametrize("text", ["4/64 bf16", "8/64 bf16", "bf16", "f32"])
def test_words_are_loaded_16_bytes_at_a_time(text):
    rows = random_rows(37, 640, text, seed=2)

    with harness_kernels():
        mx.eval(centroid_scores(random_hidden(1, 640, mx.bfloat16, 1), rows))
        report = build_kernel("centroid_scores", ("hidden", *WEIGHTS)).report

    weight = report.buffers["weight"]
    assert weight.bytes_read_wide == weight.bytes_read
    hidden = report.buffers["hidden"]
    assert hidden.bytes_read_wide == hidden.bytes_read


def test_threshold_reads_every_cluster_once():
    logits = mx.random.normal((3, 1700))
    bias = mx.zeros((1700,))

    with harness_kernels():
        probe_threshold(logits, bias, num_pinned=0, num_probes=50)
        names = ("centroid_logits", "bias", "limits")
        report = build_kernel("probe_threshold", names).report

    # Once to choose; the winner's own score comes from a register.
    assert (report.buffers["centroid_logits"].read_counts == 1).all()
    assert (report.buffers["bias"].read_counts == 3).all()
    assert report.threadgroup_bytes <= 32768
