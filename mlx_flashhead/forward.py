"""Run a model's body and look at what its layers project."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flashhead.head import FlashEmbedding, FlashHead

# The layers that mlx-lm's models project with, and the method that projects.
PROJECTIONS: dict[type, str] = {
    FlashHead: "__call__",
    FlashEmbedding: "as_linear",
    nn.Linear: "__call__",
    nn.QuantizedLinear: "__call__",
    nn.Embedding: "as_linear",
    nn.QuantizedEmbedding: "as_linear",
}

Project = Callable[[nn.Module, mx.array], mx.array]


def hidden_states(model: nn.Module, head_path: str, token_ids: mx.array) -> mx.array:
    """Return what reaches the head, ``(B * L, D)`` float32, for B texts of L tokens.

    The head itself is not computed.

    Args:
        model: A model with a head, dense or not, at ``head_path``.
        head_path: Dotted path, from ``find_head``.
        token_ids: ``(B, L)``, integers.
    """
    inputs: list[mx.array] = []

    def wrap(project: Project) -> Project:
        def record(module: nn.Module, hidden: mx.array) -> mx.array:
            inputs.append(hidden)
            return project(module, hidden)

        return record

    with exchanged_head(model, head_path, wrap):
        model(token_ids)
    return inputs[-1].reshape(-1, inputs[-1].shape[-1]).astype(mx.float32)


@contextmanager
def exchanged_head(
    model: nn.Module,
    head_path: str,
    wrap: Callable[[Project], Project],
    *,
    keep_weights: bool = False,
) -> Iterator[None]:
    """Exchange what a model's head does; let the body run as fast as it can.

    Args:
        model: A model with a head at ``head_path``.
        head_path: Dotted path of the head.
        wrap: Called with the head's projecting method; returns the one to use.
        keep_weights: The body is to run many times: where NumPy forms its products,
            layers are unpacked once and stay in memory as floats until the end.
    """
    weights: dict[str, np.ndarray] = {}

    def exchange(path: str, project: Project) -> Project:
        if path == head_path:
            return wrap(project)
        if not _numpy_is_faster(project):
            return project

        def product(layer: nn.Module, hidden: mx.array) -> mx.array:
            weight = weights.get(path)
            if weight is None:
                weight = _float_weight(layer)
                if keep_weights:
                    weights[path] = weight
            return _numpy_product(layer, hidden, weight)

        return product

    try:
        with exchanged_projections(model, exchange):
            yield
    finally:
        # The classes made for the layers are garbage in cycles, collected late.
        weights.clear()


@contextmanager
def exchanged_projections(
    model: nn.Module, wrap: Callable[[str, Project], Project]
) -> Iterator[None]:
    """Exchange the projecting method of every linear and embedding layer.

    Each layer's class gives way to a subclass of it while the context is open: unlike
    a wrapper, the layer keeps its attributes and stays an instance of its class.

    Args:
        model: Any MLX module.
        wrap: Called with each layer's dotted path and its method; returns the method
            to use instead.
    """
    layers = [
        (path, module, type(module))
        for path, module in model.named_modules()
        if type(module) in PROJECTIONS
    ]
    try:
        for path, module, layer_class in layers:
            method = PROJECTIONS[layer_class]
            exchanged = wrap(path, getattr(layer_class, method))
            module.__class__ = type(
                layer_class.__name__, (layer_class,), {method: exchanged}
            )
        yield
    finally:
        for _, module, layer_class in layers:
            module.__class__ = layer_class


def _numpy_is_faster(project: Project) -> bool:
    """Whether NumPy should form a layer's product instead of MLX.

    MLX's CPU wheels for Linux carry the reference BLAS: 2 GFLOP/s where NumPy has
    110 (2 cores, float32).
    """
    is_linear = project in (nn.Linear.__call__, nn.QuantizedLinear.__call__)
    return is_linear and mx.default_device() == mx.cpu


def _float_weight(layer: nn.Module) -> np.ndarray:
    """Return a linear layer's weight, ``(out, in)``, float32."""
    weight = layer.weight
    if "scales" in layer:
        weight = mx.dequantize(
            weight,
            layer.scales,
            layer.get("biases"),
            layer.group_size,
            layer.bits,
            layer.mode,
        )
    return np.array(weight.astype(mx.float32))


def _numpy_product(layer: nn.Module, hidden: mx.array, weight: np.ndarray) -> mx.array:
    """Apply a linear layer through NumPy, in float32."""
    product = np.array(hidden.astype(mx.float32)) @ weight.T
    output = mx.array(product).astype(hidden.dtype)
    return output + layer.bias if "bias" in layer else output
