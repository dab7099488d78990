"""Inputs, float64 answers and error bounds for the tests of the kernels."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from metal_on_cpu import CpuKernel, metal_kernel

from mlx_flashhead.config import Quantization
from mlx_flashhead.kernels import _launch
from mlx_flashhead.packing import PackedRows, pack_rows

HAS_GPU = mx.metal.is_available()

FLOATS = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}


@contextmanager
def harness_kernels():
    """Run the Metal kernels in the harness."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch, _launch.use_kernels("metal"):
        patch.setattr(mx.fast, "metal_kernel", metal_kernel)
        _launch.build_kernel.cache_clear()
        yield
    _launch.build_kernel.cache_clear()


def reorder_threads(kernel, seed: int) -> None:
    """Choose the order of threads in the harness; a GPU has its own."""
    if isinstance(kernel, CpuKernel):
        kernel.seed = seed


@contextmanager
def twins():
    """Run the twins in plain MLX ops on the CPU, where they sum in float32."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with _launch.use_kernels("ops"):
            yield
    finally:
        mx.set_default_device(device)


@pytest.fixture(
    params=[
        "harness",
        pytest.param(
            "gpu",
            marks=[
                pytest.mark.metal,
                pytest.mark.skipif(not HAS_GPU, reason="needs a Mac's GPU"),
            ],
        ),
    ]
)
def metal(request):
    """Run the Metal kernels: in the harness, or on the GPU of a Mac."""
    on_gpu = request.param == "gpu"
    with _launch.use_kernels("metal") if on_gpu else harness_kernels():
        yield request.param


def parse_format(text: str) -> tuple[Quantization | None, mx.Dtype]:
    """Return what ``4/64``, ``4/64 bf16`` or ``f16`` says: packing, and float type."""
    packing, _, dtype = text.partition(" ")
    if packing in FLOATS:
        return None, FLOATS[packing]
    bits, group_size = (int(number) for number in packing.split("/"))
    return Quantization(bits, group_size), FLOATS[dtype or "f32"]


def random_rows(num_rows: int, depth: int, text: str, seed: int) -> PackedRows:
    """Return packed random rows ``(num_rows, depth)`` of a format."""
    quantization, dtype = parse_format(text)
    rows = np.random.default_rng(seed).normal(size=(num_rows, depth))
    return pack_rows(mx.array(rows.astype(np.float32)).astype(dtype), quantization)


def random_hidden(num_positions: int, depth: int, dtype: mx.Dtype, seed: int):
    """Return hidden states ``(num_positions, depth)``."""
    hidden = np.random.default_rng(seed).normal(size=(num_positions, depth))
    return mx.array(hidden.astype(np.float32)).astype(dtype)


def in_float64(array: mx.array) -> np.ndarray:
    """Return an array's values as float64."""
    return np.array(array.astype(mx.float32), np.float64)


def unpack_in_numpy(rows: PackedRows) -> tuple[np.ndarray, np.ndarray]:
    """Return a row's values and the size of the numbers they are made of.

    Read from the packed bits, with no help of MLX: value i of a row is bits
    ``i * bits`` to ``(i + 1) * bits`` of its words, lowest first.

    Returns:
        ``scale * q + bias`` and ``|scale| * q + |bias|``, ``(R, D)``, float64.
    """
    if rows.quantization is None:
        values = in_float64(rows.weight)
        return values, np.abs(values)
    bits, group_size = rows.quantization.bits, rows.quantization.group_size
    words = np.array(rows.weight)
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    integers = stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))
    scales = np.repeat(in_float64(rows.scales), group_size, axis=1)
    biases = np.repeat(in_float64(rows.biases), group_size, axis=1)
    return integers * scales + biases, integers * np.abs(scales) + np.abs(biases)


@dataclass(frozen=True)
class Answer:
    """A product in float64, and how far a float32 sum of it may be off."""

    values: np.ndarray
    allowed: np.ndarray

    def assert_matches(self, actual: mx.array) -> None:
        """Assert that ``actual`` lies in the bound, with its own rounding added."""
        rounding = mx.finfo(actual.dtype).eps * np.abs(self.values)
        error = np.abs(in_float64(actual) - self.values)
        excess = error - self.allowed - rounding
        assert actual.shape == self.values.shape
        assert (excess <= 0).all(), (
            f"error {error.max():.3g}, over by {excess.max():.3g}"
        )


def product(hidden: mx.array, rows: PackedRows, *addends: np.ndarray) -> Answer:
    """Return ``hidden @ rows.T + ...`` with a bound from the order of sums.

    A float32 sum of terms t in which no term passes through more than n operations
    is off by at most ``n * eps * sum |t|`` (Higham, Accuracy and Stability of
    Numerical Algorithms, section 4.2). A thread adds at most 32 terms (35 operations
    with the scale and the bias), a simdgroup 5 times, and a row at most one partial
    sum for each chunk of 32 values or, for long rows of floats, each 32 lanes.

    Args:
        hidden: ``(N, D)``.
        rows: R rows.
        addends: Terms besides, of shapes that fit ``(N, R)``.
    """
    values, sizes = unpack_in_numpy(rows)
    operations = 40 + values.shape[1] // 32 + len(addends)
    x = in_float64(hidden)
    total, size = x @ values.T, np.abs(x) @ sizes.T
    for term in addends:
        total, size = total + term, size + np.abs(term)
    return Answer(total, operations * np.finfo(np.float32).eps * size)


def blocks_of(num_clusters: int) -> np.ndarray:
    """Return the block of each cluster, ``(K,)``: chunks of 32 dealt in turn."""
    return np.arange(num_clusters) // 32 % -(-num_clusters // 8192)


def chosen_by_block(
    centroid_logits: np.ndarray, num_probes: int
) -> list[list[np.ndarray]]:
    """Return the clusters probed at each position in each block, the best first.

    From a sort of float32 scores; of equal ones the smaller id comes first. A block
    passes as many as the share P / K gives the largest block, rounded up.
    """
    num_clusters = centroid_logits.shape[1]
    block = blocks_of(num_clusters)
    members = [np.flatnonzero(block == b) for b in range(block.max() + 1)]
    largest = max(len(ids) for ids in members)
    quota = -(-num_probes * largest // num_clusters)
    return [
        [ids[np.lexsort((ids, -row[ids]))][:quota] for ids in members]
        for row in centroid_logits.astype(np.float32)
    ]


def chosen_clusters(centroid_logits: np.ndarray, num_probes: int) -> np.ndarray:
    """Return which clusters are probed, ``(N, K)`` bool."""
    chosen = np.zeros(centroid_logits.shape, bool)
    for row, blocks in zip(
        chosen, chosen_by_block(centroid_logits, num_probes), strict=True
    ):
        row[np.concatenate(blocks)] = True
    return chosen


@dataclass(frozen=True)
class Clusters:
    """Rows in slot order with their index maps.

    Attributes:
        rows: ``K * C`` rows; those of padding slots are not zero, as a trap.
        cluster_tokens: ``(K, C)``, uint32, V for padding; ``None`` for clusters of one.
        token_slots: ``(V,)``, uint32; ``None`` for clusters of one.
        cluster_size: C.
    """

    rows: PackedRows
    cluster_tokens: np.ndarray | None
    token_slots: np.ndarray | None
    cluster_size: int

    @property
    def vocab_size(self) -> int:
        """V."""
        is_mapped = self.token_slots is not None
        return self.token_slots.size if is_mapped else self.rows.num_rows

    @property
    def maps(self) -> dict[str, mx.array | None]:
        """Both maps as arguments of ``cluster_logits``."""
        maps = {"cluster_tokens": self.cluster_tokens, "token_slots": self.token_slots}
        return {k: None if v is None else mx.array(v) for k, v in maps.items()}

    def token_order(self, by_slot: np.ndarray) -> np.ndarray:
        """Return ``(N, K * C)`` values of slots as ``(N, V)`` values of tokens."""
        return by_slot if self.token_slots is None else by_slot[:, self.token_slots]


def random_clusters(
    num_clusters: int, cluster_size: int, padding: int, depth: int, text: str, seed: int
) -> Clusters:
    """Return clusters whose tokens are shuffled; padding never leads a cluster.

    Clusters of one row are in the order of tokens, and have no padding.
    """
    random = np.random.default_rng(seed)
    num_slots = num_clusters * cluster_size
    rows = random_rows(num_slots, depth, text, seed)
    if cluster_size == 1:
        return Clusters(rows, None, None, 1)
    vocab_size = num_slots - padding
    may_be_empty = np.arange(num_slots)[np.arange(num_slots) % cluster_size > 0]
    empty = random.choice(may_be_empty, padding, replace=False)
    tokens = np.full(num_slots, vocab_size, np.uint32)
    tokens[np.setdiff1d(np.arange(num_slots), empty)] = random.permutation(vocab_size)
    slots = np.argsort(tokens, kind="stable")[:vocab_size].astype(np.uint32)
    return Clusters(rows, tokens.reshape(num_clusters, -1), slots, cluster_size)
