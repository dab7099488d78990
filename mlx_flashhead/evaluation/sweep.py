"""A head at several numbers of probes, at the cost of little more than one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead.blocks import least_probes
from mlx_flashhead.centroids import StoredCentroids
from mlx_flashhead.evaluation.compare import Finish, finished_logits, parts_of
from mlx_flashhead.evaluation.comparison import Comparison, Distributions, Tally
from mlx_flashhead.head import FlashHead
from mlx_flashhead.heads import Head, probing_head
from mlx_flashhead.kernels.probe_threshold import probe_threshold, probed
from mlx_flashhead.positions import Positions

# From one cluster in 256 to one in two.
_HALVINGS = range(1, 9)


@dataclass(frozen=True)
class Method:
    """A way to choose the rows that are read, at any number of probes.

    Attributes:
        name: What to call it.
        head: Scores clusters; the best are taken, whatever its ``sampling``.
        counts: Numbers of probes to try.
        uncounted_bytes: Bytes of arrays that it has for form only.
        has_tails: Whether tokens that are not read have their cluster's logit;
            otherwise their probability is zero.
    """

    name: str
    head: FlashHead
    counts: list[int]
    uncounted_bytes: int = 0
    has_tails: bool = True

    def bytes_at(self, num_probes: int) -> int:
        """Return the bytes of head read for a token."""
        head = probing_head(self.head, num_probes)
        return head.bytes_per_token - self.uncounted_bytes


def own_method(flash: FlashHead) -> Method:
    """Return a FlashHead's own method, its own number of probes among others."""
    return Method(
        "FlashHead", flash, sorted(probe_counts(flash) | {flash.config.num_probes})
    )


def probe_counts(head: FlashHead) -> set[int]:
    """Return halvings of K, but those with which a pinned cluster would not pass."""
    num_clusters = head.config.num_clusters
    pinned = np.flatnonzero(np.isposinf(_bias(head)))
    least = least_probes(pinned.tolist(), num_clusters)
    halvings = {-(-num_clusters // 2**n) for n in _HALVINGS}
    return {count for count in halvings if count >= least}


def compare_probes(
    truth: Head,
    method: Method,
    stored: Head,
    positions: Positions,
    finish: Finish,
    on_share: Callable[[float], None],
) -> list[Comparison]:
    """Return a method's figures at each of its numbers of probes.

    The scores and the exact logits are computed once, and put together as the head
    itself does at each number of probes. In NumPy: MLX's CPU backend takes its time.

    Args:
        truth: What is right.
        method: What is compared with it.
        stored: The dense product over the rows that its head stores.
        positions: N of them, at least one.
        finish: What the model does to its head's logits.
        on_share: Called with the share done.
    """
    head, vocab_size = method.head, truth.vocab_size
    tallies = [Tally() for _ in method.counts]
    arrays = head.centroids
    centroids = StoredCentroids(arrays.rows, _bias(head), arrays.projection)
    clusters = head.slots(mx.arange(vocab_size)) // head.config.cluster_size
    for part, share in parts_of(len(positions.next_tokens), vocab_size):
        hidden, next_tokens = positions.hidden[part], positions.next_tokens[part]
        right = Distributions(finished_logits(truth, hidden, finish))
        exact = finished_logits(stored, hidden, finish)
        scores = mx.array(centroids.scores(np.array(hidden)))
        tails: np.ndarray | float = -np.inf
        if method.has_tails:
            tails = np.array(finish(mx.take(scores, clusters, axis=-1)))
        for count, tally in zip(method.counts, tallies, strict=True):
            passes = probed(scores, probe_threshold(scores, num_probes=count))
            is_exact = np.array(mx.take(passes, clusters, axis=-1))
            found = Distributions(np.where(is_exact, exact, tails))
            tally.add(right, found, next_tokens, is_exact)
        on_share(share)
    return [tally.result() for tally in tallies]


def _bias(head: FlashHead) -> np.ndarray:
    """Return what is added to the clusters' scores, ``(K,)``, float32."""
    return np.array(head.centroids.bias.astype(mx.float32))
