"""Float64 answers in NumPy to what a FlashHead computes, and random heads to ask."""

import mlx.core as mx
import numpy as np
from kernel_cases import chosen_clusters, in_float64, random_clusters

from mlx_flashhead.config import FlashHeadConfig, Quantization
from mlx_flashhead.head import FlashEmbedding, FlashHead
from mlx_flashhead.packing import PackedRows, pack_rows


def random_head(
    *,
    num_clusters: int = 11,
    cluster_size: int = 5,
    padding: int = 3,
    hidden_size: int = 64,
    num_probes: int = 4,
    num_pinned: int = 2,
    rows: Quantization | None = None,
    centroids: Quantization | None = None,
    dtype: mx.Dtype = mx.float32,
    tied: bool = False,
    has_bias: bool = False,
    seed: int = 0,
) -> FlashHead:
    """Return a head of random rows, and of centroids that have no part in them."""
    config = FlashHeadConfig(
        base_model_type="llama",
        head_path="lm_head",
        tied=tied,
        vocab_size=num_clusters * cluster_size - padding,
        hidden_size=hidden_size,
        cluster_size=cluster_size,
        num_probes=num_probes,
        num_pinned=num_pinned,
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

    return (FlashEmbedding if tied else FlashHead)(
        config,
        rows=pack_rows(clusters.rows.weight.astype(dtype), rows),
        centroids=pack_rows(normal(num_clusters, hidden_size).astype(dtype), centroids),
        centroid_bias=normal(num_clusters),
        cluster_tokens=mx.array(clusters.cluster_tokens),
        token_slots=mx.array(clusters.token_slots),
        bias=normal(config.vocab_size).astype(dtype) if has_bias else None,
    )


def float_rows(rows: PackedRows) -> np.ndarray:
    """Return rows as float64 ``(R, D)``, not rounded to halves where scales are."""
    if rows.quantization is None:
        return in_float64(rows.weight)

    def widen(array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(mx.float32) if is_float else array

    return in_float64(rows.map(widen).dequantize())


def flash_logits(head: FlashHead, hidden: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Return logits in token order and which tokens' clusters are probed.

    Args:
        head: The head; its arrays are read, none of its methods is called.
        hidden: Hidden states, ``(N, D)``.

    Returns:
        ``(N, V)`` float64 and ``(N, V)`` bool.
    """
    config, x = head.config, in_float64(hidden)
    coarse = x @ float_rows(head.centroids.rows).T
    bias = in_float64(head.centroids.bias)
    chosen = chosen_clusters(coarse, bias, config.num_pinned, config.num_probes)
    exact = x @ float_rows(head.rows).T
    logits = np.full((len(x), config.vocab_size), np.nan)
    is_probed = np.zeros(logits.shape, bool)
    for cluster, tokens in enumerate(np.array(head.cluster_tokens)):
        for place, token in enumerate(tokens):
            if token == config.vocab_size:
                continue
            slot = cluster * config.cluster_size + place
            is_probed[:, token] = chosen[:, cluster]
            logits[:, token] = np.where(
                chosen[:, cluster], exact[:, slot], coarse[:, cluster]
            )
    return _with_bias(head, logits), is_probed


def dense_logits(head: FlashHead, hidden: mx.array) -> np.ndarray:
    """Return the product with all stored rows, in token order, ``(N, V)`` float64."""
    by_slot = in_float64(hidden) @ float_rows(head.rows).T
    tokens = np.array(head.cluster_tokens).reshape(-1)
    is_token = tokens < head.config.vocab_size
    logits = np.empty((len(by_slot), head.config.vocab_size))
    logits[:, tokens[is_token]] = by_slot[:, is_token]
    return _with_bias(head, logits)


def _with_bias(head: FlashHead, logits: np.ndarray) -> np.ndarray:
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
