"""``replace_head`` on models that mlx-lm has loaded."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from transformers import AutoTokenizer

from mlx_flashhead import convert, replace_head

PROMPT = [17, 90, 33, 121, 8, 64]
CLUSTERS = {"cluster_size": 8, "num_probes": 4, "centroid_bits": 8, "seed": 3}
SINGLE_ROWS = {"num_probes": 16, "centroid_bits": 8, "seed": 3}
QUICK = {"calibration_positions": 256}
both_kinds = pytest.mark.parametrize(
    "settings", [CLUSTERS, SINGLE_ROWS], ids=["clusters", "single rows"]
)


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


@both_kinds
@pytest.mark.parametrize("calibration", [QUICK, {"calibrate": False}], ids=str)
def test_result_is_that_of_converting_with_the_same_settings(
    source, settings, calibration, tmp_path
):
    model, tokenizer = mlx_lm.load(str(source))
    convert(source, tmp_path / "converted", **settings, **calibration)
    converted, _ = mlx_lm.load(str(tmp_path / "converted"))

    replaced = replace_head(model, tokenizer, **settings, **calibration)

    assert replaced is model
    ours, theirs = arrays_of(model), arrays_of(converted)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert model.lm_head.config == converted.lm_head.config
    assert generated(model) == generated(converted)


def test_a_tokenizer_of_transformers_will_do(tiny_llama):
    heads = []
    for tokenizer in (None, AutoTokenizer.from_pretrained(str(tiny_llama))):
        model, own = mlx_lm.load(str(tiny_llama))
        replace_head(model, tokenizer or own, **SINGLE_ROWS, **QUICK)
        heads.append(arrays_of(model.lm_head))

    for name, array in heads[0].items():
        np.testing.assert_array_equal(array, heads[1][name], err_msg=name)


def test_settings_are_respected(source):
    model, tokenizer = mlx_lm.load(str(source))

    head = replace_head(model, tokenizer, head_bits=8, **CLUSTERS, **QUICK).lm_head

    assert head.config.num_clusters == 26
    assert head.config.num_probes == 4
    assert head.cluster_tokens.shape == (26, 8)
    assert head.rows.quantization.bits == head.centroids.rows.quantization.bits == 8
    # 64 values of 8 bits are 16 words.
    assert head.weight.shape == (26 * 8, 16)


def test_without_settings_every_row_has_a_2_bit_centroid(source):
    model, tokenizer = mlx_lm.load(str(source))

    head = replace_head(model, tokenizer, **QUICK).lm_head

    assert head.config.num_clusters == 203
    assert "cluster_tokens" not in head
    assert head.centroids.rows.quantization.bits == 2
    # 64 values of 2 bits are 4 words.
    assert head.centroids.weight.shape == (203, 4)


@both_kinds
def test_rows_of_the_source_are_moved_bit_for_bit(source, settings):
    model, tokenizer = mlx_lm.load(str(source))
    before = arrays_of(model.lm_head)

    head = replace_head(model, tokenizer, calibrate=False, **settings).lm_head

    slots = np.array(head.slots(mx.arange(203)))
    for name, array in before.items():
        np.testing.assert_array_equal(np.array(head[name])[slots], array)


@pytest.mark.parametrize(("cluster_size", "num_probes"), [(1, 203), (8, 26)])
def test_seed_changes_the_coarse_stage_and_nothing_else(
    source, cluster_size, num_probes
):
    heads = []
    for seed in (0, 0, 1):
        model, tokenizer = mlx_lm.load(str(source))
        settings = {"cluster_size": cluster_size, "num_probes": num_probes}
        replace_head(model, tokenizer, seed=seed, **settings, **QUICK)
        heads.append(model.lm_head)

    of_seeds = [arrays_of(head) for head in heads]
    changed = "cluster_tokens" if cluster_size > 1 else "centroids.weight"
    for name in (changed, "centroids.projection"):
        np.testing.assert_array_equal(of_seeds[0][name], of_seeds[1][name])
        assert not np.array_equal(of_seeds[0][name], of_seeds[2][name])
    # Every cluster probed: the logits know nothing of the clusters.
    hidden = mx.random.normal((1, 64), key=mx.random.key(0))
    np.testing.assert_allclose(heads[0](hidden), heads[2](hidden), atol=1e-4)


@pytest.mark.parametrize(("cluster_size", "num_probes"), [(1, 203), (8, 26)])
def test_all_clusters_probed_changes_no_token(source, cluster_size, num_probes):
    model, tokenizer = mlx_lm.load(str(source))
    expected = generated(model)

    settings = {"cluster_size": cluster_size, "num_probes": num_probes}
    replace_head(model, tokenizer, calibrate=False, **settings)

    assert generated(model) == expected


@pytest.mark.parametrize("cluster_size", [1, 2])
def test_end_and_special_tokens_are_always_probed(source, cluster_size):
    model, tokenizer = mlx_lm.load(str(source))
    ends = set(tiny.SPECIAL_TOKENS)

    settings = {"cluster_size": cluster_size, "num_probes": 5}
    head = replace_head(model, tokenizer, **settings, **QUICK).lm_head

    assert ends >= set(tokenizer.eos_token_ids) | set(tokenizer.all_special_ids)
    assert head.config.num_pinned == 4 // cluster_size
    is_pinned = np.isposinf(np.array(head.centroids.bias))
    assert is_pinned.sum() == head.config.num_pinned
    clusters = np.array(head.slots(mx.array(sorted(ends)))) // cluster_size
    assert is_pinned[clusters].all()
    hidden = 50 * mx.random.normal((20, 64), key=mx.random.key(0))
    probed = np.array(head.probed_tokens(hidden))
    assert probed[:, sorted(ends)].all()


@both_kinds
def test_tied_embedding_still_embeds(settings, tmp_path):
    folder = tiny.write_folder(tmp_path / "tied", tied=True)
    model, tokenizer = mlx_lm.load(str(folder))
    token_ids = mx.arange(203)[None]
    embedded, logits = model.model.embed_tokens(token_ids), model(token_ids)

    replace_head(model, tokenizer, calibrate=False, **settings)

    assert bool(mx.array_equal(model.model.embed_tokens(token_ids), embedded))
    # 203 positions: the dense path.
    np.testing.assert_allclose(model(token_ids), logits, atol=1e-5)


def test_second_call_is_refused_and_changes_nothing(source):
    model, tokenizer = mlx_lm.load(str(source))
    replace_head(model, tokenizer, calibrate=False, **CLUSTERS)
    expected = generated(model)

    with pytest.raises(ValueError, match="has a FlashHead already, at lm_head"):
        replace_head(model, tokenizer, **CLUSTERS)

    assert generated(model) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster_size": 0}, "cluster_size=0 must be at least 1"),
        ({"cluster_size": 204}, r"cluster_size=204 must be in \[1, 203\]"),
        ({"num_probes": 0}, r"num_probes=0 must be in \[4, 203\]"),
        # Four special tokens have a cluster each.
        ({"num_probes": 3}, r"num_probes=3 must be in \[4, 203\]"),
        ({"num_probes": 204}, r"num_probes=204 must be in \[4, 203\]"),
        ({"num_probes": 14, "cluster_size": 16}, r"num_probes=14 must be in \[1, 13\]"),
        ({"head_bits": 7}, "head_bits=7 must be one of source, 4, 5"),
        ({"centroid_bits": 5}, "centroid_bits=5 must be one of 2, 4, 8, 16"),
        ({"sampling": "greedy"}, "sampling='greedy' must be one of deterministic"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        *(
            ({"target_recall": recall}, f"target_recall={recall} must lie between")
            for recall in (0, 1, 1.5, -0.1, float("nan"))
        ),
        ({"calibration_positions": 10}, "calibration_positions=10 must be at least"),
        ({"calibration_positions": 255}, "calibration_positions=255 must be at least"),
        (
            {"calibrate": False, "calibration_texts": ["a.txt"]},
            "calibration_texts are given, but calibration is off",
        ),
    ],
    ids=str,
)
def test_setting_out_of_range_leaves_the_model_as_it_was(tiny_llama, settings, message):
    model, tokenizer = mlx_lm.load(str(tiny_llama))
    stages = []

    with pytest.raises(ValueError, match=message):
        replace_head(
            model, tokenizer, progress=lambda *report: stages.append(report), **settings
        )

    assert type(model.lm_head) is nn.Linear
    # Not after minutes of work.
    assert stages == []


def test_settings_are_documented_by_name():
    with pytest.raises(TypeError, match="num_clusters"):
        replace_head(nn.Linear(2, 2), None, num_clusters=3)


def test_progress_runs_from_start_to_end(tiny_llama):
    model, tokenizer = mlx_lm.load(str(tiny_llama))
    reports = []

    replace_head(
        model,
        tokenizer,
        cluster_size=8,
        progress=lambda *report: reports.append(report),
        **QUICK,
    )

    # The mean cosine is part of the clustering's name.
    stages = [stage.split(",")[0] for stage, _ in reports]
    assert list(dict.fromkeys(stages)) == [
        "Calibrating: continuing 2 prompts",
        "Calibrating: the dense head's answers to prompts",
        "Calibrating: continuing 8 random tokens",
        "Calibrating: the dense head's answers to random tokens",
        "Clustering rows into 26 clusters",
        "Fitting centroids",
    ]
    for wanted in set(stages):
        named = zip(stages, reports, strict=True)
        shares = [share for stage, (_, share) in named if stage == wanted]
        assert shares == sorted(shares)
        assert shares[0] >= 0 and shares[-1] == 1.0
