"""The folder that a conversion writes is whole, or it is not there."""

import signal
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest
import tiny

from mlx_flashhead import convert, saving

# Stops in the middle of saving: weights and tokenizer are written, the rest is not.
PAUSED = """
import signal, sys, time
from mlx_flashhead import saving
from mlx_flashhead.cli import convert_main

def pause(*args, **kwargs):
    print("paused", flush=True)
    time.sleep(120)

# As at a terminal: a shell starts its background jobs deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
saving.model_card = pause
sys.exit(convert_main(sys.argv[1:]))
"""

# As on a full disk: no file may grow beyond 40 kB.
LIMITED = """
import resource, signal, sys
from mlx_flashhead.cli import convert_main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, -1))
sys.exit(convert_main(sys.argv[1:]))
"""


@pytest.fixture
def source(tmp_path):
    return tiny.write_folder(tmp_path / "source")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start_paused(source: Path, target: Path) -> subprocess.Popen:
    """Start a conversion and return when it is in the middle of saving."""
    arguments = ["--hf-path", source, "--mlx-path", target, "--no-calibration"]
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "paused\n"
    return process


def test_killed_conversion_leaves_nothing_that_loads(source, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    process = start_paused(source, work / "target")

    process.kill()
    process.communicate()

    (partial,) = work.iterdir()
    assert partial.name.startswith(".target.")
    assert (partial / "model.safetensors").exists()
    with pytest.raises(FileNotFoundError):
        mlx_lm.load(str(partial))

    convert(source, work / "target", calibrate=False)

    assert names_in(work) == ["target"]


def test_a_running_conversion_is_left_alone(source, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    process = start_paused(source, work / "target")
    try:
        convert(source, work / "target", calibrate=False)

        assert len(names_in(work)) == 2
    finally:
        process.terminate()
        process.communicate()
    assert names_in(work) == ["target"]


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_stopped_conversion_cleans_up(sent, status, source, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    process = start_paused(source, work / "target")

    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == status
    assert "Traceback" not in stderr
    assert names_in(work) == []


def test_full_disk_leaves_nothing(source, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    folders = ["--hf-path", source, "--mlx-path", work / "target"]
    arguments = [*folders, "--no-calibration"]

    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: The weights cannot be written")
    assert done.stderr.count("\n") == 1
    assert names_in(work) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_any_failure_while_saving_leaves_nothing(error, source, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(saving, "save_config", fail)
    before = names_in(tmp_path)

    with pytest.raises(error):
        convert(source, tmp_path / "target", calibrate=False)

    assert names_in(tmp_path) == before


def test_existing_output_is_refused_before_any_work(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").write_text("as it was")

    # The source does not exist either: it is not looked at.
    with pytest.raises(FileExistsError, match=f"{target} exists already"):
        convert(tmp_path / "absent", target)

    assert (target / "kept").read_text() == "as it was"
