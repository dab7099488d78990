"""Mistakes: one sentence, exit status 1, no traceback, nothing left behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
import tiny
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

import mlx_flashhead
from mlx_flashhead import convert
from mlx_flashhead.cli import benchmark_main, convert_main

REPOSITORY = Path(__file__).parent.parent
ROWS = "model.embed_tokens"


@pytest.fixture
def source(tmp_path):
    return tiny.write_folder(tmp_path / "source")


@pytest.fixture(autouse=True)
def _restore_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def broken_weights(folder):
    (folder / "model.safetensors").write_bytes(b"not a safetensors file" * 9)


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-999])


def incomplete_weights(folder):
    weights = tiny.read_weights(folder)
    del weights["model.norm.weight"]
    tiny.write_weights(folder, weights)


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def without_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def incomplete_config(folder):
    tiny.edit_config(folder, lambda config: config.pop("num_hidden_layers"))


def unknown_architecture(folder):
    tiny.edit_config(folder, lambda config: config.update(model_type="zzz"))


def bad_rows(folder):
    weights = tiny.read_weights(folder)
    rows = weights[f"{ROWS}.weight"]
    rows[3, 5] = float("nan")
    rows[30, :2] = float("inf")
    rows[150, 63] = -float("inf")
    tiny.write_weights(folder, weights)


def bad_scales(folder):
    """Quantized rows with a scale that is not finite."""
    weights = tiny.read_weights(folder)
    packed = mx.quantize(weights[f"{ROWS}.weight"], group_size=32, bits=4)
    packed[1][7, 1] = float("inf")
    names = ("weight", "scales", "biases")
    weights |= {f"{ROWS}.{n}": a for n, a in zip(names, packed, strict=True)}
    tiny.write_weights(folder, weights)
    quantization = {"group_size": 32, "bits": 4}
    tiny.edit_config(folder, lambda c: c.update(quantization=quantization))


def as_it_is(folder):
    pass


# (change to the folder, options, exception, its sentence)
BAD_SOURCES = [
    (without_weights, {}, FileNotFoundError, r"no weights \(model\*.safetensors\)"),
    (broken_weights, {}, ValueError, "weights in .* are damaged"),
    (empty_weights, {}, ValueError, "weights in .* are damaged"),
    (truncated_weights, {}, ValueError, "weights in .* are damaged"),
    (incomplete_weights, {}, ValueError, "model.norm.weight"),
    (without_tokenizer, {}, FileNotFoundError, "has no tokenizer"),
    (broken_tokenizer, {}, ValueError, "tokenizer.json"),
    (without_config, {}, FileNotFoundError, "has no config.json"),
    (incomplete_config, {}, ValueError, "config.json does not describe"),
    (broken_config, {}, ValueError, "config.json is damaged"),
    (unknown_architecture, {}, ValueError, "zzz"),
    (bad_rows, {}, ValueError, "3 of the head's 203 rows hold NaN or infinity"),
    (bad_scales, {}, ValueError, "1 of the head's 203 rows hold NaN or infinity"),
    (as_it_is, {"cluster_size": 0}, ValueError, r"=0 must be in \[1, 203\]"),
    (as_it_is, {"cluster_size": -4}, ValueError, r"=-4 must be in \[1, 203\]"),
    (as_it_is, {"cluster_size": 204}, ValueError, r"=204 must be in \[1, 203\]"),
    (as_it_is, {"num_probes": 0}, ValueError, r"=0 must be in \[1, 13\]"),
    (as_it_is, {"num_probes": -1}, ValueError, r"=-1 must be in \[1, 13\]"),
    (as_it_is, {"num_probes": 14}, ValueError, r"=14 must be in \[1, 13\]"),
    # Four special tokens fill four clusters of one row.
    (
        as_it_is,
        {"cluster_size": 1, "num_probes": 3},
        ValueError,
        r"num_probes=3 must be in \[4, 203\]: at least the pinned",
    ),
    (as_it_is, {"head_bits": 7}, ValueError, "head_bits=7 must be source or one of"),
    (as_it_is, {"centroid_bits": 5}, ValueError, "centroid_bits=5 must be one of"),
    (as_it_is, {"quantize": True, "q_bits": 7}, ValueError, "7 bits"),
    (as_it_is, {"quantize": True, "q_group_size": 48}, ValueError, "group size 48"),
    (as_it_is, {"quantize": True, "q_bits": 9}, ValueError, "9 bits"),
    (
        as_it_is,
        {"quantize": True, "q_mode": "mxfp4", "q_bits": 3},
        ValueError,
        "3 bits are not supported in mode mxfp4",
    ),
    (as_it_is, {"seed": -1}, ValueError, "seed=-1 must be at least 0"),
]


def argv_of(source, target, options: dict) -> list[str]:
    argv = ["--hf-path", str(source), "--mlx-path", str(target)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        argv += [flag] if value is True else [f"{flag}={value}"]
    return argv


def assert_one_sentence(status: int, streams, pattern: str) -> None:
    assert status == 1
    assert streams.out == ""
    assert re.fullmatch(r"error: .*[.)]\n", streams.err), streams.err
    assert re.search(pattern, streams.err), streams.err


def fails_everywhere(source, target, options, error, pattern, capsys) -> None:
    """Assert the mistake's sentence from Python and from the command line."""
    before = sorted(target.parent.rglob("*"))

    with pytest.raises(error, match=pattern):
        convert(source, target, **options)
    capsys.readouterr()
    status = convert_main(argv_of(source, target, options))

    assert_one_sentence(status, capsys.readouterr(), pattern)
    assert sorted(target.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "options", "error", "pattern"),
    BAD_SOURCES,
    ids=[f"{c.__name__}-{o}" for c, o, _, _ in BAD_SOURCES],
)
def test_bad_source_or_option(
    change, options, error, pattern, source, tmp_path, capsys
):
    change(source)

    fails_everywhere(source, tmp_path / "target", options, error, pattern, capsys)


def test_existing_output(source, tmp_path, capsys):
    (tmp_path / "target").mkdir()

    fails_everywhere(
        source, tmp_path / "target", {}, FileExistsError, "exists already", capsys
    )


@pytest.mark.parametrize("name", ["./absent", "no/such/folder", "a b"])
def test_unknown_path(name, tmp_path, capsys):
    fails_everywhere(
        name, tmp_path / "target", {}, FileNotFoundError, "neither a folder", capsys
    )


def test_a_file_is_no_model(source, tmp_path, capsys):
    file = source / "model.safetensors"

    fails_everywhere(
        file, tmp_path / "target", {}, FileNotFoundError, "is a file", capsys
    )


HUB_ANSWER = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (
            RepositoryNotFoundError("404 Client\n\nError", response=HUB_ANSWER),
            "no such model",
        ),
        (GatedRepoError("403 Client Error", response=HUB_ANSWER), "hf auth login"),
        (LocalEntryNotFoundError("Cannot find a snapshot"), "cannot be reached"),
        # What the hub client lets through when a download breaks off.
        (HTTPError("peer closed connection"), "cannot be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_without_the_model(error, pattern, tmp_path, capsys, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr("mlx_lm.utils.snapshot_download", snapshot_download)

    fails_everywhere(
        "org/absent", tmp_path / "target", {}, FileNotFoundError, pattern, capsys
    )


def test_no_network(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, REPOSITORY / "convert.py"),
            *argv_of("org/absent", tmp_path / "target", {}),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )

    assert done.returncode == 1
    assert re.fullmatch(r"error: org/absent .* cannot be reached; .*\n", done.stderr)
    assert not (tmp_path / "target").exists()


def test_flashhead_model_is_not_converted_again(tiny_flashhead, tmp_path, capsys):
    fails_everywhere(
        tiny_flashhead, tmp_path / "target", {}, ValueError, "already", capsys
    )


def test_quantized_model_is_not_quantized_again(source, tmp_path, capsys):
    mlx_lm.convert(str(source), str(tmp_path / "4bit"), quantize=True)

    fails_everywhere(
        tmp_path / "4bit",
        tmp_path / "target",
        {"quantize": True},
        ValueError,
        "is quantized already: leave out -q",
        capsys,
    )


def test_unknown_mode(source, tmp_path):
    with pytest.raises(ValueError, match="quantization mode 'int4' is unknown"):
        convert(source, tmp_path / "target", quantize=True, q_mode="int4")


def test_unknown_dtype(source, tmp_path):
    with pytest.raises(ValueError, match="dtype='int8' must be one of float16"):
        convert(source, tmp_path / "target", dtype="int8")


def test_head_that_cannot_be_found(tmp_path, capsys):
    # With tied weights mlx-lm's seed_oss multiplies by the embedding itself.
    source = tiny.write_folder(tmp_path / "source", "seed_oss")

    pattern = "Cannot find the vocabulary head of architecture 'seed_oss'"
    fails_everywhere(source, tmp_path / "target", {}, ValueError, pattern, capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["--hf-path", "x", "--head-bits", "many"],
        ["--hf-path", "x", "--q-mode", "int4"],
        ["--hf-path", "x", "--dtype", "int8"],
        [],
    ],
)
def test_command_line_that_makes_no_sense(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        convert_main(argv)

    assert exit.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("mlx_flashhead.convert: error:")
    )


def drop(name):
    return lambda arrays: arrays.pop(f"lm_head.{name}")


def replace(name, function):
    def change(arrays):
        arrays[f"lm_head.{name}"] = function(arrays[f"lm_head.{name}"])

    return change


def twice_the_same(tokens):
    tokens[5, 0] = tokens[4, 0]
    return tokens


def beyond_the_vocabulary(tokens):
    tokens[5, 0] = 204
    return tokens


# (change to the arrays, sentence)
BAD_ARRAYS = [
    (drop("weight"), r"lm_head\.weight are missing|lm_head\.weight is missing"),
    (drop("token_slots"), r"lm_head\.token_slots"),
    (drop("centroids.scales"), r"lm_head\.centroids\.scales"),
    (replace("weight", lambda a: a[:-1]), r"lm_head\.weight is .*\(207, 64\)"),
    (replace("cluster_tokens", lambda a: a.T), r"cluster_tokens is .*\(8, 26\)"),
    (replace("token_slots", lambda a: a[:-1]), r"token_slots is .*\(202,\)"),
    (
        replace("token_slots", lambda a: a.astype(mx.float32)),
        r"token_slots is .*float32",
    ),
    (replace("centroids.weight", lambda a: a[:, :-1]), r"centroids\.weight is"),
    (replace("centroids.bias", lambda a: a[None]), r"centroids\.bias is"),
    (replace("cluster_tokens", twice_the_same), "no permutation"),
    (replace("cluster_tokens", beyond_the_vocabulary), "no permutation"),
    (replace("token_slots", lambda a: a[::-1]), "not the inverse"),
]

# (change to the "flashhead" object, sentence)
BAD_SETTINGS = [
    (lambda c: c.update(version=99), "format version 99; .* pip install -U"),
    (lambda c: c.update(version="x"), 'no valid "version"'),
    (lambda c: c.pop("version"), 'no valid "version"'),
    (lambda c: c.update(base_model_type="zzz"), "'zzz' is unknown to this mlx-lm"),
    (lambda c: c.pop("num_probes"), "lacks num_probes"),
    (lambda c: c.update(num_probes=27), r"num_probes=27 must be in \[1, 26\]"),
    (lambda c: c.update(num_probes="4"), "wrong kind .*'str'"),
    (lambda c: c.update(centroids={"bits": 4}), "wrong kind .*'group_size'"),
    (lambda c: c.update(centroids={"bits": 7, "group_size": 64}), "7 bits"),
    (lambda c: c.update(rows={"bits": 4, "group_size": 48}), "group size 48"),
    (lambda c: c.update(dtype="float8"), "dtype='float8' must be"),
    (lambda c: c.update(head_path="model.nothing"), "nothing"),
    (lambda c: c.update(head_path="model.layers.0"), "model.layers.0"),
]


@pytest.fixture
def converted(tiny_flashhead, tmp_path):
    """A folder of its own with a converted model in it."""
    folder = tmp_path / "converted"
    folder.mkdir()
    for path in tiny_flashhead.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def cannot_be_loaded(folder, pattern, capsys) -> None:
    for load in (mlx_lm.load, mlx_flashhead.load):
        with pytest.raises(ValueError, match=pattern):
            load(str(folder))
    capsys.readouterr()
    status = benchmark_main(["--model", str(folder)])
    assert_one_sentence(status, capsys.readouterr(), pattern)


@pytest.mark.parametrize(("change", "pattern"), BAD_ARRAYS)
def test_bad_arrays_at_load(change, pattern, converted, capsys):
    weights = tiny.read_weights(converted)
    change(weights)
    tiny.write_weights(converted, weights)

    cannot_be_loaded(converted, pattern, capsys)


@pytest.mark.parametrize(("change", "pattern"), BAD_SETTINGS)
def test_bad_settings_at_load(change, pattern, converted, capsys):
    tiny.edit_config(converted, lambda config: change(config["flashhead"]))

    cannot_be_loaded(converted, pattern, capsys)


def test_folder_without_settings_at_load(converted, capsys):
    tiny.edit_config(converted, lambda config: config.pop("flashhead"))

    cannot_be_loaded(converted, 'no "flashhead" object', capsys)


@pytest.mark.parametrize("change", [broken_weights, truncated_weights])
def test_damaged_weights_at_load(change, converted):
    change(converted)

    with pytest.raises(ValueError, match=r"weights in .* are damaged"):
        mlx_flashhead.load(converted)


def test_plain_model_is_no_flashhead_model(source):
    with pytest.raises(ValueError, match="is not a FlashHead model: convert it"):
        mlx_flashhead.load(source)


def test_without_the_package_mlx_lm_does_not_know_the_type(converted):
    # The plug-in is what mlx-lm imports; hidden, the package is not there.
    code = """
import sys
sys.modules["mlx_lm.models.flashhead"] = None
import mlx_lm
mlx_lm.load(sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, converted],
        capture_output=True,
        text=True,
        check=False,
    )

    assert "Model type flashhead not supported" in done.stderr
