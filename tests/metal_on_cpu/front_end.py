"""Asks clang whether a kernel is well-formed with its address spaces.

The harness runs kernels in plain C++, where ``device``, ``constant``, ``threadgroup``
and ``thread`` vanish. Metal's compiler is clang, and so is the front end used here (the
PyPI package ``libclang``), in its nearest public dialect: C++ for OpenCL. It rejects a
pointer that changes its address space, a threadgroup variable in the wrong place or a
call that no overload takes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PRELUDE = Path(__file__).parent / "include" / "address_spaces.h"
_OPTIONS = ["-x", "cl", "-cl-std=clc++2021", "-cl-no-stdinc", "-Wno-everything"]
_ERROR = 3


def complaints(cindex: Any, text: str, name: str, arguments: str) -> list[str]:
    """Return clang's errors for one variant of a kernel.

    Args:
        cindex: The module ``clang.cindex``.
        text: The source that MLX generates.
        name: The kernel's function.
        arguments: Template arguments with their brackets, or nothing.
    """
    source = _PRELUDE.read_text("utf-8") + _plain_kernel(text, name, arguments)
    unit = cindex.Index.create().parse(
        "kernel.cl", args=_OPTIONS, unsaved_files=[("kernel.cl", source)]
    )
    return [str(found) for found in unit.diagnostics if found.severity >= _ERROR]


def _plain_kernel(text: str, name: str, arguments: str) -> str:
    """Return a kernel that is no template, which OpenCL does not have."""
    text = re.sub(r"template \[\[host_name.*", "", text)
    # Only the kernel's own template: those of the headers stay.
    head = re.search(rf"(?:template <([^<>]*)>\n)?\[\[kernel\]\] void {name}\(", text)
    if head is None:
        raise ValueError(f"no kernel named {name} in the source")
    parameters = (head[1] or "").split(", ") if head[1] else []
    values = arguments.strip("<>").split(", ")
    definitions = [
        f"typedef {value} {parameter.removeprefix('typename ')};"
        if parameter.startswith("typename ")
        else f"constexpr {parameter} = {value};"
        for parameter, value in zip(parameters, values, strict=bool(parameters))
    ]
    kernel = "\n".join([*definitions, f"kernel void {name}("])
    text = text[: head.start()] + kernel + text[head.end() :]
    text = re.sub(r"\[\[\w+(?:\(\d+\))?\]\]", "", text)
    # OpenCL writes a vector's constructor as a cast.
    return re.sub(r"\bfloat2\(", "(float2)(", text)
