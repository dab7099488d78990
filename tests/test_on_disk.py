"""What is on disk: config.json, and the arrays' names, shapes and dtypes."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
import tiny
from mlx.utils import tree_flatten
from test_checkpoint import SETTINGS

from mlx_flashhead import checkpoint, convert
from mlx_flashhead.config import FlashHeadConfig


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


ON_DISK = {
    1: {
        "weight": (mx.uint32, (203, 8)),
        "scales": (mx.float32, (203, 1)),
        "biases": (mx.float32, (203, 1)),
        "centroids.weight": (mx.uint32, (203, 4)),
        "centroids.scales": (mx.float32, (203, 1)),
        "centroids.biases": (mx.float32, (203, 1)),
        "centroids.bias": (mx.float16, (203,)),
        "centroids.projection": (mx.float32, (65, 64)),
    },
    8: {
        "weight": (mx.uint32, (208, 8)),
        "scales": (mx.float32, (208, 1)),
        "biases": (mx.float32, (208, 1)),
        "cluster_tokens": (mx.uint32, (26, 8)),
        "token_slots": (mx.uint32, (203,)),
        "centroids.weight": (mx.uint32, (26, 8)),
        "centroids.scales": (mx.float32, (26, 1)),
        "centroids.biases": (mx.float32, (26, 1)),
        "centroids.bias": (mx.float16, (26,)),
        "centroids.projection": (mx.float32, (65, 64)),
    },
}


@pytest.mark.parametrize("cluster_size", ON_DISK)
@pytest.mark.parametrize("tied", [True, False])
def test_names_on_disk_are_pinned(tied, cluster_size, tmp_path):
    """Folders that people published must stay readable."""
    source = tiny.write_folder(tmp_path / "source", tied=tied)
    options = {"cluster_size": cluster_size, "head_bits": 4, "calibrate": False}
    convert(source, tmp_path / "target", **options)

    path = "model.embed_tokens" if tied else "lm_head"
    found = {
        name.removeprefix(f"{path}."): (array.dtype, array.shape)
        for name, array in tiny.read_weights(tmp_path / "target").items()
        if name.startswith(path)
    }
    assert found == ON_DISK[cluster_size]


@pytest.mark.parametrize("folder", ["tiny_flashhead", "tiny_single_rows"])
def test_adapters_and_training_leave_the_head_alone(folder, request):
    """Index maps have no gradient: only the body is trainable."""
    model, _ = mlx_lm.load(str(request.getfixturevalue(folder)))

    trainable = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert trainable
    assert not [name for name in trainable if name.startswith("lm_head")]

    def loss(model):
        # More positions than are probed: training takes the dense path.
        return model(mx.arange(40)[None]).square().mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    norms = [float(g.square().sum()) for _, g in tree_flatten(gradients)]
    assert max(norms) > 0
