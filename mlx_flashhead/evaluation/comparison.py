"""One head's distributions beside another's, position by position, in NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Two-sided 95 % of a normal distribution.
_Z = 1.959964


@dataclass(frozen=True)
class Share:
    """A share of positions.

    Attributes:
        value: The share, 0 to 1.
        low: Lower end of its 95 % confidence interval (Wilson).
        high: Upper end.
    """

    value: float
    low: float
    high: float


def share_of(hits: np.ndarray) -> Share:
    """Return the share of true values in ``hits`` ``(N,)``, N at least 1.

    Wilson's interval keeps its coverage at shares near 1, where the usual
    ``p +- z * sqrt(p * (1 - p) / N)`` has none.
    """
    count = len(hits)
    value = float(np.mean(hits))
    middle = value + _Z**2 / (2 * count)
    half = _Z * math.sqrt(value * (1 - value) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return Share(value, max(0.0, (middle - half) / scale), (middle + half) / scale)


@dataclass(frozen=True)
class Comparison:
    """A head's figures against the truth; divergences are means over positions.

    Attributes:
        agreement: Positions at which it picks the truth's token.
        recall: Positions whose token of the truth lies in a probed cluster; ``None``
            for a dense head.
        top3: Share at which the truth's token is among its three best.
        top10: The same for ten.
        kl_divergence: From the truth to it, nats; infinite if it leaves tokens out.
        total_variation: Half the sum of the probabilities' differences.
        perplexity: Of the text under it; infinite if it leaves one of its tokens out.
        exact_mass: Its probability on exactly scored rows; ``None`` for a dense head.
        truth_exact_mass: The truth's probability on the same rows.
    """

    agreement: Share
    recall: Share | None
    top3: float
    top10: float
    kl_divergence: float
    total_variation: float
    perplexity: float
    exact_mass: float | None
    truth_exact_mass: float | None


class Tally:
    """Collects a comparison, some positions at a time."""

    def __init__(self) -> None:
        self._parts: list[dict[str, np.ndarray]] = []

    def add(
        self,
        truth: Distributions,
        head: Distributions,
        next_tokens: np.ndarray,
        is_exact: np.ndarray | None = None,
    ) -> None:
        """Add n positions.

        Args:
            truth: What is right.
            head: What is compared with it.
            next_tokens: The token that follows in the text, ``(n,)``.
            is_exact: Tokens that the head scores exactly, ``(n, V)`` bool; ``None``
                for a dense head.
        """
        positions = np.arange(len(next_tokens))
        gap = truth.log_probabilities - head.log_probabilities
        # What the truth holds impossible counts as zero, whatever the head says.
        gap[truth.probabilities == 0] = 0
        difference = np.abs(truth.probabilities - head.probabilities)
        part = {
            "agrees": head.tokens == truth.tokens,
            "rank": _ranks(head.log_probabilities, truth.tokens),
            "kl": np.sum(truth.probabilities * gap, axis=1, dtype=np.float64),
            "variation": np.sum(difference, axis=1, dtype=np.float64) / 2,
            "loss": -head.log_probabilities[positions, next_tokens],
        }
        if is_exact is not None:
            part["recalled"] = is_exact[positions, truth.tokens]
            part["mass"] = np.sum(head.probabilities, axis=1, where=is_exact)
            part["truth_mass"] = np.sum(truth.probabilities, axis=1, where=is_exact)
        self._parts.append(part)

    def result(self) -> Comparison:
        """Return the figures of all positions added, at least one."""
        all_of = {
            name: np.concatenate([part[name] for part in self._parts])
            for name in self._parts[0]
        }
        mean = {name: float(np.mean(v, dtype=np.float64)) for name, v in all_of.items()}
        return Comparison(
            agreement=share_of(all_of["agrees"]),
            recall=share_of(all_of["recalled"]) if "recalled" in all_of else None,
            top3=float((all_of["rank"] < 3).mean()),
            top10=float((all_of["rank"] < 10).mean()),
            # Rounding can leave equal distributions a hair below zero.
            kl_divergence=max(0.0, mean["kl"]),
            total_variation=mean["variation"],
            perplexity=perplexity(all_of["loss"]),
            exact_mass=mean.get("mass"),
            truth_exact_mass=mean.get("truth_mass"),
        )


class Distributions:
    """The softmax of logits ``(n, V)``, float32."""

    def __init__(self, logits: np.ndarray) -> None:
        self.tokens = logits.argmax(axis=1)
        shifted = logits - logits.max(axis=1, keepdims=True)
        weights = np.exp(shifted)
        total = weights.sum(axis=1, keepdims=True, dtype=np.float64)
        self.probabilities = weights / total.astype(np.float32)
        self.log_probabilities = shifted - np.log(total).astype(np.float32)

    def losses(self, next_tokens: np.ndarray) -> np.ndarray:
        """Return the negative log-probability of one token a position, ``(n,)``."""
        return -self.log_probabilities[np.arange(len(next_tokens)), next_tokens]


def perplexity(losses: np.ndarray) -> float:
    """Return ``exp`` of the mean of negative log-probabilities ``(N,)``."""
    return float(np.exp(np.mean(losses, dtype=np.float64)))


def _ranks(values: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Return how many values ``(n, V)`` come before one token's, ``(n,)``.

    Among equal values, such as those of an unprobed cluster, lower ids come first, as
    in an arg max.
    """
    own = np.take_along_axis(values, token_ids[:, None], axis=1)
    is_lower_id = np.arange(values.shape[1]) < token_ids[:, None]
    return ((values > own) | ((values == own) & is_lower_id)).sum(axis=1)
