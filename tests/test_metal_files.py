"""The Metal sources: one place opens them, one module uses each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted((REPOSITORY / "metal").glob("*.metal"))
HEADERS = sorted((REPOSITORY / "metal").glob("*.h"))
MODULES = sorted((REPOSITORY / "mlx_flashhead").rglob("*.py"))
ATTRIBUTE = re.compile(r"\b\w+_(?:in|per)_(?:grid|threadgroup|simdgroup)\b")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_each_kernel_is_built_by_exactly_one_module(source):
    users = [m.name for m in MODULES if f'"{source.stem}", ' in m.read_text("utf-8")]

    assert users == [f"{source.stem}.py"]


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_each_header_is_named_by_the_launcher_alone(header):
    users = [m.name for m in MODULES if header.name in m.read_text("utf-8")]

    assert "_launch.py" in users


def test_only_the_launcher_opens_the_folder():
    users = [m.name for m in MODULES if re.search(r'["/]metal["/]', m.read_text())]

    assert [u for u in users if u != "_launch.py"] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_comments_name_no_attribute_and_no_shape(source):
    """MLX would make a parameter of either, wherever it stands."""
    comments = " ".join(re.findall(r"//.*", source.read_text("utf-8")))

    assert not ATTRIBUTE.findall(comments)
    assert not re.findall(r"\w+_(?:shape|strides|ndim)\b", comments)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_inputs_that_may_be_small_are_not_bound_to_an_address_space(source):
    """Inputs of fewer than 8 elements are in the constant address space."""
    text = source.read_text("utf-8")
    may_be_small = (
        "scales|biases|bias|offset|threshold|limits|centroid_logits|cluster_tokens"
        "|head_bias"
    )

    assert not re.findall(rf"(?:device|constant)[^;\n]*= *(?:{may_be_small})\b", text)
    assert not re.findall(rf"\((?:const )?device[^)]*\)(?:{may_be_small})\b", text)
