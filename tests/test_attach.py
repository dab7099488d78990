"""Finding a model's head by what it does, and replacing it in memory."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from mlx_flashhead import replace_head
from mlx_flashhead.attach import find_head, replace_module
from mlx_flashhead.forward import PROJECTIONS, hidden_states
from mlx_flashhead.head import FlashEmbedding, FlashHead

# Where each architecture keeps its head, as mlx-lm's code has it.
PATHS = [
    ("llama", True, "model.embed_tokens"),
    ("llama", False, "lm_head"),
    ("gpt2", True, "model.wte"),
    ("mamba2", True, "backbone.embeddings"),
    ("gemma3", True, "language_model.model.embed_tokens"),
    ("gemma3", False, "language_model.lm_head"),
    ("phi", False, "lm_head"),
]


def loaded(tmp_path, model_type="llama", **options):
    folder = tiny.write_folder(tmp_path / "model", model_type, **options)
    return mlx_lm.load(str(folder))


class Wide(nn.Module):
    """A model that makes its logits by ``function`` of itself and hidden states."""

    model_type = "wide"

    def __init__(self, function):
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB_SIZE, tiny.HIDDEN_SIZE)
        self.project = nn.Linear(tiny.HIDDEN_SIZE, tiny.VOCAB_SIZE, bias=False)
        self.narrow = nn.Linear(tiny.VOCAB_SIZE, 12, bias=False)
        self._function = function

    def __call__(self, token_ids, cache=None):
        return self._function(self, self.embed(token_ids))


@pytest.mark.parametrize(("model_type", "tied", "path"), PATHS)
def test_head_is_found(model_type, tied, path, tmp_path):
    model, _ = loaded(tmp_path, model_type, tied=tied)

    head = find_head(model)

    assert (head.path, head.tied) == (path, tied)
    assert head.module is dict(model.named_modules())[path]
    assert head.hidden_size == tiny.HIDDEN_SIZE
    assert head.dtype == mx.float32
    assert (head.bias is None) == (model_type != "phi")
    assert head.rows.weight.shape == (tiny.VOCAB_SIZE, tiny.HIDDEN_SIZE)


def test_looking_for_the_head_leaves_the_model_as_it_was(tmp_path):
    model, _ = loaded(tmp_path)
    before = {name: type(module) for name, module in model.named_modules()}
    arrays = dict(tree_flatten(model.parameters()))

    find_head(model)
    hidden_states(model, "model.embed_tokens", mx.array([[1, 2]]))

    assert {name: type(module) for name, module in model.named_modules()} == before
    for name, array in tree_flatten(model.parameters()):
        assert array is arrays[name]


def test_an_error_inside_the_model_leaves_it_as_it_was():
    def fail(model, hidden):
        model.project(hidden)
        raise RuntimeError("inside")

    model = Wide(fail)

    with pytest.raises(RuntimeError, match="inside"):
        find_head(model)

    assert type(model.project) is nn.Linear


@pytest.mark.parametrize(
    "function",
    [
        lambda model, hidden: hidden @ model.project.weight.T,
        lambda model, hidden: model.project(hidden)[..., :100],
        lambda model, hidden: (model.project(hidden), hidden),
    ],
    ids=["by-hand", "cut", "tuple"],
)
def test_other_heads_are_refused_by_name(function):
    with pytest.raises(ValueError, match="head of architecture 'wide'"):
        find_head(Wide(function))


def test_the_last_projection_is_the_head():
    model = Wide(lambda model, hidden: model.narrow(model.project(hidden)))

    assert find_head(model).path == "narrow"


def test_logits_may_be_changed_after_the_head():
    model = Wide(lambda model, hidden: mx.tanh(3 * model.project(hidden)))

    assert find_head(model).path == "project"


def test_every_projecting_layer_of_mlx_is_known():
    layers = {
        layer
        for layer in vars(nn).values()
        if isinstance(layer, type)
        and issubclass(layer, nn.Module)
        and (hasattr(layer, "as_linear") or layer.__name__.endswith("dLinear"))
    }

    assert {nn.Linear, nn.QuantizedLinear} <= set(PROJECTIONS)
    assert {nn.Embedding, nn.QuantizedEmbedding} <= layers & set(PROJECTIONS)


@pytest.mark.parametrize(("model_type", "tied", "path"), PATHS)
def test_hidden_states_are_what_the_head_receives(
    model_type, tied, path, tmp_path, monkeypatch
):
    model, _ = loaded(tmp_path, model_type, tied=tied)
    token_ids = mx.array([[1, 17, 42, 150, 9], [3, 0, 77, 199, 4]])

    actual = hidden_states(model, path, token_ids)

    calls = tiny.head_calls(monkeypatch)
    model(token_ids)
    expected = np.array(calls[-1]).reshape(10, tiny.HIDDEN_SIZE)
    assert actual.shape == expected.shape
    # Two layers of float32 products, in another order of summation.
    bound = 1e-4 * np.abs(expected).max()
    assert np.abs(np.array(actual) - expected).max() <= bound


@pytest.mark.parametrize(("cluster_size", "num_probes"), [(1, 203), (8, 26)])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_replace_head_works_in_memory(
    tied, quantized, cluster_size, num_probes, tmp_path
):
    model, tokenizer = loaded(tmp_path, tied=tied)
    if quantized:
        nn.quantize(model, group_size=32, bits=6)
    token_ids = mx.array([[1, 17, 42]])
    expected = np.array(model(token_ids))
    single = np.array(model(token_ids[:, :1]))

    same = replace_head(
        model,
        tokenizer,
        cluster_size=cluster_size,
        num_probes=num_probes,
        calibration_positions=256,
    )

    assert same is model
    head = model.model.embed_tokens if tied else model.lm_head
    assert type(head) is (FlashEmbedding if tied else FlashHead)
    bound = tiny.HIDDEN_SIZE * np.finfo(np.float32).eps * np.abs(expected).max()
    assert np.abs(np.array(model(token_ids)) - expected).max() <= bound
    assert np.abs(np.array(model(token_ids[:, :1])) - single).max() <= bound


def test_replace_head_takes_the_converters_options(tmp_path):
    model, tokenizer = loaded(tmp_path)
    rows = model.model.embed_tokens.weight
    stages = []

    replace_head(
        model,
        tokenizer,
        cluster_size=4,
        num_probes=9,
        head_bits=5,
        centroid_bits=8,
        sampling="corrected",
        calibration_positions=256,
        seed=3,
        progress=lambda stage, share: stages.append(stage),
    )

    config = model.model.embed_tokens.config
    assert (config.cluster_size, config.num_probes) == (4, 9)
    assert (config.rows.bits, config.centroids.bits) == (5, 8)
    assert config.sampling == "corrected"
    assert stages
    # The embedding is the rounded rows, in token order.
    packed = mx.quantize(rows, group_size=64, bits=5)
    ids = mx.array([[0, 202], [7, 31]])
    embedded = model.model.embed_tokens(ids)
    assert mx.array_equal(embedded, mx.dequantize(*packed, group_size=64, bits=5)[ids])


def test_a_head_is_not_replaced_twice(tmp_path):
    model, tokenizer = loaded(tmp_path)
    replace_head(model, tokenizer, calibrate=False)

    with pytest.raises(ValueError, match="has a FlashHead already, at model.embed"):
        replace_head(model, tokenizer)


def test_replace_module_reaches_into_lists(tmp_path):
    model, _ = loaded(tmp_path)
    new = nn.Linear(3, 5)

    replace_module(model, "model.layers.1.mlp.up_proj", new)

    assert model.model.layers[1].mlp.up_proj is new
    assert model.model.layers[0].mlp.up_proj is not new
