"""The FlashHead architecture for mlx-lm: any other architecture, its head replaced.

Installed as ``mlx_lm/models/flashhead.py``, where mlx-lm looks for the ``model_type``
of a converted folder. What it builds is the base architecture's own model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.utils import _get_classes
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mlx_flashhead.attach import replace_module
from mlx_flashhead.checkpoint import read_config, validate_arrays
from mlx_flashhead.config import MODEL_TYPE, FlashHeadConfig
from mlx_flashhead.head import empty_head


@dataclass
class ModelArgs:
    """The base architecture's class and arguments, and the head's settings."""

    model_class: Any
    model_args: Any
    head: FlashHeadConfig

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """Read a ``config.json``.

        Raises:
            ValueError: If the settings are invalid or mlx-lm does not know the base
                architecture.
        """
        head = read_config(config)
        base = {**config, "model_type": head.base_model_type}
        try:
            model_class, args_class = _get_classes(base)
        except ValueError as error:
            raise ValueError(
                f"The base architecture {head.base_model_type!r} is unknown to this "
                "mlx-lm: pip install -U mlx-lm."
            ) from error
        return cls(model_class, args_class.from_dict(base), head)


class Model:
    """Builds a model of the base architecture with a FlashHead in it."""

    def __new__(cls, args: ModelArgs) -> Any:
        """Return ``args.model_class``'s own model, its head replaced."""
        model = args.model_class(args.model_args)
        replace_module(model, args.head.head_path, empty_head(args.head))
        sanitize = getattr(model, "sanitize", None)

        def checked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
            # A distributed load builds the model before it knows which files it needs.
            if weights:
                validate_arrays(args.head, weights)
            return weights if sanitize is None else sanitize(weights)

        # mlx-lm hands a checkpoint's arrays to this method before it loads them.
        model.sanitize = checked
        return model


class _TokenizerConfig(PreTrainedConfig):
    """Sends transformers to the base model's settings.

    transformers chooses a tokenizer by ``model_type``, and warns of one it does not
    know.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """Return the base model's transformers config, or a plain one."""
        base_type = read_config(config_dict).base_model_type
        base = {**config_dict, "model_type": base_type}
        known = base_type in CONFIG_MAPPING
        config_class = CONFIG_MAPPING[base_type] if known else PreTrainedConfig
        return config_class.from_dict(base, **kwargs)


AutoConfig.register(MODEL_TYPE, _TokenizerConfig, exist_ok=True)
