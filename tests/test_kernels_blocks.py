"""How clusters are dealt to blocks."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import blocks_of, chosen_clusters

from mlx_flashhead.blocks import block_sizes, num_blocks, probed_count

# One block, and both sides of the sizes where blocks begin, and where chunks do.
SIZES = [1, 31, 33, 8191, 8192, 8193, 8224, 8225, 16384, 16385, 20000, 151936, 262144]


@pytest.mark.parametrize("num_clusters", SIZES)
def test_blocks_are_equal_but_for_a_chunk_and_fit_a_threadgroup(num_clusters):
    sizes = block_sizes(num_clusters)

    assert list(sizes) == np.bincount(blocks_of(num_clusters)).tolist()
    assert len(sizes) == num_blocks(num_clusters) == -(-num_clusters // 8192)
    assert max(sizes) <= 8192
    assert max(sizes) - min(sizes) < 64


@pytest.mark.parametrize("num_clusters", SIZES)
def test_as_many_pass_as_are_asked_for_or_a_few_more(num_clusters):
    scores = np.random.default_rng(0).normal(size=(1, num_clusters))
    for num_probes in {1, -(-num_clusters // 32), num_clusters // 2 or 1, num_clusters}:
        count = probed_count(num_clusters, num_probes)

        assert count == chosen_clusters(scores, num_probes).sum()
        # The largest block's share is rounded up, and every block has as many.
        excess = num_blocks(num_clusters) * (1 + 64 * num_probes / num_clusters)
        assert num_probes <= count <= num_probes + excess
        assert count <= num_clusters
