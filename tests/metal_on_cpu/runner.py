"""Launches compiled kernels and reports what they did to memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .compiler import describe_address, runtime_library

MAX_THREADS = 1024


class KernelError(RuntimeError):
    """A kernel broke a rule that the harness checks."""


@dataclass(frozen=True)
class BufferReport:
    """What one launch asked of one buffer.

    Attributes:
        bytes_read: Bytes requested by all threads together.
        bytes_read_wide: Those requested by loads of 8 bytes or more.
        bytes_written: Bytes stored by all threads together.
        bytes_unwritten: Output bytes that no thread wrote.
        lines_read: 128-byte lines read, each once for every threadgroup that reads it.
        lines_read_fully: Those of which the threadgroup asked for every byte.
        read_counts: How often each byte was read, at most 255, uint8.
    """

    bytes_read: int
    bytes_read_wide: int
    bytes_written: int
    bytes_unwritten: int
    lines_read: int
    lines_read_fully: int
    read_counts: np.ndarray


@dataclass(frozen=True)
class Report:
    """What one launch did: a ``BufferReport`` by name, and threadgroup memory used."""

    buffers: dict[str, BufferReport]
    threadgroup_bytes: int
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("is_output", ctypes.c_uint64),
        ("is_initialised", ctypes.c_uint64),
        ("read_counts", ctypes.c_void_p),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_read_wide", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("bytes_unwritten", ctypes.c_uint64),
        ("lines_read", ctypes.c_uint64),
        ("lines_read_fully", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("grid", ctypes.c_uint64 * 3),
        ("threadgroup", ctypes.c_uint64 * 3),
        ("seed", ctypes.c_uint64),
        ("num_buffers", ctypes.c_uint64),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("error_address", ctypes.c_uint64),
        ("error", ctypes.c_char * 400),
    ]


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


@cache
def _runtime() -> Any:
    """Return the loaded runtime; kernels find its functions in the process."""
    return ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)


@cache
def _load_entry(library: Path) -> int:
    """Return the address of a compiled kernel's entry."""
    _runtime()
    entry = ctypes.CDLL(str(library)).metal_on_cpu_entry
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


def run_grid(
    library: Path,
    buffers: dict[str, np.ndarray],
    outputs: dict[str, bool],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    seed: int,
) -> Report:
    """Run every thread of a grid; output arrays are changed in place.

    Args:
        library: A kernel from ``build_library``.
        buffers: All arrays in the order of the kernel's buffers, contiguous.
        outputs: Names of the outputs, and whether each comes with values.
        grid: Threads in each dimension.
        threadgroup: Threads of a threadgroup in each dimension.
        seed: Order of threads and threadgroups.

    Raises:
        KernelError: If the kernel breaks a rule.
    """
    if min(grid) < 1 or min(threadgroup) < 1:
        raise KernelError(f"empty grid {grid} or threadgroup {threadgroup}")
    group = tuple(min(g, t) for g, t in zip(grid, threadgroup, strict=True))
    if np.prod(threadgroup) > MAX_THREADS:
        raise KernelError(
            f"threadgroup {threadgroup} has more than {MAX_THREADS} threads"
        )
    counts = {name: np.zeros(array.nbytes, np.uint8) for name, array in buffers.items()}
    table = (_Buffer * len(buffers))()
    for entry, (name, array) in zip(table, buffers.items(), strict=True):
        entry.data, entry.bytes = array.ctypes.data, array.nbytes
        entry.is_output = name in outputs
        entry.is_initialised = outputs.get(name, True)
        entry.read_counts = counts[name].ctypes.data
    launch = _Launch(_load_entry(library), grid, group, seed, len(buffers), table)
    if _runtime().metal_on_cpu_run(ctypes.byref(launch)):
        raise KernelError(_message(launch, library, list(buffers)))
    reports = {
        name: BufferReport(
            *(getattr(entry, field) for field, _ in _Buffer._fields_[5:]), counts[name]
        )
        for entry, name in zip(table, buffers, strict=True)
    }
    return Report(reports, launch.threadgroup_bytes, grid, threadgroup)


def _message(launch: _Launch, library: Path, names: list[str]) -> str:
    """Return an error's text with the source line and the buffers' names."""
    text = launch.error.decode()
    for number in reversed(range(len(names))):
        text = text.replace(f"buffer {number} ", f"{names[number]} ")
    if launch.error_address:
        info = _DlInfo()
        entry = ctypes.c_void_p(launch.entry)
        ctypes.CDLL(None).dladdr(entry, ctypes.byref(info))
        text += f" ({describe_address(library, launch.error_address - info.base)})"
    return text
