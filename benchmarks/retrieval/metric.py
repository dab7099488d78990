"""Coarse stages in the metric of the hidden states: the sketch.

With S the covariance of the hidden states, ``h . w = (S^-1/2 h) . (S^1/2 w)``: in
``S^1/2 w`` equal errors do equal harm on average. The directions that carry most of
the expected rows' spread are kept, turned at random so that all dimensions count
alike, and packed at few bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from clusters import means
from coarse import Coarse, quantize
from states import States, Subject

from mlx_flashhead.clustering import token_prior

# Share of the mean variance that is added to each direction, so that none is free.
DAMPING = 0.01


@dataclass(frozen=True)
class Calibration:
    """What is known of the hidden states and of the tokens.

    Attributes:
        covariance: S, ``(D, D)``, float64, damped.
        mean: Mean hidden state, ``(D,)``, or None: no bias.
        prior: Expected frequency of each token, ``(V,)``, sums to 1.
    """

    covariance: np.ndarray
    mean: np.ndarray | None
    prior: np.ndarray


def calibrate(
    subject: Subject, sets: Sequence[States], *, centred: bool = True
) -> Calibration:
    """Return the means, over sets of equal weight, of covariances and priors.

    The prior is the mean softmax of the sets and the guess from the token ids, in
    equal parts. Uncentred, S is the second moment.
    """
    covariances, averages = [], []
    for states in sets:
        average = states.hidden.mean(axis=0)
        offset = states.hidden - average if centred else states.hidden
        covariances.append(offset.T.astype(np.float64) @ offset / len(offset))
        averages.append(average)
    priors = [states.mean_probabilities for states in sets]
    return Calibration(
        _damped(np.mean(covariances, axis=0)),
        np.mean(averages, axis=0),
        np.mean([*priors, id_prior(subject)], axis=0),
    )


def no_calibration(subject: Subject) -> Calibration:
    """Return what is known without any hidden state: the token ids."""
    return Calibration(np.eye(subject.rows.shape[1]), None, id_prior(subject))


def id_prior(subject: Subject) -> np.ndarray:
    """Return the prior guessed from the token ids, ``(V,)``, summing to 1."""
    prior = token_prior(len(subject.rows), skip=subject.unlikely).astype(np.float64)
    return prior / prior.sum()


def power(covariance: np.ndarray, exponent: float) -> np.ndarray:
    """Return a power of a symmetric positive matrix, float32."""
    values, vectors = np.linalg.eigh(covariance)
    return ((vectors * values**exponent) @ vectors.T).astype(np.float32)


def sketch(
    rows: np.ndarray,
    calibration: Calibration,
    *,
    dims: int,
    bits: int,
    clusters: np.ndarray | None = None,
    seed: int | None = 0,
    exponent: float = 0.5,
    dtype: mx.Dtype = mx.float16,
    group_size: int = 64,
    use_bias: bool = True,
) -> Coarse:
    """Return low-dimensional, few-bit vectors of the rows or of cluster means.

    Args:
        rows: ``(V, D)``, float32.
        calibration: Metric, mean and prior.
        dims: Dimensions kept, d.
        bits: Bits of a weight.
        clusters: Cluster of each row, ``(V,)``; None: each row is its own.
        seed: Of the rotation; None: not rotated.
        exponent: Of the prior, where it weights rows.
        dtype: Storage of the group scales and biases and of the bias.
        group_size: Weights that share a scale.
        use_bias: Whether to add what makes scores exact at the mean hidden state.
    """
    weights: np.ndarray = calibration.prior**exponent
    weights /= weights.sum()
    common = (weights @ rows).astype(np.float32)
    vectors, mass = rows, weights
    if clusters is None:
        clusters = np.arange(len(rows), dtype=np.int64)
    else:
        vectors = means(rows, clusters, weights)
        mass = np.bincount(clusters, weights)
    offsets = vectors - common
    whole = offsets @ power(calibration.covariance, 0.5)
    basis = _turned_basis(whole, mass, dims, seed)
    packed, size_bytes = quantize(whole @ basis, bits, dtype, group_size)
    projection = power(calibration.covariance, -0.5) @ basis
    bias = None
    if use_bias and calibration.mean is not None:
        exact = offsets @ calibration.mean
        missing = exact - packed @ (calibration.mean @ projection)
        stored = mx.array(missing).astype(dtype)
        bias = np.array(stored.astype(mx.float32))
        size_bytes += stored.nbytes
    return Coarse(packed, projection, bias, clusters, common, size_bytes)


def _turned_basis(
    whole: np.ndarray, mass: np.ndarray, dims: int, seed: int | None
) -> np.ndarray:
    """Return the main directions of weighted vectors, rotated, ``(D, d)``."""
    moment = (whole.T * mass.astype(np.float32)) @ whole
    directions = np.linalg.eigh(moment.astype(np.float64))[1][:, ::-1][:, :dims]
    if seed is None:
        return directions.astype(np.float32)
    noise = np.random.default_rng(seed).standard_normal((dims, dims))
    return (directions @ np.linalg.qr(noise)[0]).astype(np.float32)


def _damped(covariance: np.ndarray) -> np.ndarray:
    """Add a share of the mean variance to the diagonal."""
    size = len(covariance)
    return covariance + DAMPING * np.trace(covariance) / size * np.eye(size)
