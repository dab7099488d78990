"""A checkpoint's arrays: what is accepted, and what is refused before it loads."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead import checkpoint
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
    "centroid_dims": 32,
    "num_probes": 2,
    "num_pinned": 1,
    "dtype": "float16",
    "rows": None,
    "centroids": Quantization(4, 32),
    "has_bias": True,
}
# The same rows, a centroid for each; two are pinned.
SINGLE_ROWS = {"cluster_size": 1, "num_pinned": 2}


def arrays(rows: Quantization | None, cluster_size: int = 3) -> dict[str, mx.array]:
    """Return a valid checkpoint, made with MLX alone."""
    num_clusters, num_slots = (4, 12) if cluster_size == 3 else (11, 11)
    bias = mx.zeros((num_clusters,), mx.float16)
    bias[: 1 if cluster_size == 3 else 2] = mx.inf
    weights = {
        "weight": mx.ones((num_slots, 64), mx.float16),
        "centroids.bias": bias,
        "centroids.projection": mx.zeros((33, 64), mx.float16),
        "bias": mx.zeros((11,), mx.float16),
    }
    if cluster_size == 3:
        weights["cluster_tokens"] = mx.array(TOKENS)
        weights["token_slots"] = mx.array(SLOTS)

    def pack(prefix: str, floats: mx.array, packing: Quantization) -> None:
        packed = mx.quantize(
            floats,
            group_size=packing.group_size,
            bits=packing.bits,
            mode=packing.mode,
        )
        for name, array in zip(("weight", "scales", "biases"), packed, strict=False):
            weights[f"{prefix}{name}"] = array

    centroids = mx.ones((num_clusters, 32), mx.float16)
    pack("centroids.", centroids, SETTINGS["centroids"])
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
@pytest.mark.parametrize("changes", [{}, SINGLE_ROWS], ids=["three", "one"])
def test_valid_arrays_are_accepted_and_each_is_needed(rows, changes):
    config = FlashHeadConfig(**SETTINGS | changes | {"rows": rows})
    weights = arrays(rows, config.cluster_size)

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
        ("centroids.projection", mx.int8),
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


@pytest.mark.parametrize(
    ("changes", "pinned", "sentence"),
    [
        ({}, [], "0 clusters are pinned; config.json has num_pinned=1"),
        ({}, [0, 2], "2 clusters are pinned; config.json has num_pinned=1"),
        (SINGLE_ROWS, [4], "1 clusters are pinned; config.json has num_pinned=2"),
    ],
)
def test_as_many_clusters_are_pinned_as_the_settings_say(changes, pinned, sentence):
    config = FlashHeadConfig(**SETTINGS | changes)
    weights = arrays(None, config.cluster_size)
    bias = np.zeros(config.num_clusters, np.float16)
    bias[pinned] = np.inf
    weights["a.head.centroids.bias"] = mx.array(bias)

    with pytest.raises(ValueError, match=sentence):
        checkpoint.validate_arrays(config, weights)


def test_a_score_that_is_minus_infinity_pins_nothing():
    """A float16 bias can overflow where a dense head shuts a token out by its own."""
    weights = arrays(None)
    weights["a.head.centroids.bias"][3] = -mx.inf

    checkpoint.validate_arrays(FlashHeadConfig(**SETTINGS), weights)


def test_pinned_clusters_of_one_block_need_room_in_it():
    """8,193 clusters make two blocks, of 4,097 and 4,096; the first chunk is in one."""
    sizes = {"vocab_size": 8193, "cluster_size": 1, "hidden_size": 2}
    sizes |= {"centroid_dims": 1, "centroids": None, "has_bias": False}
    bias = mx.zeros((8193,), mx.float16)
    bias[:5] = mx.inf
    weights = {
        "a.head.weight": mx.zeros((8193, 2)),
        "a.head.centroids.weight": mx.zeros((8193, 1)),
        "a.head.centroids.bias": bias,
        "a.head.centroids.projection": mx.zeros((2, 2)),
    }

    def validate(num_probes):
        changes = {"num_pinned": 5, "num_probes": num_probes}
        config = FlashHeadConfig(**SETTINGS | sizes | changes)
        checkpoint.validate_arrays(config, weights)

    validate(8)
    with pytest.raises(ValueError, match="num_probes=7 must be at least 8, so that"):
        validate(7)
