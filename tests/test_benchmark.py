"""``mlx_flashhead.benchmark`` against counts of its own figures by other means."""

import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from oracles import flash_logits

from mlx_flashhead import convert
from mlx_flashhead.benchmark import benchmark
from mlx_flashhead.cli import benchmark_main
from mlx_flashhead.sample_text import SAMPLE_TEXT

QUICK = {"max_tokens": 6, "num_trials": 2, "prompt": "abc"}
QUICK_OPTIONS = ["--max-tokens", "2", "--num-trials", "1", "--prompt", "abc"]


@pytest.fixture(scope="module", params=["untied", "tied"])
def models(request, tiny_llama, tmp_path_factory):
    """A tiny float model, and what ``-q`` makes of it: 4-bit body, 8-bit head.

    The untied one has clusters of 8, the tied one single rows.
    """
    folder = tmp_path_factory.mktemp("benchmark")
    source = tiny_llama
    options = {"quantize": True, "cluster_size": 8, "num_probes": 4}
    if request.param == "tied":
        source = tiny.write_folder(folder / "tied", tied=True)
        options |= {"cluster_size": 1, "num_probes": 6, "calibrate": False}
    return source, convert(source, folder / "converted", **options).path


def head_of(model) -> tuple[nn.Module, str]:
    """Return the module that ``quantize`` must change, and its name."""
    if "lm_head" in model:
        return model, "lm_head"
    return model.model, "embed_tokens"


def with_head(folder, head: nn.Module) -> tuple[nn.Module, object]:
    model, tokenizer = mlx_lm.load(str(folder))
    parent, name = head_of(model)
    setattr(parent, name, head)
    return model, tokenizer


def dense_head(source, bits: int | None) -> nn.Module:
    model, _ = mlx_lm.load(str(source))
    parent, name = head_of(model)
    head = parent[name]
    return head if bits is None else head.to_quantized(64, bits)


def layer_bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def test_figures_against_the_source_model(models):
    source, converted = models
    model, tokenizer = with_head(converted, dense_head(source, None))
    # Windows of 64 tokens, as the library cuts them.
    token_ids = tokenizer.encode(SAMPLE_TEXT)
    windows = mx.array(token_ids[: len(token_ids) // 64 * 64]).reshape(-1, 64)
    hidden = model.model(windows).reshape(-1, 64)
    truth = np.array(model(windows)).reshape(-1, 203).argmax(axis=1)

    result = benchmark(str(converted), reference=str(source), **QUICK)

    names = ["float", "dense 4-bit", "dense 8-bit", "FlashHead"]
    heads = dict(zip(names, result.heads, strict=True))
    assert [head.name for head in result.heads] == names
    assert (result.num_positions, result.num_tokens) == (len(truth), 6)
    assert all(head.tokens_per_second > 0 for head in result.heads)
    for name, bits in (("float", None), ("dense 4-bit", 4), ("dense 8-bit", 8)):
        layer = dense_head(source, bits)
        project = getattr(layer, "as_linear", layer)
        tokens = np.array(project(hidden)).argmax(axis=1)
        assert heads[name].bytes_per_token == layer_bytes(layer)
        assert heads[name].agreement == pytest.approx(
            np.mean(tokens == truth), abs=0.005
        )
        assert heads[name].text == greedy_text(*with_head(converted, layer))
    flash_model, _ = mlx_lm.load(str(converted))
    flash = getattr(*head_of(flash_model))
    logits, _ = flash_logits(flash, hidden)
    agreement = np.mean(logits.argmax(axis=1) == truth)
    assert heads["float"].agreement == 1
    assert heads["FlashHead"].agreement == pytest.approx(agreement, abs=0.005)
    assert 0 < agreement < 1
    assert heads["FlashHead"].text == greedy_text(flash_model, tokenizer)


def greedy_text(model, tokenizer) -> str:
    return mlx_lm.generate(model, tokenizer, "abc", max_tokens=6)


def test_bytes_of_flashhead_are_those_of_its_arrays(models):
    source, converted = models
    prefix = "lm_head." if source.name == "base" else "model.embed_tokens."
    sizes = {
        name.removeprefix(prefix): array.nbytes
        for name, array in tiny.read_weights(converted).items()
        if name.startswith(prefix)
    }

    result = benchmark(str(converted), **QUICK)

    # Four of 26 clusters or six rows, and all that is read whatever is probed.
    rows = sizes["weight"] + sizes["scales"] + sizes["biases"]
    probed = rows * 6 // 203 if source.name == "tied" else rows * 4 // 26
    whole = (n for n in sizes if "centroids" in n or n == "cluster_tokens")
    expected = probed + sum(sizes[name] for name in whole)
    assert result.heads[-1].bytes_per_token == expected


def test_without_reference_the_models_own_rows_are_the_truth(models):
    _, converted = models

    result = benchmark(str(converted), **QUICK)

    names = ["dense 4-bit", "dense 8-bit", "FlashHead"]
    assert [head.name for head in result.heads] == names
    # Rows of 8 bits lose nothing when they are rounded to 8 bits again.
    assert result.heads[1].agreement > 0.99
    assert "all its own rows" in result.table()


def test_command_prints_a_table_and_on_demand_the_texts(tiny_flashhead, capsys):
    arguments = ["--model", str(tiny_flashhead), *QUICK_OPTIONS]

    status = benchmark_main([*arguments, "--show-text"])

    printed = capsys.readouterr()
    assert status == 0
    assert printed.out.startswith("[dense 4-bit]\n")
    table = printed.out[printed.out.index("head  ") :].splitlines()
    assert re.fullmatch(r"dense 4-bit +[\d.]+ +1\.00x +[\d.]+% +[\d.]+", table[1])
    assert re.fullmatch(r"FlashHead +[\d.]+ +[\d.]+x +[\d.]+% +[\d.]+", table[3])
    assert table[4].startswith("Median of 1 runs of 2 tokens; agreement with ")
    assert max(map(len, table[:4])) < 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "1"], "max_tokens=1 must be at least 2"),
        (["--num-trials", "0"], "num_trials=0 at least 1"),
        (["--reference", "no/such-folder"], "no/such-folder"),
    ],
    ids=["max-tokens", "num-trials", "reference"],
)
def test_bad_argument_is_one_sentence(tiny_flashhead, options, message, capsys):
    status = benchmark_main(["--model", str(tiny_flashhead), *options])

    assert_one_sentence(status, message, capsys)


def test_model_that_is_not_converted_is_refused(tiny_llama, capsys):
    status = benchmark_main(["--model", str(tiny_llama)])

    assert_one_sentence(status, "is not a FlashHead model: convert it", capsys)


def test_missing_folder_is_refused(tmp_path, capsys):
    status = benchmark_main(["--model", str(tmp_path / "absent" / "model")])

    assert_one_sentence(status, "absent", capsys)


def test_reference_of_another_size_is_refused(tiny_flashhead, tmp_path, capsys):
    other = tiny.write_folder(tmp_path / "other", hidden_size=96)

    status = benchmark_main(["--model", str(tiny_flashhead), "--reference", str(other)])

    assert_one_sentence(status, "is 203 x 96, this model's 203 x 64", capsys)


def test_damaged_model_is_refused(tiny_flashhead, tmp_path, capsys):
    damaged = shutil.copytree(tiny_flashhead, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"none")

    status = benchmark_main(["--model", str(damaged)])

    assert_one_sentence(status, "are damaged", capsys)


def assert_one_sentence(status: int, message: str, capsys) -> None:
    printed = capsys.readouterr()
    assert status == 1
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
