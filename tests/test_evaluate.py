"""``mlx_flashhead.evaluate`` against NumPy's float64 answers on tiny models."""

import json
import math
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import oracles
import pytest
import tiny
from mlx_lm.generate import generate_step

from mlx_flashhead import convert, load
from mlx_flashhead.cli import evaluate_main
from mlx_flashhead.evaluation import evaluate
from mlx_flashhead.evaluation.comparison import share_of
from mlx_flashhead.forward import hidden_states
from mlx_flashhead.head import FlashHead

RANDOM = np.random.default_rng(3)
TEXT = " ".join(f"word{i}" for i in RANDOM.integers(100, 190, 300))
KINDS = "llama", "gemma2", "phi"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pairs of source and converted folder, tied or not, with and without a bias."""
    pairs = {}
    for kind in KINDS:
        source = tmp_path_factory.mktemp(kind) / "source"
        tiny.write_folder(source, kind, tied=kind == "gemma2")
        target = source.with_name("converted")
        convert(source, target, cluster_size=8, num_probes=5, head_bits=8)
        pairs[kind] = source, target
    return pairs


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def capped(kind, logits):
    """What gemma2 does to its head's logits; ``tiny`` has it cap them at 2."""
    return 2 * np.tanh(logits / 2) if kind == "gemma2" else logits


def text_positions(folder):
    """Return the model's head, and the text's hidden states and next tokens."""
    model, tokenizer = load(folder)
    head = next(m for m in model.modules() if isinstance(m, FlashHead))
    ids = np.array(tokenizer.encode(TEXT, add_special_tokens=False))
    windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    hidden = hidden_states(model, head.config.head_path, mx.array(windows[:, :-1]))
    return head, hidden, windows[:, 1:].reshape(-1)


def expected_figures(truth, logits, next_tokens, is_exact=None):
    """Return the figures from float64 logits ``(N, V)``."""
    p, q = softmax(truth), softmax(logits)
    best = truth.argmax(axis=1)
    rows = np.arange(len(best))
    order = np.argsort(-logits, axis=1, kind="stable")
    places = np.argmax(order == best[:, None], axis=1)
    figures = {
        "agreement": (places == 0).mean(),
        "top3": (places < 3).mean(),
        "top10": (places < 10).mean(),
        "kl_divergence": (p * np.log(p / q)).sum(axis=1).mean(),
        "total_variation": np.abs(p - q).sum(axis=1).mean() / 2,
        "perplexity": math.exp(-np.log(q[rows, next_tokens]).mean()),
    }
    if is_exact is not None:
        figures["recall"] = is_exact[rows, best].mean()
        figures["exact_mass"] = (q * is_exact).sum(axis=1).mean()
        figures["truth_exact_mass"] = (p * is_exact).sum(axis=1).mean()
    return figures


def assert_figures(figures, expected):
    for name, value in expected.items():
        actual = getattr(figures, name)
        actual = getattr(actual, "value", actual)
        assert actual == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_figures_against_its_own_rows(kind, folders, text):
    head, hidden, next_tokens = text_positions(folders[kind][1])

    result = evaluate(folders[kind][1], texts=[text], num_positions=10_000)

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


@pytest.mark.parametrize("kind", KINDS)
def test_figures_against_the_reference(kind, folders, text):
    source, converted = folders[kind]
    head, hidden, next_tokens = text_positions(converted)
    weights = tiny.read_weights(source)
    name = "model.embed_tokens" if kind == "gemma2" else "lm_head"
    rows = weights[f"{name}.weight"]
    packed = mx.quantize(rows, group_size=64, bits=4)
    bias = np.array(weights[f"{name}.bias"], np.float64) if kind == "phi" else 0

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


def test_sweep_reaches_the_dense_product(tiny_flashhead, text):
    result = evaluate(tiny_flashhead, texts=[text], num_positions=63, sweep=True)

    counts = [head.num_probes for head in result.sweep]
    recalls = [head.figures.recall.value for head in result.sweep]
    read = [head.bytes_per_token for head in result.sweep]
    assert counts == [1, 2, 4, 8]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1]
    assert read == sorted(set(read))
    assert result.sweep[2].figures == result.trials[0].heads[0].figures


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


def test_command_prints_draws_and_writes(tiny_flashhead, tiny_llama, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot, data = tmp_path / "out.png", tmp_path / "out.json"
    argv = ["--model", str(tiny_flashhead), "--reference", str(tiny_llama)]
    argv += ["--num-positions", "40", "--plot", str(plot), "--json", str(data)]

    status = evaluate_main(argv)

    streams = capsys.readouterr()
    found = json.loads(data.read_text("utf-8"))
    agreement = found["trials"][1]["heads"][0]["figures"]["agreement"]
    lines = streams.out.splitlines()
    assert status == 0
    assert streams.err == ""
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [data, plot]
    assert f"{agreement['value'] * 100:.1f} [" in streams.out
    assert len(found["sweep"]) == 4
    assert all(len(li) <= 80 for li in lines if str(tiny_llama) not in li)


BAD_OPTIONS = [
    (["--num-positions", "0"], "num_positions=0 must be at least 1"),
    (["--num-positions", "-5"], "num_positions=-5 must be at least 1"),
    (["--seed", "-1"], "seed=-1 must be at least 0"),
    (["--text", "{tmp}/absent.txt"], "absent.txt is no file"),
    (["--text", "{tmp}"], "is no file"),
    (["--text", "{tmp}/empty.txt"], "empty.txt has 0 tokens"),
    (["--text", "{tmp}/binary.txt"], "binary.txt is no UTF-8 text"),
    (
        ["--text", "{tmp}/a.txt", "--text", "{tmp}/a.txt", "--num-positions", "1"],
        "num_positions=1 must be at least 2",
    ),
    (["--reference", "{tmp}/absent"], "neither a folder"),
    (["--reference", "{tmp}/other"], "is 203 x 32, this model's 203 x 64"),
    (["--json", "{tmp}/absent/out.json"], "absent is no folder"),
    (["--json", "{tmp}"], "is a folder; name a file"),
    (["--plot", "{tmp}/absent/out.png"], "absent is no folder"),
    (["--plot", "{tmp}/out.zzz"], "out.zzz has no suffix that names a kind"),
    (["--plot", "{tmp}/out"], "out has no suffix that names a kind"),
]


@pytest.mark.parametrize(("options", "pattern"), BAD_OPTIONS)
def test_bad_option(options, pattern, tiny_flashhead, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("word90 word91", "utf-8")
    (tmp_path / "empty.txt").write_text("", "utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    tiny.write_folder(tmp_path / "other", hidden_size=32)
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    before = sorted(tmp_path.rglob("*"))

    status = evaluate_main(["--model", str(tiny_flashhead), *options])

    streams = capsys.readouterr()
    assert status == 1
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1
    assert pattern in streams.err
    assert sorted(tmp_path.rglob("*")) == before


def test_plain_model_is_refused(tiny_llama, capsys):
    assert evaluate_main(["--model", str(tiny_llama)]) == 1
    assert "is not a FlashHead model" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_measured(
    tiny_flashhead, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    plot = tmp_path / "out.png"

    status = evaluate_main(["--model", str(tiny_flashhead), "--plot", str(plot)])

    streams = capsys.readouterr()
    assert status == 1
    assert streams.out == ""
    assert streams.err.startswith("error: The plot needs matplotlib")
    assert streams.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tiny_flashhead, tmp_path, capsys, monkeypatch):
    def savefig(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    argv = ["--model", str(tiny_flashhead), "--num-positions", "8"]

    status = evaluate_main([*argv, "--plot", str(tmp_path / "out.png")])

    assert status == 1
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert not list(tmp_path.iterdir())
