"""Find the vocabulary head of an mlx-lm model by what it does, and replace it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_flashhead.config import Quantization
from mlx_flashhead.forward import PROJECTIONS, Project, exchanged_projections
from mlx_flashhead.head import FlashHead
from mlx_flashhead.packing import PackedRows


@dataclass(frozen=True)
class DenseHead:
    """A dense head as found in a model.

    Attributes:
        path: Dotted path in the model.
        module: The layer itself.
        tied: Whether it is the token embedding as well.
        hidden_size: Length of the hidden states it receives, D.
        dtype: Their float type.
    """

    path: str
    module: nn.Module
    tied: bool
    hidden_size: int
    dtype: mx.Dtype

    @property
    def rows(self) -> PackedRows:
        """The rows, ``(V, ...)``, in token order, as the layer stores them."""
        module = self.module
        if "scales" not in module:
            return PackedRows(module.weight)
        return PackedRows(
            module.weight,
            module.scales,
            module.get("biases"),
            Quantization(module.bits, module.group_size, module.mode),
        )

    @property
    def bias(self) -> mx.array | None:
        """The bias it adds to the logits, ``(V,)``, or ``None``."""
        return self.module.get("bias")


def find_head(model: nn.Module) -> DenseHead:
    """Find the layer that forms a model's logits.

    The forward pass is built, not evaluated, for one token: the head is the layer
    that projects last, and its output is as wide as the logits. No list of
    architectures or of module names is needed.

    Args:
        model: A model as loaded by mlx-lm.

    Returns:
        The head.

    Raises:
        ValueError: If the logits do not come from such a layer, or the head has been
            replaced by a FlashHead already.
    """
    for path, module in model.named_modules():
        if isinstance(module, FlashHead):
            raise ValueError(
                f"{_name_of(model)} has a FlashHead already, at {path}; "
                "start from the model it was made from."
            )
    projected: list[tuple[str, mx.array, mx.array]] = []

    def record_calls(path: str, project: Project) -> Project:
        def record(module: nn.Module, hidden: mx.array) -> mx.array:
            output = project(module, hidden)
            projected.append((path, hidden, output))
            return output

        return record

    with exchanged_projections(model, record_calls):
        logits = model(mx.array([[0]]))
    if not projected or not isinstance(logits, mx.array):
        raise ValueError(_not_found(model))
    path, hidden, output = projected[-1]
    module = dict(model.named_modules())[path]
    if output.shape != logits.shape or len(module.weight) != logits.shape[-1]:
        raise ValueError(_not_found(model))
    tied = PROJECTIONS[type(module)] == "as_linear"
    return DenseHead(path, module, tied, hidden.shape[-1], hidden.dtype)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``path`` of ``model``, in place."""
    model.update_modules(tree_unflatten([(path, module)]))


def _name_of(model: nn.Module) -> str:
    return getattr(model, "model_type", None) or type(model).__module__


def _not_found(model: nn.Module) -> str:
    return (
        f"Cannot find the vocabulary head of architecture {_name_of(model)!r}: its "
        "logits do not come from one linear or embedding layer, so FlashHead cannot "
        "replace it."
    )
