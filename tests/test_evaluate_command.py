"""The command ``mlx_flashhead.evaluate``: what it prints, draws and refuses."""

import json
import sys

import numpy as np
import pytest
import tiny

from mlx_flashhead.cli import evaluate_main
from mlx_flashhead.evaluation import evaluate
from mlx_flashhead.evaluation.plot import draw_plot


def test_command_prints_draws_and_writes(tiny_flashhead, tiny_llama, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot, data = tmp_path / "out.png", tmp_path / "out.json"
    argv = ["--model", str(tiny_flashhead), "--reference", str(tiny_llama)]
    argv += ["--num-positions", "40", "--plot", str(plot), "--json", str(data)]

    status = evaluate_main(argv)

    streams = capsys.readouterr()
    found = json.loads(data.read_text("utf-8"), parse_constant=pytest.fail)
    agreement = found["trials"][1]["heads"][0]["figures"]["agreement"]
    lines = streams.out.splitlines()
    assert status == 0
    assert streams.err == ""
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [data, plot]
    assert f"{agreement['value'] * 100:.1f} [" in streams.out
    assert len(found["sweep"]) == 5
    assert len(found["paper"]) == 4
    # JSON has no infinity.
    assert {h["figures"]["kl_divergence"] for h in found["paper"]} == {None}
    assert all(len(li) <= 80 for li in lines if str(tiny_llama) not in li)


def test_plot_marks_the_dense_head_the_paper_and_the_chosen_point(
    tiny_flashhead, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *_, **__: figures.append(self)
    )
    result = evaluate(tiny_flashhead, num_positions=64, sweep=True)

    draw_plot(result, tmp_path / "out.png")

    left, right = figures[0].axes
    lines = {line.get_label(): line.get_xydata() for line in left.get_lines()}
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    (trial,) = result.trials
    chosen, dense = trial.heads
    star = f"as converted, {chosen.bytes_per_token / 1e6:.1f} MB"
    assert set(texts) == set(lines)
    for label, head in ((star, chosen), ("dense 4-bit", dense)):
        point = head.bytes_per_token / 1e6, 100 * head.figures.agreement.value
        np.testing.assert_allclose(lines[label], [point])
    for label, heads in (
        ("FlashHead", result.sweep),
        ("the paper's method", result.paper),
    ):
        points = [
            (h.bytes_per_token / 1e6, 100 * h.figures.agreement.value) for h in heads
        ]
        np.testing.assert_allclose(lines[label], points)
    divergences = right.get_lines()[0].get_ydata()
    expected = [head.figures.kl_divergence for head in result.sweep]
    np.testing.assert_allclose(divergences, expected)
    assert "infinite" in right.texts[0].get_text()


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
