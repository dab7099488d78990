"""Converted folders that are damaged: one sentence when they are loaded."""

import subprocess
import sys

import mlx.core as mx
import mlx_lm
import pytest
import tiny
from mistakes import assert_one_sentence
from test_bad_source import broken_weights, truncated_weights

import mlx_flashhead
from mlx_flashhead.cli import benchmark_main


def drop(name):
    return lambda arrays: arrays.pop(f"lm_head.{name}")


def replace(name, function):
    def change(arrays):
        arrays[f"lm_head.{name}"] = function(arrays[f"lm_head.{name}"])

    return change


def twice_the_same(tokens):
    tokens[5, 0] = tokens[4, 0]
    return tokens


def beyond_the_vocabulary(tokens):
    tokens[5, 0] = 204
    return tokens


# (change to the arrays, sentence)
BAD_ARRAYS = [
    (drop("weight"), r"lm_head\.weight are missing|lm_head\.weight is missing"),
    (drop("token_slots"), r"lm_head\.token_slots"),
    (drop("centroids.scales"), r"lm_head\.centroids\.scales"),
    (drop("centroids.projection"), r"lm_head\.centroids\.projection are missing"),
    (replace("weight", lambda a: a[:-1]), r"lm_head\.weight is .*\(207, 64\)"),
    (replace("cluster_tokens", lambda a: a.T), r"cluster_tokens is .*\(8, 26\)"),
    (replace("token_slots", lambda a: a[:-1]), r"token_slots is .*\(202,\)"),
    (
        replace("token_slots", lambda a: a.astype(mx.float32)),
        r"token_slots is .*float32",
    ),
    (replace("centroids.weight", lambda a: a[:, :-1]), r"centroids\.weight is"),
    (replace("centroids.bias", lambda a: a[None]), r"centroids\.bias is"),
    (replace("centroids.bias", lambda a: a * 0), "0 clusters are pinned"),
    (replace("centroids.projection", lambda a: a[:-1]), r"projection is .*\(64, 64\)"),
    (replace("cluster_tokens", twice_the_same), "no permutation"),
    (replace("cluster_tokens", beyond_the_vocabulary), "no permutation"),
    (replace("token_slots", lambda a: a[::-1]), "not the inverse"),
]

# (change to the "flashhead" object, sentence)
BAD_SETTINGS = [
    (lambda c: c.update(version=99), "format version 99; .* pip install -U"),
    (lambda c: c.update(version=1), '"version" 1, not 2; convert the model again'),
    (lambda c: c.update(version="x"), "\"version\" 'x', not 2; convert the model"),
    (lambda c: c.pop("version"), '"version" None, not 2; convert the model'),
    (lambda c: c.update(base_model_type="zzz"), "'zzz' is unknown to this mlx-lm"),
    (lambda c: c.pop("num_probes"), "lacks num_probes"),
    (lambda c: c.update(num_probes=27), r"num_probes=27 must be in \[1, 26\]"),
    (lambda c: c.update(num_probes="4"), "wrong kind .*'str'"),
    (lambda c: c.update(centroids={"bits": 4}), "wrong kind .*'group_size'"),
    (lambda c: c.update(centroids={"bits": 7, "group_size": 64}), "7 bits"),
    (lambda c: c.update(rows={"bits": 4, "group_size": 48}), "group size 48"),
    (lambda c: c.update(dtype="float8"), "dtype='float8' must be"),
    (lambda c: c.update(sampling="best"), "sampling='best' must be"),
    (lambda c: c.update(centroid_dims=65), r"centroid_dims=65 must be in \[1, 64\]"),
    # Arrays of other clusters than the settings tell of.
    (
        lambda c: c.update(cluster_size=1),
        r"weight is .*\(208, 64\); config.json calls for .*\(203, 64\)",
    ),
    (lambda c: c.update(head_path="model.nothing"), "nothing"),
    (lambda c: c.update(head_path="model.layers.0"), "model.layers.0"),
]


@pytest.fixture
def converted(tiny_flashhead, tmp_path):
    """A folder of its own with a converted model in it."""
    folder = tmp_path / "converted"
    folder.mkdir()
    for path in tiny_flashhead.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def cannot_be_loaded(folder, pattern, capsys) -> None:
    for load in (mlx_lm.load, mlx_flashhead.load):
        with pytest.raises(ValueError, match=pattern):
            load(str(folder))
    capsys.readouterr()
    status = benchmark_main(["--model", str(folder)])
    assert_one_sentence(status, capsys.readouterr(), pattern)


@pytest.mark.parametrize(("change", "pattern"), BAD_ARRAYS)
def test_bad_arrays_at_load(change, pattern, converted, capsys):
    weights = tiny.read_weights(converted)
    change(weights)
    tiny.write_weights(converted, weights)

    cannot_be_loaded(converted, pattern, capsys)


@pytest.mark.parametrize(("change", "pattern"), BAD_SETTINGS)
def test_bad_settings_at_load(change, pattern, converted, capsys):
    tiny.edit_config(converted, lambda config: change(config["flashhead"]))

    cannot_be_loaded(converted, pattern, capsys)


def test_folder_without_settings_at_load(converted, capsys):
    tiny.edit_config(converted, lambda config: config.pop("flashhead"))

    cannot_be_loaded(converted, 'no "flashhead" object', capsys)


@pytest.mark.parametrize("change", [broken_weights, truncated_weights])
def test_damaged_weights_at_load(change, converted):
    change(converted)

    with pytest.raises(ValueError, match=r"weights in .* are damaged"):
        mlx_flashhead.load(converted)


def test_plain_model_is_no_flashhead_model(tiny_llama):
    with pytest.raises(ValueError, match="is not a FlashHead model: convert it"):
        mlx_flashhead.load(tiny_llama)


def test_without_the_package_mlx_lm_does_not_know_the_type(converted):
    # The plug-in is what mlx-lm imports; hidden, the package is not there.
    code = """
import sys
sys.modules["mlx_lm.models.flashhead"] = None
import mlx_lm
mlx_lm.load(sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, converted],
        capture_output=True,
        text=True,
        check=False,
    )

    assert "Model type flashhead not supported" in done.stderr
