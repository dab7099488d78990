"""Probes drawn at random instead of the best ones, so that any token can come up.

Steps 2 and 3 run on scores with noise added; the functions here make those scores, and
turn what step 3 wrote into logits. Each block draws its own quota (see ``blocks``): a
stratified draw. It reaches every cluster if no block's quota is all pinned clusters.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_flashhead.blocks import CHUNK_SIZE, num_blocks

# What tokens that were not drawn are lowered by: they keep 2e-9 of their mass, in reach
# of a logit bias or of constrained decoding, and out of a sampler's.
_LOWERED_BY = 20.0

# Half the step of mx.random.uniform: its logarithm is finite.
_LEAST_UNIFORM = 2.0**-33


def drawn_scores(centroid_logits: mx.array, sampling: str) -> mx.array:
    """Add noise, so that the clusters with the largest scores are a random draw.

    ``stochastic`` adds Gumbel noise: clusters are drawn one after the other, without
    replacement, in proportion to their probability ``softmax(centroid_logits)``
    (FlashHead, arXiv:2603.14591). ``corrected`` adds ``-log u``, u uniform: priority
    sampling, in which a cluster whose centroid logit alone is large enough is certain
    to be drawn.

    Args:
        centroid_logits: ``(N, K)``, float32; +inf pins a cluster.
        sampling: ``stochastic`` or ``corrected``.

    Returns:
        Scores, ``(N, K)``, float32. The noise follows ``mx.random.seed``.
    """
    uniform = mx.random.uniform(_LEAST_UNIFORM, shape=centroid_logits.shape)
    if sampling == "stochastic":
        # Small uniforms have the finer steps; mx.random.gumbel makes its large values
        # of large ones, and none above 16.6.
        return centroid_logits - mx.log(-mx.log1p(-uniform))
    return centroid_logits - mx.log(uniform)


def drawn_logits(
    logits: mx.array,
    centroid_logits: mx.array,
    scores: mx.array,
    is_drawn: mx.array,
    *,
    sampling: str,
    token_clusters: mx.array | None = None,
) -> mx.array:
    """Return the logits to sample from after a draw.

    A drawn token keeps its exact logit, with ``corrected`` less the logarithm of the
    probability that it was drawn: ``min(1, exp(centroid_logits - kappa))``, kappa the
    largest score of its block that was not drawn (Duffield, Lund and Thorup, 2007).
    ``exp`` of that has the expectation ``exp(exact logit)``. Any other token gets its
    centroid logit, lowered by 20.

    Args:
        logits: From step 3, ``(N, V)``.
        centroid_logits: ``(N, K)``, float32.
        scores: From ``drawn_scores``, ``(N, K)``.
        is_drawn: Which clusters passed, ``(N, K)``, bool.
        sampling: ``stochastic`` or ``corrected``.
        token_clusters: Cluster of each token, ``(V,)``; ``None`` if they are the same.

    Returns:
        Logits, ``(N, V)``, in the dtype of ``logits``.
    """
    added = mx.zeros_like(scores)
    if sampling == "corrected":
        added = mx.maximum(_largest_left(scores, is_drawn) - centroid_logits, 0)
    added = mx.where(is_drawn, added, centroid_logits - _LOWERED_BY)
    if token_clusters is not None:
        is_drawn = mx.take(is_drawn, token_clusters, axis=-1)
        added = mx.take(added, token_clusters, axis=-1)
    # Added up in float32, the type of what is added.
    return (mx.where(is_drawn, logits, 0) + added).astype(logits.dtype)


def _largest_left(scores: mx.array, is_drawn: mx.array) -> mx.array:
    """Return each cluster's kappa, ``(N, K)``; -inf where its whole block is drawn."""
    num_positions, num_clusters = scores.shape
    blocks = num_blocks(num_clusters)
    left = mx.where(is_drawn, -mx.inf, scores)
    missing = -num_clusters % (blocks * CHUNK_SIZE)
    left = mx.pad(left, [(0, 0), (0, missing)], constant_values=-mx.inf)
    left = left.reshape(num_positions, -1, blocks, CHUNK_SIZE)
    largest = mx.broadcast_to(left.max(axis=(1, 3), keepdims=True), left.shape)
    return largest.reshape(num_positions, -1)[:, :num_clusters]
