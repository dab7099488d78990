"""The tests would notice: kernels with a line taken out or changed are caught.

A mutant must be refused by the harness, give different results for different orders of
threads, or miss the float64 answer.
"""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import (
    harness_kernels,
    in_float64,
    product,
    random_hidden,
    random_rows,
)
from metal_on_cpu import KernelError
from test_kernels_cluster_logits import SHAPE, Case
from test_kernels_probe_threshold import expected_keys, find

from mlx_flashhead.kernels import _launch
from mlx_flashhead.kernels.centroid_scores import centroid_scores

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def scores_are_right() -> bytes:
    """Run step 1 and return its result's bits."""
    hidden = random_hidden(3, 576, mx.float32, seed=1)
    centroids = random_rows(70, 576, "4/64", seed=2)
    actual = centroid_scores(hidden, centroids)
    product(hidden, centroids).assert_matches(actual)
    return in_float64(actual).tobytes()


def threshold_is_right() -> bytes:
    """Run step 2 and return its result's bits."""
    logits = np.random.default_rng(0).integers(-9, 9, (3, 900)).astype(np.float32)
    bias = np.full(900, -0.0, np.float32)
    # The pinned clusters are the best; the last probe falls among signed zeros.
    logits[:, :3] = 50
    logits[1, 3:] = np.where(logits[1, 3:] == 8, 5, np.resize([0.0, -0.0], 897))
    actual = find(logits, bias, 3, 77)
    assert actual == expected_keys(logits, bias, 3, 77)
    return str(actual).encode()


def logits_are_right() -> bytes:
    """Run step 3 and return its result's bits."""
    case = Case("4/32", "f32", **{**SHAPE, "D": 96, "N": 3, "probes": 20})
    actual = case.run()
    case.answer().assert_matches(actual)
    return in_float64(actual).tobytes()


CHECKS = {
    "centroid_scores.metal": scores_are_right,
    "probe_threshold.metal": threshold_is_right,
    "cluster_logits.metal": logits_are_right,
}

# File, what is changed, into what; every barrier is taken out besides.
CHANGES = [
    ("centroid_scores.metal", "first_row + row < num_rows", "true"),
    ("centroid_scores.metal", "position * D + column", "column"),
    ("probe_threshold.metal", "cluster >= num_pinned &&", ""),
    ("probe_threshold.metal", "above < rank &&", ""),
    ("cluster_keys.h", "score == 0.0f ? 0.0f : score", "score"),
    ("cluster_keys.h", "0xffffffffu - cluster", "cluster"),
    ("cluster_logits.metal", "if (token < VocabSize)", ""),
    ("cluster_logits.metal", "if (tokens[j] < VocabSize)", ""),
    ("cluster_logits.metal", "cluster < num_pinned[0] ||", ""),
    ("cluster_logits.metal", ">=\n            threshold", ">\n            threshold"),
    ("packed_rows.h", "step < Fold", "step < Fold / 2"),
    ("packed_rows.h", "bias * hidden.total", "0.0f"),
    ("packed_rows.h", "const bool is_there = chunk < end;", "bool is_there = true;"),
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
