"""How far sampled clusters lead away from sampling with the dense head.

    python benchmarks/sampling.py MODEL --states STATES.npz

prints the table of docs/retrieval.md. MODEL is a converted folder, STATES its hidden
states, as benchmarks/retrieval.py keeps them. All heads have the model's stored rows.
"""

import argparse

import mlx.core as mx
import mlx_lm
import numpy as np

from mlx_flashhead.blocks import probed_count
from mlx_flashhead.head import FlashHead
from mlx_flashhead.kernels.probe_threshold import probe_threshold, probed
from mlx_flashhead.sampling import drawn_logits, drawn_scores

SAMPLINGS = ("deterministic", "stochastic", "corrected")
SHARES = (128, 32, 16)
DRAWS_PER_CALL = 25


def head_logits(
    dense: mx.array, centroid_logits: mx.array, num_probes: int, sampling: str
) -> mx.array:
    """Return the logits of a head of one-row clusters, ``(n, V)``.

    Args:
        dense: Exact logits, ``(n, V)``.
        centroid_logits: ``(n, V)``.
        num_probes: P.
        sampling: As in ``FlashHeadConfig``.
    """
    is_drawn = sampling != "deterministic"
    scores = drawn_scores(centroid_logits, sampling) if is_drawn else centroid_logits
    passes = probed(scores, probe_threshold(scores, num_probes=num_probes))
    if is_drawn:
        return drawn_logits(dense, centroid_logits, scores, passes, sampling=sampling)
    return mx.where(passes, dense, centroid_logits)


def variations(
    dense: mx.array,
    centroid_logits: mx.array,
    num_probes: int,
    sampling: str,
    temperature: float,
    num_draws: int,
) -> tuple[float, float, float]:
    """Return total variations to the dense softmax at one position.

    Args:
        dense: Exact logits, ``(V,)``.
        centroid_logits: ``(V,)``.
        num_probes: P.
        sampling: As in ``FlashHeadConfig``.
        temperature: What logits are divided by.
        num_draws: An even number of times ``DRAWS_PER_CALL``.

    Returns:
        Of the mean over all draws, of means over half of them, and of one draw.
    """
    truth = mx.softmax(dense / temperature)
    repeated = [
        mx.broadcast_to(array, (DRAWS_PER_CALL, array.size))
        for array in (dense, centroid_logits)
    ]
    means, single = [], []
    for _ in range(num_draws // DRAWS_PER_CALL):
        logits = head_logits(*repeated, num_probes, sampling)
        drawn = mx.softmax(logits / temperature, axis=-1)
        means.append(np.array(drawn.mean(axis=0), np.float64))
        single.append(mx.abs(drawn - truth).sum(axis=-1).mean().item() / 2)
    halves = [np.mean(means[::2], axis=0), np.mean(means[1::2], axis=0)]

    def variation(mean: np.ndarray) -> float:
        return float(np.abs(mean - np.array(truth, np.float64)).sum() / 2)

    half = np.mean([variation(mean) for mean in halves])
    return variation(np.mean(halves, axis=0)), float(half), float(np.mean(single))


def interval(values: np.ndarray) -> str:
    """Return a mean with its 95 % interval, bootstrapped over positions."""
    random = np.random.default_rng(0)
    means = random.choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{values.mean():.4f} ({low:.4f}–{high:.4f})"


def main() -> None:
    """Print a table of total variations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--states", required=True)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    model, _ = mlx_lm.load(arguments.model)
    head = next(m for m in model.modules() if isinstance(m, FlashHead))
    hidden = np.load(arguments.states)["hidden"]
    places = np.linspace(0, len(hidden) - 1, arguments.positions).astype(int)
    states = mx.array(hidden[places])
    dense, centroid_logits = head.dense_logits(states), head.centroids.logits(states)
    mx.random.seed(0)
    print("| rows read | sampling | mean of all draws | half of them | one draw |")
    print("|---|---|---|---|---|")
    for share in SHARES:
        num_probes = head.config.vocab_size // share
        count = probed_count(head.config.num_clusters, num_probes)
        for sampling in SAMPLINGS:
            is_drawn = sampling != "deterministic"
            draws = arguments.draws if is_drawn else 2 * DRAWS_PER_CALL
            found = [
                variations(
                    *position, num_probes, sampling, arguments.temperature, draws
                )
                for position in zip(dense, centroid_logits, strict=True)
            ]
            figures = " | ".join(
                interval(np.array(f)) for f in zip(*found, strict=True)
            )
            print(f"| V/{share} ({count}) | {sampling} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
