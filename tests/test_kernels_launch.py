"""Which path runs, and how threads are laid over rows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import harness_kernels, in_float64, random_hidden, random_rows, twins

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
@pytest.mark.parametrize("cluster_size", [None, 8, 16, 32])
def test_tile_is_whole_rows_of_at_most_1024_threads(bits, cluster_size):
    for depth in HIDDEN_SIZES:
        tile = tile_shape(bits, depth, cluster_size)

        assert tile.num_threads == tile.chunks_per_row * tile.rows_per_pass <= 1024
        assert depth % tile.chunks_per_row == 0
        assert 1 <= tile.passes <= 4
        assert cluster_size is None or cluster_size % tile.num_rows == 0


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_tile_of_a_real_model_leaves_few_lanes_idle(bits):
    for depth in (576, 640, 896, 1024, 1152, 1536, 2048, 2304, 2560):
        for tile in (tile_shape(bits, depth), tile_shape(bits, depth, 16)):
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

    with harness_kernels():
        actual = centroid_scores(hidden, rows)
    with twins():
        expected = centroid_scores(hidden, rows)

    assert not has_kernel(hidden, rows)
    np.testing.assert_array_equal(in_float64(actual), in_float64(expected))


def test_cluster_size_without_a_kernel_runs_the_twin():
    hidden = random_hidden(1, 64, mx.float32, seed=1)
    rows = random_rows(36, 64, "f32", seed=2)
    tokens = mx.arange(36).astype(mx.uint32)
    logits, bias = random_hidden(1, 3, mx.float32, seed=3), mx.zeros((3,))
    counts = {"num_pinned": 0, "num_probes": 3}

    with harness_kernels():
        threshold = probe_threshold(logits, bias, **counts)
        actual = step_3.cluster_logits(
            hidden,
            rows,
            tokens.reshape(3, 12),
            tokens,
            logits,
            bias,
            threshold,
            **counts,
        )

    expected = in_float64(hidden) @ in_float64(rows.weight).T
    np.testing.assert_allclose(in_float64(actual), expected, atol=1e-4)


def test_kernel_is_built_once():
    with harness_kernels():
        centroid_scores(mx.zeros((1, 64)), random_rows(5, 64, "f32", seed=1))
        centroid_scores(mx.zeros((2, 96)), random_rows(7, 96, "4/32", seed=1))

        assert build_kernel.cache_info().misses == 1


def test_mlx_takes_the_calls_of_all_three_kernels(tmp_path):
    """Without Metal, MLX still checks and records a kernel call that it exports."""
    hidden = random_hidden(2, 64, mx.bfloat16, seed=1)
    centroids = random_rows(3, 64, "4/64 bf16", seed=2)
    rows = random_rows(48, 64, "8/32 bf16", seed=3)
    tokens = mx.arange(48).astype(mx.uint32)
    bias = mx.zeros((3,))
    counts = {"num_pinned": 1, "num_probes": 2}
    build_kernel.cache_clear()

    def head(hidden):
        logits = centroid_scores(hidden, centroids)
        threshold = probe_threshold(logits, bias, **counts)
        return step_3.cluster_logits(
            hidden,
            rows,
            tokens.reshape(3, 16),
            tokens,
            logits,
            bias,
            threshold,
            **counts,
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
