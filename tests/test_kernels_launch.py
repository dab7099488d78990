"""Which path runs, and how threads are laid over rows."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import (
    chosen_clusters,
    harness_kernels,
    in_float64,
    random_clusters,
    random_hidden,
    random_rows,
    twins,
)
from test_kernels_cluster_logits import SINGLE, Case

from mlx_flashhead.config import Quantization
from mlx_flashhead.kernels import cluster_logits as step_3
from mlx_flashhead.kernels._launch import (
    build_kernel,
    has_kernel,
    metal_ready,
    tile_shape,
    use_kernels,
)
from mlx_flashhead.kernels.centroid_scores import centroid_scores
from mlx_flashhead.kernels.probe_threshold import probe_threshold
from mlx_flashhead.packing import pack_rows

HIDDEN_SIZES = [32, 96, 576, 640, 896, 1024, 1056, 1152, 1536, 2048, 2304, 2560, 3072]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 16, 32])
def test_tile_is_whole_rows_of_at_most_1024_threads(bits):
    for depth in HIDDEN_SIZES:
        tile = tile_shape(bits, depth)

        assert tile.num_threads == tile.chunks_per_row * tile.rows_per_pass <= 1024
        assert depth % tile.chunks_per_row == 0
        words_per_chunk = depth * bits // 32 // tile.chunks_per_row
        assert 12 <= tile.passes * words_per_chunk <= 16


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_tile_of_a_real_model_leaves_few_lanes_idle(bits):
    for depth in (576, 640, 896, 1024, 1152, 1536, 2048, 2304, 2560):
        assert_few_lanes_idle(tile_shape(bits, depth))


def test_tile_of_default_centroids_leaves_few_lanes_idle():
    for depth in range(64, 1024, 64):
        assert_few_lanes_idle(tile_shape(2, depth))


def assert_few_lanes_idle(tile):
    idle = -tile.num_threads % 32

    assert idle / (tile.num_threads + idle) <= 0.1
    assert tile.num_threads >= 96


def test_kernels_run_only_with_metal_on_the_default_device(monkeypatch):
    gpu, cpu = mx.Device(mx.gpu), mx.Device(mx.cpu)
    answers = {}
    for is_available in (True, False):
        for device in (gpu, cpu):
            monkeypatch.setattr(mx.metal, "is_available", lambda a=is_available: a)
            monkeypatch.setattr(mx, "default_device", lambda d=device: d)
            answers[is_available, device == gpu] = metal_ready()

    assert [key for key, ready in answers.items() if ready] == [(True, True)]


def test_either_path_can_be_forced_for_a_while():
    before = metal_ready()

    with use_kernels("metal"):
        assert metal_ready()
        with use_kernels("ops"):
            assert not metal_ready()
        assert metal_ready()

    assert metal_ready() == before


def test_unknown_path_is_refused():
    with pytest.raises(ValueError, match="'cuda'; use 'metal' or 'ops'"):  # noqa: SIM117
        with use_kernels("cuda"):
            pass


WITHOUT_KERNEL = {
    "mxfp4": (Quantization(4, 32, "mxfp4"), 64),
    "nvfp4": (Quantization(4, 16, "nvfp4"), 64),
    "mxfp8": (Quantization(8, 32, "mxfp8"), 64),
    "hidden size that is no multiple of 32": (None, 48),
    "more chunks than threads": (None, 4128),
}


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_format_without_a_kernel_runs_the_twin(name):
    quantization, depth = WITHOUT_KERNEL[name]
    hidden = random_hidden(2, depth, mx.float32, seed=1)
    rows = pack_rows(random_rows(5, depth, "f32", seed=2).weight, quantization)
    added = mx.ones((5,)), mx.zeros((2,))

    with harness_kernels():
        actual = centroid_scores(hidden, rows, *added)
    with twins():
        expected = centroid_scores(hidden, rows, *added)

    assert not has_kernel(hidden, rows)
    np.testing.assert_array_equal(in_float64(actual), in_float64(expected))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8"])
def test_rows_without_a_kernel_run_the_twin(name):
    quantization, depth = WITHOUT_KERNEL[name]
    case = Case("f32", "f32", **{**SINGLE, "D": depth, "N": 3})
    rows = pack_rows(case.clusters.rows.weight, quantization)
    case.clusters = replace(case.clusters, rows=rows)

    with harness_kernels():
        actual = case.run()

    chosen = chosen_clusters(case.centroid_logits, case.probes)
    exact = in_float64(case.hidden) @ in_float64(rows.dequantize()).T
    expected = np.where(chosen, exact, case.centroid_logits)
    np.testing.assert_allclose(in_float64(actual), expected, atol=1e-4)


def test_kernel_is_built_once():
    def score(num_positions, rows):
        added = mx.zeros((rows.num_rows,)), mx.zeros((num_positions,))
        hidden = random_hidden(num_positions, 64, mx.float32, seed=1)
        centroid_scores(hidden, rows, *added)

    with harness_kernels():
        score(1, random_rows(5, 64, "f32", seed=1))
        score(2, random_rows(7, 64, "4/32", seed=1))

        assert build_kernel.cache_info().misses == 1


@pytest.mark.parametrize("cluster_size", [1, 16])
def test_mlx_takes_the_calls_of_all_three_kernels(tmp_path, cluster_size):
    """Without Metal, MLX still checks and records a kernel call that it exports."""
    hidden = random_hidden(2, 64, mx.bfloat16, seed=1)
    clusters = random_clusters(30, cluster_size, 0, 64, "8/32 bf16", seed=3)
    centroids = random_rows(30, 64, "2/64 bf16", seed=2)
    bias = mx.zeros((30,), mx.float16)
    build_kernel.cache_clear()

    def head(hidden):
        logits = centroid_scores(hidden, centroids, bias, mx.zeros((2,)))
        threshold = probe_threshold(logits, num_probes=2)
        return step_3.cluster_logits(
            hidden,
            clusters.rows,
            logits,
            threshold,
            num_probes=2,
            vocab_size=clusters.vocab_size,
            head_bias=None,
            **clusters.maps,
        )

    exported = tmp_path / "head.mlxfn"
    with use_kernels("metal"):
        try:
            mx.export_function(str(exported), head, hidden)
        except RuntimeError as error:
            if "No Metal back-end" not in str(error):
                raise
            pytest.skip("this MLX does not export kernels without Metal")
    build_kernel.cache_clear()

    text = exported.read_bytes()
    for name in ("centroid_scores", "probe_threshold", "cluster_logits"):
        assert f"custom_kernel_flashhead_{name}".encode() in text
