"""The whole head through the kernels against the whole head through the twins."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import metal, product, twins  # noqa: F401

from mlx_flashhead.config import FlashHeadConfig, Quantization
from mlx_flashhead.head import FlashHead
from mlx_flashhead.packing import cluster_major, pack_rows, slots_of_tokens

CLUSTER_SIZE = 16


@cache
def head_of(weights: str, bits: int | None) -> tuple[FlashHead, mx.array]:
    """Return a head with SmolLM2's own rows, and 3 hidden states near some of them.

    Clusters are neighbours along one random direction: good enough to have centroids
    that differ, made without the code that clusters.
    """
    rows = mx.load(f"{weights}/model.safetensors")["model.embed_tokens.weight"]
    rows = np.array(rows.astype(mx.float32))
    vocab_size, depth = rows.shape
    random = np.random.default_rng(0)
    order = np.argsort(rows @ random.normal(size=depth)).astype(np.uint32)
    cluster_tokens = order.reshape(-1, CLUSTER_SIZE)
    centroids = rows[cluster_tokens].mean(axis=1)
    quantization = None if bits is None else Quantization(bits, 64)
    config = FlashHeadConfig(
        base_model_type="llama",
        head_path="model.embed_tokens",
        tied=False,
        vocab_size=vocab_size,
        hidden_size=depth,
        cluster_size=CLUSTER_SIZE,
        num_probes=96,
        num_pinned=3,
        dtype="float32",
        rows=quantization,
        centroids=Quantization(4, 64),
    )
    head = FlashHead(
        config,
        rows=cluster_major(pack_rows(mx.array(rows), quantization), cluster_tokens),
        centroids=pack_rows(mx.array(centroids), config.centroids),
        centroid_bias=mx.array(np.float32(random.normal(size=len(centroids)) * 0.1)),
        cluster_tokens=mx.array(cluster_tokens),
        token_slots=mx.array(slots_of_tokens(cluster_tokens, vocab_size)),
    )
    near = rows[random.integers(0, vocab_size, 3)]
    return head, mx.array(8 * near + random.normal(size=near.shape).astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8, None])
def test_head_through_kernels_equals_head_through_twins(metal, smollm2, bits):  # noqa: F811
    head, hidden = head_of(str(smollm2), bits)

    chosen = np.array(head.probed_clusters(hidden))
    logits = head(hidden)
    with twins():
        twin_chosen = np.array(head.probed_clusters(hidden))
        twin_logits = head(hidden)

    np.testing.assert_array_equal(chosen, twin_chosen)
    assert (chosen.sum(axis=1) == 96).all()
    # Each is off by at most the bound of a float32 sum, here with the largest weight.
    tails, largest = (
        product(hidden, head.centroids.rows),
        mx.abs(head.rows.dequantize()),
    )
    sizes = 2 * float(largest.max()) * np.abs(np.array(hidden)).sum()
    allowed = 2 * max(tails.allowed.max(), 60 * np.finfo(np.float32).eps * sizes)
    np.testing.assert_allclose(np.array(logits), np.array(twin_logits), atol=allowed)
    assert logits.argmax(axis=-1).tolist() == twin_logits.argmax(axis=-1).tolist()


def test_head_has_exact_logits_for_probed_clusters(metal, smollm2):  # noqa: F811
    head, hidden = head_of(str(smollm2), 8)
    hidden = hidden[:1]
    clusters = np.flatnonzero(np.array(head.probed_clusters(hidden)))
    slots = (clusters[:, None] * CLUSTER_SIZE + np.arange(CLUSTER_SIZE)).reshape(-1)
    exact = product(hidden, head.rows.take(mx.array(slots)))

    logits = head(hidden)

    tokens = head.cluster_tokens.reshape(-1)[mx.array(slots)]
    assert len(clusters) == 96
    exact.assert_matches(logits[:, tokens])
