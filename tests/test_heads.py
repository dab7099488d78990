"""Heads beside each other: each one's logits, bytes and figures by brute force."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import in_float64, random_hidden
from oracles import dense_logits, flash_logits, float_rows, head_shapes, random_head

from mlx_flashhead.config import Quantization
from mlx_flashhead.evaluation.compare import compare_heads
from mlx_flashhead.heads import (
    dense_4bit_head,
    float_head,
    probing_head,
    stored_head,
)
from mlx_flashhead.measure import head_bytes
from mlx_flashhead.positions import Positions

D = 64
# No multiple of the positions that one call probes.
N = 301


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@head_shapes
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_complete", [False, True])
def test_figures_match_brute_force(is_complete, has_bias, shape):
    num_clusters = shape.get("num_clusters", 11)
    probes = {"num_probes": num_clusters} if is_complete else {}
    head = random_head(
        rows=Quantization(3, 64), has_bias=has_bias, **{**shape, **probes}
    )
    # The source's rows are those from which the head's few bits were rounded, or so.
    tokens = mx.arange(head.config.vocab_size)
    stored = float_rows(head.rows)[np.array(head.slots(tokens))]
    noise = np.random.default_rng(9).normal(size=stored.shape) * 0.1
    rows = (stored + noise).astype(np.float32)
    # Small enough that tails have mass.
    hidden = 0.1 * random_hidden(N, D, mx.float32, seed=4)
    next_tokens = np.random.default_rng(5).integers(0, len(rows), N)
    heads = [probing_head(head), dense_4bit_head(head, rows)]

    perplexity, figures = compare_heads(
        float_head(head, rows),
        heads,
        Positions(hidden, next_tokens),
        lambda logits: logits,
        lambda share: None,
    )

    bias = in_float64(head.bias) if has_bias else 0
    truth = in_float64(hidden) @ rows.T + bias
    logits, is_probed = flash_logits(head, hidden)
    packed = mx.quantize(mx.array(rows), group_size=64, bits=4)
    rounded = in_float64(mx.dequantize(*packed, group_size=64, bits=4))
    rival = in_float64(hidden) @ rounded.T + bias
    best, p = truth.argmax(axis=1), softmax(truth)
    position = np.arange(N)
    for found, expected in zip(figures, (logits, rival), strict=True):
        agreement = (expected.argmax(axis=1) == best).mean()
        kl = (p * np.log(p / softmax(expected))).sum(axis=1).mean()
        assert found.agreement.value == pytest.approx(agreement, abs=1e-9)
        assert found.kl_divergence == pytest.approx(kl, rel=1e-3)
        assert 0 < agreement < 1 and kl > 0
    recall = is_probed[position, best].mean()
    assert figures[0].recall.value == pytest.approx(recall, abs=1e-9)
    assert recall == 1 if is_complete else recall < 1
    losses = -np.log(p[position, next_tokens])
    assert perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-4)


@head_shapes
def test_a_probing_head_never_takes_its_dense_path(shape):
    head = random_head(**shape)
    hidden = random_hidden(50, D, mx.float32, seed=1)

    found = probing_head(head)

    expected, is_probed = flash_logits(head, hidden)
    np.testing.assert_allclose(np.array(found.logits(hidden)), expected, atol=1e-4)
    np.testing.assert_array_equal(found.exact_tokens(hidden), is_probed)
    assert found.bytes_per_token == head_bytes(head).read_per_token
    assert np.abs(expected - dense_logits(head, hidden)).max() > 1


def test_a_probing_head_may_have_other_probes():
    head = random_head(num_probes=3)
    hidden = random_hidden(4, D, mx.float32, seed=1)

    found = probing_head(head, 11)

    expected = dense_logits(head, hidden)
    np.testing.assert_allclose(np.array(found.logits(hidden)), expected, atol=1e-4)
    assert found.bytes_per_token > head_bytes(head).read_per_token
    assert head.config.num_probes == 3


@head_shapes
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_stored_rows_are_not_rounded_to_the_type_of_their_scales(dtype, shape):
    head = random_head(rows=Quantization(8, 64), dtype=dtype, **shape)
    hidden = random_hidden(5, D, mx.float32, seed=1)

    found = stored_head(head)

    expected = dense_logits(head, hidden)
    np.testing.assert_allclose(np.array(found.logits(hidden)), expected, atol=1e-4)
