"""Imports point one way; mlx-lm, transformers and the Hub are known to a few modules.

The tables are the design. A module that needs more than its row allows is a decision,
to be taken here as well.
"""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "mlx_flashhead"

MAY_IMPORT = {
    "blocks": set(),
    "config": {"blocks"},
    "options": {"config"},
    "sample_text": set(),
    "statistics": set(),
    "vocabulary": set(),
    "clustering": set(),
    "packing": {"config"},
    "sampling": {"blocks"},
    "kernels": {"blocks", "packing"},
    "head": {"config", "packing", "kernels", "sampling"},
    "checkpoint": {"blocks", "config", "packing", "head"},
    "forward": {"head"},
    "attach": {"config", "packing", "head", "forward"},
    "measure": {"packing", "clustering", "head"},
    "loading": {"config"},
    "positions": {"forward", "sample_text"},
    "heads": {"attach", "forward", "head", "loading", "measure", "packing"},
    "centroids": {"config", "clustering", "packing", "statistics"},
    "calibration": {
        *("attach", "blocks", "centroids", "heads", "kernels", "positions"),
        *("statistics", "vocabulary"),
    },
    "coarse": {
        *("calibration", "centroids", "config", "packing", "statistics"),
        "vocabulary",
    },
    "tuning": {
        *("blocks", "calibration", "centroids", "coarse", "options", "packing"),
        "positions",
    },
    "build": {
        *("attach", "blocks", "calibration", "centroids", "clustering", "coarse"),
        *("config", "head", "options", "packing", "tuning", "vocabulary"),
    },
    "replacement": {
        *("attach", "build", "calibration", "options", "packing", "vocabulary"),
    },
    "report": {"calibration", "config", "evaluation", "measure"},
    "saving": {"build", "checkpoint", "loading", "report"},
    "conversion": {
        *("attach", "build", "calibration", "config", "evaluation", "head", "heads"),
        *("loading", "measure", "options", "packing", "positions", "replacement"),
        *("report", "sample_text", "saving"),
    },
    "benchmark": {
        *("packing", "head", "attach", "forward", "measure", "build", "heads"),
        *("loading", "positions"),
    },
    "evaluation": {
        *("blocks", "build", "centroids", "clustering", "head", "heads", "kernels"),
        *("loading", "packing", "positions", "sample_text"),
    },
    "cli": {"conversion", "benchmark", "evaluation"},
}
HOSTS = {
    "mlx_lm": {
        *("benchmark", "conversion", "loading", "positions", "replacement", "saving"),
    },
    # Optional: the extra "plot".
    "matplotlib": {"evaluation"},
    "huggingface_hub": {"loading", "report", "saving", "cli"},
    "transformers": set(),
}
OUTSIDE = {"mlx", "numpy", *HOSTS}


def imported_by(path: Path) -> set[str]:
    """Return the dotted names that a file imports, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def files_of(layer: str) -> list[Path]:
    return [*PACKAGE.glob(f"{layer}.py"), *PACKAGE.glob(f"{layer}/**/*.py")]


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_one_way(layer):
    assert files_of(layer)
    for path in files_of(layer):
        parts = [name.split(".") for name in imported_by(path)]
        ours = {part[1] for part in parts if part[0] == "mlx_flashhead"}
        assert ours - {layer} <= MAY_IMPORT[layer], path
        for host, known_to in HOSTS.items():
            assert layer in known_to or host not in {p[0] for p in parts}, path


def test_the_table_has_no_circle_and_nothing_to_spare():
    placed = set()
    while ready := {
        layer
        for layer, below in MAY_IMPORT.items()
        if layer not in placed and below <= placed
    }:
        placed |= ready
    assert placed == set(MAY_IMPORT)

    for layer, below in MAY_IMPORT.items():
        names = set().union(*(imported_by(path) for path in files_of(layer)))
        used = {n.split(".")[1] for n in names if n.startswith("mlx_flashhead.")}
        assert below <= used, layer
        for host, known_to in HOSTS.items():
            is_used = host in {name.split(".")[0] for name in names}
            assert is_used == (layer in known_to), (layer, host)


def test_every_module_has_a_layer():
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    layers = {path.parts[0].removesuffix(".py") for path in paths}
    assert layers == {"__init__", *MAY_IMPORT}


def test_nothing_else_is_needed_at_run_time():
    for path in PACKAGE.rglob("*.py"):
        top = {name.split(".")[0] for name in imported_by(path)}
        others = top - OUTSIDE - {"mlx_flashhead", "__future__"}
        standard = set(sys.stdlib_module_names)
        assert others <= standard, path


def test_plugin_knows_the_host_and_little_of_us():
    names = imported_by(REPOSITORY / "plugin" / "flashhead.py")
    ours = {n.split(".")[1] for n in names if n.startswith("mlx_flashhead.")}
    assert ours == {"attach", "checkpoint", "config", "head"}


def test_only_the_command_line_prints():
    for path in PACKAGE.rglob("*.py"):
        calls = (
            node.func.id
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        )
        assert path.name == "cli.py" or "print" not in calls, path
