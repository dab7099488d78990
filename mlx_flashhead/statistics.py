"""What is known of a model's hidden states, as sums over sets of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Share of the mean variance that is added in every direction: none is free of noise.
_DAMPING = 0.01


@dataclass(frozen=True)
class HiddenStatistics:
    """Moments of hidden states, and what the dense head makes of them.

    Attributes:
        mean: Mean hidden state m, ``(D,)``, float64.
        covariance: Centred covariance S, ``(D, D)``, float64.
        token_probabilities: Mean softmax of the dense logits, ``(V,)``, float64.
    """

    mean: np.ndarray
    covariance: np.ndarray
    token_probabilities: np.ndarray

    def metric(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ``S ** 0.5`` and ``S ** -0.5``, ``(D, D)``, float64, S damped.

        ``h . w = (S ** -0.5 h) . (S ** 0.5 w)``, and ``S ** -0.5 h`` is white about
        its mean: equal errors in any direction of ``S ** 0.5 w`` do equal harm.
        """
        values, directions = np.linalg.eigh(self.covariance)
        # Rounding may make the smallest eigenvalues of few positions negative.
        values = np.maximum(values, 0) + _DAMPING * max(values.mean(), 1e-12)
        root = (directions * np.sqrt(values)) @ directions.T
        inverse = (directions / np.sqrt(values)) @ directions.T
        return root, inverse


def mean_statistics(sets: Sequence[HiddenStatistics]) -> HiddenStatistics:
    """Return the mean of the statistics of sets that count alike, whatever their size.

    Each set's covariance is about its own mean.
    """
    return HiddenStatistics(
        np.mean([s.mean for s in sets], axis=0),
        np.mean([s.covariance for s in sets], axis=0),
        np.mean([s.token_probabilities for s in sets], axis=0),
    )


def hidden_statistics(
    hidden: np.ndarray, token_probabilities: np.ndarray
) -> HiddenStatistics:
    """Return the statistics of hidden states ``(N, D)``, N at least 1.

    Args:
        hidden: Float32.
        token_probabilities: Mean softmax at these positions, ``(V,)``.
    """
    mean = hidden.mean(axis=0, dtype=np.float64)
    offset = hidden - mean.astype(np.float32)
    covariance = offset.T.astype(np.float64) @ offset / len(hidden)
    return HiddenStatistics(mean, covariance, token_probabilities)
