"""Fitting: the centroids, P and the level of the tails that a head is built with."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import chosen_clusters
from test_centroids import D, V, exact_scores, random_rows
from test_coarse import ID_PRIOR, SETS, stage_of

from mlx_flashhead import tuning
from mlx_flashhead.coarse import known_from
from mlx_flashhead.config import Quantization
from mlx_flashhead.options import HeadOptions
from mlx_flashhead.packing import PackedRows, pack_rows
from mlx_flashhead.tuning import Fitted, fit

cluster_sizes = pytest.mark.parametrize("cluster_size", [1, 5])


def fitted(cluster_size: int, *, calibration=SETS, bits=None, **options) -> Fitted:
    quantization = bits and Quantization(bits, 64)
    stored = pack_rows(mx.array(random_rows()), quantization)
    return fit(
        stage_of(cluster_size),
        stored,
        calibration,
        ID_PRIOR,
        HeadOptions(cluster_size=cluster_size, **options),
        lambda share: None,
    )


def tail_masses(cluster_size: int, found: Fitted) -> tuple[float, float]:
    """Return the mean mass on rows not read: FlashHead's and the dense head's."""
    hidden = np.vstack([s.hidden for s in SETS]).astype(np.float64)
    scores = exact_scores(found.centroids, hidden)
    clusters = stage_of(cluster_size).token_clusters
    is_read = chosen_clusters(scores, found.num_probes)[:, clusters]
    dense = hidden @ random_rows().T.astype(np.float64)
    logits = np.where(is_read, dense, scores[:, clusters])
    masses = []
    for values in (logits, dense):
        weights = np.exp(values - values.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        masses.append(np.where(is_read, 0, weights).sum(axis=1).mean())
    return masses[0], masses[1]


@cluster_sizes
def test_tails_are_raised_to_the_dense_heads_mass(cluster_size):
    found = fitted(cluster_size, num_probes=4)

    plain = stage_of(cluster_size).centroids(known_from(SETS, ID_PRIOR))
    before, after = (np.delete(c.bias, [2, 9]) for c in (plain, found.centroids))
    level = np.unique((after - before).round(4))
    assert len(level) == 1 and abs(level[0]) > 0.01
    # Fitted on 188 of these 210 positions.
    mass, expected = tail_masses(cluster_size, found)
    assert mass == pytest.approx(expected, rel=0.05)
    unfitted = Fitted(plain, found.num_probes, found.choice)
    assert abs(tail_masses(cluster_size, unfitted)[0] - expected) > abs(mass - expected)


@cluster_sizes
def test_a_given_number_of_probes_is_kept_and_judged(cluster_size):
    found = fitted(cluster_size, num_probes=6)

    needed = stage_of(cluster_size).probes_needed(SETS, ID_PRIOR, lambda _: None)
    assert found.num_probes == found.choice.num_probes == 6
    assert found.choice.recall == pytest.approx((needed <= 6).mean())
    assert found.choice.target is None


# A budget of less than nothing, of some rows, and of more than it takes.
@pytest.mark.parametrize("num_rows", [-5, 9, 60])
def test_the_number_that_calibration_chooses_fits_the_budget(num_rows, monkeypatch):
    # 2-bit centroids of 32 dimensions with a float32 scale and bias, a half for the
    # score's bias, the projection; rows of 8 bits with a scale and a bias.
    coarse_bytes = V * (8 + 8 + 2) + 33 * D * 4
    budget = coarse_bytes + num_rows * 72 + 71
    monkeypatch.setattr(tuning, "dense_bytes", lambda shape, dtype: budget)

    found = fitted(1, target_recall=0.98, bits=8)

    needed = stage_of(1).probes_needed(SETS, ID_PRIOR, lambda _: None)
    # Of 210 positions none may be a miss. One row in 32 is always read.
    assert found.num_probes == max(3, min(num_rows, needed.max()))
    assert 9 < needed.max() < 60
    assert found.choice.is_reached == (num_rows == 60)
    assert found.choice.num_positions == 210
    assert found.choice.target == 0.98


@cluster_sizes
def test_without_calibration_one_in_16_and_the_pinned_are_probed(cluster_size):
    found = fitted(cluster_size, calibration=[])

    num_clusters = V if cluster_size == 1 else 17
    plain = stage_of(cluster_size).centroids(known_from([], ID_PRIOR))
    assert found.num_probes == -(-num_clusters // 16) + 2
    assert found.choice is None
    np.testing.assert_array_equal(found.centroids.bias, plain.bias)


def test_without_calibration_a_given_number_is_kept():
    assert fitted(1, calibration=[], num_probes=40).num_probes == 40


def test_shares_run_to_the_end():
    shares = []

    fit(
        stage_of(),
        PackedRows(mx.array(random_rows())),
        SETS,
        ID_PRIOR,
        HeadOptions(),
        shares.append,
    )

    assert shares == sorted(shares)
    assert shares[-1] == 1
