"""The methods of each table, as functions that are called one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import numpy as np
from clusters import balanced_kmeans, means
from coarse import Coarse, plain
from metric import (
    Calibration,
    calibrate,
    id_prior,
    no_calibration,
    power,
    sketch,
)
from states import States, Subject

from mlx_flashhead.clustering import cluster_rows, token_prior, weighted_centroids

Method = tuple[str, Callable[[], Coarse]]

# Main directions of the metric that rows are clustered in: as good as all, faster.
CLUSTERING_DIMS = 128


def reference(subject: Subject) -> Calibration:
    """Return the calibration on both sets, the recipe's."""
    return calibrate(subject, (subject.calibration, subject.random))


def cluster_methods(subject: Subject) -> Iterator[Method]:
    """Yield the paper's method, the product's, and clusters in the metric."""
    rows, size = subject.rows, 16
    spherical = balanced_kmeans(rows, size, spherical=True)
    equal = means(rows, spherical, np.ones(len(rows)))
    unit = equal / np.linalg.norm(equal, axis=1, keepdims=True)
    yield "paper: spherical k-means, unit centroids", partial(plain, unit, spherical)
    yield "paper's clusters, mean centroids", partial(plain, equal, spherical)
    yield "product, version 0.1: centred, prior^0.5 means", partial(_product, subject)
    calibration = reference(subject)
    for size, all_dims in ((16, (rows.shape[1],)), (4, (128, 288))):
        clusters = _metric_clusters(subject, calibration, size)
        for dims in all_dims:
            yield (
                f"clusters of {size} in the metric, {dims} dimensions, 4 bits",
                partial(
                    sketch, rows, calibration, dims=dims, bits=4, clusters=clusters
                ),
            )


def sketch_methods(subject: Subject) -> Iterator[Method]:
    """Yield sketches of several sizes."""
    calibration = reference(subject)
    for dims, bits in (
        *((dims, 2) for dims in (64, 96, 128, 192)),
        *((dims, 3) for dims in (64, 96, 128)),
        *((dims, 4) for dims in (64, 96, 128)),
    ):
        yield (
            f"sketch, {dims} dimensions, {bits} bits",
            partial(sketch, subject.rows, calibration, dims=dims, bits=bits),
        )


def calibration_methods(subject: Subject) -> Iterator[Method]:
    """Yield 2-bit sketches of 128 dimensions, differently calibrated."""
    prompts, random = subject.calibration, subject.random
    whole = reference(subject)
    nothing = no_calibration(subject)
    ids_only = Calibration(whole.covariance, whole.mean, id_prior(subject))
    choices: dict[str, Calibration] = {
        "prompts and random starts (the recipe)": whole,
        "prompts only": calibrate(subject, (prompts,)),
        "random starts only": calibrate(subject, (random,)),
        "both, 500 positions each": calibrate(
            subject, (_part(prompts, 500), _part(random, 500))
        ),
        "both, second moment instead of covariance": calibrate(
            subject, (prompts, random), centred=False
        ),
        "both, prior from ids only": ids_only,
        "none (ids only, no metric, no bias)": nothing,
    }
    for count in (500, 1000, 3000):
        name = f"random starts only, {count} positions"
        choices[name] = calibrate(subject, (_part(random, count),))
    for name, calibration in choices.items():
        yield (
            f"calibrated on {name}",
            partial(sketch, subject.rows, calibration, dims=128, bits=2),
        )
    yield (
        "calibrated on none, all dimensions",
        partial(sketch, subject.rows, nothing, dims=subject.rows.shape[1], bits=2),
    )


def variant_methods(subject: Subject) -> Iterator[Method]:
    """Yield 2-bit sketches of 128 dimensions with one choice changed at a time."""
    calibration = reference(subject)
    variants: dict[str, dict] = {
        "the recipe (float16 scales)": {},
        "float32 scales": {"dtype": mx.float32},
        "bfloat16 scales": {"dtype": mx.bfloat16},
        "groups of 32": {"group_size": 32},
        "groups of 128": {"group_size": 128},
        "no bias": {"use_bias": False},
        "no rotation": {"seed": None},
        "another rotation": {"seed": 1},
        "a third rotation": {"seed": 2},
        **{f"prior^{a:g}": {"exponent": a} for a in (0, 0.25, 0.75, 1)},
    }
    for name, settings in variants.items():
        yield (
            name,
            partial(sketch, subject.rows, calibration, dims=128, bits=2, **settings),
        )


def tail_methods(subject: Subject) -> Iterator[Method]:
    """Yield what the tails are measured of: two sketches and clusters of 16."""
    rows, calibration = subject.rows, reference(subject)
    for dims in (128, 192):
        yield (
            f"sketch d{dims} 2-bit",
            partial(sketch, rows, calibration, dims=dims, bits=2),
        )
    yield (
        "clusters of 16, 4-bit",
        partial(
            sketch,
            rows,
            calibration,
            dims=rows.shape[1],
            bits=4,
            clusters=_metric_clusters(subject, calibration, 16),
        ),
    )


def _product(subject: Subject) -> Coarse:
    """Return what the converter builds, without its pinned clusters."""
    rows = subject.rows
    prior = token_prior(len(rows), skip=subject.unlikely)
    slots = cluster_rows(rows, prior=prior).cluster_tokens
    clusters = np.empty(len(rows), dtype=np.int64)
    clusters[slots.reshape(-1)] = np.repeat(np.arange(len(slots)), slots.shape[1])
    return plain(weighted_centroids(rows, slots, prior), clusters)


def _metric_clusters(
    subject: Subject, calibration: Calibration, size: int
) -> np.ndarray:
    """Return the cluster of each row, ``(V,)``, where k-means runs in the metric."""
    weights: np.ndarray = calibration.prior**0.5
    common = (weights / weights.sum()) @ subject.rows
    whole = (subject.rows - common).astype(np.float32)
    whole = whole @ power(calibration.covariance, 0.5)
    moment = (whole.T * weights.astype(np.float32)) @ whole
    main = np.linalg.eigh(moment)[1][:, -CLUSTERING_DIMS:]
    return balanced_kmeans(np.ascontiguousarray(whole @ main), size, weights=weights)


def _part(states: States, count: int) -> States:
    """Return ``count`` random positions; the mean softmax stays that of all."""
    chosen = np.random.default_rng(0).permutation(len(states.hidden))[:count]
    return States(
        states.hidden[chosen],
        states.best[chosen],
        states.kind[chosen],
        states.text[chosen],
        states.mean_probabilities,
    )
