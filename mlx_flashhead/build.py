"""From a dense head to a FlashHead: cluster, permute, pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashhead.attach import DenseHead, find_head, replace_module
from mlx_flashhead.clustering import cluster_rows, token_prior, weighted_centroids
from mlx_flashhead.config import FlashHeadConfig
from mlx_flashhead.head import FlashEmbedding, FlashHead
from mlx_flashhead.packing import (
    PackedRows,
    affine,
    cluster_major,
    pack_rows,
    slots_of_tokens,
)
from mlx_flashhead.vocabulary import Vocabulary, read_vocabulary

HEAD_BITS = (4, 5, 6, 8, 16)
CENTROID_BITS = (4, 8, 16)

# One cluster in 8 is read exactly unless the user names a number. On texts of many
# kinds these hold the dense head's token at 97.4 % of positions for SmolLM2-135M and at
# 99.5 % for Gemma-3-270M; one in 16 holds it at 95.7 and 98.8 %.
DEFAULT_PROBE_SHARE = 8

_ROWS_PER_CHUNK = 1 << 14

Progress = Callable[[str, float], None]


def replace_head(
    model: nn.Module,
    tokenizer: Any,
    *,
    cluster_size: int = 16,
    num_probes: int | None = None,
    head_bits: int | Literal["source"] = "source",
    centroid_bits: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Give a model loaded by mlx-lm a FlashHead, in place and in memory only.

    Args:
        model: Any model of mlx-lm whose logits come from one linear or embedding
            layer, quantized or not.
        tokenizer: The model's tokenizer; its end-of-sequence and special tokens are
            always scored exactly.
        cluster_size: Rows in a cluster, C.
        num_probes: Clusters scored exactly per position, P; default: the pinned
            clusters and one in 8 of all.
        head_bits: Bits of the stored rows, 4, 5, 6, 8 or 16; ``source`` moves the
            rows as they are, bit for bit.
        centroid_bits: Bits of the centroids, 4, 8 or 16.
        seed: Seed of the clustering.
        progress: Called with what is being done and the share of it done, 0 to 1.

    Returns:
        The same model.

    Raises:
        ValueError: If the head cannot be found, a setting is out of range, or rows
            hold NaN or infinity.
    """
    dense = find_head(model)
    head = build_head(
        dense,
        read_vocabulary(tokenizer, dense.rows.num_rows),
        base_model_type=model.model_type,
        cluster_size=cluster_size,
        num_probes=num_probes,
        head_bits=head_bits,
        centroid_bits=centroid_bits,
        seed=seed,
        progress=progress,
    )
    replace_module(model, dense.path, head)
    return model


def build_head(
    dense: DenseHead,
    vocabulary: Vocabulary,
    *,
    base_model_type: str,
    cluster_size: int = 16,
    num_probes: int | None = None,
    head_bits: int | Literal["source"] = "source",
    head_group_size: int = 64,
    centroid_bits: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> FlashHead:
    """Build the FlashHead that stands in for a dense head.

    Args:
        dense: The head, as found.
        vocabulary: Its tokens' kinds.
        base_model_type: ``model_type`` of its model.
        cluster_size: As in ``replace_head``.
        num_probes: As in ``replace_head``.
        head_bits: As in ``replace_head``.
        head_group_size: Group size of rows that are quantized here.
        centroid_bits: As in ``replace_head``.
        seed: As in ``replace_head``.
        progress: As in ``replace_head``.

    Returns:
        The head, its arrays evaluated.

    Raises:
        ValueError: As ``replace_head``.
    """
    stored = _stored_rows(dense, head_bits, head_group_size)
    vocab_size = stored.num_rows
    if not 1 <= cluster_size <= vocab_size:
        raise ValueError(
            f"cluster_size={cluster_size} must be in [1, {vocab_size}], the number of "
            "the head's rows."
        )
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0.")
    if centroid_bits not in CENTROID_BITS:
        raise ValueError(
            f"centroid_bits={centroid_bits} must be one of "
            f"{', '.join(map(str, CENTROID_BITS))}."
        )
    num_clusters = -(-vocab_size // cluster_size)
    num_pinned = -(-len(vocabulary.pinned) // cluster_size)
    dtype = _float_dtype(dense, stored)
    config = FlashHeadConfig(
        base_model_type=base_model_type,
        head_path=dense.path,
        tied=dense.tied,
        vocab_size=vocab_size,
        hidden_size=dense.hidden_size,
        cluster_size=cluster_size,
        num_probes=_probe_count(num_probes, num_clusters, num_pinned),
        num_pinned=num_pinned,
        dtype=str(dtype).removeprefix("mlx.core."),
        rows=stored.quantization,
        centroids=affine(centroid_bits, dense.hidden_size),
        has_bias=dense.bias is not None,
    )
    rows = float_rows(stored)
    prior = token_prior(vocab_size, skip=vocabulary.unlikely)
    cluster_tokens = cluster_rows(
        rows,
        cluster_size=cluster_size,
        prior=prior,
        pinned_tokens=vocabulary.pinned,
        seed=seed,
        progress=_on_clustering(progress, num_clusters),
    ).cluster_tokens
    centroids = mx.array(weighted_centroids(rows, cluster_tokens, prior)).astype(dtype)
    head = (FlashEmbedding if dense.tied else FlashHead)(
        config,
        rows=cluster_major(stored, cluster_tokens),
        centroids=_packed(centroids, centroid_bits),
        centroid_bias=_centroid_bias(dense, cluster_tokens, prior),
        cluster_tokens=mx.array(cluster_tokens),
        token_slots=mx.array(slots_of_tokens(cluster_tokens, vocab_size)),
        bias=dense.bias,
    )
    mx.eval(head.parameters())
    return head


def float_rows(rows: PackedRows) -> np.ndarray:
    """Return rows as float32 ``(R, D)``, a chunk at a time.

    Raises:
        ValueError: If any of them holds NaN or infinity; says how many.
    """
    floats = np.empty((0, 0), np.float32)
    for start in range(0, rows.num_rows, _ROWS_PER_CHUNK):
        part = slice(start, start + _ROWS_PER_CHUNK)
        chunk = rows.take(part).dequantize().astype(mx.float32)
        if start == 0:
            floats = np.empty((rows.num_rows, chunk.shape[1]), np.float32)
        floats[part] = np.array(chunk)
    # A row's sum is finite exactly if its entries are, short of overflow at 1e38.
    bad = int(np.count_nonzero(~np.isfinite(floats.sum(axis=1))))
    if bad:
        raise ValueError(
            f"{bad} of the head's {len(floats)} rows hold NaN or infinity; the model "
            "is damaged: download it again."
        )
    return floats


def _stored_rows(
    dense: DenseHead, head_bits: int | Literal["source"], group_size: int
) -> PackedRows:
    """Return the rows, ``(V, ...)``, at the precision wanted."""
    if head_bits == "source":
        return dense.rows
    if head_bits not in HEAD_BITS:
        raise ValueError(
            f"head_bits={head_bits!r} must be source or one of "
            f"{', '.join(map(str, HEAD_BITS))}."
        )
    return _packed(dense.rows.dequantize(), head_bits, group_size)


def _packed(rows: mx.array, bits: int, group_size: int = 64) -> PackedRows:
    """Pack float rows; at 16 bits float32 becomes float16."""
    if bits == 16 and rows.dtype == mx.float32:
        rows = rows.astype(mx.float16)
    return pack_rows(rows, affine(bits, rows.shape[1], group_size))


def _probe_count(num_probes: int | None, num_clusters: int, num_pinned: int) -> int:
    """Return P: as given, or the pinned clusters and a share of all."""
    if num_probes is not None:
        return num_probes
    share = -(-num_clusters // DEFAULT_PROBE_SHARE)
    return min(num_pinned + share, num_clusters)


def _float_dtype(dense: DenseHead, rows: PackedRows) -> mx.Dtype:
    """Return the float type of a head's arrays; fp modes have integer scales."""
    array = rows.weight if rows.scales is None else rows.scales
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return array.dtype if is_float else dense.dtype


def _centroid_bias(
    dense: DenseHead, cluster_tokens: np.ndarray, prior: np.ndarray
) -> mx.array:
    """Return what the head's own bias adds to a cluster's score, ``(K,)``."""
    if dense.bias is None:
        return mx.zeros((len(cluster_tokens),), mx.float32)
    bias = np.array(dense.bias.astype(mx.float32))[:, None]
    return mx.array(weighted_centroids(bias, cluster_tokens, prior)[:, 0])


def _on_clustering(
    progress: Progress | None, num_clusters: int
) -> Callable[[float, float | None], None] | None:
    """Put the clustering's progress in words."""
    if progress is None:
        return None
    cosine = ""

    def report(share: float, mean_cosine: float | None) -> None:
        nonlocal cosine
        if mean_cosine is not None:
            cosine = f", mean cosine {mean_cosine:.3f}"
        progress(f"Clustering rows into {num_clusters} clusters{cosine}", share)

    return report
