"""Metal kernels on a CPU: test equipment, described in README.md beside this file."""

from .compiler import sees_whole_vectors
from .kernels import CpuKernel, library_kernel, metal_kernel
from .runner import BufferReport, KernelError, Report

__all__ = [
    "BufferReport",
    "CpuKernel",
    "KernelError",
    "Report",
    "library_kernel",
    "metal_kernel",
    "sees_whole_vectors",
]
