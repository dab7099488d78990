"""Centroids, the number of probes and the tails' level, from calibration positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_flashhead.blocks import least_probes
from mlx_flashhead.calibration import (
    CalibrationSet,
    ProbeChoice,
    choose_probes,
    judge_probes,
    tail_level,
)
from mlx_flashhead.centroids import StoredCentroids
from mlx_flashhead.coarse import CoarseStage, known_from
from mlx_flashhead.options import HeadOptions
from mlx_flashhead.packing import PackedRows, dense_bytes
from mlx_flashhead.positions import spread

# Fewer rows would do for the best token, but leave too much to the tails: with these
# SmolLM2's full distribution is nearer to the float head's than a dense 4-bit head's.
_LEAST_SHARE = 32
# Without calibration nothing tells how many rows are enough.
_UNCALIBRATED_SHARE = 16
# Positions that the level of the tails is fitted on.
_TAIL_POSITIONS = 256


@dataclass(frozen=True)
class Fitted:
    """A coarse stage that is ready.

    Attributes:
        centroids: K centroids, their tails raised.
        num_probes: P.
        choice: P on held-out positions; ``None`` without calibration.
    """

    centroids: StoredCentroids
    num_probes: int
    choice: ProbeChoice | None


def fit(
    stage: CoarseStage,
    stored: PackedRows,
    calibration: Sequence[CalibrationSet],
    id_prior: np.ndarray,
    options: HeadOptions,
    on_share: Callable[[float], None],
) -> Fitted:
    """Fit centroids, choose P, and raise the tails.

    Args:
        stage: The clusters.
        stored: The rows that are read exactly; their bytes bound P.
        calibration: Positions of the model; none to go by the rows alone.
        id_prior: Guessed frequency of each token, ``(V,)``.
        options: The user's choices.
        on_share: Called with the share done.
    """
    centroids = stage.centroids(known_from(calibration, id_prior))
    if not calibration:
        num_probes = options.num_probes or _default_probes(stage)
        return Fitted(centroids, num_probes, None)
    choice = _choose(stage, centroids, stored, calibration, id_prior, options, on_share)
    centroids = _with_tails(stage, centroids, choice.num_probes, calibration)
    return Fitted(centroids, choice.num_probes, choice)


def _default_probes(stage: CoarseStage) -> int:
    """Return P where neither the user nor calibration names it."""
    share = -(-stage.num_clusters // _UNCALIBRATED_SHARE)
    of_pinned = least_probes(stage.pinned, stage.num_clusters)
    wanted = max(share + len(stage.pinned), of_pinned)
    return min(wanted, stage.num_clusters)


def _choose(
    stage: CoarseStage,
    centroids: StoredCentroids,
    stored: PackedRows,
    calibration: Sequence[CalibrationSet],
    id_prior: np.ndarray,
    options: HeadOptions,
    on_share: Callable[[float], None],
) -> ProbeChoice:
    """Choose P by held-out positions, or judge the one that was asked for."""
    needed = stage.probes_needed(calibration, id_prior, on_share)
    if options.num_probes is not None:
        return judge_probes(needed, options.num_probes)
    num_clusters = stage.num_clusters
    of_pinned = least_probes(stage.pinned, num_clusters)
    least = max(-(-num_clusters // _LEAST_SHARE), of_pinned)
    cluster_bytes = stored.nbytes * options.cluster_size / stored.num_rows
    # The bias is stored in halves.
    coarse_bytes = (
        centroids.rows.nbytes + centroids.bias.nbytes // 2 + centroids.projection.nbytes
    )
    if stage.cluster_tokens is not None:
        coarse_bytes += stage.cluster_tokens.nbytes
    to_spend = dense_bytes(stage.rows.shape, stage.dtype) - coarse_bytes
    most = max(least, min(num_clusters, int(to_spend / cluster_bytes)))
    return choose_probes(needed, options.target_recall, least=least, most=most)


def _with_tails(
    stage: CoarseStage,
    centroids: StoredCentroids,
    num_probes: int,
    calibration: Sequence[CalibrationSet],
) -> StoredCentroids:
    """Raise all scores, which changes tails and no choice."""
    share = _TAIL_POSITIONS // len(calibration)
    hidden = np.vstack(
        [spread(c.hidden, min(share, len(c.hidden))) for c in calibration]
    )
    level = tail_level(
        centroids, stage.token_clusters, num_probes, stage.rows, stage.head_bias, hidden
    )
    return replace(centroids, bias=centroids.bias + np.float32(level))
