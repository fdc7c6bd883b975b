"""Annealed importance sampling against normalisers that are known: normals, and sums over all states.

Means of weights and of log weights are held to |z| < 5.5, a false alarm of 4e-8 each.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.evidence.annealed import AIS, log_partition
from ppl_gen.inference import SVI, ContrastiveDivergence
from ppl_gen.models import ppca, rbm
from ppl_gen.models.energy.bipartite import Bipartite, softplus_difference
from ppl_gen.models.energy.rbm import BoltzmannMachine
from ppl_gen.program.extensions import Tempering

Z = 5.5

float64_and_seed = float64_under(11)


def normals(dims=3, loc=2.0, scale=0.5):
    """From a standard normal to exp(-(x - loc)^2 / 2 scale^2), every f_b a normal that is drawn exactly."""

    def moments(b):
        precision = 1 - b + b / scale**2
        return b * loc / scale**2 / precision, precision**-0.5

    def move(x, b, steps):
        centre, width = moments(b)
        return centre + width * torch.randn_like(x) if steps else x

    def log_density(x, b):
        return (-(1 - b) * x**2 / 2 - b * (x - loc) ** 2 / (2 * scale**2)).sum(-1)

    base = torch.tensor(dims * 0.5 * math.log(2 * math.pi))
    made = Tempering(lambda count: torch.randn(count, dims), base, log_density, move)
    return made, float(base) + dims * math.log(scale)


def log_weights(tempering, ladder, count):
    from ppl_gen.evidence.annealed import _walk

    return _walk(tempering, tempering.begin(count), ladder)[1]


def machine(visible=10, hidden=6, scale=1.0):
    made = BoltzmannMachine(torch.randn(visible), hidden, scale)
    with torch.no_grad():
        made.hidden_bias.normal_()
        made.visible_bias.normal_()
    return made


def test_weights_from_normal_to_normal_have_the_ratio_of_normalisers_as_their_mean():
    made, exact = normals()
    ratios = (log_weights(made, AIS(temperatures=20).ladder(), 20_000) + float(made.log_base) - exact).exp()
    assert abs(float((ratios.mean() - 1) / (ratios.std() / len(ratios) ** 0.5))) < Z
    found = log_partition(made, AIS(temperatures=200, chains=2000), torch.randn(7, 3))
    assert abs(found.forward - exact) < 3 * found.forward_stderr + 0.1
    assert found.agrees and abs(found.reverse - exact) < 3 * found.reverse_stderr + 0.1


def test_the_spread_of_log_weights_falls_as_one_over_the_root_of_the_temperatures():
    """With exact draws at each b the log weight is a sum of T independent terms of spread 1/T each."""
    made, _ = normals()
    few, many = (float(log_weights(made, [k / n for k in range(n + 1)], 4000).std()) for n in (50, 800))
    # An sd of 4000 draws has a relative error of 1/sqrt(8000): 1.6 % on the ratio; the law itself holds to O(1/50).
    assert few / many == pytest.approx(4.0, rel=0.12)


@pytest.mark.filterwarnings("ignore::UserWarning")  # with few temperatures nothing is to be trusted
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_forward_lies_below_the_enumerated_log_z_and_reverse_above_it(scale):
    made = machine(scale=scale)
    exact, tempering = float(made.log_partition().detach()), made.tempering()
    states = made.gibbs(made.begin(torch.Size([4000])), 300)
    method = AIS(temperatures=5, chains=20, burn=50)  # few of both: the bounds are seen
    found = [log_partition(tempering, method, states[20 * k : 20 * k + 20]) for k in range(200)]
    for values, sign in (([f.forward for f in found], 1.0), ([f.reverse for f in found], -1.0)):
        gap = sign * (exact - torch.tensor(values))
        assert float(gap.mean()) > -Z * float(gap.std()) / len(gap) ** 0.5
    wide = torch.tensor([f.reverse - f.forward for f in found])
    assert float(wide.mean()) > (Z * float(wide.std()) / len(found) ** 0.5 if scale == 1.0 else -0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_z_of_a_machine_is_found_within_its_error(dtype):
    made = machine(30, 16, scale=0.4).to(dtype)
    exact = float(made.log_partition().detach())
    found = log_partition(made.tempering(), AIS(temperatures=1000, chains=100), made.begin(torch.Size([100])))
    assert found.agrees and found.forward_stderr < 0.1
    assert abs(found.forward - exact) < 3 * found.forward_stderr + 0.1
    assert abs(found.reverse - exact) < 3 * found.reverse_stderr + 0.1


def test_a_fused_step_is_the_plain_one():
    made = machine()
    pair = Bipartite(made.weight, made.visible_bias, made.hidden_bias, made.base, torch.randn(6)).tempering()
    x = pair.begin(200)
    torch.manual_seed(0)
    states, gain = pair.between(x, 0.3, 0.7)
    torch.testing.assert_close(gain, (pair.log_density(x, 0.7) - pair.log_density(x, 0.3)).detach(), rtol=0, atol=1e-12)
    torch.manual_seed(0)
    assert torch.equal(states, pair.move(x, 0.7, 1))
    small = pair.between(x, 0.3, 0.31)[1]
    torch.testing.assert_close(
        small, (pair.log_density(x, 0.31) - pair.log_density(x, 0.3)).detach(), rtol=0, atol=1e-12
    )
    at, by = torch.randn(1000, 1) * 20, torch.tensor([-30.0, -1e-3, 0.0, 1e-9, 2.0, 70.0])
    exact = torch.logaddexp(at + by, torch.zeros(())) - torch.logaddexp(at, torch.zeros(()))
    torch.testing.assert_close(softplus_difference(at, by), exact, rtol=1e-9, atol=1e-13)


def test_where_forward_chains_miss_a_mode_both_ways_disagree_and_the_answer_is_not_trusted():
    """Two modes, all units on or all off: coins find the second rarely, but the data hold both."""
    made = BoltzmannMachine(torch.full((20,), -2.0), 20, 0.0)
    with torch.no_grad():
        made.weight.fill_(1.0)
        made.visible_bias.fill_(-10.0)
        made.hidden_bias.fill_(-8.0)
    method = AIS(temperatures=50, chains=100)
    with pytest.warns(UserWarning, match="annealed importance sampling: .*log Z is not known"):
        found = log_partition(replace(made.tempering(), exact=None), method, torch.ones(4, 20))
    assert not found.agrees and found.stderr == math.inf
    with pytest.warns(UserWarning, match="the sum over all states, .*, is taken"):
        found = log_partition(made.tempering(), method, torch.ones(4, 20))
    assert found.value == found.exact == float(made.log_partition().detach()) and found.stderr == 0.0


def unseen(units):
    """Nearly all of the mass where all units are on, and all chains and data where nearly all are off."""
    made = BoltzmannMachine(torch.full((units,), -4.0), units, 0.0)
    with torch.no_grad():
        made.weight.fill_(1.0)
        made.visible_bias.fill_(1.0 - units / 2)
        made.hidden_bias.fill_(2.0 - units / 2)
    return made


@pytest.mark.parametrize("units", [20, 40])
def test_a_mode_that_forward_chains_and_data_both_miss_is_found_from_elsewhere(units):
    """All units on: log Z is units^2 + 2 (1.5 - units / 2) units = 3 units, and the two ways agree on 0."""
    tempering, data = replace(unseen(units).tempering(), exact=None), torch.zeros(50, units)
    method = AIS(temperatures=500, chains=100)
    blind = log_partition(replace(tempering, elsewhere=None), method, data)
    assert blind.agrees and abs(blind.forward) < 1.0 and abs(blind.reverse) < 1.0, "60 nats and more are missing"
    with pytest.warns(UserWarning, match="began far from the data found rows of higher density.*log Z is not known"):
        found = log_partition(tempering, method, data)
    assert found.stderr == math.inf and found.elsewhere > 3 * units


def test_a_sum_over_states_stands_in_for_chains_that_agree_on_too_little():
    made = unseen(20)
    tempering = replace(made.tempering(), elsewhere=None)
    with pytest.warns(UserWarning, match=r"it gives -?0\.\d+, and the sum over all states 60\.00.*60\.00, is taken"):
        found = log_partition(tempering, AIS(temperatures=500, chains=100), torch.zeros(50, 20))
    assert found.value == float(made.log_partition().detach()) and found.stderr == 0.0 and not found.agrees
    many = BoltzmannMachine(torch.zeros(30), 23, 0.1).tempering()
    assert many.exact is None and many.elsewhere is not None


@pytest.mark.parametrize("scale", [0.2, 0.7, 1.5])
def test_a_look_elsewhere_raises_no_alarm_where_there_is_nothing(scale):
    """A hundred machines with random weights, seen before: none. Here five of each scale."""
    for _ in range(5):
        made = machine(24, 14, scale=scale)
        data = made.gibbs(made.begin(torch.Size([100])), 100)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "annealed importance sampling")
            found = log_partition(made.tempering(), AIS(temperatures=300, chains=100, burn=50), data)
        assert "far from the data" not in found.doubt
        assert abs(found.value - float(made.log_partition().detach())) < 3 * found.stderr + 0.1


# ---------------------------------------------------------------------------------------------------------- of a fit


def rows(count=60, width=20):
    return torch.bernoulli(torch.full((count, width), 0.4))


def fitted(x, hidden=17, steps=20):
    return pg.fit(rbm(hidden=hidden), x, SVI(ContrastiveDivergence(), steps=steps, lr=0.05), seed=0)


def test_evidence_by_annealing_is_that_by_enumeration():
    x = rows()
    fit = fitted(x, hidden=8)
    exact, found = fit.evidence(), fit.evidence(method=pg.AIS(temperatures=500, chains=100))
    assert exact.exact and exact.kind == "exact" and exact.log_partition is None
    assert not found.exact and found.kind.startswith("ais; log Z ") and "in reverse" in found.kind
    assert 0 < found.mc_stderr < 0.1 and abs(found.mean - exact.mean) < 3 * found.mc_stderr + 0.01
    shift = found.values - exact.values
    torch.testing.assert_close(shift, shift.mean().expand(60), rtol=0, atol=1e-10)
    assert found.stderr == pytest.approx(exact.stderr, rel=1e-9)
    again = fit.evidence(method=pg.AIS(temperatures=500, chains=100))
    assert again.log_partition == found.log_partition, "the fit's own seed unless another is given"
    other = fit.evidence(method=pg.AIS(temperatures=500, chains=100), seed=9)
    assert other.log_partition != found.log_partition


def test_evidence_where_nothing_can_be_enumerated(tmp_path):
    x = rows()
    fit = fitted(x)
    with pytest.raises(pg.IncompatibleError, match=r"evidence\(method=pg.AIS\(\)\)"):
        fit.evidence()
    method = pg.AIS(temperatures=200, chains=100)
    found = fit.evidence(x[:10], method=method)
    assert found.rows == 10 and found.log_partition.agrees and math.isfinite(found.mc_stderr)
    loaded = pg.load(fit.save(tmp_path / "fit"), rbm(hidden=17))
    assert loaded.evidence(x[:10], method=method).mean == pytest.approx(found.mean, abs=1e-12)
    assert fit.evidence(x[:10], method=pg.AIS(temperatures=50, chains=50, reverse=False)).log_partition.reverse is None


def test_a_few_chains_in_one_direction_are_in_doubt():
    """Nothing else tells how far off they are: of these estimates most lie beyond three of their errors."""
    tempering, exact = normals(dims=8, loc=4.0)
    found = []
    for _ in range(20):
        with pytest.warns(UserWarning, match="2 chains, all in one direction, say little of their error"):
            found.append(log_partition(tempering, AIS(temperatures=5, chains=2, reverse=False), None))
    assert not any(one.agrees for one in found) and all(one.stderr == math.inf for one in found)
    assert sum(abs(one.forward - exact) > 3 * one.forward_stderr + 0.1 for one in found) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert log_partition(tempering, AIS(temperatures=2000, chains=30, reverse=False), None).agrees


def test_what_is_no_method_or_no_energy_is_refused():
    fit = fitted(rows(), hidden=2, steps=1)
    with pytest.raises(TypeError, match="method: expected pg.AIS"):
        fit.evidence(method="ais")
    linear = pg.fit(ppca(4, 1), torch.randn(30, 4), SVI(steps=1))
    with pytest.raises(pg.IncompatibleError, match="method: the program 'ppca' has no energy"):
        linear.evidence(method=pg.AIS())
    for settings in (
        {"temperatures": 0},
        {"temperatures": [0.0, 0.5]},
        {"temperatures": [0.0, 0.7, 0.6, 1.0]},
        {"temperatures": "many"},
        {"chains": 1},
        {"burn": -1},
        {"reverse": "yes"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            pg.AIS(**settings)
    for count in (1, 2, 3, 10, 1000):
        ladder = pg.AIS(temperatures=count).ladder()
        assert len(ladder) == count + 1 and ladder[0] == 0 and ladder[-1] == 1 and sorted(set(ladder)) == ladder
