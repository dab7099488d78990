"""Kernels with the calling convention of ``mx.fast.metal_kernel``, run on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .compiler import build_library
from .runner import Report, run_grid
from .signature import Template, extra_inputs, template_arguments, write_kernel

_Triple = tuple[int, int, int]

# Order of threads in kernels made from now on; tests of races change it.
DEFAULT_SEED = 0


class CpuKernel:
    """A kernel made from a body, as ``mx.fast.metal_kernel`` makes it.

    Attributes:
        seed: Order of threads and threadgroups in the next launch.
        report: What the last launch did; ``None`` before it.
    """

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
    ) -> None:
        self.name = name
        self.input_names = list(input_names)
        self.output_names = list(output_names)
        self.source = source
        self.header = header
        self.seed = DEFAULT_SEED
        self.report: Report | None = None

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        grid: _Triple,
        threadgroup: _Triple,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Template = (),
        init_value: float | None = None,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the grid; arguments as those of MLX's kernels."""
        named = {
            name: value if isinstance(value, mx.array) else mx.array(value)
            for name, value in zip(self.input_names, inputs, strict=True)
        }
        dtypes = dict(zip(self.output_names, output_dtypes, strict=True))
        full_name, text = write_kernel(
            self.name, self.source, self.header, named, dtypes, template
        )
        # Messages count lines from the body's first.
        text = text.replace(self.source, f'#line 1 "{self.name}.metal"\n{self.source}')
        library = build_library(
            text, full_name, template_arguments(template), f"header of {self.name}"
        )
        buffers = self._input_buffers(named)
        for name, shape in zip(self.output_names, output_shapes, strict=True):
            filled = mx.full(shape, init_value or 0, dtype=dtypes[name])
            buffers[name] = to_numpy(filled)
        outputs = dict.fromkeys(self.output_names, init_value is not None)
        self.report = run_grid(
            library, buffers, outputs, tuple(grid), tuple(threadgroup), self.seed
        )
        return [to_mlx(buffers[n], dtypes[n]) for n in self.output_names]

    def _input_buffers(self, named: dict[str, mx.array]) -> dict[str, np.ndarray]:
        """Return the inputs and what the body asks to know of them, in order."""
        buffers = {}
        for name, array in named.items():
            buffers[name] = to_numpy(array)
            strides = np.cumprod([1, *array.shape[:0:-1]])[::-1]
            extras = {
                "shape": np.array(array.shape, np.int32),
                "strides": strides.astype(np.int64),
                "ndim": np.array([array.ndim], np.int32),
            }
            if array.ndim:
                for kind in extra_inputs(self.source, name):
                    buffers[f"{name}_{kind}"] = extras[kind]
        return buffers


# Tests put it in the place of mx.fast.metal_kernel.
metal_kernel = CpuKernel


def library_kernel(
    text: str,
    name: str,
    arguments: str,
    buffers: dict[str, np.ndarray],
    outputs: Sequence[str],
    *,
    grid: _Triple,
    threadgroup: _Triple,
    seed: int = 0,
) -> Report:
    """Run a kernel that has its own signature, such as one of MLX's.

    Args:
        text: Metal source that defines the kernel.
        name: Its function.
        arguments: Its template arguments with their brackets.
        buffers: Arrays by name, in the order of its buffers.
        outputs: Names of those it writes, which change in place.
        grid: Threads in each dimension.
        threadgroup: Threads of a threadgroup in each dimension.
        seed: Order of threads and threadgroups.
    """
    library = build_library(text, name, arguments, f"{name}.metal")
    unwritten = dict.fromkeys(outputs, False)
    return run_grid(library, buffers, unwritten, grid, threadgroup, seed)


def to_numpy(array: mx.array) -> np.ndarray:
    """Return a contiguous copy of an array's bits; bfloat16 becomes uint16."""
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(plain, order="C")


def to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Return the array whose bits ``to_numpy`` gave."""
    plain = mx.array(array)
    return plain.view(dtype) if dtype == mx.bfloat16 else plain
