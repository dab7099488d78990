"""Heads as functions from hidden states to logits, to be set side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashhead.attach import find_head
from mlx_flashhead.forward import Project, exchanged_projections
from mlx_flashhead.head import FlashHead
from mlx_flashhead.loading import load_source
from mlx_flashhead.measure import head_bytes, probed_parts, rounded_rows
from mlx_flashhead.packing import DENSE_BITS, float_rows


@dataclass(frozen=True)
class Head:
    """A head that can be compared with others.

    Attributes:
        name: What to call it.
        vocab_size: Its logits, V.
        logits: Hidden states ``(N, D)``, float32, to logits ``(N, V)``, float32.
        bytes_per_token: Bytes it reads for a token.
        exact_tokens: Hidden states to which tokens it scores exactly, ``(N, V)``
            bool; ``None`` if it does so with all.
    """

    name: str
    vocab_size: int
    logits: Callable[[mx.array], mx.array]
    bytes_per_token: int
    exact_tokens: Callable[[mx.array], np.ndarray] | None = None


def probing_head(flash: FlashHead, num_probes: int | None = None) -> Head:
    """Return a FlashHead, never on its dense path, at its own or at other probes.

    It takes the best clusters, even where the model draws them at random: one draw
    tells nothing about the distribution that draws add up to.
    """
    flash = copy.copy(flash)
    flash.config = replace(
        flash.config,
        num_probes=num_probes or flash.config.num_probes,
        sampling="deterministic",
    )

    def logits(hidden: mx.array) -> mx.array:
        parts = [flash.logits(part) for part in probed_parts(flash, hidden)]
        return mx.concatenate(parts).astype(mx.float32)

    def exact_tokens(hidden: mx.array) -> np.ndarray:
        return np.array(flash.probed_tokens(hidden))

    read = head_bytes(flash).read_per_token
    size = flash.config.vocab_size
    return Head("FlashHead", size, logits, read, exact_tokens)


def dense_head(
    name: str, rows: np.ndarray, bias: mx.array | None, bytes_per_token: int
) -> Head:
    """Return a head that reads all of its rows ``(V, D)``, float32."""
    # MLX's CPU backend multiplies at a fiftieth of NumPy's speed.
    on_gpu = mx.default_device() == mx.gpu
    transposed = mx.array(rows).T if on_gpu else None

    def logits(hidden: mx.array) -> mx.array:
        if transposed is not None:
            products = hidden @ transposed
        else:
            products = mx.array(np.array(hidden) @ rows.T)
        return products if bias is None else products + bias.astype(mx.float32)

    return Head(name, len(rows), logits, bytes_per_token)


def stored_head(flash: FlashHead) -> Head:
    """Return the dense product over all rows that a FlashHead stores."""
    sizes = head_bytes(flash)
    rows = truth_rows(flash, None)
    return dense_head(
        "its rows, dense", rows, flash.get("bias"), sizes.stored - sizes.overhead
    )


def dense_4bit_head(flash: FlashHead, rows: np.ndarray) -> Head:
    """Return the head that mlx-lm would make of the rows ``(V, D)``: the rival."""
    return dense_head(
        f"dense {DENSE_BITS}-bit",
        rounded_rows(rows, DENSE_BITS),
        flash.get("bias"),
        head_bytes(flash).dense_4bit,
    )


def float_head(flash: FlashHead, rows: np.ndarray) -> Head:
    """Return the source's head, with rows ``(V, D)``: the truth."""
    float_bytes = rows.size * getattr(mx, flash.config.dtype).size
    return dense_head("float", rows, flash.get("bias"), float_bytes)


def truth_rows(flash: FlashHead, reference: str | None) -> np.ndarray:
    """Return the rows that a FlashHead is to do justice to, ``(V, D)``, float32.

    Args:
        flash: The head.
        reference: The model it was made from; ``None`` for the rows it stores.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If its head has another shape.
    """
    if reference is None:
        tokens = mx.arange(flash.config.vocab_size)
        return float_rows(flash.rows.take(flash.slots(tokens)))
    dense = find_head(load_source(reference).model)
    config = flash.config
    if (dense.rows.num_rows, dense.hidden_size) != (
        config.vocab_size,
        config.hidden_size,
    ):
        raise ValueError(
            f"The head of {reference} is {dense.rows.num_rows} x {dense.hidden_size}, "
            f"this model's {config.vocab_size} x {config.hidden_size}: name the model "
            "that it was converted from."
        )
    return float_rows(dense.rows)


def after_head(
    model: nn.Module, head_path: str, vocab_size: int
) -> Callable[[mx.array], mx.array]:
    """Return what a model does to its head's logits ``(N, V)``: scale or cap them.

    The model is called with the logits put in place of the head's; MLX is lazy, so
    the body they do not depend on is never computed.
    """

    def finish(logits: mx.array) -> mx.array:
        def wrap(path: str, project: Project) -> Project:
            return (lambda *_: logits[None]) if path == head_path else project

        with exchanged_projections(model, wrap):
            return model(mx.zeros((1, len(logits)), mx.int32))[0]

    sample = mx.linspace(-30, 30, vocab_size)[None]
    return finish if not mx.array_equal(finish(sample), sample) else lambda x: x
