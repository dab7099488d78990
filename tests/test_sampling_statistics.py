"""How often clusters are drawn, and what sampling from their logits comes to."""

from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from draws import block_size, draw, sampling_head  # noqa: F401
from kernel_cases import in_float64, random_hidden
from oracles import HEAD_SHAPES, dense_logits

from mlx_flashhead.head import FlashHead
from mlx_flashhead.sampling import drawn_logits

D = 64


def test_stochastic_draws_as_often_as_drawing_one_by_one():
    random = np.random.default_rng(2)
    scores = random.normal(size=13) * 1.5
    probabilities = np.exp(scores) / np.exp(scores).sum()
    simulated = np.zeros(13)
    num_draws = 20000
    for _ in range(num_draws):
        simulated[random.choice(13, 5, replace=False, p=probabilities)] += 1

    _, _, is_drawn = draw(mx.array(scores), 5, "stochastic", num_draws)

    found, expected = in_float64(is_drawn).mean(axis=0), simulated / num_draws
    error = np.sqrt(2 * expected * (1 - expected) / num_draws)
    assert (np.abs(found - expected) < 4.5 * error).all()
    # Far from what drawing with the same chance for all would give.
    assert found.min() < 0.2 and found.max() > 0.8


def mean_errors(head: FlashHead, hidden: mx.array, num_calls: int) -> np.ndarray:
    """Return how far mean ``exp(logits)`` are from ``exp(dense)``, in standard errors.

    Tokens that are always read have neither; they count as 0.
    """
    repeated = mx.broadcast_to(hidden, (head.config.max_probed_positions, D))
    logits = mx.concatenate([head.logits(repeated) for _ in range(num_calls)])
    dense = dense_logits(head, hidden)
    ratios = np.exp(in_float64(logits) - dense)
    deviation = ratios.std(axis=0) / np.sqrt(len(ratios))
    return (ratios.mean(axis=0) - 1) / np.maximum(deviation, 1e-5)


@pytest.mark.parametrize("shape", ["single rows", "clusters of 5"])
def test_corrected_weights_are_right_in_the_mean(shape, block_size):  # noqa: F811
    shape = HEAD_SHAPES[shape]
    hidden = random_hidden(1, D, mx.float32, seed=6) / 8
    mx.random.seed(0)

    corrected = mean_errors(sampling_head("corrected", **shape), hidden, 1000)
    stochastic = mean_errors(sampling_head("stochastic", **shape), hidden, 100)

    assert np.abs(corrected).max() < 4.5
    # Some were not drawn at all, or their chance is 1; but not most.
    assert (np.abs(corrected) > 0.1).mean() > 0.5
    assert np.abs(stochastic).max() > 20


TEXT = """The harbour was empty when they came back: two boats, a dog, and the smell
of tar. def add(a, b):\n    return a + b\n\n Dear Sir or Madam, thank you for your"""


def mean_softmax(
    dense: mx.array, scores: mx.array, num_probes: int, sampling: str, num_calls: int
) -> np.ndarray:
    """Return mean probabilities ``(V,)`` over draws, 25 a call, at one position."""
    means = []
    for _ in range(num_calls):
        estimates, noisy, is_drawn = draw(scores, num_probes, sampling, 25)
        logits = mx.broadcast_to(dense, noisy.shape)
        logits = drawn_logits(logits, estimates, noisy, is_drawn, sampling=sampling)
        means.append(np.array(mx.softmax(logits, axis=-1).mean(axis=0)))
    return np.mean(means, axis=0)


@pytest.mark.slow
def test_total_variation_to_dense_sampling_on_real_hidden_states(smollm2_flashhead):
    model, tokenizer = mlx_lm.load(str(smollm2_flashhead))
    head = next(m for m in model.modules() if isinstance(m, FlashHead))
    hidden = model.model(mx.array([tokenizer.encode(TEXT)]))[0, 4::4]
    head.config = replace(head.config, num_probes=head.config.vocab_size // 32)
    probabilities = np.array(mx.softmax(head.logits(hidden), axis=-1))
    found = {"deterministic": list(probabilities), "stochastic": [], "corrected": []}
    dense = head.dense_logits(hidden)
    mx.random.seed(0)

    for position in zip(dense, head.centroids.logits(hidden), strict=True):
        for sampling in ("stochastic", "corrected"):
            mean = mean_softmax(*position, head.config.num_probes, sampling, 8)
            found[sampling].append(mean)

    truth = np.array(mx.softmax(dense, axis=-1))
    variation = {
        sampling: np.abs(np.array(means) - truth).sum(axis=1).mean() / 2
        for sampling, means in found.items()
    }
    assert len(hidden) >= 10
    assert variation["corrected"] < 0.02
    assert variation["corrected"] < variation["deterministic"] / 2
    assert variation["deterministic"] < variation["stochastic"] < 0.2
