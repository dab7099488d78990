"""Finds, builds and lays out the Metal kernels; decides whether they run.

The only module that opens ``metal/``. Kernels are built from the shipped text at
their first use: without Metal, building works and calling raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_flashhead.packing import PackedRows

# Metal's limit; a row of D = 4096 floats needs all of them.
_MAX_THREADS = 1024
# Enough threads to hide the latency of memory, few enough that several threadgroups
# fit on a core and the last ones do not leave cores idle.
_TARGET_THREADS = 192
# Words of weights that a thread has in registers, 4 rows at 4 and 8 bits: one hidden
# chunk is loaded for as many rows, and as many loads are in flight.
_WORDS_IN_REGISTERS = 16

# MLX passes smaller inputs in the constant address space; weights are read through
# device pointers.
_MIN_DEVICE_SIZE = 8

_GROUP_SIZES = (32, 64, 128)
_HEADERS = ("packed_rows.h", "cluster_keys.h")

_forced: ContextVar[str | None] = ContextVar("flashhead_kernels", default=None)


@contextmanager
def use_kernels(path: Literal["metal", "ops"]) -> Iterator[None]:
    """Run the Metal kernels, or their twins in MLX ops, whatever the device.

    For tests, and to compare the two on a Mac. Holds in the thread that asks for it;
    formats that the kernels do not have use the twins in any case.

    Args:
        path: ``metal`` or ``ops``.
    """
    if path not in ("metal", "ops"):
        raise ValueError(f"got kernels {path!r}; use 'metal' or 'ops'.")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def metal_ready() -> bool:
    """Return whether the Metal kernels run here: forced, or on a Mac's GPU."""
    forced = _forced.get()
    if forced is not None:
        return forced == "metal"
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


@dataclass(frozen=True)
class TileShape:
    """How a threadgroup walks over rows: a chunk of a row for each thread.

    Attributes:
        chunks_per_row: Threads that one row takes.
        rows_per_pass: Rows that the threadgroup loads at once.
        passes: Times it does so before it adds up.
    """

    chunks_per_row: int
    rows_per_pass: int
    passes: int

    @property
    def num_threads(self) -> int:
        """Threads of a threadgroup."""
        return self.chunks_per_row * self.rows_per_pass

    @property
    def num_rows(self) -> int:
        """Rows of a tile."""
        return self.rows_per_pass * self.passes


def storage_bits(rows: PackedRows) -> int:
    """Return the width of a stored value: 2 to 8, or 16 and 32 for floats."""
    if rows.quantization is None:
        return rows.weight.itemsize * 8
    return rows.quantization.bits


def values_per_chunk(bits: int) -> int:
    """Return how many values a thread loads at once (``Chunk`` in packed_rows.h)."""
    if 32 % bits:
        return 32
    return 32 if bits == 2 else 128 // bits


def has_kernel(hidden: mx.array, rows: PackedRows) -> bool:
    """Return whether the kernels can multiply these arrays."""
    dtypes = (mx.float32, mx.float16, mx.bfloat16)
    depth = hidden.shape[-1]
    if hidden.dtype not in dtypes or depth % 32 or rows.weight.size < _MIN_DEVICE_SIZE:
        return False
    if depth // values_per_chunk(storage_bits(rows)) > _MAX_THREADS:
        return False
    if rows.quantization is None:
        return rows.weight.dtype in dtypes
    is_affine = rows.quantization.mode == "affine"
    return is_affine and rows.quantization.group_size in _GROUP_SIZES


@cache
def tile_shape(bits: int, depth: int) -> TileShape:
    """Choose the tile for rows of ``depth`` values.

    A threadgroup takes whole rows, so that threads keep their columns. The number of
    rows side by side is the one that fills simdgroups best, and of those the one
    nearest to ``_TARGET_THREADS`` threads.

    Args:
        bits: Width of a stored value.
        depth: Length of a row, D.
    """
    chunks = depth // values_per_chunk(bits)

    def order(rows: int) -> tuple[float, int]:
        threads = rows * chunks
        idle = -threads % 32 / (threads + -threads % 32)
        return round(idle, 2), abs(threads - _TARGET_THREADS)

    rows_per_pass = min(range(1, _MAX_THREADS // chunks + 1), key=order)
    words_per_chunk = values_per_chunk(bits) * bits // 32
    return TileShape(chunks, rows_per_pass, _WORDS_IN_REGISTERS // words_per_chunk)


def row_template(
    hidden: mx.array, rows: PackedRows, tile: TileShape
) -> list[tuple[str, int | mx.Dtype]]:
    """Return the template arguments that tell a kernel the format of ``rows``."""
    quantization = rows.quantization
    return [
        ("T", hidden.dtype),
        ("W", rows.weight.dtype),
        ("Bits", storage_bits(rows)),
        ("D", hidden.shape[-1]),
        ("GroupSize", quantization.group_size if quantization else 0),
        ("RowsPerPass", tile.rows_per_pass),
        ("Passes", tile.passes),
    ]


def row_inputs(rows: PackedRows) -> list[mx.array]:
    """Return weight, scales and biases; floats have only the first."""
    return [
        rows.weight,
        rows.weight if rows.scales is None else rows.scales,
        rows.weight if rows.biases is None else rows.biases,
    ]


@cache
def scalars(*values: int) -> mx.array:
    """Return small numbers as an array for a kernel, made once."""
    array = mx.array(values, dtype=mx.uint32)
    mx.eval(array)
    return array


@cache
def build_kernel(name: str, inputs: tuple[str, ...]) -> Any:
    """Return the kernel whose body is ``metal/<name>.metal``; its output is ``out``."""
    return mx.fast.metal_kernel(
        name=f"flashhead_{name}",
        input_names=list(inputs),
        output_names=["out"],
        source=_read(f"{name}.metal"),
        header="".join(_read(header) for header in _HEADERS),
    )


def _read(file_name: str) -> str:
    """Return the text of a file of ``metal/``."""
    return _folder().joinpath(file_name).read_text("utf-8")


def _folder() -> Traversable:
    """Return ``metal/``: in the package, or beside it in an editable install."""
    packed = files("mlx_flashhead").joinpath("metal")
    if packed.is_dir():
        return packed
    return Path(__file__).parents[2] / "metal"
