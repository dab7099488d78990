"""How a mistake is told: one sentence, exit status 1, nothing left behind."""

import re

import pytest

from mlx_flashhead import convert
from mlx_flashhead.cli import convert_main


def argv_of(source, target, options: dict) -> list[str]:
    """Return a command line that says the same as a call of ``convert``."""
    argv = ["--hf-path", str(source), "--mlx-path", str(target)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "calibrate":
            argv += ["--no-calibration"]
        elif name == "calibration_texts":
            argv += [f"--calibration-text={path}" for path in value]
        else:
            argv += [flag] if value is True else [f"{flag}={value}"]
    return argv


def assert_one_sentence(status: int, streams, pattern: str) -> None:
    """Assert that a command told of a mistake, and of nothing else."""
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
