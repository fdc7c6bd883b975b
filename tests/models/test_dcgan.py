"""Deep convolutional generators and critics: sizes, batch norm in training and after, what critics are taken by default."""

import pytest
import torch
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.models import ConvolutionalCritic, dcgan
from ppl_gen.nn.images import Writer, stages


def _images(rows=40, side=8, channels=1):
    return torch.rand(rows, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 16), (1, 32, 32), (3, 64, 64), (2, 9, 17), (1, 64, 8)])
def test_maps_double_to_exactly_the_image_and_halve_to_a_number(shape):
    writer, critic = Writer(shape, 2, 3), ConvolutionalCritic(shape, filters=2)
    images = writer(torch.randn(2, 5, 3))
    assert images.shape == (2, 5, *shape), "dimensions that lead stay"
    assert critic(images.flatten(0, 1)).shape == (10, 1)
    # As published: a convolution for each halving; batch norm but at the critic's input and the generator's output.
    steps = len(stages(*shape[1:])) - 1
    kinds = [type(layer) for layer in writer.layers]
    assert kinds.count(nn.ConvTranspose2d) == kinds.count(nn.BatchNorm2d) == steps and kinds[-1] is nn.ConvTranspose2d
    kinds = [type(layer) for layer in critic.layers]
    assert kinds.count(nn.Conv2d) == steps == kinds.count(nn.BatchNorm2d) + 1 and nn.BatchNorm2d not in kinds[:3]
    assert max(stages(*shape[1:])[-1]) <= 7 or min(stages(*shape[1:])[-1]) < 4


def test_samples_are_in_the_range_of_each_channel():
    images = _images(channels=2) * torch.tensor([255.0, 2.0])[:, None, None] - torch.tensor([0.0, 1.0])[:, None, None]
    fit = pg.fit(dcgan(latent=3, filters=4), images, SVI(Adversarial(), steps=2), seed=0)
    made = fit.sample(50)["x"]
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    assert (made.amin((0, 2, 3)) >= low).all() and (made.amax((0, 2, 3)) <= high).all()
    middle = (low + high) / 2  # an untrained network of small weights starts there, at tanh of about zero
    assert ((made.mean((0, 2, 3)) - middle).abs() < 0.2 * (high - low)).all()


def test_batch_norm_takes_the_batch_in_training_and_running_averages_afterwards(tmp_path):
    images, algorithm = _images(), SVI(Adversarial(critic_steps=2), steps=5, batch_size=20)
    fit = pg.fit(dcgan(latent=3, filters=4), images, algorithm, seed=0)
    generator = fit.module("generator")
    norms = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
    # A pass for each update of either player and one for the driver's dry run; evaluation adds none.
    passes = {int(norm.num_batches_tracked) for norm in norms}
    assert len(passes) == 1 and passes <= {15, 16, 17} and not generator.training
    assert all(bool((norm.running_var != 1).all()) for norm in norms)
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    together = fit.sample(6, given={"z": z})["x"]
    alone = torch.cat([fit.sample(1, given={"z": row[None]})["x"] for row in z])
    # No row depends on the others: the same sums in another order.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, generator(z), rtol=0, atol=1e-5)
    # In training mode the same rows do depend on each other, far beyond rounding: the two modes are told apart here.
    other = generator.train()(z).detach()
    assert float((other - together).abs().max()) > 1e-2
    loaded = pg.load(fit.save(tmp_path / "fit"), program=dcgan(latent=3, filters=4))
    assert torch.equal(loaded.sample(6, given={"z": z})["x"], together)
    again = {name: buffer for name, buffer in loaded.module("generator").named_buffers()}
    assert again.keys() and all(torch.equal(again[n], b) for n, b in fit.module("generator").named_buffers())
    assert any("running_mean" in name for name in again)


def test_samples_after_training_are_like_those_in_training():
    """Running averages that belonged to other weights, or were never moved, would give another distribution."""
    images = (torch.arange(8) >= 4).float().expand(60, 1, 8, 8) * _images(60)
    fit = pg.fit(dcgan(latent=3, filters=4), images, SVI(Adversarial(), steps=120, batch_size=30, lr=1e-3), seed=0)
    z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1))
    generator = fit.module("generator")
    with torch.no_grad():
        after, during = generator(z), generator.train()(z)
    # Averages over about ten batches of 30 rows with 16 pixels lag behind weights that move by 1e-3 a step.
    assert float((after.mean(0) - during.mean(0)).abs().max()) < 0.1
    assert float(after.mean(0)[..., 4:].mean() - after.mean(0)[..., :4].mean()) > 0.1, "the picture was learned"


def test_images_get_a_convolutional_critic_and_other_rows_do_not():
    def made(objective, data, program):
        return pg.fit(program, data, SVI(objective, steps=1, batch_size=10), seed=0)

    program = dcgan(latent=3, filters=4)
    fit = made(Adversarial(), _images(), program)
    assert fit.notes["critic"].startswith("convolutional network on 1 x 8 x 8 pixels, with batch norm (default)")
    norms = [type(m) for m in fit.module("critic").modules()]
    assert nn.Conv2d in norms
    penalised = made(Adversarial("wasserstein", penalty="gradient"), _images(), program)
    assert "no batch norm" in penalised.notes["critic"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in penalised.module("critic").modules())
    small = made(Adversarial(), _images(side=4), pg.models.gan(latent=3))
    assert small.notes["critic"].startswith("perceptron on 16 standardised column(s)")
    own = made(Adversarial(critic=ConvolutionalCritic((1, 8, 8), filters=3)), _images(), program)
    assert own.notes["critic"].startswith("as given")


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_what_a_critic_says_of_a_row_depends_on_the_others_only_with_batch_norm(norm):
    critic = ConvolutionalCritic((1, 16, 16), filters=3, norm=norm).double()
    rows = torch.rand(2, 6, 1, 16, 16, dtype=torch.float64)
    joined = critic(torch.cat(list(rows)))[:6]
    apart = critic(rows[0])
    assert bool(torch.allclose(joined, apart, atol=1e-12)) is (norm == "none")


def test_rows_that_are_no_images_are_refused():
    for data in (torch.rand(40, 64), torch.rand(40, 8, 8), torch.rand(40, 1, 4, 4)):
        with pytest.raises(ValueError, match="data: dcgan takes images, rows x"):
            pg.check(dcgan(), data)
    with pytest.raises(ValueError, match=r"all 40 row\(s\) are equal"):
        pg.check(dcgan(), torch.ones(40, 1, 8, 8))


def test_averages_of_parameters_do_not_go_with_running_averages_of_others():
    """They would be evaluated together in silence; a critic's batch norm is another matter, and no part of the program."""
    last, averaged = (
        pg.fit(dcgan(latent=3, filters=4), _images(), SVI(Adversarial(averaging=a), steps=4, batch_size=10), seed=0)
        for a in (0.0, 0.9)
    )
    assert averaged.notes["averaging"].startswith("none: BatchNorm2d kept running averages")
    assert all(torch.equal(averaged.params[name], value) for name, value in last.params.items())
    recurrent = pg.models.gran(latent=2, hidden=3, filters=2)
    last, averaged = (
        pg.fit(recurrent, _images(), SVI(Adversarial(averaging=a), steps=4, batch_size=10), seed=0) for a in (0.0, 0.9)
    )
    assert "with batch norm" in averaged.notes["critic"] and "average of the iterates" in averaged.notes["averaging"]
    assert any(not torch.equal(averaged.params[name], value) for name, value in last.params.items())
