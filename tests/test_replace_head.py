"""``replace_head`` on models that mlx-lm has loaded."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from mlx_flashhead import convert, replace_head

PROMPT = [17, 90, 33, 121, 8, 64]
SETTINGS = {"cluster_size": 8, "num_probes": 4, "centroid_bits": 8, "seed": 3}


def arrays_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def generated(model) -> list[int]:
    steps = generate_step(mx.array(PROMPT), model, max_tokens=24)
    return [token for token, _ in steps]


@pytest.fixture(params=["float", "4-bit"])
def source(request, tiny_llama, tmp_path):
    if request.param == "float":
        return tiny_llama
    folder = tmp_path / "quantized"
    mlx_lm.convert(str(tiny_llama), str(folder), quantize=True, q_bits=4)
    return folder


def test_result_is_that_of_converting_with_the_same_settings(source, tmp_path):
    model, tokenizer = mlx_lm.load(str(source))
    convert(source, tmp_path / "converted", **SETTINGS)
    converted, _ = mlx_lm.load(str(tmp_path / "converted"))

    replaced = replace_head(model, tokenizer, **SETTINGS)

    assert replaced is model
    ours, theirs = arrays_of(model), arrays_of(converted)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert model.lm_head.config == converted.lm_head.config
    assert generated(model) == generated(converted)


def test_settings_are_respected(source):
    model, tokenizer = mlx_lm.load(str(source))

    head = replace_head(model, tokenizer, head_bits=8, **SETTINGS).lm_head

    assert head.config.num_clusters == 26
    assert head.config.num_probes == 4
    assert head.cluster_tokens.shape == (26, 8)
    assert head.rows.quantization.bits == head.centroids.rows.quantization.bits == 8
    # 64 values of 8 bits are 16 words.
    assert head.weight.shape == (26 * 8, 16)


def test_rows_of_the_source_are_moved_bit_for_bit(source):
    model, tokenizer = mlx_lm.load(str(source))
    before = arrays_of(model.lm_head)

    head = replace_head(model, tokenizer, **SETTINGS).lm_head

    slots = np.array(head.token_slots)
    for name, array in before.items():
        np.testing.assert_array_equal(np.array(head[name])[slots], array)


def test_seed_changes_the_clusters_and_nothing_else(source):
    heads = []
    for seed in (0, 0, 1):
        model, tokenizer = mlx_lm.load(str(source))
        replace_head(model, tokenizer, cluster_size=8, num_probes=26, seed=seed)
        heads.append(model.lm_head)

    clusters = [np.array(head.cluster_tokens) for head in heads]
    np.testing.assert_array_equal(clusters[0], clusters[1])
    assert not np.array_equal(clusters[0], clusters[2])
    # Every cluster probed: the logits know nothing of the clusters.
    hidden = mx.random.normal((1, 64), key=mx.random.key(0))
    np.testing.assert_allclose(heads[0](hidden), heads[2](hidden), atol=1e-4)


def test_all_clusters_probed_changes_no_token(source):
    model, tokenizer = mlx_lm.load(str(source))
    expected = generated(model)

    replace_head(model, tokenizer, cluster_size=8, num_probes=26)

    assert generated(model) == expected


def test_end_and_special_tokens_are_always_probed(source):
    model, tokenizer = mlx_lm.load(str(source))

    head = replace_head(model, tokenizer, cluster_size=2, num_probes=5).lm_head

    pinned = np.array(head.cluster_tokens)[: head.config.num_pinned]
    ends = set(tokenizer.eos_token_ids) | set(tokenizer.all_special_ids)
    assert ends <= set(pinned.reshape(-1).tolist())
    assert head.config.num_pinned == -(-len(ends) // 2)


def test_tied_embedding_still_embeds(tmp_path):
    import tiny

    folder = tiny.write_folder(tmp_path / "tied", tied=True)
    model, tokenizer = mlx_lm.load(str(folder))
    token_ids = mx.arange(203)[None]
    embedded, logits = model.model.embed_tokens(token_ids), model(token_ids)

    replace_head(model, tokenizer, **SETTINGS)

    assert bool(mx.array_equal(model.model.embed_tokens(token_ids), embedded))
    # 203 positions: the dense path.
    np.testing.assert_allclose(model(token_ids), logits, atol=1e-5)


def test_second_call_is_refused_and_changes_nothing(source):
    model, tokenizer = mlx_lm.load(str(source))
    replace_head(model, tokenizer, **SETTINGS)
    expected = generated(model)

    with pytest.raises(ValueError, match="has a FlashHead already, at lm_head"):
        replace_head(model, tokenizer, **SETTINGS)

    assert generated(model) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster_size": 0}, "cluster_size=0 must be in"),
        ({"cluster_size": 204}, "cluster_size=204 must be in"),
        ({"num_probes": 0}, "num_probes=0 must be in"),
        ({"num_probes": 14}, "num_probes=14 must be in"),
        ({"head_bits": 7}, "head_bits=7 must be"),
        ({"centroid_bits": 5}, "centroid_bits=5 must be"),
    ],
    ids=str,
)
def test_setting_out_of_range_leaves_the_model_as_it_was(tiny_llama, settings, message):
    model, tokenizer = mlx_lm.load(str(tiny_llama))

    with pytest.raises(ValueError, match=message):
        replace_head(model, tokenizer, **settings)

    assert type(model.lm_head) is nn.Linear


def test_settings_are_documented_by_name():
    with pytest.raises(TypeError, match="num_clusters"):
        replace_head(nn.Linear(2, 2), None, num_clusters=3)


def test_progress_runs_from_start_to_end(tiny_llama):
    model, tokenizer = mlx_lm.load(str(tiny_llama))
    shares = []

    replace_head(model, tokenizer, progress=lambda _, share: shares.append(share))

    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] == 1.0
