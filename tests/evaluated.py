"""Float64 answers in NumPy to what an evaluation measures."""

import math

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_flashhead import load
from mlx_flashhead.forward import hidden_states
from mlx_flashhead.head import FlashHead

RANDOM = np.random.default_rng(3)
TEXT = " ".join(f"word{i}" for i in RANDOM.integers(100, 190, 300))


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def capped(kind, logits):
    """What gemma2 does to its head's logits; ``tiny`` has it cap them at 2."""
    return 2 * np.tanh(logits / 2) if kind == "gemma2" else logits


def text_positions(folder):
    """Return the model's head, and the text's hidden states and next tokens."""
    model, tokenizer = load(folder)
    head = next(m for m in model.modules() if isinstance(m, FlashHead))
    ids = np.array(tokenizer.encode(TEXT, add_special_tokens=False))
    windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    hidden = hidden_states(model, head.config.head_path, mx.array(windows[:, :-1]))
    return head, hidden, windows[:, 1:].reshape(-1)


def source_head(folder, kind):
    """Return rows ``(V, D)`` and bias of a source's head, float64."""
    weights = tiny.read_weights(folder)
    name = "model.embed_tokens" if kind == "gemma2" else "lm_head"
    bias = np.array(weights[f"{name}.bias"], np.float64) if kind == "phi" else 0
    return np.array(weights[f"{name}.weight"], np.float64), bias


def expected_figures(truth, logits, next_tokens, is_exact=None):
    """Return the figures from float64 logits ``(N, V)``."""
    p, q = softmax(truth), softmax(logits)
    best = truth.argmax(axis=1)
    rows = np.arange(len(best))
    order = np.argsort(-logits, axis=1, kind="stable")
    places = np.argmax(order == best[:, None], axis=1)
    figures = {
        "agreement": (places == 0).mean(),
        "top3": (places < 3).mean(),
        "top10": (places < 10).mean(),
        "kl_divergence": (p * np.log(p / q)).sum(axis=1).mean(),
        "total_variation": np.abs(p - q).sum(axis=1).mean() / 2,
        "perplexity": math.exp(-np.log(q[rows, next_tokens]).mean()),
    }
    if is_exact is not None:
        figures["recall"] = is_exact[rows, best].mean()
        figures["exact_mass"] = (q * is_exact).sum(axis=1).mean()
        figures["truth_exact_mass"] = (p * is_exact).sum(axis=1).mean()
    return figures


def assert_figures(figures, expected):
    for name, value in expected.items():
        actual = getattr(figures, name)
        actual = getattr(actual, "value", actual)
        assert actual == pytest.approx(value, rel=1e-4, abs=1e-6), name
