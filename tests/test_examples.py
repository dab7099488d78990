"""The scripts a user would copy run as they stand."""

import subprocess
import sys
from pathlib import Path

import mlx_lm
from mlx_lm.sample_utils import make_sampler

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True
    )


def test_replace_head_example_answers_as_the_model_does(tiny_llama):
    answer = run(EXAMPLES / "replace_head.py", tiny_llama, "b c d")

    assert answer.returncode == 0, answer.stderr
    model, tokenizer = mlx_lm.load(str(tiny_llama))
    expected = mlx_lm.generate(
        model, tokenizer, "b c d", max_tokens=200, sampler=make_sampler(temp=0.0)
    )
    # A random model's dense arg max is not always found; its first token here is.
    assert answer.stdout.split()[0] == expected.split()[0]
    assert "Calibrating" in answer.stderr
    assert "Fitting centroids: 100%" in answer.stderr


def test_replace_head_example_shows_its_usage():
    answer = run(EXAMPLES / "replace_head.py")

    assert answer.returncode == 2
    assert "python examples/replace_head.py" in answer.stderr


def test_smollm2_example_keeps_an_existing_folder(smollm2):
    before = (smollm2 / "model.safetensors").stat().st_mtime_ns

    answer = run(EXAMPLES / "smollm2_from_pypi.py", smollm2)

    assert answer.returncode == 0
    assert "there already" in answer.stdout
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == before
