"""What the wheel and the sdist carry; both are built here."""

import ast
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

REPOSITORY = Path(__file__).parent.parent
KERNELS = sorted(path.name for path in (REPOSITORY / "metal").glob("*.metal"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("wheel"))
    builder = WheelBuilder(str(REPOSITORY))
    path = next(iter(builder.build(directory=folder, versions=["standard"])))
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_has_the_plugin_where_mlx_lm_looks(wheel):
    plugin = (REPOSITORY / "plugin" / "flashhead.py").read_bytes()

    assert wheel.read("mlx_lm/models/flashhead.py") == plugin
    # It adds to mlx-lm and replaces nothing of it.
    assert [n for n in wheel.namelist() if n.startswith("mlx_lm/")] == [
        "mlx_lm/models/flashhead.py"
    ]


def test_wheel_has_all_of_the_package(wheel):
    sources = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "mlx_flashhead").rglob("*.py")
    }

    assert len(KERNELS) >= 3
    metal = {
        f"mlx_flashhead/metal/{path.name}"
        for path in (REPOSITORY / "metal").iterdir()
        if path.suffix in (".metal", ".h")
    }
    assert {f"mlx_flashhead/metal/{name}" for name in KERNELS} < metal
    assert sources | metal | {"mlx_flashhead/py.typed"} <= set(wheel.namelist())
    for name in metal:
        file = REPOSITORY / "metal" / Path(name).name
        assert wheel.read(name) == file.read_bytes()


def test_wheel_has_nothing_else(wheel):
    tops = {name.split("/")[0].split("-")[0] for name in wheel.namelist()}

    assert tops == {"mlx_flashhead", "mlx_lm"}
    assert not [n for n in wheel.namelist() if n.endswith((".pyc", ".safetensors"))]


def test_wheel_says_what_it_needs_and_offers(wheel):
    (metadata,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
    (scripts,) = (n for n in wheel.namelist() if n.endswith("/entry_points.txt"))
    (licence,) = (n for n in wheel.namelist() if n.endswith("/licenses/LICENSE"))
    needs = {
        line.removeprefix("Requires-Dist: ").split(">=")[0]
        for line in wheel.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }

    assert needs == {"mlx", "mlx-lm", "numpy", "transformers", "huggingface-hub"}
    commands = wheel.read(scripts).decode()
    assert "mlx_flashhead.convert = mlx_flashhead.cli:convert_main" in commands
    assert "mlx_flashhead.benchmark = mlx_flashhead.cli:benchmark_main" in commands
    assert "mlx_flashhead.evaluate = mlx_flashhead.cli:evaluate_main" in commands
    assert b"Apache License" in wheel.read(licence)


def test_sdist_can_make_the_wheel(tmp_path):
    builder = SdistBuilder(str(REPOSITORY))
    path = next(iter(builder.build(directory=str(tmp_path), versions=["standard"])))
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = (path for path in tmp_path.iterdir() if path.is_dir())

    again = WheelBuilder(str(root))
    made = next(iter(again.build(directory=str(tmp_path), versions=["standard"])))

    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
    assert {f"mlx_flashhead/metal/{name}" for name in KERNELS} <= names
    assert {"mlx_lm/models/flashhead.py", "mlx_flashhead/py.typed"} <= names


def test_one_module_opens_the_kernels():
    """Each kernel file is loaded by exactly one module."""
    launched = {}
    for path in sorted((REPOSITORY / "mlx_flashhead" / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "build_kernel"
                and isinstance(node.args[0], ast.Constant)
            ):
                launched.setdefault(f"{node.args[0].value}.metal", set()).add(path.name)
    assert sorted(launched) == KERNELS
    assert all(len(modules) == 1 for modules in launched.values())
