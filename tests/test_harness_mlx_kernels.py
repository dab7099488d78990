"""MLX's own Metal kernels, from the installed wheel, through the harness.

They were written for Apple's GPUs and are tested there, so that they agree with MLX
on the CPU says that the harness does what a GPU does.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_on_cpu import library_kernel
from metal_on_cpu.kernels import to_mlx, to_numpy

HEADERS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
DTYPES = {"float": mx.float32, "half": mx.float16, "bfloat16_t": mx.bfloat16}


@cache
def declarations(header: str) -> list[str]:
    """Return the top-level declarations of a header, each with its body."""
    text = (HEADERS / header).read_text("utf-8")
    text = re.sub(r"//.*|/\*.*?\*/|#(include|pragma).*", "", text)
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"#(?:.*\\\n)*.*|[{};]", text):
        token = match[0]
        depth += {"{": 1, "}": -1}.get(token, 0)
        part = text[start : match.end()].strip()
        is_class = token == "}" and re.search(r"\bstruct\b", part.split("{")[0])
        if depth == 0 and not is_class:
            parts.append(part)
            start = match.end()
    return parts


def pick(header: str, *names: str) -> str:
    """Return the declarations of a header that declare one of ``names``."""
    wanted = re.compile(rf"\b({'|'.join(names)})\b(?!<complex)")
    found = [d for d in declarations(header) if wanted.search(d.split("{")[0])]
    assert found, f"{header} no longer declares {names}"
    return "\n".join([*found, ""])


def common() -> str:
    """Return what the kernels below need of MLX's utilities."""
    limits = pick("utils.h", "struct Limits", "instantiate_float_limit", "ceildiv")
    return pick("defines.h", "MTL_CONST", "SOFTMAX_N_READS") + limits


def scalar(value: int) -> np.ndarray:
    return np.array([value], np.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["softmax_single_row", "softmax_looped"])
@pytest.mark.parametrize("size", [1, 101, 4096])
def test_softmax_matches_mlx(kernel, dtype, size):
    x = mx.random.normal((3, size), key=mx.random.key(size)).astype(DTYPES[dtype])
    out = to_numpy(mx.zeros_like(x))
    # As MLX launches them: four values a thread, or 1024 threads in a loop.
    is_single = kernel == "softmax_single_row"
    threads = min(1024, -(-size // 128) * 32) if is_single else 1024

    library_kernel(
        common() + pick("softmax.h", "softmax_exp", kernel),
        kernel,
        f"<{dtype}, float>",
        {"in": to_numpy(x), "out": out, "axis_size": scalar(size)},
        ["out"],
        grid=(3 * threads, 1, 1),
        threadgroup=(threads, 1, 1),
    )

    actual = np.array(to_mlx(out, x.dtype).astype(mx.float32))
    expected = np.array(mx.softmax(x.astype(mx.float32), axis=-1))
    # The CPU's exponential is good to some 1e-6; 6e-8 is the smallest half.
    rtol = max(2 * mx.finfo(x.dtype).eps, 4e-6)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=6e-8)


@pytest.mark.parametrize("kernel", ["logsumexp", "logsumexp_looped"])
@pytest.mark.parametrize("seed", [0, 1])
def test_logsumexp_matches_mlx(kernel, seed):
    x = mx.random.normal((2, 1000), key=mx.random.key(seed))
    out = np.zeros(2, np.float32)
    threads = 256 if kernel == "logsumexp" else 1024

    library_kernel(
        common() + pick("logsumexp.h", kernel),
        kernel,
        "<float>",
        {"in": to_numpy(x), "out": out, "axis_size": scalar(1000)},
        ["out"],
        grid=(2 * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        seed=seed,
    )

    np.testing.assert_allclose(out, np.array(mx.logsumexp(x, axis=-1)), rtol=1e-6)


QMV = (
    "MLX_MTL_CONST",
    "SIMD_SIZE",
    "get_pack_factor",
    "get_bytes_per_pack",
    "load_vector",
    "load_vector_safe",
    "qdot",
    "qdot_safe",
    "adjust_matrix_offsets",
    "qmv_fast_impl",
    "qmv_impl",
    "affine_qmv",
    "affine_qmv_fast",
)


# 640 and 1152 are not multiples of the fast kernel's block; 20 and 13 rows are not
# multiples of the eight rows of a threadgroup.
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("kernel", "num_rows", "depth"),
    [("affine_qmv_fast", 24, 1024), ("affine_qmv", 20, 640), ("affine_qmv", 13, 1152)],
)
def test_quantized_matrix_vector_product_matches_mlx(kernel, num_rows, depth, bits):
    keys = mx.random.split(mx.random.key(bits))
    x = mx.random.normal((2, depth), key=keys[0])
    rows = mx.random.normal((num_rows, depth), key=keys[1])
    weight, scales, biases = mx.quantize(rows, group_size=64, bits=bits)
    out = np.zeros((2, num_rows), np.float32)
    # Arguments of batched products, which these are not.
    unused = {f"unused_{i}": np.zeros(1, np.int64) for i in range(8)}

    report = library_kernel(
        pick("utils.h", "elem_to_loc")
        + pick("steel/utils.h", "elem_to_loc_broadcast")
        + pick("quantized.h", *QMV),
        kernel,
        f"<float, 64, {bits}, false>",
        {
            "w": to_numpy(weight),
            "scales": to_numpy(scales),
            "biases": to_numpy(biases),
            "x": to_numpy(x),
            "y": out,
            "in_vec_size": scalar(depth),
            "out_vec_size": scalar(num_rows),
            **unused,
        },
        ["y"],
        grid=(2 * 32, -(-num_rows // 8) * 2, 1),
        threadgroup=(32, 2, 1),
    )

    expected = (
        np.array(x, np.float64)
        @ np.array(mx.dequantize(weight, scales, biases, 64, bits), np.float64).T
    )
    np.testing.assert_allclose(out, expected, atol=4 * depth * mx.finfo(x.dtype).eps)
    np.testing.assert_allclose(
        out,
        np.array(mx.quantized_matmul(x, weight, scales, biases, True, 64, bits)),
        atol=4 * depth * mx.finfo(x.dtype).eps,
    )
    if num_rows % 8 == 0:
        assert report.buffers["w"].bytes_read == 2 * weight.nbytes
