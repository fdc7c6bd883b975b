"""k-hat against ratios whose tail is known, the cases no tail can be fitted to, verdicts on guides, trend of a loss."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ppl_gen.diagnostics.verdicts import loss_trend, verdict_point, verdict_variational
from ppl_gen.weights.psis import (
    MIN_DRAWS,
    effective_sample_size,
    pareto_k,
    pareto_k_rows,
    pareto_k_threshold,
    row_subset,
    smoothed_weights,
)


def pareto_log_ratios(k, shape, seed):
    """Logs of draws of the generalised Pareto distribution with scale 1, by inversion."""
    uniform = np.random.default_rng(seed).random(shape)
    return np.log(np.expm1(-k * np.log(uniform)) / k)


def normal_log_ratios(sd, shape, seed):
    """log N(x; 0, 1) - log N(x; 0, sd) at draws of N(0, sd), up to a constant."""
    z = np.random.default_rng(seed).normal(size=shape)
    return 0.5 * z**2 - 0.5 * (sd * z) ** 2


def test_threshold():
    # 1 - 1 / log10(S), by hand: 1 - 1/2, 1 - 1/3; 10^2.5 = 316.2 gives 0.6 and 10^(1 / 0.3) = 2154.4 the limit of 0.7.
    assert pareto_k_threshold(100) == pytest.approx(0.5, abs=1e-15)
    assert pareto_k_threshold(1000) == pytest.approx(2 / 3, abs=1e-15)
    assert pareto_k_threshold(316) < 0.6 < pareto_k_threshold(317) < pareto_k_threshold(320) < 0.601
    assert pareto_k_threshold(2154) < 0.7
    assert pareto_k_threshold(2155) == pareto_k_threshold(2200) == pareto_k_threshold(10**6) == 0.7


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.0, 1.5])
def test_known_tail_is_recovered(k):
    draws, rows = 4000, 200
    estimates = pareto_k_rows(pareto_log_ratios(k, (draws, rows), seed=int(10 * k)))
    # A tail of M = 3 sqrt(S) exceedances of a generalised Pareto variable is generalised Pareto with the same k; the
    # maximum likelihood estimate has sd (1 + k) / sqrt(M). The prior worth 10 draws at 0.5 moves it by at most
    # |0.5 - k| 10 / (M + 10); 1 / M is for the bias of the estimate itself. Five standard errors of the mean.
    tail = 3 * math.sqrt(draws)
    sd = (1 + k) / math.sqrt(tail)
    tolerance = 5 * sd / math.sqrt(rows) + abs(0.5 - k) * 10 / (tail + 10) + 1 / tail
    assert abs(estimates.mean() - k) < tolerance
    # The sd of 200 estimates has a relative error of 1 / sqrt(400) = 0.05, and the prior shrinks it by 5 %.
    assert estimates.std() == pytest.approx(sd, rel=0.3)


def test_narrow_guides_are_caught_and_wide_ones_are_not():
    """Posterior N(0, 1), guide N(0, s): the ratio's tail has k = 1 - s^2 for s < 1 and is bounded for s >= 1.

    The exponent holds in the limit only: at z standard deviations the local slope is (1 - s^2) z^2 / (1 + z^2), that is
    0.8 of it at the cut-off of 4000 draws (z = 2). For s = 0.25 the slope is 0.75 to 0.94; the prior at 0.5 takes up to
    0.02 away, and the mean of 200 rows has an error of 0.01.
    """
    narrow = pareto_k_rows(normal_log_ratios(0.25, (4000, 200), seed=1))
    assert 0.75 - 0.05 < narrow.mean() < 0.94
    assert narrow.mean() > pareto_k_threshold(4000)
    nearly = pareto_k_rows(normal_log_ratios(0.8, (4000, 200), seed=2))
    assert 0.8 * 0.36 < nearly.mean() < 0.36 + 0.05  # prior: (0.5 - 0.36) 10 / 200 = 0.007; error of the mean 0.007
    assert nearly.mean() < pareto_k_threshold(4000) - 0.2
    for sd in (1.1, 1.5, 3.0):
        assert (pareto_k_rows(normal_log_ratios(sd, (4000, 20), seed=3)) < 0).all()


def test_a_constant_changes_nothing():
    """Ratios are known up to a factor: 1e4 costs 4 digits of 16, and the logs of the ratios are of order 1 to 10."""
    ratios = pareto_log_ratios(0.6, 1000, seed=4)
    assert pareto_k(ratios + 1e4) == pytest.approx(pareto_k(ratios), abs=1e-6)
    np.testing.assert_allclose(smoothed_weights(ratios - 1e4), smoothed_weights(ratios), atol=1e-6)


def test_rows_are_judged_one_by_one():
    ratios = np.column_stack([pareto_log_ratios(k, 500, seed=i) for i, k in enumerate((0.1, 0.6, 1.2))])
    ratios = np.column_stack([ratios, np.zeros(500), np.where(np.arange(500) == 7, np.nan, 0.0)])
    together = pareto_k_rows(ratios)
    np.testing.assert_array_equal(together, [pareto_k(column) for column in ratios.T])
    assert together[3] == 0.0 and together[4] == math.inf
    np.testing.assert_array_equal(smoothed_weights(ratios[:, :4])[:, 1], smoothed_weights(ratios[:, 1]))


def test_rows_beyond_the_limit_are_left_out_evenly():
    ratios = pareto_log_ratios(0.4, (100, 11), seed=5)
    np.testing.assert_array_equal(pareto_k_rows(ratios, max_rows=3), pareto_k_rows(ratios)[[0, 5, 10]])
    assert len(row_subset(10_000, 2000)) == len(set(row_subset(10_000, 2000))) == 2000
    assert len(pareto_k_rows(ratios, max_rows=None)) == 11
    with pytest.raises(ValueError, match="max_rows"):
        pareto_k_rows(ratios, max_rows=0)


# ------------------------------------------------------------------------------------------------ no tail to fit
def test_exact_guide_reads_as_perfectly_good():
    assert pareto_k(np.full(1000, -1234.5)) == 0.0
    np.testing.assert_array_equal(effective_sample_size(smoothed_weights(np.zeros((50, 2)))), [50.0, 50.0])


@pytest.mark.parametrize("size", [10.0, 1e3, 1e5, 1e6])
def test_rounding_of_an_exact_guide_is_no_tail(size):
    """Two float32 sums of this size that are equal in theory differ by multiples of their spacing."""
    rng = np.random.default_rng(6)
    exact = size + rng.normal(size=1000)
    joint, guide = exact.astype(np.float32), (exact + 0.1).astype(np.float32) - np.float32(0.1)
    assert np.ptp(joint - guide) > 0
    assert pareto_k(joint - guide) < 0.5


@pytest.mark.parametrize("noise", [1e-16, 1e-15, 1e-13, 1e-10, 1e-6])
def test_noise_around_equal_ratios_is_no_tail(noise):
    assert pareto_k(3.0 + noise * np.random.default_rng(7).normal(size=1000)) < 0.5


def test_discrete_latents_make_ties():
    """Two values: k = log(max w / mean w) / log S, here weights 4 (a tenth of the draws) and 1: mean 1.3."""
    ratios = np.where(np.arange(1000) < 100, math.log(4.0), 0.0)
    assert pareto_k(ratios) == pytest.approx(math.log(4 / 1.3) / math.log(1000), rel=1e-12)
    weights = np.exp(smoothed_weights(ratios))
    np.testing.assert_allclose(weights, np.exp(ratios) / 1300, rtol=1e-12)  # as they are: nothing to smooth
    rare = np.where(np.arange(1000) < 2, math.log(1e4), 0.0)
    assert pareto_k(rare) > pareto_k_threshold(1000), "two draws carry nearly all the weight"


def test_zero_weights_are_kept():
    """Half of the draws outside the support: the tail, among the largest, is what it was."""
    rng = np.random.default_rng(8)
    ratios = pareto_log_ratios(0.3, 1000, seed=8)
    ratios[np.argsort(ratios)[:500]] = -np.inf
    assert pareto_k(ratios) == pytest.approx(pareto_k(pareto_log_ratios(0.3, 1000, seed=8)), abs=1e-12)
    weights = smoothed_weights(ratios)
    assert np.isneginf(weights).sum() == 500 and np.exp(weights).sum() == pytest.approx(1.0, abs=1e-12)
    assert pareto_k(np.where(rng.random(1000) < 0.5, -np.inf, 0.0)) == pytest.approx(
        math.log(2) / math.log(1000), rel=0.1
    )


@pytest.mark.parametrize(
    "ratios",
    [
        np.full(100, -np.inf),
        np.where(np.arange(100) < 4, 0.0, -np.inf),
        np.r_[np.zeros(99), np.nan],
        np.r_[np.zeros(99), np.inf],
        1e5 * np.random.default_rng(9).normal(size=100),
        np.where(np.arange(100) == 3, 1e4, 0.0),
    ],
    ids=["no weight", "four draws", "nan", "infinite", "one draw beyond underflow", "one draw and ties"],
)
def test_hopeless_weights_are_infinite_never_good(ratios):
    k = pareto_k(ratios)
    assert k == math.inf
    assert str(verdict_variational(k, None, pareto_k_threshold(100))).startswith("do not trust: ")


def test_huge_spread_is_not_mistaken_for_ties():
    assert pareto_k(500.0 * np.random.default_rng(10).normal(size=1000)) >= 1.0


def test_shapes_and_counts_are_checked_first():
    with pytest.raises(ValueError, match=rf"at least {MIN_DRAWS} draws, got 24"):
        pareto_k(np.zeros(24))
    with pytest.raises(ValueError, match="at least 25 draws"):
        pareto_k_threshold(10)
    with pytest.raises(ValueError, match="use pareto_k_rows"):
        pareto_k(np.zeros((100, 2)))
    with pytest.raises(ValueError, match=r"\(draws, rows\), got \(30, 2, 2\)"):
        pareto_k_rows(np.zeros((30, 2, 2)))
    with pytest.raises(ValueError, match="1 of 2 columns"):
        smoothed_weights(np.column_stack([np.zeros(50), np.r_[np.zeros(49), np.nan]]))
    with pytest.raises(ValueError, match="1 of 1 columns"):
        smoothed_weights(np.full(50, -np.inf))
    assert pareto_k_rows(np.zeros((MIN_DRAWS, 0))).shape == (0,)


# ------------------------------------------------------------------------------------------------ weights
def test_smoothed_weights_are_normalised_and_keep_their_order():
    ratios = pareto_log_ratios(0.8, (1000, 5), seed=11)
    weights = smoothed_weights(ratios)
    np.testing.assert_allclose(np.exp(weights).sum(axis=0), 1.0, atol=1e-12)
    for raw, smooth in zip(ratios.T, weights.T, strict=True):
        order = np.argsort(raw)
        assert (np.diff(smooth[order]) >= -1e-12).all()
        body = order[:900]  # the tail is 3 sqrt(1000) = 95 draws
        np.testing.assert_allclose(np.diff(smooth[body]), np.diff(raw[body]), atol=1e-9)
        assert np.ptp(smooth) <= np.ptp(raw) + 1e-9


def test_smoothing_steadies_the_estimate():
    """E[w] of generalised Pareto ratios with k = 0.7 is 1 / (1 - k), the variance infinite: smoothing must help.

    The estimate of E[w] is the mean of the smoothed weights before normalising; their scale is recovered from a draw
    outside the tail, whose raw ratio is kept. Mean squares of the errors of the log over 400 repetitions.
    """
    ratios = pareto_log_ratios(0.7, (500, 400), seed=12)
    anchor = np.argsort(ratios, axis=0)[100]
    column = np.arange(400)
    raw_log_mean = np.log(np.exp(ratios).mean(axis=0))
    log_total = ratios[anchor, column] - smoothed_weights(ratios)[anchor, column]
    truth = -math.log(0.3)
    raw_error, error = raw_log_mean - truth, log_total - math.log(500) - truth
    assert np.sqrt((error**2).mean()) < np.sqrt((raw_error**2).mean())


def test_effective_sample_size():
    assert effective_sample_size(np.log([0.5, 0.25, 0.25])) == pytest.approx(1 / (0.25 + 2 / 16), rel=1e-12)
    assert effective_sample_size(np.zeros(40) - 1e4) == pytest.approx(40.0, rel=1e-12)
    assert effective_sample_size(np.r_[0.0, np.full(9, -np.inf)]) == 1.0
    with pytest.raises(ValueError, match="at least one finite"):
        effective_sample_size(np.full(3, -np.inf))
    with pytest.raises(ValueError, match="expected shape"):
        effective_sample_size(np.zeros((2, 2, 2)))


# ------------------------------------------------------------------------------------------------ trend of the loss
def autocorrelated(coefficient, shape, seed):
    noise = np.random.default_rng(seed).normal(size=shape)
    series = np.empty(shape)
    series[..., 0] = noise[..., 0]
    for t in range(1, shape[-1]):
        series[..., t] = coefficient * series[..., t - 1] + math.sqrt(1 - coefficient**2) * noise[..., t]
    return series


def test_settled_but_autocorrelated_losses_have_no_trend():
    """A settled loss with correlation time 39 steps.

    Student's t with 18 degrees of freedom has sd 1.06; neighbouring batches of 100 correlate by
    0.95 / (100 * 0.0975) = 0.1, which makes it about 1.17; the sd of 300 values has an error of 0.05. Control: a line
    through all losses, as if they were independent, gives sqrt(39) = 6.
    """
    losses = autocorrelated(0.95, (300, 4000), seed=13)
    robust = np.array([loss_trend(row)[0] for row in losses])
    assert robust.std() < 1.17 + 6 * 0.05
    time = np.arange(2000) - 999.5
    last = losses[:, 2000:]
    slope = last @ time / (time @ time)
    residual = last - last.mean(axis=1, keepdims=True) - slope[:, None] * time
    naive = slope / np.sqrt((residual**2).sum(axis=1) / 1998 / (time @ time))
    assert naive.std() > 4


@pytest.mark.parametrize("steps", [40, 77, 1000, 12_345])
def test_a_line_is_measured_exactly(steps):
    t, change = loss_trend(5.0 - 0.002 * np.arange(steps))
    half = steps - steps // 2
    batches = min(20, half // 2)
    # The slope is exact; the stretch is the last half less what does not fill a batch (fewer than `batches` losses).
    assert change == pytest.approx(-0.002 * (half // batches) * batches, rel=1e-9)
    assert t < -1e4


def test_a_falling_loss_is_seen_through_noise():
    """Falls by 1 over the last half; the noise of a batch mean of 50 is 1 / sqrt(50) = 0.14, so the slope per batch has
    an error of 0.14 / sqrt(20^3 / 12) = 0.0055 against 0.05: t about -9, its own sd about 1.8."""
    losses = np.linspace(2.0, 0.0, 2000) + np.random.default_rng(14).normal(size=2000)
    t, change = loss_trend(losses)
    assert t < -4 and abs(change + 1) < 5 * 20 * 0.0055
    assert loss_trend(losses[::-1])[0] > 4


def test_loss_trend_edges():
    assert loss_trend(np.full(100, 3.0)) == (0.0, 0.0)
    assert all(math.isnan(value) for value in loss_trend(np.arange(39.0)))
    with pytest.raises(ValueError, match="got 1 that are not"):
        loss_trend(np.r_[np.zeros(99), np.nan])
    with pytest.raises(ValueError, match=r"\(steps,\)"):
        loss_trend(np.zeros((50, 2)))


# ------------------------------------------------------------------------------------------------ verdicts on guides
@pytest.mark.parametrize(
    ("joint", "rows", "trend", "start", "words"),
    [
        (0.3, None, None, "trust", "k-hat 0.30, below 0.67"),
        (
            -1.8,
            None,
            (-9.0, -0.001),
            "trust",
            "no problem was found where the guide has mass",
        ),  # sure, but too small to matter
        (
            -1.8,
            None,
            (-1.0, -0.5),
            "trust",
            "no problem was found where the guide has mass",
        ),  # large, but within the noise
        (0.3, None, (math.nan, math.nan), "trust", "no problem was found where the guide has mass"),
        (0.68, None, None, "doubtful", "about 1400 draws"),
        (0.8, None, None, "doubtful", "need not mean that the program is wrong"),
        (1.0, None, None, "do not trust", "poor approximation"),
        (math.inf, None, None, "do not trust", "k-hat inf"),
        (math.nan, None, None, "do not trust", "k-hat inf"),
        (0.3, None, (-9.0, -0.5), "doubtful", "still falling (by 0.5 nats over"),
        (0.3, None, (9.0, 0.5), "doubtful", "rising"),
        (None, [0.1] * 19 + [0.9], None, "trust", "95% of 20 rows"),
        (None, [0.1] * 17 + [0.9] * 3, None, "doubtful", "15% of 20 rows"),
        (None, [0.1] * 17 + [1.2] * 3, None, "do not trust", "largest 1.20"),
        (None, [0.1] * 17 + [math.nan] * 3, None, "do not trust", "15% of 20 rows"),
        (0.2, [0.1, 0.3], None, "trust", "k-hat 0.20, below 0.67; k-hat below 0.67 in 100% of 2 rows"),
        (0.2, [0.9, 0.8], None, "doubtful", "100% of 2 rows"),
    ],
)
def test_each_rule_on_guides(joint, rows, trend, start, words):
    said = str(verdict_variational(joint, rows, 2 / 3, trend=trend))
    assert said.startswith(start + ": ") and words in said and said.endswith(".")


def test_a_k_hat_that_is_passed_over_is_said_to_be():
    """3776 of 4000 effective: sqrt(4000 / 3776 - 1) = 0.2436, rounded up; of rows, one in two is above the limit."""
    said = verdict_variational(2.41, None, 0.7, effective=(3776.0, 4000))
    assert said.trusted
    assert "k-hat 2.41 is above 0.70 and passed over, for the weights are nearly equal" in said.reason
    assert "no mean is off by more than 0.25 sd" in said.reason
    rows = verdict_variational(None, [0.1, 2.0], 0.7, effective_rows=np.array([0.9, 0.95]))
    assert rows.trusted and "k-hat below 0.70 (or above it with weights that are nearly equal) in 100%" in rows.reason
    few = verdict_variational(2.41, None, 0.7, effective=(3000.0, 4000))
    assert not few.trusted and "passed over" not in few.reason
    below = verdict_variational(0.2, [0.1], 0.7, effective=(3776.0, 4000), effective_rows=np.array([0.95]))
    assert "nearly equal" not in below.reason


def test_more_draws_are_asked_for_where_they_would_do():
    """k = 0.6 is above the threshold of 100 draws and below that of the number that is asked for."""
    said = str(verdict_variational(0.6, None, pareto_k_threshold(100)))
    assert "about 400 draws" in said and pareto_k_threshold(400) > 0.6 > pareto_k_threshold(100)


def test_a_guide_without_k_is_refused():
    with pytest.raises(ValueError, match="use verdict_point"):
        verdict_variational(None, None, 0.7)
    with pytest.raises(ValueError, match="use verdict_point"):
        verdict_variational(None, np.empty(0), 0.7)


@pytest.mark.parametrize(
    ("converged", "options", "start", "words"),
    [
        (True, {}, "trust", "from one start"),
        (True, {"restarts": 3}, "trust", "best of 3 starts"),
        (False, {"trend": (-0.5, -0.001)}, "trust", "the loss had settled"),
        (False, {}, "doubtful", "before its own criterion"),
        (False, {"trend": (math.nan, math.nan)}, "doubtful", "before its own criterion"),
        (False, {"criterion": False}, "doubtful", "nothing shows whether the optimum was reached"),
        (False, {"criterion": False, "trend": (math.nan, math.nan)}, "doubtful", "so few steps do not show"),
        (False, {"criterion": False, "trend": (-0.5, -0.001)}, "trust", "the loss had settled"),
        (False, {"trend": (-20.0, -1.0)}, "doubtful", "still falling"),
        (True, {"trend": (-20.0, -1.0)}, "doubtful", "still falling"),
    ],
)
def test_each_rule_on_points(converged, options, start, words):
    said = str(verdict_point(converged, **options))
    assert said.startswith(start + ": ") and words in said and said.endswith(".")


def test_real_guides_get_the_right_verdict():
    """From draws to the sentence: a wide guide is trusted, a narrow one is not, and both have the right mean."""
    threshold = pareto_k_threshold(4000)
    wide = pareto_k(normal_log_ratios(1.5, 4000, seed=15))
    narrow = pareto_k_rows(normal_log_ratios(0.1, (4000, 50), seed=16))
    assert str(verdict_variational(wide, None, threshold)).startswith("trust: ")
    assert not str(verdict_variational(None, narrow, threshold)).startswith("trust: ")
