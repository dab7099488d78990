"""The harness wraps a body in the very text that MLX generates.

Exporting a function traces a kernel call without Metal, and MLX then prints the
source it would compile: the independent answer on every machine.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from metal_on_cpu.signature import write_kernel

METAL_FOLDER = Path(__file__).parents[1] / "metal"


def mlx_source(tmp_path, **call) -> str:
    """Return the kernel text that MLX prints for a call."""
    inputs = call.pop("inputs")
    kernel = mx.fast.metal_kernel(
        name="probe",
        input_names=list(inputs),
        output_names=list(call["outputs"]),
        source=call["source"],
        header=call["header"],
    )

    def function(*arrays):
        return kernel(
            inputs=list(arrays),
            template=call["template"],
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
            output_shapes=[(8,)] * len(call["outputs"]),
            output_dtypes=list(call["outputs"].values()),
            verbose=True,
        )

    printed = tmp_path / "printed.txt"
    sys.stdout.flush()
    kept = os.dup(1)
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        try:
            mx.export_function(str(tmp_path / "f.mlxfn"), function, *inputs.values())
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    text = re.search(r"```\n(.*)\n```", printed.read_text("utf-8"), re.DOTALL)
    if text is None:
        pytest.skip("this MLX does not print kernels without Metal")
    return text[1]


CASES = {
    "every kind of input": {
        "inputs": {
            "x": mx.zeros((3, 5), mx.bfloat16),
            "tiny": mx.zeros((7,), mx.float16),
            "number": mx.array(3),
            "ids": mx.zeros((8,), mx.uint32),
        },
        "outputs": {"out": mx.float32, "keys": mx.int64},
        "template": [("T", mx.bfloat16), ("D", -3), ("Flag", True)],
        "header": "// a header\n",
        "source": "out[0] = x_shape[0] + x_strides[1] + tiny_ndim;\n"
        "keys[thread_position_in_grid.x] = ids[thread_index_in_simdgroup];",
    },
    "no template, no attribute": {
        "inputs": {"x": mx.zeros((8,))},
        "outputs": {"out": mx.float16},
        "template": [],
        "header": "",
        "source": "out[0] = x[0];",
    },
    "names that end another's": {
        "inputs": {"x": mx.zeros((8,)), "max": mx.zeros((9,))},
        "outputs": {"out": mx.int32},
        "template": [("N", 1)],
        "header": "",
        "source": "// max_shape, threads_per_grid\nout[0] = N;",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_signature_is_the_text_that_mlx_generates(case, tmp_path):
    call = CASES[case]
    expected = mlx_source(tmp_path, **call)

    _, text = write_kernel(name="probe", **call)

    assert text.strip() == expected.strip()


@pytest.mark.parametrize("path", sorted(METAL_FOLDER.glob("*.metal")), ids=str)
def test_signature_of_our_kernels_is_that_of_mlx(path, tmp_path):
    names = re.findall(r"(\w+) \[", path.read_text("utf-8").split("Output")[0])
    call = {
        "inputs": {name: mx.zeros((4, 8), mx.uint32) for name in dict.fromkeys(names)},
        "outputs": {"out": mx.float32},
        "template": [("T", mx.float16)],
        "header": "",
        "source": path.read_text("utf-8"),
    }
    expected = mlx_source(tmp_path, **call)

    _, text = write_kernel(name="probe", **call)

    assert text.strip() == expected.strip()
