"""The FlashHead modules: hidden states in, full logits out."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_flashhead.config import FlashHeadConfig, Quantization
from mlx_flashhead.kernels.centroid_scores import centroid_scores
from mlx_flashhead.kernels.cluster_logits import cluster_logits
from mlx_flashhead.kernels.probe_threshold import cluster_keys, probe_threshold
from mlx_flashhead.packing import PackedRows


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
    """K packed centroids and one bias for each, used for choosing only."""

    def __init__(self, rows: PackedRows, bias: mx.array) -> None:
        super().__init__(rows)
        self.bias = bias


class FlashHead(PackedModule):
    """A vocabulary head that reads only the clusters it needs.

    Logits of probed clusters equal those of the dense product over the same stored
    rows; every other token gets its cluster's centroid logit, so that each token
    stays reachable and the softmax denominator stays nearly right. Calls with more
    than ``config.max_probed_positions`` positions take the dense path, and so does
    training (``model.train()``): choosing clusters has no gradient.

    Args:
        config: Settings; shapes below are in its terms.
        rows: ``K * C`` rows in slot order.
        centroids: K rows.
        centroid_bias: ``(K,)``, float32.
        cluster_tokens: Token of each slot, ``(K, C)``, uint32; V marks padding, which
            never stands in a cluster's first slot.
        token_slots: Its inverse, ``(V,)``, uint32.
        bias: The dense head's own bias in token order, ``(V,)``, or ``None``.
    """

    def __init__(
        self,
        config: FlashHeadConfig,
        *,
        rows: PackedRows,
        centroids: PackedRows,
        centroid_bias: mx.array,
        cluster_tokens: mx.array,
        token_slots: mx.array,
        bias: mx.array | None = None,
    ) -> None:
        super().__init__(rows)
        self.config = config
        self.centroids = Centroids(centroids, centroid_bias)
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
        return self._add_bias(logits).reshape(*leading, self.config.vocab_size)

    def dense_logits(self, hidden: mx.array) -> mx.array:
        """Return the full product ``(..., V)`` over the stored rows: the dense path."""
        logits = mx.take(self.rows.matmul(hidden), self.token_slots, axis=-1)
        return self._add_bias(logits)

    def probed_clusters(self, hidden: mx.array) -> mx.array:
        """Return which clusters are scored exactly, ``(N, K)`` bool.

        Args:
            hidden: Hidden states, ``(N, D)``.
        """
        centroid_logits, threshold = self._coarse_stage(hidden)
        keys = cluster_keys(centroid_logits, self.centroids.bias)
        is_pinned = mx.arange(keys.shape[-1]) < self.config.num_pinned
        return is_pinned | (keys >= threshold[:, None])

    def _coarse_stage(self, hidden: mx.array) -> tuple[mx.array, mx.array]:
        """Return centroid logits ``(N, K)`` and thresholds ``(N,)``."""
        centroid_logits = centroid_scores(hidden, self.centroids.rows)
        threshold = probe_threshold(
            centroid_logits,
            self.centroids.bias,
            num_pinned=self.config.num_pinned,
            num_probes=self.config.num_probes,
        )
        return centroid_logits, threshold

    def _probed_logits(self, hidden: mx.array) -> mx.array:
        """Run the three steps on ``(N, D)`` hidden states."""
        centroid_logits, threshold = self._coarse_stage(hidden)
        return cluster_logits(
            hidden,
            self.rows,
            self.cluster_tokens,
            self.token_slots,
            centroid_logits,
            self.centroids.bias,
            threshold,
            num_pinned=self.config.num_pinned,
            num_probes=self.config.num_probes,
        )

    def _add_bias(self, logits: mx.array) -> mx.array:
        return logits + self.bias if "bias" in self else logits

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
        rows = self.rows.take(self.token_slots[token_ids])
        return rows.dequantize()

    def as_linear(self, hidden: mx.array) -> mx.array:
        """Return logits ``(..., V)`` for hidden states ``(..., D)``."""
        return self.logits(hidden)


def empty_head(config: FlashHeadConfig) -> FlashHead:
    """Return the head that ``config`` describes, its arrays zero and not allocated."""
    dtype = getattr(mx, config.dtype)
    head_class = FlashEmbedding if config.tied else FlashHead
    bias = mx.zeros((config.vocab_size,), dtype) if config.has_bias else None
    return head_class(
        config,
        rows=_empty_rows(config.num_slots, config, config.rows),
        centroids=_empty_rows(config.num_clusters, config, config.centroids),
        centroid_bias=mx.zeros((config.num_clusters,), mx.float32),
        cluster_tokens=mx.zeros((config.num_clusters, config.cluster_size), mx.uint32),
        token_slots=mx.zeros((config.vocab_size,), mx.uint32),
        bias=bias,
    )


def _empty_rows(
    num_rows: int, config: FlashHeadConfig, quantization: Quantization | None
) -> PackedRows:
    """Return lazy zero rows of the shapes and dtypes that ``mx.quantize`` gives."""
    dtype = getattr(mx, config.dtype)
    if quantization is None:
        return PackedRows(mx.zeros((num_rows, config.hidden_size), dtype))
    words = config.hidden_size * quantization.bits // 32
    groups = config.hidden_size // quantization.group_size
    is_affine = quantization.mode == "affine"
    scales = mx.zeros((num_rows, groups), dtype if is_affine else mx.uint8)
    return PackedRows(
        mx.zeros((num_rows, words), mx.uint32),
        scales,
        scales if is_affine else None,
        quantization,
    )
