"""Heads that draw their clusters, and many draws at once."""

from dataclasses import replace

import mlx.core as mx
import pytest
from oracles import random_head

from mlx_flashhead import blocks
from mlx_flashhead.head import FlashHead
from mlx_flashhead.kernels.probe_threshold import probe_threshold, probed
from mlx_flashhead.sampling import drawn_scores

samplings = pytest.mark.parametrize("sampling", ["stochastic", "corrected"])


@pytest.fixture(params=[8192, 32], ids=["one block", "blocks of 32"])
def block_size(request, monkeypatch):
    """Clusters of a block at most; 53 are one block, or two of 32 and 21."""
    blocks.block_sizes.cache_clear()
    monkeypatch.setattr(blocks, "MAX_BLOCK_SIZE", request.param)
    yield request.param
    blocks.block_sizes.cache_clear()


def sampling_head(sampling: str, **options) -> FlashHead:
    head = random_head(**options)
    head.config = replace(head.config, sampling=sampling)
    return head


def draw(
    scores: mx.array, num_probes: int, sampling: str, num_draws: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Return centroid logits ``(K,)`` repeated, their noisy scores, and who passes."""
    repeated = mx.broadcast_to(scores, (num_draws, scores.size))
    noisy = drawn_scores(repeated, sampling)
    return repeated, noisy, probed(noisy, probe_threshold(noisy, num_probes=num_probes))
