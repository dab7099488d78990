"""Settings: which are valid, and their form in config.json."""

import json

import mlx.core as mx
import pytest

from mlx_flashhead.config import FORMAT_VERSION, FlashHeadConfig, Quantization

VALID = {
    "base_model_type": "llama",
    "head_path": "model.embed_tokens",
    "tied": True,
    "vocab_size": 203,
    "hidden_size": 96,
    "cluster_size": 8,
    "centroid_dims": 64,
    "num_probes": 5,
    "num_pinned": 2,
    "dtype": "float16",
    "rows": Quantization(8, 32),
    "centroids": Quantization(4, 32),
}

# The form on disk. Folders that people published must stay readable: a change here
# needs a new version and code that reads the old one.
ON_DISK = """
{"version": 2, "base_model_type": "llama", "head_path": "model.embed_tokens",
 "tied": true, "vocab_size": 203, "hidden_size": 96, "cluster_size": 8,
 "centroid_dims": 64, "num_probes": 5, "num_pinned": 2, "dtype": "float16",
 "rows": {"bits": 8, "group_size": 32, "mode": "affine"},
 "centroids": {"bits": 4, "group_size": 32, "mode": "affine"}, "has_bias": false,
 "sampling": "deterministic"}
"""


def test_form_on_disk_is_pinned():
    config = FlashHeadConfig(**VALID)

    assert json.loads(json.dumps(config.to_json())) == json.loads(ON_DISK)
    assert FlashHeadConfig.from_json(json.loads(ON_DISK)) == config
    assert FORMAT_VERSION == 2


def test_unquantized_arrays_survive_the_form_on_disk():
    changes = {"rows": None, "centroids": None, "has_bias": True, "tied": False}
    changes |= {"cluster_size": 1, "sampling": "corrected"}
    config = FlashHeadConfig(**VALID | changes)

    assert FlashHeadConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_unknown_keys_of_the_same_version_are_ignored():
    values = json.loads(ON_DISK) | {"note": "made on a Tuesday"}

    assert FlashHeadConfig.from_json(values) == FlashHeadConfig(**VALID)


@pytest.mark.parametrize(
    ("vocab_size", "cluster_size", "num_clusters", "num_slots"),
    [(203, 8, 26, 208), (208, 8, 26, 208), (203, 1, 203, 203), (203, 203, 1, 203)],
)
def test_counts_round_up(vocab_size, cluster_size, num_clusters, num_slots):
    sizes = {"vocab_size": vocab_size, "cluster_size": cluster_size}
    counts = {"num_probes": 1, "num_pinned": 0}

    config = FlashHeadConfig(**VALID | sizes | counts)

    assert (config.num_clusters, config.num_slots) == (num_clusters, num_slots)


# (P, positions): never fewer than one; with P = K the dense path reads as much.
@pytest.mark.parametrize(
    ("num_probes", "positions"), [(26, 1), (14, 1), (13, 2), (2, 13)]
)
def test_probing_stops_where_it_reads_more_than_the_head(num_probes, positions):
    config = FlashHeadConfig(**VALID | {"num_probes": num_probes})

    assert config.max_probed_positions == positions


# 20,000 clusters are dealt to three blocks of 6688, 6656 and 6656; each passes as many
# as the share of the largest asks for.
@pytest.mark.parametrize(
    ("num_probes", "num_probed"), [(1, 3), (3, 6), (625, 627), (20_000, 20_000)]
)
def test_every_block_passes_as_many_clusters(num_probes, num_probed):
    sizes = {"vocab_size": 20_000, "cluster_size": 1, "num_pinned": 0}

    config = FlashHeadConfig(**VALID | sizes | {"num_probes": num_probes})

    assert config.num_probed == num_probed
    assert config.max_probed_positions == 20_000 // num_probed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"cluster_size": 0}, "cluster_size=0 must be at least 1"),
        ({"cluster_size": 204}, r"cluster_size=204 must be in \[1, 203\]"),
        ({"centroid_dims": 0}, "centroid_dims=0 must be at least 1"),
        ({"centroid_dims": 97}, r"centroid_dims=97 must be in \[1, 96\]"),
        ({"num_pinned": -1}, r"num_pinned=-1 must be in \[0, 26\]"),
        ({"num_pinned": 27}, r"num_pinned=27 must be in \[0, 26\]"),
        ({"num_probes": 1}, r"num_probes=1 must be in \[2, 26\]"),
        ({"num_probes": 27}, r"num_probes=27 must be in \[2, 26\]"),
        ({"num_probes": 0, "num_pinned": 0}, r"num_probes=0 must be in \[1, 26\]"),
        ({"dtype": "int8"}, "dtype='int8' must be"),
        ({"rows": Quantization(4, 64)}, "rows: group size 64 does not divide"),
        ({"centroids": Quantization(4, 128)}, "centroids: group size 128 does not"),
        # Groups divide a centroid, whatever divides a row.
        (
            {"centroid_dims": 48, "centroids": Quantization(2, 32)},
            "centroids: group size 32 does not divide their length 48",
        ),
        ({"sampling": "greedy"}, "'greedy' must be one of deterministic, stochastic"),
    ],
)
def test_invalid_settings_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        FlashHeadConfig(**VALID | changes)


@pytest.mark.parametrize("version", [None, 0, 1, "2", 2.5])
def test_an_older_format_is_to_be_converted_again(version):
    values = json.loads(ON_DISK) | {"version": version}

    with pytest.raises(ValueError, match=r'"version" .* not 2; convert the model'):
        FlashHeadConfig.from_json(values)


def test_a_newer_format_needs_a_newer_package():
    values = json.loads(ON_DISK) | {"version": 3}

    with pytest.raises(ValueError, match="version 3; .* reads 2: pip install -U"):
        FlashHeadConfig.from_json(values)


def test_every_setting_but_the_later_ones_must_be_there():
    values = json.loads(ON_DISK)
    for name in values.keys() - {"version", "has_bias", "sampling"}:
        lacking = {key: value for key, value in values.items() if key != name}
        with pytest.raises(ValueError, match=f"lacks {name}"):
            FlashHeadConfig.from_json(lacking)
    older = {k: v for k, v in values.items() if k not in ("has_bias", "sampling")}
    assert FlashHeadConfig.from_json(older) == FlashHeadConfig(**VALID)


@pytest.mark.parametrize("changes", [{"num_probes": 26, "num_pinned": 26}, {}])
def test_every_cluster_may_be_pinned(changes):
    assert FlashHeadConfig(**VALID | changes).num_clusters == 26


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 128])
def test_quantizations_are_those_of_mlx(mode, bits, group_size):
    rows = mx.ones((3, 384))
    try:
        mx.eval(mx.quantize(rows, group_size=group_size, bits=bits, mode=mode))
    except ValueError:
        with pytest.raises(ValueError, match="not supported in mode"):
            Quantization(bits, group_size, mode)
    else:
        Quantization(bits, group_size, mode)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode 'int4' is unknown; use one of affine"):
        Quantization(4, 64, "int4")
