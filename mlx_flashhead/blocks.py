"""How clusters are dealt to blocks, each of which chooses its own probes.

A block is what one threadgroup can hold, so step 2 is many small searches whatever the
vocabulary. Chunks of neighbours go to the blocks in turn: token ids follow frequency,
and dealt like this no block has more of the frequent ones than another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache

# 16 scores in the registers of each of 512 threads.
MAX_BLOCK_SIZE = 8192
# A chunk of float32 scores is 128 bytes, a line of memory. The kernels know it as well
# (block_chunk in cluster_keys.h).
CHUNK_SIZE = 32


def num_blocks(num_clusters: int) -> int:
    """Return T, the blocks that ``num_clusters`` K are dealt to.

    Cluster k is in block ``k // CHUNK_SIZE % T``.
    """
    return -(-num_clusters // MAX_BLOCK_SIZE)


@cache
def block_sizes(num_clusters: int) -> tuple[int, ...]:
    """Return how many clusters each block has: T numbers that add up to K."""
    blocks = num_blocks(num_clusters)
    chunks = -(-num_clusters // CHUNK_SIZE)
    sizes = [len(range(b, chunks, blocks)) * CHUNK_SIZE for b in range(blocks)]
    sizes[(chunks - 1) % blocks] -= chunks * CHUNK_SIZE - num_clusters
    return tuple(sizes)


def probes_per_block(num_clusters: int, num_probes: int) -> int:
    """Return how many clusters pass in each block that has as many."""
    return -(-num_probes * max(block_sizes(num_clusters)) // num_clusters)


def probed_count(num_clusters: int, num_probes: int) -> int:
    """Return how many clusters pass at a position: P, or a few more.

    Every block passes the same number, or all it has if it has fewer; if P = K, all.

    Args:
        num_clusters: K, at least 1.
        num_probes: P, in ``[1, K]``.
    """
    quota = probes_per_block(num_clusters, num_probes)
    return sum(min(quota, size) for size in block_sizes(num_clusters))


def least_probes(pinned: Iterable[int], num_clusters: int) -> int:
    """Return the least P with which every block has room for its pinned clusters.

    It is at least their number, though blocks that round up may pass more than P.

    Args:
        pinned: Ids of the clusters that always pass.
        num_clusters: K, at least 1.
    """
    blocks = num_blocks(num_clusters)
    in_block = Counter(cluster // CHUNK_SIZE % blocks for cluster in pinned)
    most = max(in_block.values(), default=1)
    # The least P whose quota is at least that many.
    of_fullest = (most - 1) * num_clusters // max(block_sizes(num_clusters)) + 1
    return max(of_fullest, in_block.total())
