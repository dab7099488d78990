"""The hidden states of a model that continues many texts at once.

MLX's CPU wheels carry a slow matrix product: every linear layer goes through NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_flashhead.attach import find_head
from mlx_flashhead.build import float_rows
from mlx_flashhead.forward import Project, exchanged_projections


@dataclass(frozen=True)
class Continuations:
    """What a model did at each position that it sampled a token for.

    Attributes:
        hidden: What reached the head, ``(N, D)``, float32.
        best: Arg max of the dense float head, ``(N,)``, int64.
        token: The sampled token, ``(N,)``, int64.
        text: Which of the texts, ``(N,)``, int64.
        mean_probabilities: Mean of the softmax over the positions, ``(V,)``, float64.
    """

    hidden: np.ndarray
    best: np.ndarray
    token: np.ndarray
    text: np.ndarray
    mean_probabilities: np.ndarray


class Decoder:
    """A model's body with NumPy's products, and its head's rows."""

    def __init__(self, model: nn.Module) -> None:
        head = find_head(model)
        self.model = model
        self.head_path = head.path
        self.rows = float_rows(head.rows)
        self._weights: dict[str, np.ndarray] = {}
        self._hidden: mx.array | None = None

    def _wrap(self, path: str, project: Project) -> Project:
        def record(module: nn.Module, hidden: mx.array) -> mx.array:
            self._hidden = hidden[:, -1].astype(mx.float32)
            return hidden

        def product(module: nn.Module, hidden: mx.array) -> mx.array:
            if path not in self._weights:
                self._weights[path] = np.array(module.weight.astype(mx.float32)).T
            out = mx.array(np.array(hidden) @ self._weights[path])
            return out + module.bias if "bias" in module else out

        if path == self.head_path:
            return record
        return product if project is nn.Linear.__call__ else project

    def last_hidden(self, token_ids: list[list[int]], cache: list[Any]) -> np.ndarray:
        """Feed ``(B, L)`` tokens; return the hidden states at the last, ``(B, D)``."""
        with exchanged_projections(self.model, self._wrap):
            self.model(mx.array(token_ids), cache=cache)
        return np.array(self._hidden)


def continue_texts(
    decoder: Decoder,
    texts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop: set[int],
    seed: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Continuations:
    """Sample a continuation of each text at temperature 1.

    Texts are decoded in the order of their length. Those of a batch start together,
    at the length of its shortest; the longer ones are fed their own tokens at first.

    Args:
        decoder: The model.
        texts: Token ids of each text, at least one.
        max_tokens: Positions kept of each text, at most.
        stop: Tokens that end a text; the position that chose one is kept.
        seed: Seed of the sampling.
        batch_size: Texts at a time.
        progress: Called with the number of texts done and of all.

    Returns:
        All positions, text by text within a step of a batch.
    """
    random = np.random.default_rng(seed)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    kept: list[tuple[np.ndarray, ...]] = []
    total = np.zeros(len(decoder.rows))
    for start in range(0, len(order), batch_size):
        batch = np.array(order[start : start + batch_size])
        own = [list(texts[i]) for i in batch]
        total += _continue_batch(decoder, own, batch, max_tokens, stop, random, kept)
        progress(start + len(batch), len(order))
    hidden, best, token, text = (
        np.concatenate(part) for part in zip(*kept, strict=True)
    )
    return Continuations(hidden, best, token, text, total / len(best))


def _continue_batch(
    decoder: Decoder,
    texts: list[list[int]],
    ids: np.ndarray,
    max_tokens: int,
    stop: set[int],
    random: np.random.Generator,
    kept: list[tuple[np.ndarray, ...]],
) -> np.ndarray:
    """Decode one batch into ``kept``; return the sum of its softmaxes, ``(V,)``."""
    lengths = np.array([len(text) for text in texts])
    cache = make_prompt_cache(decoder.model)
    active = np.ones(len(texts), dtype=bool)
    total = np.zeros(len(decoder.rows))
    feed = [text[: lengths[0]] for text in texts]
    for position in range(lengths[0], lengths[-1] + max_tokens):
        hidden = decoder.last_hidden(feed, cache)
        active &= position < lengths + max_tokens
        chooses = active & (position >= lengths)
        best, token, total_now = _sample(hidden[chooses], decoder.rows, random)
        total += total_now
        kept.append((hidden[chooses], best, token, ids[chooses]))
        tokens = np.zeros(len(texts), dtype=np.int64)  # 0 for those that have ended
        tokens[chooses] = token
        active[chooses] &= ~np.isin(token, list(stop))
        if not active.any():
            break
        for i in np.flatnonzero(position < lengths):
            tokens[i] = texts[i][position]
        feed = tokens[:, None].tolist()
    return total


def _sample(
    hidden: np.ndarray, rows: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return arg max, a sample of the softmax, and the sum of the softmaxes."""
    logits = hidden @ rows.T
    best = logits.argmax(axis=1)
    weights = np.exp(logits - np.take_along_axis(logits, best[:, None], axis=1))
    heaps = weights.cumsum(axis=1, dtype=np.float64)
    draws = random.random(len(hidden)) * heaps[:, -1] if len(hidden) else []
    token = np.array(
        [np.searchsorted(h, d, "right") for h, d in zip(heaps, draws, strict=True)],
        dtype=np.int64,
    )
    if not len(hidden):
        return best, token, np.zeros(len(rows))
    return best, token, (1 / heaps[:, -1]) @ weights
