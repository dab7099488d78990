"""Planted bugs: the harness catches each kind, and names the line."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_on_cpu import KernelError, metal_kernel, sees_whole_vectors

FIRST = "const uint i = thread_position_in_grid.x;\n"


def run(body, *, seed=0, size=96, group=64, x=None):
    """Run a body over ``size`` threads with input ``x`` and float output ``out``."""
    kernel = metal_kernel("planted", ["x"], ["out"], FIRST + body)
    kernel.seed = seed
    x = mx.arange(size, dtype=mx.float32) if x is None else x
    (out,) = kernel(
        inputs=[x],
        grid=(size, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
    )
    return np.array(out), kernel.report


BUGS = {
    "read past the end": ("out[i] = x[i + 1];", "out of bounds: read of 4 .* of x"),
    "read before the start": ("out[i] = x[i - 1];", "out of bounds: read"),
    "index wrapped at 32 bits": (
        "out[i] = x[i - 2147483647u];",
        "out of bounds: read",
    ),
    "write past the end": (
        "out[i + 1] = x[i];",
        "out of bounds: write of 4 .* of out",
    ),
    "past a threadgroup array": (
        "threadgroup float a[64];\nthreadgroup float b[64];\n"
        "a[i % 64 + 1] = 0.0f; b[i % 64] = 0.0f; out[i] = 0.0f;",
        "out of bounds: write of 4 bytes at threadgroup",
    ),
    "misaligned vector": (
        "const uint4 v = *(const device uint4*)(x + 1);\n"
        "out[i] = float(v.x + v.y + v.z + v.w);",
        "misaligned: 16 bytes",
    ),
    "write to an input": ("((device float*)x)[i] = 0.0f;", "write to input x"),
    "read of an output nobody wrote": (
        "out[i] = out[95 - i] + 1.0f;",
        "uninitialised: read of output out",
    ),
    "read of threadgroup memory nobody wrote": (
        "threadgroup float a[64];\nout[i] = a[i % 64];",
        "uninitialised: read of 4 bytes at threadgroup",
    ),
    "missing barrier": (
        "threadgroup float a[64];\na[i % 64] = x[i];\nout[i] = a[63 - i % 64];",
        "uninitialised: read",
    ),
    "barrier for some threads": (
        "if (x[i] < 40.0f)\n  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "out[i] = 1.0f;",
        r"of 64 threads, 40 wait at the barrier in line 3",
    ),
    "barrier after a return": (
        "out[i] = 1.0f;\nif (i == 5) return;\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "divergent: .* barrier in line 4, .* 1 have returned",
    ),
    "two barriers in two branches": (
        "if (i % 64 < 32) {\n threadgroup_barrier(mem_flags::mem_none);\n} else {\n"
        " threadgroup_barrier(mem_flags::mem_none);\n}\nout[i] = 1.0f;",
        "barriers in lines [35] and [35]",
    ),
    "two simdgroup operations in two branches": (
        "if (i % 2)\n out[i] = simd_sum(1.0f);\nelse\n out[i] = simd_max(1.0f);",
        "lanes of one simdgroup wait at lines [35] and [35]",
    ),
    "barrier against simdgroup operation": (
        "if (i % 2)\n threadgroup_barrier(mem_flags::mem_none);\nelse\n"
        " out[i] = simd_sum(1.0f);",
        "divergent: of 64 threads",
    ),
    "shuffle from a lane that left": (
        "out[i] = 1.0f;\nif (i % 32 == 7) return;\nout[i] = simd_shuffle(x[i], 7);",
        "lane that is not there in line 4",
    ),
    "too much threadgroup memory": (
        "threadgroup float a[8000];\nthreadgroup float b[8000];\n"
        "a[i] = b[i] = 0.0f; out[i] = 0.0f;",
        "more than 32 KB",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_harness_catches(bug):
    body, message = BUGS[bug]
    if bug == "misaligned vector" and not sees_whole_vectors():
        pytest.skip("clang splits the load of a vector")

    with pytest.raises(KernelError, match=message):
        run(body)


def test_harness_names_the_line_of_an_access():
    with pytest.raises(KernelError, match=r"planted\.metal:4"):
        run("out[i] = 0.0f;\n\nout[i] = x[i + 1];")


RACES = {
    "between threads": (
        "threadgroup float last[1];\nlast[0] = x[i];\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = last[0];"
    ),
    "between threadgroups": (
        "out[0] = x[i];\nout[i] = i == 0 ? out[0] : x[i];\n"
        "if (i > 0) { out[0] = x[i]; }"
    ),
    "missing barrier before the next round": (
        "threadgroup float a[64];\na[i % 64] = x[i];\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "const float other = a[63 - i % 64];\n"
        "a[i % 64] = -x[i];\n"
        "out[i] = other;"
    ),
}


@pytest.mark.parametrize("race", RACES)
def test_race_shows_as_a_difference_between_seeds(race):
    results = {run(RACES[race], size=128, seed=seed)[0].tobytes() for seed in range(8)}

    assert len(results) > 1


def test_correct_exchange_gives_one_result_for_all_seeds():
    body = (
        "threadgroup float a[64];\na[i % 64] = x[i];\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = a[63 - i % 64];"
    )
    expected = np.arange(128).reshape(2, 64)[:, ::-1].reshape(-1)

    results = [run(body, size=128, seed=seed)[0] for seed in range(8)]

    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_partial_threadgroup_has_the_remaining_threads():
    body = "out[i] = 100 * threads_per_threadgroup.x + simd_sum(1);"

    out, _ = run(body, size=104, group=64)

    # 64 threads in two simdgroups; then 40, of which the second simdgroup has 8.
    np.testing.assert_array_equal(out, [6432] * 64 + [4032] * 32 + [4008] * 8)


def test_simdgroup_operations_match_numpy():
    body = (
        "const uint lane = thread_index_in_simdgroup;\n"
        "if (x[0] == 0) out[i] = simd_sum(x[i]);\n"
        "if (x[0] == 1) out[i] = simd_prefix_exclusive_sum(x[i]);\n"
        "if (x[0] == 2) out[i] = simd_shuffle_xor(x[i], 5);\n"
        "if (x[0] == 3) out[i] = simd_shuffle_down(x[i], 3);\n"
        "if (x[0] == 4) out[i] = simd_max(x[i]) - simd_min(x[i]);\n"
        "if (x[0] == 5) out[i] = simd_or(1u << uint(x[i] + 9));"
    )
    values = np.random.default_rng(0).integers(-9, 9, (6, 2, 32)).astype(np.float32)
    values[:, 0, 0] = np.arange(6)
    ones = 1 << values[5].astype(int) + 9
    down = np.concatenate([values[3, :, 3:], values[3, :, -3:]], axis=1)
    expected = [
        np.repeat(values[0].sum(1, keepdims=True), 32, axis=1),
        values[1].cumsum(1) - values[1],
        values[2][:, np.arange(32) ^ 5],
        down,
        np.repeat(np.ptp(values[4], axis=1, keepdims=True), 32, axis=1),
        np.repeat(np.bitwise_or.reduce(ones, axis=1, keepdims=True), 32, axis=1),
    ]

    for x, answer in zip(values, expected, strict=True):
        out, _ = run(body, size=64, x=mx.array(x.reshape(-1)))
        np.testing.assert_array_equal(out.reshape(2, 32), answer)


def test_report_counts_bytes_and_lines():
    body = "out[i] = i < 40 ? x[i] + x[0] : 0.0f;"

    _, report = run(body, size=96)

    x = report.buffers["x"]
    assert x.bytes_read == 40 * 8
    assert x.read_counts[0] == 41
    assert x.read_counts[39 * 4] == 1
    assert x.read_counts[40 * 4] == 0
    assert (x.lines_read, x.lines_read_fully) == (2, 1)
    assert report.buffers["out"].bytes_written == 96 * 4


def test_report_counts_output_that_nobody_wrote():
    _, report = run("if (i % 2) out[i] = 1.0f;", size=96)

    assert report.buffers["out"].bytes_unwritten == 48 * 4


def test_threadgroup_over_1024_threads_is_refused():
    with pytest.raises(KernelError, match="more than 1024"):
        run("out[i] = 0.0f;", size=2048, group=1025)
