"""What a conversion says of the head it made: its figures against plain NumPy."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard
from oracles import flash_logits

from mlx_flashhead import convert
from mlx_flashhead.cli import convert_main
from mlx_flashhead.sample_text import SAMPLE_TEXT

QUICK = {"calibration_positions": 256}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def figures_of(source, target) -> dict[str, tuple[float, float]]:
    """Return figures of a head and of its dense 4-bit rival, from their files."""
    base, tokenizer = mlx_lm.load(str(source))
    ids = tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
    windows = np.array(ids)[: len(ids) // 64 * 64].reshape(-1, 64)
    hidden = base.model(mx.array(windows[:, :-1])).reshape(-1, tiny.HIDDEN_SIZE)
    rows = tiny.read_weights(source)["lm_head.weight"]
    rounded = mx.dequantize(*mx.quantize(rows, group_size=64, bits=4), 64, 4)
    x = np.array(hidden, np.float64)
    truth = log_softmax(x @ np.array(rows, np.float64).T)
    ours = flash_logits(mlx_lm.load(str(target))[0].lm_head, hidden)[0]
    heads = (log_softmax(ours), log_softmax(x @ np.array(rounded, np.float64).T))
    return {
        "agreement": tuple(
            (h.argmax(axis=1) == truth.argmax(axis=1)).mean() for h in heads
        ),
        "kl": tuple((np.exp(truth) * (truth - h)).sum(axis=1).mean() for h in heads),
        "num_positions": len(x),
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"num_probes": 12}, {"cluster_size": 8}, {"num_probes": 203}],
    ids=str,
)
def test_summary_and_card_have_the_figures_of_both_heads(options, tiny_llama, tmp_path):
    target = tmp_path / "target"

    result = convert(tiny_llama, target, **QUICK, **options)

    expected = figures_of(tiny_llama, target)
    ours, rival = result.heads.flash, result.heads.dense_4bit
    found = (ours.agreement.value, rival.agreement.value)
    assert found == pytest.approx(expected["agreement"])
    assert result.heads.num_positions == expected["num_positions"]
    found = (ours.kl_divergence, rival.kl_divergence)
    assert found == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6)
    read = (result.head.read_per_token / 1e6, result.head.dense_4bit / 1e6)
    table = {
        "agreement with the source's head": [f"{v:.1%}" for v in expected["agreement"]],
        "KL divergence from it, nats": [f"{abs(v):.4f}" for v in expected["kl"]],
        "MB of head read per token": [f"{v:.1f}" for v in read],
    }
    card = ModelCard.load(target / "README.md").text
    for name, cells in table.items():
        assert f"| {name} | {' | '.join(cells)} |" in card
        (line,) = (li for li in result.summary().splitlines() if name in li)
        assert line.split()[-2:] == cells
    assert f"On {expected['num_positions']} positions" in card


def test_recall_is_that_of_held_out_positions(tiny_llama, tmp_path):
    result = convert(tiny_llama, tmp_path / "target", num_probes=16, **QUICK)

    choice = result.choice
    assert result.config.num_probes == choice.num_probes == 16
    assert 0 < choice.recall < 1
    misses = (1 - choice.recall) * choice.num_positions
    assert misses == pytest.approx(round(misses))
    sentence = (
        f"recall {choice.recall:.2%} on {choice.num_positions} positions held out; at "
        f"least {choice.least_recall:.2%} with 95% confidence"
    )
    assert f"\n  {sentence}\n" in result.summary()
    assert f"ranks first: {sentence}." in (result.path / "README.md").read_text("utf-8")
    # Whatever was chosen was not chosen by a target.
    assert choice.target is None
    assert "the target of" not in result.summary()


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory):
    """A random model of 2,003 rows, whose projection is small beside them."""
    folder = tmp_path_factory.mktemp("large") / "base"
    sizes = {"vocab_size": 2003, "hidden_size": 128, "head_dim": 32}
    return tiny.write_folder(folder, tied=False, **sizes)


def test_without_a_given_number_calibration_chooses_it(large_vocabulary, tmp_path):
    results = {
        target: convert(
            large_vocabulary,
            tmp_path / str(target),
            target_recall=target,
            head_bits=8,
            **QUICK,
        )
        for target in (0.9, 0.8, 0.01)
    }

    for target, result in results.items():
        choice = result.choice
        assert result.config.num_probes == choice.num_probes
        assert choice.target == target
        assert choice.recall > choice.least_recall >= target
        assert choice.is_reached
        assert "the target of" not in result.summary()
    numbers = [result.choice.num_probes for result in results.values()]
    assert numbers[0] > numbers[1] > numbers[2]
    # One row in 32, whatever the target.
    assert numbers[2] == 63


def test_a_target_out_of_reach_is_said_and_what_to_do(large_vocabulary, tmp_path):
    remedies = {
        0.999: "more probes would read more than a dense 4-bit head",
        # The share of hits is as high, but so few positions prove less.
        0.985: "more --calibration-positions may show it",
    }
    for target, remedy in remedies.items():
        options = {"target_recall": target, "head_bits": 8, **QUICK}

        result = convert(large_vocabulary, tmp_path / str(target), **options)

        read, dense = result.head.read_per_token, result.head.dense_4bit
        # One more row of 8 bits would not fit.
        assert read <= dense < read + 128 + 2 * 8
        assert not result.choice.is_reached
        assert (result.choice.recall > target) == (target == 0.985)
        sentence = f"the target of {target:.2%} is not shown: {remedy}"
        assert f"\n  {sentence}\n" in result.summary()


def test_without_calibration_no_recall_is_known(tiny_llama, tmp_path):
    result = convert(tiny_llama, tmp_path / "target", calibrate=False)

    sentence = "recall not measured: converted without calibration"
    assert result.choice is None
    assert f"\n  {sentence}\n" in result.summary()
    assert f"ranks first: {sentence}." in (result.path / "README.md").read_text("utf-8")


def test_summary_fits_a_terminal(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--hf-path", str(tiny_llama), "--mlx-path", "out"]

    status = convert_main([*argv, "--calibration-positions", "256"])

    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert status == 0
    assert printed.err == ""
    assert max(map(len, lines)) <= 100
    assert lines[-2:] == ["Try it:", '  mlx_lm.generate --model out --prompt "Hello"']
