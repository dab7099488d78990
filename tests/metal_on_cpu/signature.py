"""The source text that ``mx.fast.metal_kernel`` makes around a kernel's body.

``test_harness_signature.py`` compares it, letter by letter, with what MLX prints.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

# Metal's thread attributes and their types; one becomes a parameter of the kernel if
# its name occurs anywhere in the body.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

_SCALARS = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}

# Smaller inputs arrive in the constant address space.
_MIN_DEVICE_SIZE = 8

Template = Sequence[tuple[str, int | bool | mx.Dtype]]


def template_arguments(template: Template) -> str:
    """Return ``<...>`` as it follows the kernel's name; empty without a template."""
    values = [
        _SCALARS[value] if isinstance(value, mx.Dtype) else str(int(value))
        for _, value in template
    ]
    return f"<{', '.join(values)}>" if values else ""


def extra_inputs(source: str, name: str) -> list[str]:
    """Return which of shape, strides and ndim of an input the body asks for."""
    return [kind for kind in ("shape", "strides", "ndim") if f"{name}_{kind}" in source]


def write_kernel(
    name: str,
    source: str,
    header: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, mx.Dtype],
    template: Template,
) -> tuple[str, str]:
    """Return the generated kernel's name and its whole text."""
    full_name = _full_name(name, inputs, outputs, template)
    parameters = []
    for input_name, array in inputs.items():
        space = "constant" if array.size < _MIN_DEVICE_SIZE else "device"
        mark = "*" if array.ndim else "&"
        parameters.append(f"const {space} {_SCALARS[array.dtype]}{mark} {input_name}")
        types = {"shape": "int*", "strides": "int64_t*", "ndim": "int&"}
        if array.ndim:
            parameters += [
                f"const constant {types[kind]} {input_name}_{kind}"
                for kind in extra_inputs(source, input_name)
            ]
    parameters += [f"device {_SCALARS[d]}* {n}" for n, d in outputs.items()]
    lines = [f"  {text} [[buffer({i})]]" for i, text in enumerate(parameters)]
    lines += [f"  {t} {a} [[{a}]]" for a, t in ATTRIBUTES.items() if a in source]
    arguments = template_arguments(template)
    text = header
    if template:
        kinds = [f"{_template_kind(value)} {key}" for key, value in template]
        text += f"template <{', '.join(kinds)}>\n"
    text += f"[[kernel]] void {full_name}(\n" + ",\n".join(lines) + ") {\n"
    text += source + "\n}\n"
    if template:
        instance = full_name + arguments
        text += f'\ntemplate [[host_name("{full_name}")]] [[kernel]] '
        text += f"decltype({instance}) {instance};\n"
    return full_name, text


def _template_kind(value: int | bool | mx.Dtype) -> str:
    """Return the kind of one template parameter."""
    if isinstance(value, mx.Dtype):
        return "typename"
    return "bool" if isinstance(value, bool) else "int"


def _full_name(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, mx.Dtype],
    template: Template,
) -> str:
    """Return the name under which MLX keeps this variant of a kernel."""
    text = f"custom_kernel_{name}"
    if template:
        arguments = template_arguments(template).replace(", ", "_").replace("-", "_")
        text += "_" + arguments.replace("<", "_").replace(">", "_")[:-1]
    for array in inputs.values():
        text += f"_{_SCALARS[array.dtype]}"
        if array.ndim == 0:
            text += "s"
        elif array.size < _MIN_DEVICE_SIZE:
            text += "c"
    return text + "".join(f"_{_SCALARS[dtype]}" for dtype in outputs.values())
