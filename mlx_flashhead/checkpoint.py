"""What a FlashHead is on disk: names, shapes and dtypes, and whether they are right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_flashhead.blocks import least_probes
from mlx_flashhead.config import MODEL_TYPE, FlashHeadConfig
from mlx_flashhead.head import empty_head
from mlx_flashhead.packing import slots_of_tokens


def model_config(
    base_config: Mapping[str, Any], config: FlashHeadConfig
) -> dict[str, Any]:
    """Return the ``config.json`` of a model whose head was replaced.

    The base model's keys stay; ``model_type`` and ``"flashhead"`` are set, and the
    head leaves the per-layer quantization, which mlx-lm would apply to it.
    """
    changed = {
        **base_config,
        "model_type": MODEL_TYPE,
        MODEL_TYPE: config.to_json(),
    }
    for key in ("quantization", "quantization_config"):
        if isinstance(layers := changed.get(key), dict):
            changed[key] = {
                path: value
                for path, value in layers.items()
                if path != config.head_path
            }
    return changed


def read_config(model_config: Mapping[str, Any]) -> FlashHeadConfig:
    """Return the FlashHead settings of a ``config.json``.

    Raises:
        ValueError: If they are absent, invalid, or of a newer format.
    """
    values = model_config.get(MODEL_TYPE)
    if not isinstance(values, dict):
        raise ValueError(
            f'config.json has model_type "{MODEL_TYPE}" but no "{MODEL_TYPE}" object; '
            "convert the model again."
        )
    return FlashHeadConfig.from_json(values)


def validate_arrays(config: FlashHeadConfig, weights: Mapping[str, mx.array]) -> None:
    """Check that a checkpoint holds the head that ``config`` describes.

    Args:
        config: The settings.
        weights: All arrays of the checkpoint by name.

    Raises:
        ValueError: If an array of the head is missing, has another shape or dtype, or
            the index maps are not inverse permutations of the tokens; or if P has no
            room for the pinned clusters.
    """
    expected = dict(tree_flatten(empty_head(config).parameters()))
    names = {name: f"{config.head_path}.{name}" for name in expected}
    if missing := sorted(names[n] for n in expected if names[n] not in weights):
        raise ValueError(
            f"The FlashHead arrays {', '.join(missing)} are missing; "
            "download or convert the model again."
        )
    for name, array in expected.items():
        found = weights[names[name]]
        if found.shape != array.shape or not _same_kind(found.dtype, array.dtype):
            raise ValueError(
                f"{names[name]} is {found.dtype} {tuple(found.shape)}; config.json "
                f"calls for {array.dtype} {tuple(array.shape)}; convert the model "
                "again."
            )
    _check_pinned(config, weights[names["centroids.bias"]])
    if config.cluster_size == 1:
        return
    cluster_tokens = np.array(weights[names["cluster_tokens"]])
    token_slots = slots_of_tokens(cluster_tokens, config.vocab_size)
    if not np.array_equal(token_slots, np.array(weights[names["token_slots"]])):
        raise ValueError(
            f"{names['token_slots']} is not the inverse of {names['cluster_tokens']}; "
            "convert the model again."
        )


def _check_pinned(config: FlashHeadConfig, bias: mx.array) -> None:
    """Check that the clusters with an infinite bias are always probed."""
    pinned = np.flatnonzero(np.isposinf(np.array(bias.astype(mx.float32))))
    if len(pinned) != config.num_pinned:
        raise ValueError(
            f"{len(pinned)} clusters are pinned; config.json has "
            f"num_pinned={config.num_pinned}; convert the model again."
        )
    least = least_probes(pinned.tolist(), config.num_clusters)
    if config.num_probes < least:
        raise ValueError(
            f"config.json: num_probes={config.num_probes} must be at least {least}, so "
            "that the pinned clusters are always probed."
        )


def _same_kind(found: mx.Dtype, expected: mx.Dtype) -> bool:
    """Floats may have been cast with the rest of the model; indices may not."""
    if mx.issubdtype(expected, mx.floating):
        return mx.issubdtype(found, mx.floating)
    return found == expected
