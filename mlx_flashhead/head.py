"""The FlashHead modules: hidden states in, full logits out."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_flashhead.config import FlashHeadConfig, Quantization
from mlx_flashhead.kernels.centroid_scores import centroid_scores
from mlx_flashhead.kernels.cluster_logits import cluster_logits
from mlx_flashhead.kernels.probe_threshold import probe_threshold, probed
from mlx_flashhead.kernels.projection import project
from mlx_flashhead.packing import PackedRows
from mlx_flashhead.sampling import drawn_logits, drawn_scores

# Arrays that only clusters of several rows have.
INDEX_MAPS = ("cluster_tokens", "token_slots")


class PackedModule(nn.Module):
    """Holds packed rows as ``weight``, ``scales``, ``biases``, as MLX layers do."""

    def __init__(self, rows: PackedRows) -> None:
        super().__init__()
        self._quantization = rows.quantization
        self.weight = rows.weight
        if rows.scales is not None:
            self.scales = rows.scales
        if rows.biases is not None:
            self.biases = rows.biases

    @property
    def rows(self) -> PackedRows:
        """The rows as one value."""
        return PackedRows(
            self.weight, self.get("scales"), self.get("biases"), self._quantization
        )


class Centroids(PackedModule):
    """K packed centroids, what is added to their scores, and what they score."""

    def __init__(self, rows: PackedRows, bias: mx.array, projection: mx.array) -> None:
        super().__init__(rows)
        self.bias = bias
        self.projection = projection

    def logits(self, hidden: mx.array) -> mx.array:
        """Estimate the clusters' logits for hidden states ``(N, D)``: ``(N, K)``."""
        projected = project(hidden, self.projection)
        return centroid_scores(
            projected[:, :-1], self.rows, self.bias, projected[:, -1]
        )


class FlashHead(PackedModule):
    """A vocabulary head that reads only the rows it needs.

    Logits of probed clusters equal those of the dense product over the same stored
    rows; every other token gets its cluster's centroid logit, so that each token
    stays reachable and the softmax denominator stays nearly right. Calls with more
    than ``config.max_probed_positions`` positions take the dense path, and so does
    training (``model.train()``): choosing clusters has no gradient.

    With another ``config.sampling`` than ``deterministic`` the clusters are drawn anew
    for each position of each call, by the numbers that ``mx.random.seed`` leads to, and
    tokens that were not drawn are all but out of reach (see ``sampling``).

    Args:
        config: Settings; shapes below are in its terms.
        rows: ``K * C`` rows in slot order, which is token order if C is 1.
        centroids: K rows of length d.
        centroid_bias: Added to the centroid logits, ``(K,)``; infinity pins a cluster.
        projection: ``(d + 1, D)``; what turns a hidden state into the d numbers that
            centroids score, and one more that is added to all their logits.
        cluster_tokens: Token of each slot, ``(K, C)``, uint32; V marks padding, which
            never stands in a cluster's first slot. ``None`` if C is 1.
        token_slots: Its inverse, ``(V,)``, uint32, or ``None``.
        bias: The dense head's own bias in token order, ``(V,)``, or ``None``.
    """

    def __init__(
        self,
        config: FlashHeadConfig,
        *,
        rows: PackedRows,
        centroids: PackedRows,
        centroid_bias: mx.array,
        projection: mx.array,
        cluster_tokens: mx.array | None = None,
        token_slots: mx.array | None = None,
        bias: mx.array | None = None,
    ) -> None:
        super().__init__(rows)
        self.config = config
        self.centroids = Centroids(centroids, centroid_bias, projection)
        if cluster_tokens is not None:
            self.cluster_tokens = cluster_tokens
            self.token_slots = token_slots
        if bias is not None:
            self.bias = bias
        # Index maps have no gradient, and rows that move would leave their clusters.
        self.freeze()
        self.eval()

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return logits, as ``logits`` does."""
        return self.logits(hidden)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits ``(..., V)`` in token order for hidden states ``(..., D)``."""
        *leading, hidden_size = hidden.shape
        num_positions = math.prod(leading)
        is_probed = 1 <= num_positions <= self.config.max_probed_positions
        if self.training or not is_probed:
            return self.dense_logits(hidden)
        logits = self._probed_logits(hidden.reshape(num_positions, hidden_size))
        return logits.reshape(*leading, self.config.vocab_size)

    def dense_logits(self, hidden: mx.array) -> mx.array:
        """Return the full product ``(..., V)`` over the stored rows: the dense path."""
        logits = self.rows.matmul(hidden)
        if (token_slots := self.get("token_slots")) is not None:
            logits = mx.take(logits, token_slots, axis=-1)
        return logits + self.bias if "bias" in self else logits

    def slots(self, token_ids: mx.array) -> mx.array:
        """Return where the rows of tokens are stored, in the shape of ``token_ids``."""
        token_slots = self.get("token_slots")
        return token_ids if token_slots is None else token_slots[token_ids]

    def probed_tokens(self, hidden: mx.array) -> mx.array:
        """Return which tokens' clusters are the best, ``(N, V)`` bool.

        These are scored exactly, or would be if ``config.sampling`` drew none.

        Args:
            hidden: Hidden states, ``(N, D)``.
        """
        scores = self.centroids.logits(hidden)
        is_probed = probed(scores, self._threshold(scores))
        clusters = self._token_clusters()
        return is_probed if clusters is None else mx.take(is_probed, clusters, axis=-1)

    def _token_clusters(self) -> mx.array | None:
        """Return the cluster of each token, ``(V,)``; ``None`` if C is 1."""
        token_slots = self.get("token_slots")
        return None if token_slots is None else token_slots // self.config.cluster_size

    def _threshold(self, scores: mx.array) -> mx.array:
        """Return the thresholds ``(N, T)`` of scores ``(N, K)``."""
        return probe_threshold(scores, num_probes=self.config.num_probes)

    def _probed_logits(self, hidden: mx.array) -> mx.array:
        """Return logits ``(N, V)`` for hidden states ``(N, D)``, most rows not read."""
        sampling = self.config.sampling
        centroid_logits = self.centroids.logits(hidden)
        if sampling == "deterministic":
            threshold = self._threshold(centroid_logits)
            return self._cluster_logits(hidden, centroid_logits, threshold)
        scores = drawn_scores(centroid_logits, sampling)
        threshold = self._threshold(scores)
        return drawn_logits(
            self._cluster_logits(hidden, scores, threshold),
            centroid_logits,
            scores,
            probed(scores, threshold),
            sampling=sampling,
            token_clusters=self._token_clusters(),
        )

    def _cluster_logits(
        self, hidden: mx.array, scores: mx.array, threshold: mx.array
    ) -> mx.array:
        """Run step 3: logits ``(N, V)``, the scores ``(N, K)`` where no row is read."""
        return cluster_logits(
            hidden,
            self.rows,
            scores,
            threshold,
            num_probes=self.config.num_probes,
            vocab_size=self.config.vocab_size,
            cluster_tokens=self.get("cluster_tokens"),
            token_slots=self.get("token_slots"),
            head_bias=self.get("bias"),
        )

    def _extra_repr(self) -> str:
        config = self.config
        return (
            f"{config.vocab_size}, {config.hidden_size}, "
            f"num_clusters={config.num_clusters}, num_probes={config.num_probes}"
        )


class FlashEmbedding(FlashHead):
    """A FlashHead whose rows are the token embedding as well (tied weights)."""

    def __call__(self, token_ids: mx.array) -> mx.array:
        """Return the embeddings ``(..., D)`` of token ids ``(...)``."""
        return self.rows.take(self.slots(token_ids)).dequantize()

    def as_linear(self, hidden: mx.array) -> mx.array:
        """Return logits ``(..., V)`` for hidden states ``(..., D)``."""
        return self.logits(hidden)


def empty_head(config: FlashHeadConfig) -> FlashHead:
    """Return the head that ``config`` describes, its arrays zero and not allocated."""
    dtype = getattr(mx, config.dtype)
    head_class = FlashEmbedding if config.tied else FlashHead
    num_clusters, depth = config.num_clusters, config.hidden_size
    maps = {}
    if config.cluster_size > 1:
        maps["cluster_tokens"] = mx.zeros(
            (num_clusters, config.cluster_size), mx.uint32
        )
        maps["token_slots"] = mx.zeros((config.vocab_size,), mx.uint32)
    return head_class(
        config,
        rows=_empty_rows(config.num_slots, depth, dtype, config.rows),
        centroids=_empty_rows(
            num_clusters, config.centroid_dims, dtype, config.centroids
        ),
        centroid_bias=mx.zeros((num_clusters,), mx.float16),
        projection=mx.zeros((config.centroid_dims + 1, depth), dtype),
        **maps,
        bias=mx.zeros((config.vocab_size,), dtype) if config.has_bias else None,
    )


def _empty_rows(
    num_rows: int, depth: int, dtype: mx.Dtype, quantization: Quantization | None
) -> PackedRows:
    """Return lazy zero rows of the shapes and dtypes that ``mx.quantize`` gives."""
    if quantization is None:
        return PackedRows(mx.zeros((num_rows, depth), dtype))
    words = depth * quantization.bits // 32
    groups = depth // quantization.group_size
    is_affine = quantization.mode == "affine"
    scales = mx.zeros((num_rows, groups), dtype if is_affine else mx.uint8)
    return PackedRows(
        mx.zeros((num_rows, words), mx.uint32),
        scales,
        scales if is_affine else None,
        quantization,
    )
