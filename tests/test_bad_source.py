"""Sources that cannot be converted: one sentence, and nothing left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
import tiny
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from mistakes import argv_of, fails_everywhere

REPOSITORY = Path(__file__).parent.parent
ROWS = "model.embed_tokens"


@pytest.fixture
def source(tmp_path):
    return tiny.write_folder(tmp_path / "source")


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


# (change to the folder, exception, its sentence)
BAD_SOURCES = [
    (without_weights, FileNotFoundError, r"no weights \(model\*.safetensors\)"),
    (broken_weights, ValueError, "weights in .* are damaged"),
    (empty_weights, ValueError, "weights in .* are damaged"),
    (truncated_weights, ValueError, "weights in .* are damaged"),
    (incomplete_weights, ValueError, "model.norm.weight"),
    (without_tokenizer, FileNotFoundError, "has no tokenizer"),
    (broken_tokenizer, ValueError, "tokenizer.json"),
    (without_config, FileNotFoundError, "has no config.json"),
    (incomplete_config, ValueError, "config.json does not describe"),
    (broken_config, ValueError, "config.json is damaged"),
    (unknown_architecture, ValueError, "zzz"),
    (bad_rows, ValueError, "3 of the head's 203 rows hold NaN or infinity"),
    (bad_scales, ValueError, "1 of the head's 203 rows hold NaN or infinity"),
]


@pytest.mark.parametrize(
    ("change", "error", "pattern"),
    BAD_SOURCES,
    ids=[change.__name__ for change, _, _ in BAD_SOURCES],
)
def test_bad_source(change, error, pattern, source, tmp_path, capsys):
    change(source)

    fails_everywhere(source, tmp_path / "target", {}, error, pattern, capsys)


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


def test_head_that_cannot_be_found(tmp_path, capsys):
    # With tied weights mlx-lm's seed_oss multiplies by the embedding itself.
    source = tiny.write_folder(tmp_path / "source", "seed_oss")

    pattern = "Cannot find the vocabulary head of architecture 'seed_oss'"
    fails_everywhere(source, tmp_path / "target", {}, ValueError, pattern, capsys)
