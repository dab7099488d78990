"""``mlx_flashhead.evaluate`` against NumPy's float64 answers on tiny models."""

import math
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import oracles
import pytest
import tiny
from evaluated import (
    RANDOM,
    TEXT,
    assert_figures,
    capped,
    expected_figures,
    softmax,
    source_head,
    text_positions,
)
from mlx_lm.generate import generate_step

from mlx_flashhead import convert, load
from mlx_flashhead.clustering import cluster_rows
from mlx_flashhead.evaluation import evaluate
from mlx_flashhead.evaluation.comparison import share_of
from mlx_flashhead.measure import head_bytes

# Untied; tied, the logits capped; with a bias. In clusters and without.
KINDS = ("llama", 8), ("gemma2", 1), ("phi", 8), ("phi", 1)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pairs of source and converted folder."""
    pairs = {}
    for kind, cluster_size in KINDS:
        source = tmp_path_factory.mktemp(kind) / "source"
        tiny.write_folder(source, kind, tied=kind == "gemma2")
        target = source.with_name("converted")
        convert(
            source,
            target,
            cluster_size=cluster_size,
            # Four of them are pinned.
            num_probes=6,
            head_bits=8,
            calibrate=False,
        )
        pairs[kind, cluster_size] = source, target
    return pairs


@pytest.mark.parametrize(("kind", "cluster_size"), KINDS)
def test_figures_against_its_own_rows(kind, cluster_size, folders, text):
    _, converted = folders[kind, cluster_size]
    head, hidden, next_tokens = text_positions(converted)

    result = evaluate(converted, texts=[text], num_positions=10_000)

    truth = capped(kind, oracles.dense_logits(head, hidden))
    logits, is_exact = oracles.flash_logits(head, hidden)
    expected = expected_figures(truth, capped(kind, logits), next_tokens, is_exact)
    (trial,) = result.trials
    assert result.num_positions == len(next_tokens) == 4 * 63
    assert 0.1 < expected["recall"] < 1
    assert 0 < expected["exact_mass"] < 1
    assert_figures(trial.heads[0].figures, expected)
    losses = -np.log(softmax(truth)[np.arange(len(truth)), next_tokens])
    assert trial.truth_perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)


@pytest.mark.parametrize(("kind", "cluster_size"), KINDS)
def test_figures_against_the_reference(kind, cluster_size, folders, text):
    source, converted = folders[kind, cluster_size]
    head, hidden, next_tokens = text_positions(converted)
    rows, bias = source_head(source, kind)
    packed = mx.quantize(mx.array(rows, mx.float32), group_size=64, bits=4)

    result = evaluate(converted, reference=str(source), texts=[text])

    def product(matrix):
        matrix = np.array(matrix, np.float64)
        return capped(kind, np.array(hidden, np.float64) @ matrix.T + bias)

    count = result.num_positions
    truth = product(rows)
    logits, is_exact = oracles.flash_logits(head, hidden)
    own, last = result.trials
    flash, stored, four_bit = last.heads
    assert count == len(next_tokens)
    assert [h.name for h in own.heads] == ["FlashHead"]
    for found, values, exact in (
        (flash, capped(kind, logits), is_exact),
        (stored, capped(kind, oracles.dense_logits(head, hidden)), None),
        (four_bit, product(mx.dequantize(*packed, group_size=64, bits=4)), None),
    ):
        expected = expected_figures(truth, values, next_tokens, exact)
        assert_figures(found.figures, expected)
    dense = capped(kind, oracles.dense_logits(head, hidden))
    expected = expected_figures(dense, capped(kind, logits), next_tokens, is_exact)
    assert_figures(own.heads[0].figures, expected)
    assert last.truth_bytes_per_token == 203 * 64 * 4
    # Eight bits and a scale and a bias, both float32, for each row of 64.
    bias_bytes = 4 * 203 if kind == "phi" else 0
    assert stored.bytes_per_token == 203 * (64 + 8) + bias_bytes
    assert four_bit.bytes_per_token == 203 * (32 + 8) + bias_bytes


def test_greedy_texts_differ_where_generated_ones_do(tiny_flashhead, tiny_llama, text):
    result = evaluate(tiny_flashhead, texts=[text])

    model, tokenizer = load(tiny_flashhead)
    dense, _ = mlx_lm.load(str(tiny_llama))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    expected = []
    for start in range(0, len(ids) // 64 * 64, 64):
        prompt = mx.array(ids[start : start + 17])
        ours, theirs = (
            [token for token, _ in generate_step(prompt, m, max_tokens=32)]
            for m in (model, dense)
        )
        differs = np.array(ours) != np.array(theirs)
        expected.append(int(differs.argmax()) if differs.any() else None)
    assert set(expected) != {None}
    assert result.trials[0].heads[0].first_differences == expected


def test_default_positions_are_the_models_own_text(tiny_flashhead):
    first, again, other = (
        evaluate(tiny_flashhead, num_positions=70, seed=s) for s in (0, 0, 1)
    )

    # Two texts of 32 tokens fit.
    assert first.num_positions == 64
    assert first == again
    assert first.trials[0].truth_perplexity != other.trials[0].truth_perplexity


@pytest.mark.parametrize(("kind", "cluster_size"), KINDS)
def test_sweep_is_the_head_with_other_probes(kind, cluster_size, folders, text):
    source, converted = folders[kind, cluster_size]
    head, hidden, next_tokens = text_positions(converted)
    rows, bias = source_head(source, kind)

    result = evaluate(converted, reference=str(source), texts=[text], sweep=True)

    truth = capped(kind, np.array(hidden, np.float64) @ rows.T + bias)
    own = head.config
    size = own.num_clusters
    # Halvings, less what leaves no room for the pinned clusters.
    counts = sorted(
        {-(-size // 2**n) for n in range(1, 9)} - set(range(own.num_pinned))
        | {own.num_probes}
    )
    assert [found.num_probes for found in result.sweep] == counts
    for found in result.sweep:
        head.config = replace(own, num_probes=found.num_probes)
        logits, is_exact = oracles.flash_logits(head, hidden)
        logits = capped(kind, logits)
        expected = expected_figures(truth, logits, next_tokens, is_exact)
        assert_figures(found.figures, expected)
        assert found.bytes_per_token == head_bytes(head).read_per_token


@pytest.mark.parametrize(("kind", "cluster_size"), KINDS)
def test_the_papers_method_is_unit_centroids_and_nothing_else(
    kind, cluster_size, folders, text
):
    source, converted = folders[kind, cluster_size]
    head, hidden, next_tokens = text_positions(converted)
    rows, bias = source_head(source, kind)
    clusters = cluster_rows(
        rows.astype(np.float32), cluster_size=16, centred=False, seed=3
    ).cluster_tokens

    result = evaluate(
        converted, reference=str(source), texts=[text], sweep=True, seed=3
    )

    states = np.array(hidden, np.float64)
    truth = capped(kind, states @ rows.T + bias)
    stored = capped(kind, oracles.dense_logits(head, hidden))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    sums = np.array([units[c[c < 203]].sum(axis=0) for c in clusters])
    sums /= np.linalg.norm(sums, axis=1, keepdims=True)
    packed = mx.quantize(mx.array(sums.astype(np.float32)), group_size=64, bits=4)
    scores = states @ np.array(mx.dequantize(*packed, group_size=64, bits=4)).T
    order = np.argsort(-scores, axis=1)
    cluster_of = np.empty(203, int)
    for cluster, tokens in enumerate(clusters):
        cluster_of[tokens[tokens < 203]] = cluster
    assert [found.num_probes for found in result.paper] == [1, 2, 4, 7]
    for found in result.paper:
        chosen = order[:, : found.num_probes]
        is_read = (cluster_of[:, None] == chosen[:, None, :]).any(axis=2)
        logits = np.where(is_read, stored, -np.inf)
        with np.errstate(divide="ignore"):
            expected = expected_figures(truth, logits, next_tokens, is_read)
        del expected["top3"], expected["top10"]
        assert expected["kl_divergence"] == math.inf
        assert_figures(found.figures, expected)
        # Centroids, rows of 8 bits with two float32 scales, the map, the bias.
        row = 64 + 8 + 4
        bias_bytes = 4 * 203 if kind == "phi" else 0
        assert found.bytes_per_token == (
            13 * (32 + 8) + found.num_probes * 16 * (row - 4) + 13 * 16 * 4 + bias_bytes
        )


def test_uncentred_clusters_are_of_directions():
    rows = RANDOM.normal(size=(203, 64)).astype(np.float32) + 2
    longer = rows * RANDOM.uniform(1, 9, size=(203, 1)).astype(np.float32)

    same, centred = (
        [
            cluster_rows(r, cluster_size=16, centred=c).cluster_tokens
            for r in (rows, longer)
        ]
        for c in (False, True)
    )

    assert np.array_equal(*same)
    assert not np.array_equal(*centred)
    assert not np.array_equal(same[0], centred[0])


def test_all_probed_is_the_dense_product(tiny_all_probed, text):
    result = evaluate(tiny_all_probed, texts=[text])

    head = result.trials[0].heads[0]
    assert head.figures.recall.value == head.figures.agreement.value == 1
    assert head.figures.kl_divergence < 1e-6
    assert head.figures.exact_mass == pytest.approx(1, abs=1e-5)
    assert set(head.first_differences) == {None}
    assert head.figures.perplexity == pytest.approx(
        result.trials[0].truth_perplexity, rel=1e-5
    )


def test_positions_are_shared_by_the_texts(tiny_flashhead, tmp_path, text):
    short = tmp_path / "short.txt"
    short.write_text(" ".join(TEXT.split()[:11]), "utf-8")

    result = evaluate(tiny_flashhead, texts=[text, short], num_positions=40)

    # Windows of 11 tokens: two of the long text, the only one of the short.
    assert result.num_positions == 30


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # From the formula worked out by hand with z = 1.959964.
    [(0, 10, 0.0, 0.27754), (10, 10, 0.72246, 1.0), (98, 100, 0.93000, 0.99450)],
)
def test_wilson_interval(hits, total, low, high):
    share = share_of(np.arange(total) < hits)

    assert share.value == hits / total
    assert share.low == pytest.approx(low, abs=1e-4)
    assert share.high == pytest.approx(high, abs=1e-4)


def test_a_model_that_draws_is_measured_with_the_best_clusters(
    tiny_flashhead, tmp_path, text
):
    drawing = shutil.copytree(tiny_flashhead, tmp_path / "drawing")

    def draw(config):
        config["flashhead"]["sampling"] = "corrected"

    tiny.edit_config(drawing, draw)

    results = [evaluate(m, texts=[text]) for m in (tiny_flashhead, drawing)]

    assert results[0].trials == results[1].trials
    assert "not a corrected draw" in results[1].table()
    assert "the best clusters" not in results[0].table()
