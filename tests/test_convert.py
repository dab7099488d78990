"""The converter: what it does to a model's arrays, for each kind of source and option.

Expected values come from the source's own files, from ``mx.quantize`` and from what
``mlx_lm.convert`` makes of the same source.
"""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny

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


@pytest.fixture
def source(tmp_path):
    """A tied float32 model."""
    return tiny.write_folder(tmp_path / "source")


def bits_of(array: mx.array) -> tuple:
    """Return what two arrays must share to be the same bit for bit."""
    return array.dtype, array.shape, bytes(memoryview(array.view(mx.uint8)))


def split(folder) -> tuple[dict, dict]:
    """Return a folder's arrays: those of the head, without its path, and the rest."""
    path = json.loads((folder / "config.json").read_text())["flashhead"]["head_path"]
    arrays = tiny.read_weights(folder)
    head = {
        name.removeprefix(f"{path}."): array
        for name, array in arrays.items()
        if name.startswith(f"{path}.")
    }
    return head, {n: a for n, a in arrays.items() if not n.startswith(f"{path}.")}


def assert_moved(head: dict, rows: dict) -> None:
    """Assert that a head holds ``rows`` (by name, in token order) bit for bit."""
    slots = np.array(head["token_slots"])
    tokens = np.array(head["cluster_tokens"]).reshape(-1)
    assert sorted(tokens[slots]) == list(range(tiny.VOCAB_SIZE))
    assert np.array_equal(tokens[slots], np.arange(tiny.VOCAB_SIZE))
    padding = np.setdiff1d(np.arange(len(tokens)), slots)
    assert (tokens[padding] == tiny.VOCAB_SIZE).all()
    assert {"weight", "scales", "biases"} & set(head) == set(rows)
    for name, array in rows.items():
        assert bits_of(head[name][mx.array(slots)]) == bits_of(array), name
        if len(padding):
            assert not head[name][mx.array(padding)].any(), name


def assert_same(arrays: dict, expected: dict) -> None:
    assert sorted(arrays) == sorted(expected)
    for name, array in arrays.items():
        assert bits_of(array) == bits_of(expected[name]), name


def logits_of(folder) -> np.ndarray:
    """Return logits of two prompts, each of one position."""
    model, _ = mlx_lm.load(str(folder))
    logits = [model(mx.array([[token]]))[0, 0] for token in (17, 120)]
    return np.array(mx.stack(logits).astype(mx.float32))


def head_name(tied: bool) -> str:
    return "model.embed_tokens" if tied else "lm_head"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float_rows_keep_their_bits(dtype, tied, tmp_path):
    source = tiny.write_folder(
        tmp_path / "source", tied=tied, dtype=getattr(mx, dtype), num_shards=3
    )

    result = convert(source, tmp_path / "target", num_probes=13)

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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", QUANTIZED, ids=str)
def test_quantized_rows_keep_their_bits(options, tied, tmp_path):
    tiny.write_folder(tmp_path / "float", tied=tied)
    source, target = tmp_path / "source", tmp_path / "target"
    mlx_lm.convert(str(tmp_path / "float"), str(source), quantize=True, **options)

    convert(source, target, num_probes=13)

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

    result = convert(source, tmp_path / "target", quantize=True, **options)

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
    convert(source, tmp_path / "target", head_bits=bits)

    rows = tiny.read_weights(source)["model.embed_tokens.weight"]
    packed = mx.quantize(rows, group_size=64, bits=bits)
    head, _ = split(tmp_path / "target")
    assert_moved(head, dict(zip(("weight", "scales", "biases"), packed, strict=True)))


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "float16"), ("bfloat16", "bfloat16")]
)
def test_16_head_bits_are_half_precision(dtype, stored, tmp_path):
    source = tiny.write_folder(tmp_path / "source", dtype=getattr(mx, dtype))

    convert(source, tmp_path / "target", head_bits=16)

    rows = tiny.read_weights(source)["model.embed_tokens.weight"]
    head, _ = split(tmp_path / "target")
    assert_moved(head, {"weight": rows.astype(getattr(mx, stored))})


def test_source_head_bits_with_q_keep_the_rows(source, tmp_path):
    convert(source, tmp_path / "target", quantize=True, head_bits="source")

    head, _ = split(tmp_path / "target")
    assert_moved(
        head, {"weight": tiny.read_weights(source)["model.embed_tokens.weight"]}
    )


def test_centroid_bits_round_means_of_the_clusters_rows(source, tmp_path):
    for bits in (4, 8, 16):
        convert(source, tmp_path / str(bits), centroid_bits=bits)

    heads = {bits: split(tmp_path / str(bits))[0] for bits in (4, 8, 16)}
    rows = np.array(tiny.read_weights(source)["model.embed_tokens.weight"])
    rows = np.vstack([rows, np.full((1, tiny.HIDDEN_SIZE), np.nan, np.float32)])
    members = rows[np.array(heads[16]["cluster_tokens"])]
    means = np.array(heads[16]["centroids.weight"].astype(mx.float32))
    assert means.shape == (13, tiny.HIDDEN_SIZE)
    half = 2e-3 * np.abs(means).max()
    assert (means >= np.nanmin(members, axis=1) - half).all()
    assert (means <= np.nanmax(members, axis=1) + half).all()
    for bits in (4, 8):
        packed = [heads[bits][f"centroids.{n}"] for n in ("weight", "scales", "biases")]
        rounded = np.array(mx.dequantize(*packed, group_size=64, bits=bits))
        # mx.quantize moves the end of a range by up to a step to keep zero exact.
        steps = np.abs(np.array(packed[1]))
        assert (np.abs(rounded - means) <= steps + half).all()


@pytest.mark.parametrize(("cluster_size", "num_clusters"), [(8, 26), (32, 7), (203, 1)])
def test_cluster_size_pads_the_last_slots(cluster_size, num_clusters, source, tmp_path):
    target = tmp_path / "target"

    result = convert(source, target, cluster_size=cluster_size, num_probes=num_clusters)

    head, _ = split(target)
    assert head["cluster_tokens"].shape == (num_clusters, cluster_size)
    assert result.config.num_clusters == num_clusters
    # No cluster is padding alone.
    assert (np.array(head["cluster_tokens"]) < tiny.VOCAB_SIZE).any(axis=1).all()
    assert_moved(
        head, {"weight": tiny.read_weights(source)["model.embed_tokens.weight"]}
    )


def test_a_seed_decides_all(source, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        convert(source, tmp_path / name, cluster_size=8, seed=seed)

    files = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c")
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_ends_and_special_tokens_are_pinned(source, tmp_path):
    ends = {"eos_token_id": [tiny.EOS, tiny.EOS_BY_CONFIG]}
    (source / "generation_config.json").write_text(json.dumps(ends))

    result = convert(source, tmp_path / "target", cluster_size=2)

    tokens = np.array(split(tmp_path / "target")[0]["cluster_tokens"])
    pinned = set(tokens[: result.config.num_pinned].reshape(-1).tolist())
    assert {*tiny.SPECIAL_TOKENS, tiny.EOS_BY_CONFIG} <= pinned
    assert result.config.num_pinned == 3
    # One cluster in 8 of the 102, besides the pinned ones.
    assert result.config.num_probes == 3 + 13


def test_dtype_casts_all_floats(source, tmp_path):
    mlx_lm.convert(str(source), str(tmp_path / "plain"), dtype="bfloat16")

    convert(source, tmp_path / "target", dtype="bfloat16")

    expected = tiny.read_weights(tmp_path / "plain")
    rows = expected.pop("model.embed_tokens.weight")
    head, rest = split(tmp_path / "target")
    assert_moved(head, {"weight": rows})
    assert_same(rest, expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_bits", [4, 8, "source"])
def test_memory_figures_are_those_of_the_files(head_bits, tied, tmp_path):
    source = tiny.write_folder(tmp_path / "source", tied=tied)

    result = convert(source, tmp_path / "target", head_bits=head_bits, num_probes=3)

    head, rest = split(tmp_path / "target")
    head_bytes = sum(array.nbytes for array in head.values())
    body_bytes = sum(array.nbytes for array in rest.values())
    assert result.head.stored == head_bytes
    assert result.model_bytes == head_bytes + body_bytes
    rows = tiny.read_weights(source)[f"{head_name(tied)}.weight"]
    dense_4bit = sum(a.nbytes for a in mx.quantize(rows, group_size=64, bits=4))
    assert result.head.dense_4bit == dense_4bit
    assert result.plain_4bit_bytes == body_bytes + dense_4bit
    packed = [rows]
    if head_bits != "source":
        packed = mx.quantize(rows, group_size=64, bits=head_bits)
    row_bytes = sum(array.nbytes for array in packed) // tiny.VOCAB_SIZE
    assert result.head.overhead == head_bytes - tiny.VOCAB_SIZE * row_bytes
    coarse = sum(a.nbytes for n, a in head.items() if n.startswith("centroids."))
    assert result.head.read_per_token == (
        coarse + 3 * 16 * row_bytes + head["cluster_tokens"].nbytes
    )


def test_progress_names_the_stages_in_order(source, tmp_path):
    reports = []

    convert(
        source, tmp_path / "target", progress=lambda *report: reports.append(report)
    )

    stages = list(dict.fromkeys(stage.split()[0] for stage, _ in reports))
    assert [stages[0], stages[-1]] == ["Clustering", "Saving"]
    assert all(0 <= share <= 1 for _, share in reports)
    assert any("mean cosine 0." in stage for stage, _ in reports)
