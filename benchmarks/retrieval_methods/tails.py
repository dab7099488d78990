"""What becomes of the whole distribution when tokens that are not read get a stand-in.

Exact logits on the rows that the coarse stage chooses, its scores elsewhere; compared
with the softmax of the dense float head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead.calibration import CalibrationSet, tail_level
from mlx_flashhead.evaluation.comparison import Distributions
from mlx_flashhead.kernels.probe_threshold import probe_threshold, probed
from mlx_flashhead.positions import spread
from retrieval_methods.candidates import Candidate
from retrieval_methods.recall import interval
from retrieval_methods.subject import States

# As in mlx_flashhead.calibration: larger arrays cost more to allocate than to fill.
_VALUES_PER_CHUNK = 1 << 22
# As many as the converter fits the level of the tails on.
_FIT_POSITIONS = 256


@dataclass(frozen=True)
class Tails:
    """How far distributions are from the dense head's, each ``(N,)``.

    Attributes:
        divergence: Kullback-Leibler divergence from the dense softmax, nats.
        variation: Half the sum of the absolute differences.
        mass: Probability of the tokens that are not exact.
        dense_mass: What the dense softmax gives them.
    """

    divergence: np.ndarray
    variation: np.ndarray
    mass: np.ndarray
    dense_mass: np.ndarray

    def cells(self, text: np.ndarray) -> str:
        """Return mean KL with interval, its 99th percentile, and the other means."""
        low, high = interval(self.divergence, text)
        return (
            f"{self.divergence.mean():.4f} ({low:.3f}–{high:.3f}) "
            f"| {np.quantile(self.divergence, 0.99):.3f} | {self.variation.mean():.4f} "
            f"| {self.mass.mean():.4f} | {self.dense_mass.mean():.4f}"
        )


def some_states(states: States, count: int) -> States:
    """Return ``count`` random positions."""
    chosen = np.random.default_rng(0).permutation(len(states.best))[:count]
    return States(*(values[chosen] for values in vars(states).values()))


def measure_tails(
    rows: np.ndarray,
    hidden: np.ndarray,
    chosen: Candidate,
    num_rows: int,
    addition: float | np.ndarray = 0.0,
) -> Tails:
    """Compare with the dense softmax.

    Args:
        rows: The head's rows, ``(V, D)``.
        hidden: ``(N, D)``.
        chosen: The coarse stage.
        num_rows: Rows read exactly at each position.
        addition: What is added to the scores for stand-ins, one number or ``(V,)``.
    """
    num_probes = num_rows // chosen.cluster_size

    def head(part: np.ndarray, dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = chosen.centroids.scores(part)
        as_array = mx.array(scores)
        passes = probed(as_array, probe_threshold(as_array, num_probes=num_probes))
        is_exact = np.array(passes)[:, chosen.token_clusters]
        tails = scores[:, chosen.token_clusters] + addition
        return np.where(is_exact, dense, tails), is_exact

    return _compared(rows, hidden, head)


def measure_rounded_head(
    rows: np.ndarray, rounded: np.ndarray, hidden: np.ndarray
) -> Tails:
    """Compare a dense head of rounded rows with the float one: all of it is tail."""

    def head(part: np.ndarray, dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return part @ rounded.T, np.zeros(dense.shape, bool)

    return _compared(rows, hidden, head)


def fitted_level(
    rows: np.ndarray, sets: list[CalibrationSet], chosen: Candidate, num_rows: int
) -> float:
    """Return the level that the converter raises the tails by."""
    hidden = np.vstack([spread(s.hidden, _FIT_POSITIONS // len(sets)) for s in sets])
    num_probes = num_rows // chosen.cluster_size
    return tail_level(
        chosen.centroids, chosen.token_clusters, num_probes, rows, None, hidden
    )


def _compared(
    rows: np.ndarray,
    hidden: np.ndarray,
    head: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Tails:
    """Compare logits from ``head``, and which of them are exact, with the truth."""
    parts = []
    step = max(1, _VALUES_PER_CHUNK // len(rows))
    for start in range(0, len(hidden), step):
        part = hidden[start : start + step]
        dense = part @ rows.T
        logits, is_exact = head(part, dense)
        truth, ours = Distributions(dense), Distributions(logits)
        gap = truth.log_probabilities - ours.log_probabilities
        difference = np.abs(truth.probabilities - ours.probabilities)
        parts.append(
            (
                np.sum(truth.probabilities * gap, axis=1, dtype=np.float64),
                np.sum(difference, axis=1, dtype=np.float64) / 2,
                np.sum(ours.probabilities, axis=1, where=~is_exact),
                np.sum(truth.probabilities, axis=1, where=~is_exact),
            )
        )
    return Tails(*(np.concatenate(values) for values in zip(*parts, strict=True)))
