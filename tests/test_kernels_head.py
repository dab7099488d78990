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

CENTROID_DIMS = 192
PINNED = [0, 700, 3071]


@cache
def head_of(
    weights: str, bits: int | None, cluster_size: int
) -> tuple[FlashHead, mx.array]:
    """Return a head with SmolLM2's own rows, and 3 hidden states near some of them.

    Clusters are neighbours along one random direction, and centroids their means in
    random dimensions: good enough to differ, made without the code that clusters.
    """
    rows = mx.load(f"{weights}/model.safetensors")["model.embed_tokens.weight"]
    rows = np.array(rows.astype(mx.float32))
    vocab_size, depth = rows.shape
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(depth, CENTROID_DIMS)))[0]
    means, maps = rows, {}
    if cluster_size > 1:
        order = np.argsort(rows @ random.normal(size=depth)).astype(np.uint32)
        tokens = order.reshape(-1, cluster_size)
        means = rows[tokens].mean(axis=1)
        maps = {
            "cluster_tokens": mx.array(tokens),
            "token_slots": mx.array(slots_of_tokens(tokens, vocab_size)),
        }
    quantization = None if bits is None else Quantization(bits, 64)
    config = FlashHeadConfig(
        base_model_type="llama",
        head_path="model.embed_tokens",
        tied=False,
        vocab_size=vocab_size,
        hidden_size=depth,
        cluster_size=cluster_size,
        centroid_dims=CENTROID_DIMS,
        num_probes=len(means) // 32,
        num_pinned=len(PINNED),
        dtype="float32",
        rows=quantization,
        centroids=Quantization(2, 64),
    )
    packed = pack_rows(mx.array(rows), quantization)
    bias = random.normal(size=len(means)) * 0.1
    bias[PINNED] = np.inf
    projection = np.vstack([basis.T, rows.mean(axis=0)]).astype(np.float32)
    head = FlashHead(
        config,
        rows=packed if cluster_size == 1 else cluster_major(packed, tokens),
        centroids=pack_rows(
            mx.array((means @ basis).astype(np.float32)), config.centroids
        ),
        centroid_bias=mx.array(bias.astype(np.float16)),
        projection=mx.array(projection),
        **maps,
    )
    near = rows[random.integers(0, vocab_size, 3)]
    return head, mx.array(8 * near + random.normal(size=near.shape).astype(np.float32))


# 49,152 clusters in six blocks, and 3,072 in one.
@pytest.mark.parametrize(
    ("cluster_size", "bits"), [(1, 8), (1, None), (16, 4), (16, 8)]
)
def test_head_through_kernels_equals_head_through_twins(
    metal,  # noqa: F811
    smollm2,
    bits,
    cluster_size,
):
    head, hidden = head_of(str(smollm2), bits, cluster_size)

    chosen = np.array(head.probed_tokens(hidden))
    logits = head(hidden)
    with twins():
        twin_chosen = np.array(head.probed_tokens(hidden))
        twin_logits = head(hidden)

    np.testing.assert_array_equal(chosen, twin_chosen)
    assert (chosen.sum(axis=1) == 49152 // 32).all()
    pinned = PINNED
    if cluster_size > 1:
        pinned = np.array(head.cluster_tokens)[PINNED].reshape(-1)
    assert chosen[:, pinned].all()
    # Each is off by at most the bound of a float32 sum, here with the largest weight.
    largest = mx.abs(head.rows.dequantize()).max()
    sizes = 2 * float(largest) * np.abs(np.array(hidden)).sum()
    allowed = 2 * 60 * np.finfo(np.float32).eps * sizes
    np.testing.assert_allclose(np.array(logits), np.array(twin_logits), atol=allowed)
    assert logits.argmax(axis=-1).tolist() == twin_logits.argmax(axis=-1).tolist()


@pytest.mark.parametrize("cluster_size", [1, 16])
def test_head_has_exact_logits_for_probed_clusters(metal, smollm2, cluster_size):  # noqa: F811
    head, hidden = head_of(str(smollm2), 8, cluster_size)
    hidden = hidden[:1]
    tokens = mx.array(np.flatnonzero(np.array(head.probed_tokens(hidden))))
    exact = product(hidden, head.rows.take(head.slots(tokens)))

    logits = head(hidden)

    assert len(tokens) == 49152 // 32
    exact.assert_matches(logits[:, tokens])
