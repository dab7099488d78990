"""The tests would notice: kernels with a line taken out or changed are caught.

A mutant must be refused by the harness, give different results for different orders of
threads, or miss the float64 answer.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from kernel_cases import harness_kernels, in_float64
from metal_on_cpu import KernelError
from test_kernels_centroid_scores import Case as ScoresCase
from test_kernels_cluster_logits import SHAPE, SINGLE, Case
from test_kernels_probe_threshold import expected_keys, find

from mlx_flashhead.kernels import _launch

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def scores_are_right() -> bytes:
    """Run step 1 and return its result's bits."""
    case = ScoresCase("4/64", "f32", 3, 70, 576)
    actual = case.run()
    case.answer().assert_matches(actual)
    return in_float64(actual).tobytes()


def threshold_is_right() -> bytes:
    """Run step 2 and return its result's bits."""
    # Two blocks of 4128 and 4116; the threshold falls among signed zeros in both.
    logits = np.random.default_rng(0).integers(-9, 9, (3, 8244)).astype(np.float32)
    logits[1] = np.where(logits[1] == 8, 5, np.resize([0.0, -0.0], 8244))
    actual = [find(logits, count) for count in (770, 8244)]
    assert actual == [expected_keys(logits, count) for count in (770, 8244)]
    return str(actual).encode()


def logits_are_right() -> bytes:
    """Run step 3 and return its result's bits."""
    shapes = [
        {**SHAPE, "D": 96, "N": 3, "probes": 20, "bias": "f32"},
        # The last slots of the second threadgroup have no row.
        {**SINGLE, "N": 3, "K": 300, "probes": 150},
        {**SINGLE, "N": 1, "K": 8244, "D": 32, "probes": 70},  # two blocks
    ]
    results = []
    for shape in shapes:
        case = Case("4/32", "f32", **shape)
        results.append(case.run())
        case.answer().assert_matches(results[-1])
    return b"".join(in_float64(result).tobytes() for result in results)


CHECKS = {
    "centroid_scores.metal": scores_are_right,
    "probe_threshold.metal": threshold_is_right,
    "cluster_logits.metal": logits_are_right,
}

# File, what is changed, into what; every barrier is taken out besides.
CHANGES = [
    ("centroid_scores.metal", "if (row < num_rows)", "if (true)"),
    ("centroid_scores.metal", "position * D + column", "column"),
    ("centroid_scores.metal", "float(bias[row])", "0.0f"),
    ("centroid_scores.metal", "offset[position]", "offset[0]"),
    ("probe_threshold.metal", "place < block_size) {\n    c", "true) {\n    c"),
    ("probe_threshold.metal", "above < rank &&", ""),
    ("probe_threshold.metal", "min(limits[0], block_size)", "limits[0]"),
    ("cluster_keys.h", "-(bits & 0x7fffffff)", "bits"),
    ("cluster_keys.h", "- long(cluster)", "+ long(cluster)"),
    ("cluster_keys.h", "0xffffu - place", "place"),
    ("cluster_keys.h", "cluster / block_chunk % num_blocks", "0u"),
    ("cluster_logits.metal", "else if (token < VocabSize)", "else"),
    ("cluster_logits.metal", "      if (token < VocabSize)", ""),
    ("cluster_logits.metal", ">=\n        threshold", ">\n        threshold"),
    ("cluster_logits.metal", "&& slot % C == 0", ""),
    ("cluster_logits.metal", "row >= num_rows ||", ""),
    ("cluster_logits.metal", "|| (probed_by[row / C] >> n & 1u) == 0", ""),
    ("cluster_logits.metal", "simd_or(", "("),
    ("cluster_logits.metal", "float(head_bias[token])", "float(head_bias[slot])"),
    ("packed_rows.h", "step < Fold", "step < Fold / 2"),
    ("packed_rows.h", "bias * hidden.total", "0.0f"),
    ("packed_rows.h", "if (is_there) {", "if (true) {"),
]


def survives(monkeypatch, check, file_name, text) -> bool:
    """Return whether a changed source passes ``check`` for several orders."""
    read = _launch._read
    monkeypatch.setattr(
        _launch, "_read", lambda name: text if name == file_name else read(name)
    )
    results = set()
    with harness_kernels():
        for seed in range(3):
            monkeypatch.setattr("metal_on_cpu.kernels.DEFAULT_SEED", seed)
            _launch.build_kernel.cache_clear()
            try:
                results.add(check())
            except (KernelError, AssertionError):
                return False
    return len(results) == 1


@pytest.mark.parametrize("name", CHECKS)
def test_unchanged_kernels_survive(monkeypatch, name):
    assert survives(monkeypatch, CHECKS[name], name, _launch._read(name))


@pytest.mark.parametrize("name", CHECKS)
def test_a_missing_barrier_is_noticed(monkeypatch, name):
    text = _launch._read(name)
    places = [match.start() for match in re.finditer(re.escape(BARRIER), text)]
    assert places

    for start in places:
        mutant = text[:start] + text[start + len(BARRIER) :]
        line = text[:start].count("\n") + 1
        assert not survives(monkeypatch, CHECKS[name], name, mutant), f"line {line}"


@pytest.mark.parametrize(("file_name", "old", "new"), CHANGES)
def test_a_changed_line_is_noticed(monkeypatch, file_name, old, new):
    text = _launch._read(file_name)
    assert old in text
    mutant = text.replace(old, new)
    checks = [CHECKS[file_name]] if file_name in CHECKS else CHECKS.values()

    assert not all(survives(monkeypatch, c, file_name, mutant) for c in checks)
