"""What is on disk: config.json, the arrays' names, shapes and dtypes."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from mlx_flashhead import checkpoint, convert
from mlx_flashhead.config import FlashHeadConfig, Quantization

# V = 11 in 4 clusters of 3, slot 7 is padding; D = 64.
TOKENS = np.array([[4, 0, 9], [1, 10, 2], [8, 11, 3], [7, 5, 6]], np.uint32)
SLOTS = np.array([1, 3, 5, 8, 0, 10, 11, 9, 6, 2, 4], np.uint32)
SETTINGS = {
    "base_model_type": "llama",
    "head_path": "a.head",
    "tied": False,
    "vocab_size": 11,
    "hidden_size": 64,
    "cluster_size": 3,
    "num_probes": 2,
    "num_pinned": 1,
    "dtype": "float16",
    "rows": None,
    "centroids": Quantization(4, 32),
    "has_bias": True,
}


def arrays(rows: Quantization | None) -> dict[str, mx.array]:
    """Return a valid checkpoint, made with MLX alone."""
    weights = {
        "weight": mx.ones((12, 64), mx.float16),
        "cluster_tokens": mx.array(TOKENS),
        "token_slots": mx.array(SLOTS),
        "centroids.bias": mx.zeros((4,)),
        "bias": mx.zeros((11,), mx.float16),
    }

    def pack(prefix: str, floats: mx.array, packing: Quantization) -> None:
        packed = mx.quantize(
            floats,
            group_size=packing.group_size,
            bits=packing.bits,
            mode=packing.mode,
        )
        for name, array in zip(("weight", "scales", "biases"), packed, strict=False):
            weights[f"{prefix}{name}"] = array

    pack("centroids.", mx.ones((4, 64), mx.float16), SETTINGS["centroids"])
    if rows is not None:
        pack("", weights["weight"], rows)
    return {f"a.head.{name}": array for name, array in weights.items()} | {
        "a.norm.weight": mx.ones((64,))
    }


ROWS = [
    None,
    Quantization(3, 32),
    Quantization(8, 64),
    Quantization(4, 32, "mxfp4"),
    Quantization(4, 16, "nvfp4"),
    Quantization(8, 32, "mxfp8"),
]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_valid_arrays_are_accepted_and_each_is_needed(rows):
    config = FlashHeadConfig(**SETTINGS | {"rows": rows})
    weights = arrays(rows)

    checkpoint.validate_arrays(config, weights)

    for name in weights:
        if name == "a.norm.weight":
            continue
        lacking = {n: a for n, a in weights.items() if n != name}
        with pytest.raises(ValueError, match=f"{name} (is|are) missing"):
            checkpoint.validate_arrays(config, lacking)
        taller = weights | {name: mx.concatenate([weights[name]] * 2)}
        with pytest.raises(ValueError, match=f"{name} is .*config.json calls for"):
            checkpoint.validate_arrays(config, taller)


def test_all_missing_arrays_are_named():
    weights = arrays(None)
    del weights["a.head.weight"], weights["a.head.centroids.bias"]

    with pytest.raises(ValueError, match=r"a\.head\.centroids\.bias, a\.head\.weight"):
        checkpoint.validate_arrays(FlashHeadConfig(**SETTINGS), weights)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("weight", mx.uint32),
        ("centroids.weight", mx.int32),
        ("cluster_tokens", mx.int32),
        ("token_slots", mx.uint64),
        ("centroids.bias", mx.uint8),
    ],
)
def test_wrong_kinds_are_refused(name, dtype):
    weights = arrays(None)
    weights[f"a.head.{name}"] = weights[f"a.head.{name}"].astype(dtype)

    with pytest.raises(ValueError, match=rf"a\.head\.{name} is"):
        checkpoint.validate_arrays(FlashHeadConfig(**SETTINGS), weights)


def test_floats_may_have_been_cast():
    weights = {
        name: array.astype(mx.bfloat16) if array.dtype == mx.float16 else array
        for name, array in arrays(None).items()
    }

    checkpoint.validate_arrays(FlashHeadConfig(**SETTINGS), weights)


def test_maps_must_be_inverse():
    weights = arrays(None)
    swapped = SLOTS.copy()
    swapped[[2, 3]] = swapped[[3, 2]]
    weights["a.head.token_slots"] = mx.array(swapped)

    with pytest.raises(ValueError, match="token_slots is not the inverse of"):
        checkpoint.validate_arrays(FlashHeadConfig(**SETTINGS), weights)


def test_config_keeps_the_base_models_keys():
    base = {"model_type": "llama", "hidden_size": 64, "text_config": {"x": 1}}
    config = FlashHeadConfig(**SETTINGS)

    changed = checkpoint.model_config(base, config)

    assert base["model_type"] == "llama"
    assert changed.pop("model_type") == "flashhead"
    assert changed.pop("flashhead") == config.to_json()
    assert changed == {"hidden_size": 64, "text_config": {"x": 1}}


def test_the_head_leaves_the_per_layer_quantization():
    layers = {"bits": 4, "group_size": 64, "a.head": {"bits": 6}, "a.up": {"bits": 2}}
    base = {
        "model_type": "llama",
        "quantization": layers,
        "quantization_config": dict(layers),
    }

    changed = checkpoint.model_config(base, FlashHeadConfig(**SETTINGS))

    expected = {"bits": 4, "group_size": 64, "a.up": {"bits": 2}}
    assert changed["quantization"] == expected
    assert changed["quantization_config"] == expected
    assert "a.head" in layers


def test_settings_are_read_back():
    config = FlashHeadConfig(**SETTINGS)

    text = json.dumps(checkpoint.model_config({"model_type": "llama"}, config))

    assert checkpoint.read_config(json.loads(text)) == config


@pytest.mark.parametrize("values", [{}, {"flashhead": None}, {"flashhead": [1]}])
def test_absent_settings_are_refused(values):
    with pytest.raises(ValueError, match='no "flashhead" object'):
        checkpoint.read_config(values)


@pytest.mark.parametrize("tied", [True, False])
def test_names_on_disk_are_pinned(tied, tmp_path):
    """Folders that people published must stay readable."""
    source = tiny.write_folder(tmp_path / "source", tied=tied)
    convert(source, tmp_path / "target", cluster_size=8, head_bits=4)

    path = "model.embed_tokens" if tied else "lm_head"
    found = {
        name.removeprefix(f"{path}."): (array.dtype, array.shape)
        for name, array in tiny.read_weights(tmp_path / "target").items()
        if name.startswith(path)
    }
    assert found == {
        "weight": (mx.uint32, (208, 8)),
        "scales": (mx.float32, (208, 1)),
        "biases": (mx.float32, (208, 1)),
        "cluster_tokens": (mx.uint32, (26, 8)),
        "token_slots": (mx.uint32, (203,)),
        "centroids.weight": (mx.uint32, (26, 8)),
        "centroids.scales": (mx.float32, (26, 1)),
        "centroids.biases": (mx.float32, (26, 1)),
        "centroids.bias": (mx.float32, (26,)),
    }


def test_adapters_and_training_leave_the_head_alone(tiny_flashhead):
    """Index maps have no gradient: only the body is trainable."""
    model, _ = mlx_lm.load(str(tiny_flashhead))

    trainable = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert trainable
    assert not [name for name in trainable if name.startswith("lm_head")]

    def loss(model):
        # More positions than are probed: training takes the dense path.
        return model(mx.arange(40)[None]).square().mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    norms = [float(g.square().sum()) for _, g in tree_flatten(gradients)]
    assert max(norms) > 0
