"""From a dense head to a FlashHead: cluster, fit centroids, choose probes, pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead.attach import DenseHead
from mlx_flashhead.blocks import least_probes
from mlx_flashhead.calibration import CalibrationSet, ProbeChoice
from mlx_flashhead.centroids import StoredCentroids
from mlx_flashhead.clustering import cluster_rows, token_prior
from mlx_flashhead.coarse import (
    CoarseStage,
    Knowledge,
    known_from,
    pinned_clusters,
)
from mlx_flashhead.config import FlashHeadConfig
from mlx_flashhead.head import FlashEmbedding, FlashHead
from mlx_flashhead.options import HeadOptions
from mlx_flashhead.packing import (
    PackedRows,
    affine,
    cluster_major,
    pack_rows,
    slots_of_tokens,
)
from mlx_flashhead.tuning import fit
from mlx_flashhead.vocabulary import Vocabulary

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BuiltHead:
    """A head, and what its calibration showed.

    Attributes:
        head: The head, its arrays evaluated.
        choice: Its probes on held-out positions; ``None`` without calibration.
    """

    head: FlashHead
    choice: ProbeChoice | None


def check_options(
    options: HeadOptions, vocabulary: Vocabulary, vocab_size: int
) -> None:
    """Check what depends on the head, before minutes of work on it.

    Raises:
        ValueError: If a cluster would have more rows than there are, or P is too
            small for the pinned clusters or larger than their number.
    """
    if options.cluster_size > vocab_size:
        raise ValueError(
            f"cluster_size={options.cluster_size} must be in [1, {vocab_size}], the "
            "number of the head's rows."
        )
    num_clusters = -(-vocab_size // options.cluster_size)
    pinned = pinned_clusters(vocabulary, options.cluster_size)
    least, given = least_probes(pinned, num_clusters), options.num_probes
    if given is not None and not least <= given <= num_clusters:
        raise ValueError(
            f"num_probes={given} must be in [{least}, {num_clusters}]: at least the "
            "clusters that are always scored, at most all."
        )


def build_head(
    dense: DenseHead,
    rows: np.ndarray,
    vocabulary: Vocabulary,
    calibration: Sequence[CalibrationSet],
    options: HeadOptions,
    *,
    base_model_type: str,
    progress: Progress | None = None,
) -> BuiltHead:
    """Build the FlashHead that stands in for a dense head.

    Args:
        dense: The head, as found.
        rows: Its rows, ``(V, D)``, float32.
        vocabulary: Its tokens' kinds.
        calibration: Positions of its model; none for a head from the rows alone.
        options: The user's choices, checked.
        base_model_type: ``model_type`` of its model.
        progress: Called with what is being done and the share of it done, 0 to 1.
    """
    stored = _stored_rows(dense, options)
    id_prior = token_prior(len(rows), skip=vocabulary.unlikely)
    known = known_from(calibration, id_prior)
    stage = _coarse_stage(dense, rows, stored, vocabulary, known, options, progress)

    def on_share(share: float) -> None:
        if progress:
            progress("Fitting centroids", share)

    on_share(0.0)
    fitted = fit(stage, stored, calibration, id_prior, options, on_share)
    config = _config(dense, stored, stage, fitted.num_probes, base_model_type, options)
    head = _assemble(config, stored, stage, fitted.centroids, dense.bias)
    return BuiltHead(head, fitted.choice)


def _stored_rows(dense: DenseHead, options: HeadOptions) -> PackedRows:
    """Return the rows, ``(V, ...)``, at the precision wanted."""
    if options.head_bits == "source":
        return dense.rows
    rows = dense.rows.dequantize()
    if options.head_bits == 16 and rows.dtype == mx.float32:
        rows = rows.astype(mx.float16)
    packing = affine(options.head_bits, rows.shape[1], options.head_group_size)
    return pack_rows(rows, packing)


def _float_dtype(dense: DenseHead, rows: PackedRows) -> mx.Dtype:
    """Return the float type of a head's arrays; fp modes have integer scales."""
    array = rows.weight if rows.scales is None else rows.scales
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return array.dtype if is_float else dense.dtype


def _coarse_stage(
    dense: DenseHead,
    rows: np.ndarray,
    stored: PackedRows,
    vocabulary: Vocabulary,
    known: Knowledge,
    options: HeadOptions,
    progress: Progress | None,
) -> CoarseStage:
    """Form the clusters, and say how they are scored."""
    vocab_size, hidden_size = rows.shape
    cluster_tokens = None
    if options.cluster_size > 1:
        num_clusters = -(-vocab_size // options.cluster_size)
        clustering = cluster_rows(
            known.scored_rows(rows),
            cluster_size=options.cluster_size,
            prior=known.prior.astype(np.float32),
            pinned_tokens=vocabulary.pinned,
            seed=options.seed,
            progress=_on_clustering(progress, num_clusters),
        )
        cluster_tokens = clustering.cluster_tokens
    bias = dense.bias
    dims = options.centroid_dims(
        hidden_size, is_calibrated=known.statistics is not None
    )
    return CoarseStage(
        rows=rows,
        cluster_tokens=cluster_tokens,
        pinned=pinned_clusters(vocabulary, options.cluster_size),
        head_bias=None if bias is None else np.array(bias.astype(mx.float32)),
        dims=dims,
        quantization=affine(options.stored_centroid_bits, dims),
        dtype=_float_dtype(dense, stored),
        seed=options.seed,
    )


def _config(
    dense: DenseHead,
    stored: PackedRows,
    stage: CoarseStage,
    num_probes: int,
    base_model_type: str,
    options: HeadOptions,
) -> FlashHeadConfig:
    return FlashHeadConfig(
        base_model_type=base_model_type,
        head_path=dense.path,
        tied=dense.tied,
        vocab_size=stored.num_rows,
        hidden_size=dense.hidden_size,
        cluster_size=options.cluster_size,
        centroid_dims=stage.dims,
        num_probes=num_probes,
        num_pinned=len(stage.pinned),
        dtype=str(stage.dtype).removeprefix("mlx.core."),
        rows=stored.quantization,
        centroids=stage.quantization,
        has_bias=dense.bias is not None,
        sampling=options.sampling,
    )


def _assemble(
    config: FlashHeadConfig,
    stored: PackedRows,
    stage: CoarseStage,
    centroids: StoredCentroids,
    bias: mx.array | None,
) -> FlashHead:
    """Put the arrays in place, and evaluate them."""
    maps: dict[str, mx.array] = {}
    if stage.cluster_tokens is not None:
        token_slots = slots_of_tokens(stage.cluster_tokens, config.vocab_size)
        stored = cluster_major(stored, stage.cluster_tokens)
        maps = {
            "cluster_tokens": mx.array(stage.cluster_tokens),
            "token_slots": mx.array(token_slots),
        }
    head = (FlashEmbedding if config.tied else FlashHead)(
        config,
        rows=stored,
        centroids=centroids.rows,
        centroid_bias=mx.array(centroids.bias).astype(mx.float16),
        projection=centroids.projection,
        bias=bias,
        **maps,
    )
    mx.eval(head.parameters())
    return head


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
