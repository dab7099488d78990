"""The converter: what it does to a model's arrays, for each kind of source and option.

Expected values come from the source's own files, from ``mx.quantize`` and from what
``mlx_lm.convert`` makes of the same source.
"""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from folders import assert_moved, assert_same, head_name, split

from mlx_flashhead import convert

# Options of mlx_lm.convert that make the source.
QUANTIZED = [
    *({"q_bits": bits} for bits in (2, 3, 4, 5, 6, 8)),
    {"q_bits": 4, "q_group_size": 32},
    {"q_mode": "mxfp4"},
    {"q_mode": "nvfp4"},
    {"q_mode": "mxfp8"},
    {"quant_predicate": "mixed_2_6"},
]


# All is probed, so that logits are the source's.
both_kinds = pytest.mark.parametrize(
    "kind",
    [
        {"num_probes": 203, "calibration_positions": 256},
        {"cluster_size": 16, "num_probes": 13, "calibrate": False},
    ],
    ids=["single rows", "clusters"],
)


@pytest.fixture
def source(tmp_path):
    """A tied float32 model."""
    return tiny.write_folder(tmp_path / "source")


def logits_of(folder) -> np.ndarray:
    """Return logits of two prompts, each of one position."""
    model, _ = mlx_lm.load(str(folder))
    logits = [model(mx.array([[token]]))[0, 0] for token in (17, 120)]
    return np.array(mx.stack(logits).astype(mx.float32))


@both_kinds
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float_rows_keep_their_bits(dtype, tied, kind, tmp_path):
    source = tiny.write_folder(
        tmp_path / "source", tied=tied, dtype=getattr(mx, dtype), num_shards=3
    )

    result = convert(source, tmp_path / "target", **kind)

    body = tiny.read_weights(source)
    rows = {"weight": body.pop(f"{head_name(tied)}.weight")}
    head, rest = split(tmp_path / "target")
    assert_moved(head, rows)
    assert_same(rest, body)
    assert result.config.dtype == dtype
    # The rounding of a product of length 64 in that type.
    expected = logits_of(source)
    tolerance = 8 * float(mx.finfo(getattr(mx, dtype)).eps) * np.abs(expected).max()
    assert np.abs(logits_of(tmp_path / "target") - expected).max() <= tolerance


@both_kinds
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", QUANTIZED, ids=str)
def test_quantized_rows_keep_their_bits(options, tied, kind, tmp_path):
    tiny.write_folder(tmp_path / "float", tied=tied)
    source, target = tmp_path / "source", tmp_path / "target"
    mlx_lm.convert(str(tmp_path / "float"), str(source), quantize=True, **options)

    convert(source, target, **kind)

    body = tiny.read_weights(source)
    path = head_name(tied)
    names = [n for n in ("weight", "scales", "biases") if f"{path}.{n}" in body]
    head, rest = split(target)
    assert_moved(head, {name: body.pop(f"{path}.{name}") for name in names})
    assert_same(rest, body)
    expected = logits_of(source)
    error = np.abs(logits_of(target) - expected).max()
    assert error <= 64 * np.finfo(np.float32).eps * np.abs(expected).max()


@pytest.mark.parametrize(
    ("model_type", "tied", "options"),
    [
        ("llama", True, {}),
        ("llama", False, {"q_bits": 6, "q_group_size": 32}),
        ("llama", True, {"q_mode": "mxfp4"}),
        ("llama", False, {"q_mode": "nvfp4"}),
        ("llama", True, {"q_mode": "nvfp4", "q_group_size": 16}),
        ("llama", True, {"q_mode": "mxfp8"}),
        ("llama", True, {"dtype": "float16"}),
        # Its own predicate quantizes some layers otherwise.
        ("qwen3_moe", True, {"q_bits": 3}),
    ],
)
def test_q_quantizes_the_body_as_mlx_lm_does(model_type, tied, options, tmp_path):
    source = tiny.write_folder(tmp_path / "source", model_type, tied=tied)
    mlx_lm.convert(str(source), str(tmp_path / "plain"), quantize=True, **options)

    result = convert(
        source, tmp_path / "target", quantize=True, calibrate=False, **options
    )

    expected = tiny.read_weights(tmp_path / "plain")
    path = head_name(tied)
    head, rest = split(tmp_path / "target")
    assert_same(
        rest, {n: a for n, a in expected.items() if not n.startswith(f"{path}.")}
    )
    dtype = getattr(mx, options.get("dtype", "float32"))
    rows = tiny.read_weights(source)[f"{path}.weight"].astype(dtype)
    group_size = 32 if options.get("q_group_size") == 32 else 64
    packed = mx.quantize(rows, group_size=group_size, bits=8)
    assert_moved(head, dict(zip(("weight", "scales", "biases"), packed, strict=True)))
    assert (result.config.rows.bits, result.config.rows.mode) == (8, "affine")
    # What mlx-lm reads back is what was measured here.
    assert np.isfinite(logits_of(tmp_path / "target")).all()


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_head_bits_quantize_the_rows(bits, source, tmp_path):
    convert(source, tmp_path / "target", head_bits=bits, calibrate=False)

    rows = tiny.read_weights(source)["model.embed_tokens.weight"]
    packed = mx.quantize(rows, group_size=64, bits=bits)
    head, _ = split(tmp_path / "target")
    assert_moved(head, dict(zip(("weight", "scales", "biases"), packed, strict=True)))


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "float16"), ("bfloat16", "bfloat16")]
)
def test_16_head_bits_are_half_precision(dtype, stored, tmp_path):
    source = tiny.write_folder(tmp_path / "source", dtype=getattr(mx, dtype))

    convert(source, tmp_path / "target", head_bits=16, calibrate=False)

    rows = tiny.read_weights(source)["model.embed_tokens.weight"]
    head, _ = split(tmp_path / "target")
    assert_moved(head, {"weight": rows.astype(getattr(mx, stored))})


def test_source_head_bits_with_q_keep_the_rows(source, tmp_path):
    options = {"head_bits": "source", "calibrate": False}
    convert(source, tmp_path / "target", quantize=True, **options)

    head, _ = split(tmp_path / "target")
    assert_moved(
        head, {"weight": tiny.read_weights(source)["model.embed_tokens.weight"]}
    )


def test_dtype_casts_all_floats(source, tmp_path):
    mlx_lm.convert(str(source), str(tmp_path / "plain"), dtype="bfloat16")

    convert(source, tmp_path / "target", dtype="bfloat16", calibrate=False)

    expected = tiny.read_weights(tmp_path / "plain")
    rows = expected.pop("model.embed_tokens.weight")
    head, rest = split(tmp_path / "target")
    assert_moved(head, {"weight": rows})
    assert_same(rest, expected)
