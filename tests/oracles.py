"""Float64 answers in NumPy to what a FlashHead computes, and random heads to ask."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import chosen_clusters, in_float64, random_clusters

from mlx_flashhead.config import FlashHeadConfig, Quantization
from mlx_flashhead.head import FlashEmbedding, FlashHead
from mlx_flashhead.packing import PackedRows, pack_rows

# Arguments of ``random_head``: 52, 53 and 61 tokens.
HEAD_SHAPES = {
    "single rows": {
        "num_clusters": 53,
        "cluster_size": 1,
        "num_probes": 12,
        "pinned": (52, 7),
    },
    "clusters of 5": {},
    "clusters of 16": {"num_clusters": 4, "cluster_size": 16, "num_probes": 1}
    | {"pinned": ()},
}
head_shapes = pytest.mark.parametrize("shape", HEAD_SHAPES.values(), ids=HEAD_SHAPES)


def random_head(
    *,
    num_clusters: int = 11,
    cluster_size: int = 5,
    padding: int = 3,
    hidden_size: int = 64,
    centroid_dims: int = 32,
    num_probes: int = 4,
    pinned: Sequence[int] = (0, 1),
    rows: Quantization | None = None,
    centroids: Quantization | None = None,
    dtype: mx.Dtype = mx.float32,
    tied: bool = False,
    has_bias: bool = False,
    seed: int = 0,
) -> FlashHead:
    """Return a head of random rows, and of centroids that have no part in them.

    Clusters of one row have no padding.
    """
    config = FlashHeadConfig(
        base_model_type="llama",
        head_path="lm_head",
        tied=tied,
        vocab_size=num_clusters * cluster_size - padding * (cluster_size > 1),
        hidden_size=hidden_size,
        cluster_size=cluster_size,
        centroid_dims=centroid_dims,
        num_probes=num_probes,
        num_pinned=len(pinned),
        dtype=str(dtype).removeprefix("mlx.core."),
        rows=rows,
        centroids=centroids,
        has_bias=has_bias,
    )
    shape = (num_clusters, cluster_size, padding, hidden_size)
    clusters = random_clusters(*shape, "f32", seed)
    random = np.random.default_rng(seed + 1)

    def normal(*shape: int) -> mx.array:
        return mx.array(random.normal(size=shape).astype(np.float32))

    centroid_rows = normal(num_clusters, centroid_dims).astype(dtype)
    projection = normal(centroid_dims + 1, hidden_size) / hidden_size**0.5
    bias = np.array(normal(num_clusters))
    bias[list(pinned)] = np.inf
    return (FlashEmbedding if tied else FlashHead)(
        config,
        rows=pack_rows(clusters.rows.weight.astype(dtype), rows),
        centroids=pack_rows(centroid_rows, centroids),
        centroid_bias=mx.array(bias).astype(mx.float16),
        projection=projection.astype(dtype),
        bias=normal(config.vocab_size).astype(dtype) if has_bias else None,
        **clusters.maps,
    )


def float_rows(rows: PackedRows) -> np.ndarray:
    """Return rows as float64 ``(R, D)``, not rounded to halves where scales are."""
    if rows.quantization is None:
        return in_float64(rows.weight)

    def widen(array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(mx.float32) if is_float else array

    return in_float64(rows.map(widen).dequantize())


def slots_of(head: FlashHead) -> list[tuple[int, int, int]]:
    """Return slot, cluster and token of all that is stored but padding."""
    config = head.config
    if "cluster_tokens" not in head:
        return [(token, token, token) for token in range(config.vocab_size)]
    tokens = np.array(head.cluster_tokens).reshape(-1).tolist()
    return [
        (slot, slot // config.cluster_size, token)
        for slot, token in enumerate(tokens)
        if token != config.vocab_size
    ]


def centroid_logits(head: FlashHead, hidden: mx.array) -> np.ndarray:
    """Return scores of all clusters, ``(N, K)`` float64, infinite where pinned."""
    projected = in_float64(hidden) @ in_float64(head.centroids.projection).T
    scores = projected[:, :-1] @ float_rows(head.centroids.rows).T
    return scores + in_float64(head.centroids.bias) + projected[:, -1:]


def flash_logits(head: FlashHead, hidden: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Return logits in token order and which tokens' clusters are probed.

    Args:
        head: The head; its arrays are read, none of its methods is called.
        hidden: Hidden states, ``(N, D)``.

    Returns:
        ``(N, V)`` float64 and ``(N, V)`` bool.
    """
    coarse = centroid_logits(head, hidden)
    chosen = chosen_clusters(coarse, head.config.num_probes)
    exact = in_float64(hidden) @ float_rows(head.rows).T
    if "bias" in head:
        slots, _, tokens = np.array(slots_of(head)).T
        exact[:, slots] += in_float64(head.bias)[tokens]
    logits = np.full((len(coarse), head.config.vocab_size), np.nan)
    is_probed = np.zeros(logits.shape, bool)
    for slot, cluster, token in slots_of(head):
        passes = chosen[:, cluster]
        is_probed[:, token] = passes
        logits[:, token] = np.where(passes, exact[:, slot], coarse[:, cluster])
    return logits, is_probed


def dense_logits(head: FlashHead, hidden: mx.array) -> np.ndarray:
    """Return the product with all stored rows, in token order, ``(N, V)`` float64."""
    by_slot = in_float64(hidden) @ float_rows(head.rows).T
    slots, _, tokens = np.array(slots_of(head)).T
    logits = np.empty((len(by_slot), head.config.vocab_size))
    logits[:, tokens] = by_slot[:, slots]
    return logits + in_float64(head.bias) if "bias" in head else logits


def assert_logits(actual: mx.array, expected: np.ndarray, hidden_size: int) -> None:
    """Assert that logits are right but for rounding.

    A float32 sum of D products of unit variance is off by far less than
    ``D * eps * max``; two roundings to the dtype of ``actual`` come on top, one of
    them for the head's bias.
    """
    assert actual.shape == expected.shape
    relative = 2 * mx.finfo(actual.dtype).eps + hidden_size * np.finfo(np.float32).eps
    error = np.abs(in_float64(actual) - expected).max()
    allowed = relative * np.abs(expected).max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
