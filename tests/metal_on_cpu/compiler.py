"""Metal source -> shared library, by the system's C++ compiler, kept by content."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_FLAGS = ["-std=c++20", "-fPIC", "-w", "-g1"]
# -O1 merges repeated loads, as Metal's compiler does; -fno-tree-sra (g++ only) keeps
# the load of a whole vector one access.
_KERNEL_FLAGS = ["-O1", "-fsanitize=thread"]
_GCC_FLAGS = ["-fno-tree-sra", "--param", "tsan-instrument-func-entry-exit=0"]
# Clang would join neighbouring loads into ones that no thread of a GPU makes.
_CLANG_FLAGS = ["-fno-vectorize", "-fno-slp-vectorize"]

_ARRAY = re.compile(
    r"(?<![\w(,])threadgroup\s+([A-Za-z_][\w:<>, ]*?)\s+(\w+)((?:\s*\[[^\]]+\])*)\s*;"
)

# Where each attribute's value is found; `ids` is the thread's position.
_ATTRIBUTE_VALUES = {
    "dispatch_simdgroups_per_threadgroup": "(count(ids->full_size) + 31) / 32",
    "dispatch_threads_per_threadgroup": "triple(ids->full_size)",
    "grid_origin": "uint3(0)",
    "grid_size": "triple(ids->grid)",
    "quadgroup_index_in_threadgroup": "ids->index / 4",
    "simdgroup_index_in_threadgroup": "ids->index / 32",
    "simdgroups_per_threadgroup": "(count(ids->size) + 31) / 32",
    "thread_execution_width": "32",
    "thread_index_in_quadgroup": "ids->index % 4",
    "thread_index_in_simdgroup": "ids->index % 32",
    "thread_index_in_threadgroup": "ids->index",
    "thread_position_in_grid": (
        "triple(ids->position) + triple(ids->group) * triple(ids->full_size)"
    ),
    "thread_position_in_threadgroup": "triple(ids->position)",
    "threadgroup_position_in_grid": "triple(ids->group)",
    "threads_per_grid": "triple(ids->grid)",
    "threads_per_simdgroup": "32",
    "threads_per_threadgroup": "triple(ids->size)",
}

_ENTRY = """
static uint3 triple(const uint32_t* v) {{ return uint3(v[0], v[1], v[2]); }}
static uint count(const uint32_t* v) {{ return v[0] * v[1] * v[2]; }}
extern "C" void metal_on_cpu_entry(void** buffers, const metal_on_cpu::Ids* ids) {{
  {instance}({arguments});
}}
"""


def build_library(text: str, name: str, arguments: str, file_name: str) -> Path:
    """Compile a kernel.

    Args:
        text: Metal source that defines the kernel ``name``.
        name: The kernel's function.
        arguments: Its template arguments with their brackets, or nothing.
        file_name: What error messages call the source.

    Returns:
        Path of the library; an earlier one of the same content if there is one.
    """
    source = to_cpp(text, name, arguments, file_name)
    compiler = _compiler()
    key = hashlib.sha256((source + compiler + _support_text()).encode()).hexdigest()
    library = _cache_folder() / f"{key[:24]}.so"
    if not library.exists():
        extra = _GCC_FLAGS if _is_gcc(compiler) else _CLANG_FLAGS
        flags = [*_FLAGS, *_KERNEL_FLAGS, *extra]
        with tempfile.TemporaryDirectory() as folder:
            path, made = Path(folder, "kernel.cpp"), Path(folder, "kernel.o")
            path.write_text(source, "utf-8")
            include = [f"-I{_HERE / 'include'}", f"-I{_HERE}"]
            _run([compiler, *flags, *include, "-c", str(path), "-o", str(made)])
            linked = Path(folder, "kernel.so")
            _run([compiler, *_link_flags(), str(made), "-o", str(linked)])
            _publish(linked, library)
    return library


def to_cpp(text: str, name: str, arguments: str, file_name: str) -> str:
    """Return the C++ translation unit of a Metal kernel.

    Three rewrites: threadgroup variables come from the runtime (their address space
    must be watched), explicit instantiations go, and a caller for one thread is added.
    """
    body = re.sub(r"//.*", "", text)
    body = _ARRAY.sub(_threadgroup_variable, body)
    body = re.sub(r"template \[\[host_name\(.*", "", body)
    entry = _ENTRY.format(
        instance=name + arguments, arguments=", ".join(_call_arguments(text, name))
    )
    return f'#include <metal_stdlib>\n#line 1 "{file_name}"\n{body}\n{entry}'


def describe_address(library: Path, offset: int) -> str:
    """Return ``file:line`` of an address in a library, if the tools can tell."""
    tool = shutil.which("addr2line")
    if tool is None:
        return "unknown line"
    # A return address names the statement after the call.
    command = [tool, "-e", str(library), hex(offset - 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Path(done.stdout.split(" ")[0].strip()).name


def _threadgroup_variable(match: re.Match[str]) -> str:
    """Return the C++ for one variable in threadgroup memory."""
    kind, name, dimensions = match.groups()
    type_ = f"std::type_identity_t<{kind}{dimensions}>"
    return (
        f"auto& {name} = *[] {{ static char site; return static_cast<{type_}*>("
        f"metal_on_cpu_threadgroup(&site, sizeof({type_}))); }}();"
    )


def _call_arguments(text: str, name: str) -> list[str]:
    """Return the expressions with which one thread calls the kernel."""
    # Two calls deep is enough for [[buffer(0)]] inside the parameter list.
    match = re.search(rf"void {re.escape(name)}\(((?:[^()]|\([^()]*\))*)\)", text)
    if match is None:
        raise ValueError(f"no kernel named {name} in the source")
    calls, buffers = [], 0
    for parameter in re.sub(r"/\*.*?\*/|//.*", "", match[1]).split(","):
        attribute = re.search(r"\[\[(\w+)\]\]", parameter)
        if attribute:
            value = _ATTRIBUTE_VALUES[attribute[1]]
            is_scalar = re.search(r"\buint\s", parameter) and "triple" in value
            calls.append(f"({value}).x" if is_scalar else value)
            continue
        slot = re.search(r"\[\[buffer\((\d+)\)\]\]", parameter)
        number = int(slot[1]) if slot else buffers
        declared = re.sub(r"\[\[.*?\]\]|\b(const|device|constant)\b", "", parameter)
        star = "*" if "&" in declared else ""
        calls.append(f"{star}metal_on_cpu::AnyPointer{{buffers[{number}]}}")
        buffers += 1
    return calls


def sees_whole_vectors() -> bool:
    """Return whether a vector's load is one access: clang splits it, g++ does not."""
    return _is_gcc(_compiler())


def _compiler() -> str:
    """Return the C++ compiler's path."""
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if found is None:
        raise RuntimeError("the Metal harness needs a C++ compiler (g++ or clang)")
    return found


@cache
def _is_gcc(compiler: str) -> bool:
    """Return whether the compiler is GNU's."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return "Free Software Foundation" in done.stdout


@cache
def _support_text() -> str:
    """Return all text outside a kernel that its library depends on."""
    files = [*(_HERE / "include").iterdir(), *_HERE.glob("*.h"), Path(__file__)]
    files.append(_HERE / "runtime.cpp")
    return "".join(path.read_text("utf-8") for path in sorted(files))


def _cache_folder() -> Path:
    """Return the folder of compiled kernels, private to this user."""
    folder = Path(tempfile.gettempdir(), f"metal-on-cpu-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@cache
def runtime_library() -> Path:
    """Return the compiled runtime, one for all kernels of a process."""
    compiler = _compiler()
    key = hashlib.sha256((_support_text() + compiler).encode()).hexdigest()[:24]
    library = _cache_folder() / f"runtime-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder, "runtime.so")
            source = str(_HERE / "runtime.cpp")
            _run([compiler, *_FLAGS, "-O2", "-shared", source, "-o", str(fresh)])
            _publish(fresh, library)
    return library


def _link_flags() -> list[str]:
    """Return flags for a library whose symbols come from the loaded runtime."""
    is_mac = sys.platform == "darwin"
    return ["-shared", *(["-undefined", "dynamic_lookup"] if is_mac else [])]


def _publish(fresh: Path, target: Path) -> None:
    """Move a finished file to its name in one step: other processes may look."""
    staged = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy(fresh, staged)
    staged.replace(target)


def _run(command: list[str]) -> None:
    """Run a compiler; its messages become the error's text."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
