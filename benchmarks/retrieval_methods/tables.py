"""The methods of each table of recall, built and judged one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from mlx_flashhead.calibration import CalibrationSet
from mlx_flashhead.coarse import Knowledge
from mlx_flashhead.options import HeadOptions
from retrieval_methods import candidates, rivals
from retrieval_methods.candidates import Candidate, candidate, coarse_stage, known
from retrieval_methods.recall import Result
from retrieval_methods.subject import Subject

Method = tuple[str, Callable[[], Candidate]]


def default_sets(subject: Subject) -> list[CalibrationSet]:
    """Return what the converter calibrates on by default."""
    return subject.calibration(subject.positions)


def judged(subject: Subject, methods: Iterator[Method]) -> Iterator[Result]:
    """Build and judge methods, one at a time."""
    test = subject.test
    for name, build in methods:
        started = time.perf_counter()
        chosen = build()
        needed = chosen.rows_needed(test.hidden, test.best)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        yield Result(name, needed, chosen.coarse_bytes)


def main_methods(subject: Subject) -> Iterator[Method]:
    """Yield the paper's method, the product's clusters of 16 and the product."""
    unit, means = rivals.paper_candidates(subject.rows)
    yield "paper: spherical k-means, unit centroids", lambda: unit
    yield "paper's clusters, mean centroids", lambda: means
    knowledge = known(subject, default_sets(subject))
    yield _of_clusters(subject, knowledge, HeadOptions(cluster_size=16))
    yield "**default**", _calibrated(subject, knowledge)
    yield "--no-calibration", _calibrated(subject, known(subject, []))


def small_cluster_methods(subject: Subject) -> Iterator[Method]:
    """Yield the product's clusters of 4, at 4 and at 2 bits."""
    knowledge = known(subject, default_sets(subject))
    for bits in (4, 2):
        options = HeadOptions(cluster_size=4, centroid_bits=bits)
        yield _of_clusters(subject, knowledge, options)


def _of_clusters(
    subject: Subject, knowledge: Knowledge, options: HeadOptions
) -> Method:
    name = f"--cluster-size {options.cluster_size}"
    if options.centroid_bits is not None:
        name += f" --centroid-bits {options.centroid_bits}"
    return name, lambda: candidate(coarse_stage(subject, knowledge, options), knowledge)


def inverted_file_results(subject: Subject) -> Iterator[Result]:
    """Yield faiss's inverted file with lists of 64 and of 16 rows on average."""
    for size in (64, 16):
        started = time.perf_counter()
        name, num_lists = f"faiss IVF, V/{size} lists", len(subject.rows) // size
        test = subject.test
        found = rivals.inverted_file(subject.rows, num_lists, test.hidden, test.best)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        yield Result(name, *found)


def variant_methods(subject: Subject) -> Iterator[Method]:
    """Yield the product with one choice changed at a time."""
    sets = default_sets(subject)
    knowledge = known(subject, sets)
    stage = coarse_stage(subject, knowledge)

    def default(*, knowledge: Knowledge = knowledge, **changes: object) -> Candidate:
        return candidate(replace(stage, **changes), knowledge)

    yield f"default: {stage.dims} dimensions, 2 bits", default
    yield from _sizes(subject, knowledge)
    for exponent in (0, 0.5, 1):
        changed = candidates.with_exponent(knowledge, exponent)
        yield f"prior^{exponent:g}", lambda changed=changed: default(knowledge=changed)
    for seed in (1, 2):
        yield f"rotation of seed {seed}", lambda seed=seed: default(seed=seed)
    with candidates.unrotated():
        yield "no rotation", default
    moment = candidates.with_second_moment(knowledge, sets)
    yield "second moment, not covariance", lambda: default(knowledge=moment)
    yield (
        "no bias",
        lambda: candidates.with_bias(default(), np.zeros(stage.num_clusters)),
    )
    yield "projected in bfloat16", lambda: candidates.half_projected(default())
    for size in (1024, stage.num_clusters):
        name = "no blocks" if size == stage.num_clusters else f"blocks of {size}"
        yield name, lambda size=size: replace(default(), block_size=size)


def _sizes(subject: Subject, knowledge: Knowledge) -> Iterator[Method]:
    """Yield other dimensions and bits, packed in both ways."""

    def build(dims: int | None, bits: int) -> Candidate:
        stage = coarse_stage(subject, knowledge, dims=dims)
        packing = replace(stage.quantization, bits=bits)
        return candidate(replace(stage, quantization=packing), knowledge)

    for dims in (64, 128, 256, 320):
        yield f"{dims} dimensions, 2 bits", lambda dims=dims: build(dims, 2)
    for dims in (128, None):
        name = f"{dims} dimensions, 4 bits" if dims else "4 bits"
        yield name, lambda dims=dims: build(dims, 4)
    with candidates.packed_by_mlx():
        for dims, bits in ((None, 2), (128, 2), (128, 3), (128, 4), (None, 3)):
            name = f"{dims} dimensions, {bits} bits" if dims else f"{bits} bits"
            yield (
                f"{name}, by mx.quantize",
                lambda dims=dims, bits=bits: build(dims, bits),
            )


def calibration_methods(subject: Subject) -> Iterator[Method]:
    """Yield the product, differently calibrated."""
    sets = default_sets(subject)
    prompts, random = sets
    whole = known(subject, sets)
    ids = known(subject, []).prior
    choices = {
        "prompts and random starts, 6144 positions (default)": whole,
        "prompts only (its half)": known(subject, [prompts]),
        "random starts only (its half)": known(subject, [random]),
        "the same, prior from ids only": Knowledge(whole.statistics, ids),
    }
    for name, knowledge in choices.items():
        yield name, _calibrated(subject, knowledge)
    for count in (500, 1000, 3000):
        knowledge = known(subject, subject.calibration(count))
        yield f"--calibration-positions {count}", _calibrated(subject, knowledge)
    nothing = known(subject, [])
    for dims in (192, 320):
        yield (
            f"none, {dims} dimensions",
            lambda dims=dims: candidate(
                coarse_stage(subject, nothing, dims=dims), nothing
            ),
        )


def _calibrated(subject: Subject, knowledge: Knowledge) -> Callable[[], Candidate]:
    return lambda: candidate(coarse_stage(subject, knowledge), knowledge)
