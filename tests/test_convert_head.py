"""The converter: the head that its options ask for, and the figures that it reports.

Expected values come from the source's own files and from plain NumPy.
"""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from folders import assert_moved, head_name, split
from oracles import flash_logits

from mlx_flashhead import convert
from mlx_flashhead.attach import find_head
from mlx_flashhead.calibration import sample_states
from mlx_flashhead.vocabulary import read_vocabulary

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def source(tmp_path):
    """A tied float32 model."""
    return tiny.write_folder(tmp_path / "source")


def stored_centroids(folder, bits: int) -> np.ndarray:
    """Return centroids as rows of the model's width, ``(K, D)``, float64.

    Without calibration a centroid keeps all 64 dimensions, turned, less the mean row.
    """
    head, _ = split(folder)
    centroids = head["centroids.weight"]
    if bits < 16:
        packed = [head[f"centroids.{n}"] for n in ("weight", "scales", "biases")]
        centroids = mx.dequantize(*packed, group_size=64, bits=bits)
    projection = np.array(head["centroids.projection"], np.float64)
    turned = projection[:-1]
    np.testing.assert_allclose(turned @ turned.T, np.eye(64), atol=1e-5)
    return np.array(centroids, np.float64) @ turned + projection[-1]


def expected_means(rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the means of clusters, weighted by tokens' likelihood by their ids."""
    unlikely = {*tiny.SPECIAL_TOKENS, 200, 201, 202}
    likely = [token for token in range(tiny.VOCAB_SIZE) if token not in unlikely]
    rank = np.full(tiny.VOCAB_SIZE, len(likely), np.float64)
    rank[likely] = np.arange(len(likely))
    weights = (1 / (rank + 200)) ** 0.75
    means = []
    for members in tokens.astype(np.int64):
        kept = members[members < tiny.VOCAB_SIZE]
        means.append(weights[kept] @ rows[kept] / weights[kept].sum())
    return np.array(means)


@pytest.mark.parametrize("cluster_size", [1, 16])
def test_centroids_are_the_mean_rows_at_any_bits(cluster_size, source, tmp_path):
    rows = np.array(tiny.read_weights(source)[EMBEDDING], np.float64)
    # Errors of the best uniform quantizers of normal variables (Max, 1960).
    errors = {16: 1e-6, 8: 0.01, 4: 0.12, 2: 0.36}

    for bits in errors:
        options = {"centroid_bits": bits, "cluster_size": cluster_size}
        result = convert(source, tmp_path / str(bits), calibrate=False, **options)
        assert result.config.centroid_dims == 64

    head, _ = split(tmp_path / "16")
    tokens = np.arange(tiny.VOCAB_SIZE)[:, None]
    if cluster_size > 1:
        tokens = np.array(head["cluster_tokens"])
    means = expected_means(rows, tokens)
    scale = means.std()
    for bits, allowed in errors.items():
        error = stored_centroids(tmp_path / str(bits), bits) - means
        assert np.sqrt((error**2).mean()) <= allowed * scale
        assert bits == 16 or np.sqrt((error**2).mean()) > allowed * scale / 10


@pytest.mark.parametrize(
    ("cluster_size", "dims", "bits"),
    [(1, 64, 2), (2, 128, 4), (3, 192, 4), (5, 192, 4)],
)
def test_calibrated_centroids_have_a_third_of_their_rows_length(
    cluster_size, dims, bits, tmp_path
):
    source = tiny.write_folder(tmp_path / "source", hidden_size=192)
    options = {"cluster_size": cluster_size, "calibration_positions": 256}

    config = convert(source, tmp_path / "target", **options).config

    head, _ = split(tmp_path / "target")
    assert config.centroid_dims == dims
    assert head["centroids.projection"].shape == (dims + 1, 192)
    assert (config.centroids.bits, config.centroids.group_size) == (bits, 64)
    assert head["centroids.weight"].shape == (config.num_clusters, dims * bits // 32)


@pytest.mark.parametrize(
    ("cluster_size", "num_clusters"), [(1, 203), (8, 26), (32, 7), (203, 1)]
)
def test_cluster_size_pads_the_last_slots(cluster_size, num_clusters, source, tmp_path):
    target = tmp_path / "target"
    options = {"num_probes": num_clusters, "calibrate": False}

    result = convert(source, target, cluster_size=cluster_size, **options)

    head, _ = split(target)
    assert result.config.num_clusters == num_clusters
    assert ("cluster_tokens" in head) == (cluster_size > 1)
    if cluster_size > 1:
        assert head["cluster_tokens"].shape == (num_clusters, cluster_size)
        # No cluster is padding alone.
        assert (np.array(head["cluster_tokens"]) < tiny.VOCAB_SIZE).any(axis=1).all()
    assert_moved(head, {"weight": tiny.read_weights(source)[EMBEDDING]})


@pytest.mark.parametrize("cluster_size", [1, 8])
def test_a_seed_decides_all(cluster_size, source, tmp_path):
    options = {"cluster_size": cluster_size, "calibration_positions": 256}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        convert(source, tmp_path / name, seed=seed, **options)

    files = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c")
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]


# One cluster in 16 of 203 and of 102, and the pinned ones.
@pytest.mark.parametrize(
    ("cluster_size", "num_pinned", "num_probes"), [(1, 5, 13 + 5), (2, 3, 7 + 3)]
)
def test_ends_and_special_tokens_are_pinned(
    cluster_size, num_pinned, num_probes, source, tmp_path
):
    ends = {"eos_token_id": [tiny.EOS, tiny.EOS_BY_CONFIG]}
    (source / "generation_config.json").write_text(json.dumps(ends))
    target = tmp_path / "target"

    config = convert(source, target, cluster_size=cluster_size, calibrate=False).config

    head, _ = split(target)
    pinned = np.flatnonzero(np.isposinf(np.array(head["centroids.bias"])))
    tokens = {*tiny.SPECIAL_TOKENS, tiny.EOS_BY_CONFIG}
    if cluster_size == 1:
        assert set(pinned) == tokens
    else:
        assert tokens <= set(np.array(head["cluster_tokens"])[pinned].reshape(-1))
    assert config.num_pinned == len(pinned) == num_pinned
    assert config.num_probes == num_probes


@pytest.mark.parametrize(("cluster_size", "num_probes"), [(1, 9), (16, 3)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_bits", [4, 8, "source"])
def test_memory_figures_are_those_of_the_files(
    head_bits, tied, cluster_size, num_probes, tmp_path
):
    source = tiny.write_folder(tmp_path / "source", tied=tied)
    options = {"cluster_size": cluster_size, "num_probes": num_probes}

    result = convert(
        source, tmp_path / "target", head_bits=head_bits, calibrate=False, **options
    )

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
    map_bytes = head["cluster_tokens"].nbytes if cluster_size > 1 else 0
    assert result.head.read_per_token == (
        coarse + num_probes * cluster_size * row_bytes + map_bytes
    )


def test_progress_names_the_stages_in_order(source, tmp_path):
    reports = []

    convert(
        source,
        tmp_path / "target",
        cluster_size=8,
        calibration_positions=256,
        progress=lambda *report: reports.append(report),
    )

    stages = list(dict.fromkeys(stage.split()[0].strip(":") for stage, _ in reports))
    assert stages == ["Calibrating", "Clustering", "Fitting", "Measuring", "Saving"]
    assert all(0 <= share <= 1 for _, share in reports)
    assert any("mean cosine 0." in stage for stage, _ in reports)


@pytest.mark.parametrize("cluster_size", [1, 8])
def test_tails_have_the_dense_heads_mass_where_it_was_calibrated(
    cluster_size, tiny_llama, tmp_path
):
    options = {"cluster_size": cluster_size, "num_probes": 8, "seed": 2}
    convert(tiny_llama, tmp_path / "target", calibration_positions=512, **options)

    head = mlx_lm.load(str(tmp_path / "target"))[0].lm_head
    model, tokenizer = mlx_lm.load(str(tiny_llama))
    dense = find_head(model)
    rows = np.array(dense.rows.weight)
    vocabulary = read_vocabulary(tokenizer, tiny.VOCAB_SIZE)
    sets = sample_states(
        model, tokenizer, dense, rows, vocabulary, num_positions=512, seed=2
    )
    hidden = np.vstack([positions.hidden for positions in sets])
    logits, is_read = flash_logits(head, mx.array(hidden))
    masses = []
    for values in (logits, hidden.astype(np.float64) @ rows.T):
        weights = np.exp(values - values.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        masses.append(np.where(is_read, 0, weights).sum(axis=1).mean())
    assert masses[1] > 0.02
    # The level was fitted on half of these positions.
    assert masses[0] == pytest.approx(masses[1], rel=0.1)
