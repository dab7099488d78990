"""Every architecture: converted, loaded by plain mlx-lm, compared with its base."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx_lm.models.cache import make_prompt_cache

from mlx_flashhead import convert

BOTH = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_5",
    "gemma3_text",
    "gemma3",
    "gemma4",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "exaone4",
    "mamba2",
]
ONLY_TIED = ["gemma", "gemma2", "cohere2", "lfm2", "gpt2"]
ONLY_UNTIED = ["glm4", "gpt_oss", "deepseek_v3", "seed_oss", "phi", "gptj"]
WITH_BIAS = ["phi", "gptj"]
CASES = [
    *((model_type, tied) for model_type in BOTH for tied in (True, False)),
    *((model_type, True) for model_type in ONLY_TIED),
    *((model_type, False) for model_type in ONLY_UNTIED),
]

# Clusters of 8 have five slots of padding.
NUM_CLUSTERS = {1: 203, 8: 26}
NUM_PROBES = {1: 24, 8: 4}
PROMPT = [1, 17, 42, 150, 9]
STEPS = [61, 198, 202, 7]


def logits_of(model) -> np.ndarray:
    """Return logits of a prompt at once and of single steps, with a cache."""
    cache = make_prompt_cache(model)
    parts = [model(mx.array([PROMPT]), cache=cache)]
    parts += [model(mx.array([[token]]), cache=cache) for token in STEPS]
    return np.array(mx.concatenate(parts, axis=1)[0])


def assert_within_rounding(actual: np.ndarray, expected: np.ndarray) -> None:
    """Both are float32 products of length D, after the same body."""
    bound = tiny.HIDDEN_SIZE * np.finfo(np.float32).eps * np.abs(expected).max()
    error = np.abs(actual - expected).max()
    assert error <= bound, f"error {error:.3g} > {bound:.3g}"


def probed_tokens(folder, hidden: np.ndarray) -> np.ndarray:
    """Return which tokens are probed, ``(N, V)``, from the folder's files alone."""
    config = json.loads((folder / "config.json").read_text("utf-8"))["flashhead"]
    arrays = tiny.read_weights(folder)
    path = f"{config['head_path']}.centroids"
    packed = (arrays[f"{path}.{name}"] for name in ("weight", "scales", "biases"))
    packing = config["centroids"]
    floats = mx.dequantize(*packed, packing["group_size"], packing["bits"])
    projected = hidden.astype(np.float64) @ np.array(arrays[f"{path}.projection"]).T
    scores = projected[:, :-1] @ np.array(floats).astype(np.float64).T
    scores += projected[:, -1:] + np.array(arrays[f"{path}.bias"])
    best = np.argsort(-scores, axis=1)[:, : config["num_probes"]]
    if config["cluster_size"] > 1:
        best = np.array(arrays[f"{config['head_path']}.cluster_tokens"])[best]
    tokens = best.reshape(len(hidden), -1)
    is_probed = np.zeros((len(hidden), tiny.VOCAB_SIZE + 1), bool)
    np.put_along_axis(is_probed, tokens.astype(np.int64), True, axis=1)
    return is_probed[:, :-1]


@pytest.mark.parametrize("cluster_size", NUM_CLUSTERS)
@pytest.mark.parametrize(("model_type", "tied"), CASES)
def test_converted_model_equals_its_base(
    model_type, tied, cluster_size, tmp_path, capfd, monkeypatch
):
    source = tiny.write_folder(tmp_path / "source", model_type, tied=tied)
    target = tmp_path / "target"
    num_clusters = NUM_CLUSTERS[cluster_size]
    result = convert(
        source,
        target,
        cluster_size=cluster_size,
        num_probes=num_clusters,
        calibrate=cluster_size == 1,
        calibration_positions=256,
    )
    base, _ = mlx_lm.load(str(source))
    capfd.readouterr()

    flash, _ = mlx_lm.load(str(target))

    assert tuple(capfd.readouterr()) == ("", "")
    assert type(flash) is type(base)
    assert result.config.num_clusters == num_clusters
    assert result.config.tied == tied
    assert result.config.has_bias == (model_type in WITH_BIAS)
    calls = tiny.head_calls(monkeypatch)
    expected = logits_of(base)
    hidden = np.array(mx.concatenate(calls, axis=1)[0])
    assert expected.shape == hidden.shape[:1] + (tiny.VOCAB_SIZE,)
    assert_within_rounding(logits_of(flash), expected)

    # The same folder with fewer probes: the steps are probed, the prompt is not.
    few_probes = {"num_probes": NUM_PROBES[cluster_size]}
    tiny.edit_config(target, lambda c: c["flashhead"].update(few_probes))
    few = slice(len(PROMPT), None)
    step_logits = logits_of(mlx_lm.load(str(target))[0])[few]

    is_probed = probed_tokens(target, hidden[few])
    assert_within_rounding(step_logits[is_probed], expected[few][is_probed])
    # What is not probed is estimated: the dense path would be equal everywhere.
    errors = np.abs(step_logits - expected[few])[~is_probed]
    assert np.median(errors) > 1e-3 * np.abs(expected).max()


def test_gemma2_logits_are_soft_capped(tmp_path):
    source = tiny.write_folder(tmp_path / "source", "gemma2")
    convert(source, tmp_path / "target", calibration_positions=256)

    logits = logits_of(mlx_lm.load(str(tmp_path / "target"))[0])

    assert 1.9 < np.abs(logits).max() <= 2.0
