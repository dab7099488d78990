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

from mlx_flashhead.kernels import centroid_scores as step_1
from mlx_flashhead.kernels import cluster_logits as step_3
from mlx_flashhead.kernels._launch import build_kernel
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


def score(hidden, rows):
    """Run step 1 and return what it asked for."""
    added = mx.zeros((rows.num_rows,), mx.float16), mx.zeros((len(hidden),))
    step_1.centroid_scores(hidden, rows, *added)
    return build_kernel("centroid_scores", step_1._INPUTS).report


@pytest.mark.parametrize("num_positions", [1, 5])
@pytest.mark.parametrize(("text", "dtype", "depth"), FORMATS)
def test_centroids_are_read_exactly_once(text, dtype, depth, num_positions):
    hidden = random_hidden(num_positions, depth, FLOATS[dtype], seed=1)
    rows = random_rows(203, depth, text, seed=2)

    with harness_kernels():
        report = score(hidden, rows)

    buffers = weight_buffers(report, rows)
    counts = expected_counts(rows, np.ones(203, np.uint8))
    for buffer, expected in zip(buffers, counts, strict=True):
        np.testing.assert_array_equal(buffer.read_counts, expected)
    assert sum(b.bytes_read for b in buffers) == rows.nbytes
    # All but the ends of the three arrays.
    assert line_share(buffers) > 0.95
    assert (report.buffers["bias"].read_counts == num_positions).all()
    assert report.threadgroup_bytes <= 32768


def logits_report(hidden, clusters, centroid_logits, num_probes):
    """Run step 3 and return what it asked for."""
    logits = mx.array(centroid_logits)
    step_3.cluster_logits(
        hidden,
        clusters.rows,
        logits,
        probe_threshold(logits, num_probes=num_probes),
        num_probes=num_probes,
        vocab_size=clusters.vocab_size,
        head_bias=None,
        **clusters.maps,
    )
    return build_kernel("cluster_logits", step_3._INPUTS).report


@pytest.mark.parametrize("cluster_size", [1, 16])
@pytest.mark.parametrize("num_positions", [1, 5])
@pytest.mark.parametrize(("text", "dtype", "depth"), FORMATS)
def test_only_rows_of_probed_clusters_are_read_and_once(
    text, dtype, depth, num_positions, cluster_size
):
    hidden = random_hidden(num_positions, depth, FLOATS[dtype], seed=1)
    num_clusters, padding = (528, 0) if cluster_size == 1 else (33, 3)
    shape = (num_clusters, cluster_size, padding, depth)
    clusters = random_clusters(*shape, text, seed=2)
    logits = np.random.default_rng(3).normal(size=(num_positions, num_clusters))
    logits = logits.astype(np.float32)
    chosen = chosen_clusters(logits, 6).any(axis=0)

    with harness_kernels():
        report = logits_report(hidden, clusters, logits, 6)

    buffers = weight_buffers(report, clusters.rows)
    is_read = np.repeat(chosen.astype(np.uint8), cluster_size)
    counts = expected_counts(clusters.rows, is_read)
    for buffer, expected in zip(buffers, counts, strict=True):
        np.testing.assert_array_equal(buffer.read_counts, expected)
    if cluster_size > 1:
        # Words come in whole lines; 16 scales of a group share some with a neighbour.
        assert line_share(buffers[:1]) == 1.0
        assert line_share(buffers) > 0.85
    # The threads of a cluster ask for the same logit.
    times = num_positions * num_clusters * cluster_size
    assert report.buffers["centroid_logits"].bytes_read == 4 * times
    assert report.threadgroup_bytes <= 32768


# A row of 640 bytes fills five lines; one of 320 touches three and fills two. Its 20
# bytes of scales touch a line, or (one time in eight) two, and so do those of biases.
@pytest.mark.parametrize(
    ("text", "full_share", "lines_per_row"),
    [("8/64 bf16", 1, 5 + 2.25), ("4/64 bf16", 2 / 3, 3 + 2.25)],
)
def test_single_rows_cannot_fill_lines(text, full_share, lines_per_row):
    clusters = random_clusters(4000, 1, 0, 640, text, seed=2)
    logits = np.random.default_rng(3).normal(size=(1, 4000)).astype(np.float32)

    with harness_kernels():
        hidden = random_hidden(1, 640, mx.bfloat16, seed=1)
        report = logits_report(hidden, clusters, logits, 125)

    words, *scales = weight_buffers(report, clusters.rows)
    assert line_share([words]) == pytest.approx(full_share, rel=0.1)
    assert line_share(scales) == 0
    # Less, as neighbours share some.
    lines = sum(b.lines_read for b in [words, *scales])
    assert 0.9 * 125 * lines_per_row <= lines <= 125 * lines_per_row


@pytest.mark.skipif(
    not sees_whole_vectors(), reason="clang splits the load of a vector"
)
@pytest.mark.parametrize("text", ["2/64 bf16", "4/64 bf16", "8/64 bf16", "bf16", "f32"])
def test_words_are_loaded_8_or_16_bytes_at_a_time(text):
    with harness_kernels():
        hidden = random_hidden(1, 640, mx.bfloat16, seed=1)
        report = score(hidden, random_rows(37, 640, text, seed=2))

    for name in ("weight", "projected"):
        buffer = report.buffers[name]
        assert buffer.bytes_read_wide == buffer.bytes_read


@pytest.mark.parametrize("num_clusters", [1700, 8244])
def test_threshold_reads_every_cluster_once(num_clusters):
    logits = mx.random.normal((3, num_clusters))

    with harness_kernels():
        probe_threshold(logits, num_probes=50)
        report = build_kernel("probe_threshold", ("centroid_logits", "limits")).report

    # Once to choose; the winner's own score comes from a register.
    assert (report.buffers["centroid_logits"].read_counts == 1).all()
    assert report.threadgroup_bytes <= 32768
