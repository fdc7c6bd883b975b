"""What a user may write by mistake, and how the answer begins: one line for each, ``expression  ->  first words``."""

from __future__ import annotations

import ppl_gen as pg

__all__ = ["TABLE"]

#: Part of the table -> class of the error -> lines. The names are those of `bad_input_cases.names`.
TABLE: dict[str, dict[type[Exception], str]] = {
    "Data": {
        ValueError: """
            pg.check(ppca(4, 2), with_value(nan))  ->  data 'x': 1 value(s) are NaN or infinite, the first at index (3, 1)
            pg.check(gan(4), with_value(inf))  ->  data 'x': 1 value(s) are NaN
            pg.check(normal, with_value(nan))  ->  data 'x': 1 value(s) are NaN
            pg.check(vae(4), with_value(1e300))  ->  data 'x': 1e+300 at index (3, 1) is so large
            pg.check(normal, x[:0])  ->  data 'x': expected at least one row
            pg.check(maf(4), x[:0])  ->  data 'x': expected at least one row
            pg.check(gaussian_mixture(2), x[:, :0])  ->  data 'x': expected at least one row and one column
            pg.check(gaussian_mixture(2), x[:1])  ->  components: 2 of them need
            pg.check(ppca(4, 2), x[:1])  ->  data: column(s) 0, 1, 2, 3 are constant
            pg.check(ppca(4, 2), x[:, :3])  ->  data: ppca(features=4) takes rows of 4 columns, got (40, 3)
            pg.check(vae(4), x[:, :3])  ->  data: vae was made for rows of shape (4,)
            pg.check(dcgan(), x)  ->  data: dcgan takes images, rows x (channels, height, width)
            pg.check(dcgan((1, 8, 8)), torch.arange(405.0).reshape(5, 1, 9, 9))  ->  data: dcgan was made for rows of shape (1, 8, 8)
            pg.check(hidden_markov(2), x[0])  ->  data: hidden_markov takes sequences x time
            pg.check(normal, (x, y))  ->  data: a tuple of 2 values, and the model takes 1 (x)
            pg.check(normal, 3.0)  ->  data 'x': expected rows
            pg.check(ppca(4, 2), None)  ->  data: ppca reads the entry 'x', got none
            pg.check(ppca(4, 2), {"rows": x})  ->  data: ppca reads the entry 'x', got only rows
            pg.check(m2(4, classes=2), {"x": x, "Y": y})  ->  data 'Y': neither model nor recipe reads it; did you mean the argument 'y'
            pg.check(normal, {"rows": x})  ->  the model needs the argument 'x', which the data does not hold (it holds rows)
            pg.check(takes_nothing, x)  ->  the model takes no arguments
            pg.check(m2(4, classes=2), {"x": x, "y": y[:3]})  ->  data: entries must share their rows
            pg.check(m2(4, classes=2), {"x": x, "y": y + 1})  ->  data 'y': expected labels from 0 to 1
            pg.check(m2(4, classes=2), {"x": x, "y": y.float()})  ->  data 'y': expected one integer label per row
            pg.check(vae(4, classes=2), {"x": x, "y": y - 1})  ->  data 'y': expected labels from 0 to 1, got -1
            pg.check(vae(4, classes=2), x)  ->  data: vae reads labels from the entry 'y'
            pg.check(vae(4, likelihood="bernoulli"), x)  ->  data: likelihood='bernoulli' takes zeros and ones
            pg.check(vae(1, likelihood="categorical", levels=2), y[:, None] + 1)  ->  data: categorical pixels are integers
            pg.check(rbm(4, 2), x)  ->  data: an rbm takes zeros and ones
            pg.check(dbm(4), x)  ->  data: a dbm takes zeros and ones
            pg.check(helmholtz(4), x)  ->  data: a helmholtz takes zeros and ones
            pg.check(gaussian_rbm(4), x[:1])  ->  data: column(s) 0, 1, 2, 3 are constant
            pg.check(energy_model(nn.Identity()), x)  ->  network: expected one number for each of 4 rows
            pg.check(char_rnn(3), torch.full((2, 5), 3))  ->  data: char_rnn(symbols=3): expected codes from 0 to 2
            pg.check(char_rnn(3), {"x": torch.zeros(2, 5).long(), "lengths": torch.tensor([6, 5])})  ->  lengths: expected
            pg.check(classifier(2), x)  ->  data: classifier reads labels from the entry 'y'
            pg.check(classifier(2), {"x": x, "y": y + 1})  ->  data 'y': expected labels from 0 to 1, got 2
            pg.check(classifier(), {"x": x, "y": y - 1})  ->  data 'y': expected labels from 0 to
            pg.check(classifier(), {"x": x, "y": y * 5000})  ->  classes: the labels 'y' reach 5000
            pg.check(classifier(), {"x": x[:, None], "y": y})  ->  data: classifier takes rows x features or
            pg.check(classifier(hidden=()), {"x": x[:, None, None], "y": y})  ->  hidden: images need
            pg.check(classifier(2, linear(4, 3)), {"x": x, "y": y})  ->  network: expected scores of shape (2, 2)
            pg.check(classifier(2, linear(3, 2)), {"x": x, "y": y})  ->  network: it cannot read rows of shape (4,)
            pg.check(ppca(4, 2), {"x": x, "mask": x})  ->  data 'mask': expected booleans
            pg.check(chances, x)  ->  the model of 'chances' failed on a dry run: at site 'x'
        """,
        TypeError: """
            pg.check(normal, x.to_sparse())  ->  data 'x': expected a tensor or an array of real numbers, got a sparse
            pg.check(rbm(4, 2), x.to_sparse())  ->  data 'x': expected a tensor or an array of real numbers, got a sparse
            pg.check(ppca(4, 2), x * 1j)  ->  data 'x': expected a tensor or an array of real numbers, got complex
            pg.check(ppca(4, 2), [["a", "b"]] * 9)  ->  data 'x': expected a tensor or an array of numbers, got list
            pg.check(normal, np.array([None, 1.0]))  ->  data 'x': expected a tensor or an array of numbers, got ndarray
            pg.check(normal, "rows.csv")  ->  data 'x': expected a tensor or an array of numbers, got str
            pg.check(normal, [[1.0, 2.0], [3.0]])  ->  data 'x': expected a tensor or an array of numbers, got list
            pg.check(char_rnn(3), x)  ->  data: char_rnn(symbols=3): expected integer codes
            pg.check(hidden_markov(2, emission="categorical"), x)  ->  data: categorical emissions are integers
        """,
    },
    "Settings of the wrong kind": {
        ValueError: """
            NUTS(full_mass="yes")  ->  full_mass: expected True, False or None, got 'yes'
            NUTS(sampler="stan")  ->  sampler: expected one of 'auto', 'nutpie', 'pyro', got 'stan'
            NUTS(mass="full")  ->  mass: expected one of 'auto', 'dense', 'low_rank', 'diagonal', got 'full'
            NUTS(sampler="pyro", mass="low_rank")  ->  mass: pyro has no mass matrix 'low_rank'
            NUTS(jitter=float("inf"))  ->  jitter: expected a number of at least 0, or None, got inf
            NUTS(max_tree_depth=100)  ->  max_tree_depth: expected a whole number of at least 1 and at most 20, got 100
            NUTS(target_accept="high")  ->  target_accept: expected a number between 0 and 1, got 'high'
            ELBO(enumerate="all")  ->  enumerate: expected True or False, got 'all'
            EM(tolerance="small")  ->  tolerance: expected a number of nats of at least 0, got 'small'
            CAVI(tolerance=None)  ->  tolerance: expected a number from 0 up to 1, got None
            Plateau(window=2.5)  ->  window: expected a whole number of at least 2, got 2.5
            Patience(checks="many")  ->  checks: expected a whole number of at least 1, got 'many'
            pg.fit(normal, x, SVI(steps=1), progress="yes")  ->  progress: expected True, False or None, got 'yes'
            pg.fit(normal, x, SVI(steps=1), device="meta")  ->  device: expected one that holds numbers
            pg.fit(normal, x, SVI(steps=1), device=[1])  ->  device: 
            pg.fit(normal, x, SVI(steps=1), validate_every=True)  ->  validate_every: expected a whole number of at least 1, got True
            pg.compare(normal, x, {"a": SVI(steps=1)}, n_jobs=-5000)  ->  n_jobs: expected a number of processes
            pg.compare(normal, x, {"a": SVI(steps=1)}, seeds=[2**40])  ->  seeds: expected a whole number of at least 0 and below 2**32
            pg.compare(normal, x, {"a": SVI(steps=1)}, device="meta")  ->  device: expected one that holds numbers
            pg.compare(normal, x, {"a": SVI(steps=1)}, progress=3)  ->  progress: expected True, False or None, got 3
        """,
        TypeError: """
            pg.fit(normal, x, SVI(steps=1), fabric=2)  ->  fabric: expected a lightning_fabric.Fabric
            pg.fit(normal, x, SVI(steps=1), dtype=torch.float16)  ->  dtype: expected torch.float32 or torch.float64, got torch.float16
            pg.compare(normal, x, {"a": SVI(steps=1)}, dtype="float64")  ->  dtype: expected torch.float32 or torch.float64, got 'float64'
            pg.compare(normal, x, {"a": SVI(steps=1)}, seeds=np.int64(3))  ->  seeds: expected several whole numbers
            pg.fit(normal, x, SVI(steps=60, stop_rule=lambda history: 0.5))  ->  stop_rule: expected None, or a sentence that says why the run ends, got 0.5
            pg.fit(normal, x, SVI(steps=1, schedule=lambda optimiser: None))  ->  schedule: expected a function of the optimiser that returns
            pg.check(normal, x.to("meta"))  ->  data 'x': expected a tensor or an array of real numbers, got a meta tensor
            Plateau(on=3)  ->  on: expected the name of a record of the history, got 3
            compared().report(3)  ->  path: expected a path, as text or pathlib.Path, got int
        """,
    },
    "Programs": {
        ValueError: """
            pg.check(pg.Program(normal, guide_of_another_name), x)  ->  model and guide of 'normal' do not match: latent site(s) ['loc'] are in the model only; site(s) ['mean']
            pg.check(pg.Program(normal, guide_in_the_plate), x)  ->  at site 'loc': inside the data plate in the guide
            pg.check(pg.Program(normal, guide_that_draws_x), x)  ->  model and guide of 'normal' do not match: site(s) ['x'] are observed
            pg.check(no_plate, x)  ->  the model of 'no_plate' failed on a dry run: at site 'x': invalid log_prob shape
            pg.check(pg.Program(plate_of_another_name, data_plate="units"), x)  ->  the program 'plate_of_another_name' has no plate named 'units'
            pg.check(columns_in_the_plate, x)  ->  the model of 'columns_in_the_plate' failed on a dry run: at site 'x'
            pg.check(keeps_a_name, x)  ->  the site 'draw' has a name that ArviZ reserves for the draws
            pg.fit(forty_rows, x, SVI(steps=1)).sample(3)  ->  pyro.plate('data') has 40 rows, written out
            pg.fit(forty_rows, x, SVI(steps=1)).predict(x[:3])  ->  data: the fit of 'forty_rows' cannot take these rows: pyro.plate('data') has 40 rows
            pg.fit(observes_nothing, x, SVI(steps=1))  ->  no site of 'observes_nothing' is observed
        """,
        TypeError: """
            pg.Program(3)  ->  model: expected a Pyro model
            pg.Program(normal, guide="AutoNormal")  ->  guide: expected a Pyro guide
            pg.fit(pg.Program(normal, AutoNormalizingFlow), x, SVI(steps=1))  ->  guide: AutoNormalizingFlow cannot be made of a model alone
            pg.Program(normal, terms={"penalty": 1.0})  ->  terms: expected functions
            pg.Recipe(pg.Program(normal))  ->  build: expected a function
            pg.fit(pg.Recipe(normal), x, SVI(steps=1))  ->  the recipe 'normal' must return a Program, got NoneType
            pg.check(nn.Linear, x)  ->  program: got the class Linear
            pg.check("ppca", x)  ->  program: expected a model function
        """,
        pg.IncompatibleError: """
            pg.fit(sums_everything, x, NUTS())  ->  NUTS does not fit the program 'sums_everything'
            pg.fit(pg.Program(counts, guide_without_gradient), x, SVI(IWAE(), steps=1))  ->  IWAE gives no gradient to the guide's site(s) 'count'
            pg.fit(pg.Program(normal, AutoDiscreteParallel), x, SVI(steps=1))  ->  AutoDiscreteParallel guides finite latent sites only
            pg.fit(pg.Program(normal, AutoDelta), x, SVI(steps=1)).marginal_likelihood()  ->  the guide of 'normal' puts loc at one value
            pg.fit(gan(4), x, SVI(steps=1))  ->  SVI(ELBO) does not fit the program 'gan'
            pg.fit(gan(4), x, NUTS())  ->  NUTS does not fit the program 'gan'
            pg.fit(vae(4), x, EM())  ->  EM does not fit the program 'vae'
            pg.fit(rbm(4, 2), (x > 0).float(), SVI(steps=1))  ->  SVI(ELBO) does not fit the program 'rbm'
            pg.fit(dbn(4, (3, 2)), (x > 0).float(), SVI(ContrastiveDivergence(), steps=1))  ->  SVI(ContrastiveDivergence) does not fit
            pg.fit(ppca(4, 2), x, SVI(WakeSleep(), steps=1))  ->  WakeSleep gives no gradient that leads to the posterior of
            pg.fit(vae(4), x, SVI(Walkback()))  ->  SVI(Walkback) does not fit the program 'vae'
            pg.fit(normal, x, CAVI())  ->  CAVI does not fit the program 'normal'
            pg.fit(normal, x, SVI(ContrastiveDivergence()))  ->  SVI(ContrastiveDivergence) does not fit
            pg.fit(normal, x, SVI(SimpleDiffusion()))  ->  SVI(SimpleDiffusion) does not fit
            inpaint(fit, x, x > 0)  ->  inpaint needs a fit of denoising_diffusion
            ddim_sample(fit, 2)  ->  ddim_sample needs a fit of denoising_diffusion
            guided_sample(fit, lambda x: x[:, 0], 2)  ->  guided_sample needs a fit of denoising_diffusion
        """,
    },
    "Settings of a model": {
        ValueError: """
            vae(0)  ->  features: expected a whole number of at least 1, got 0
            vae(())  ->  features: expected
            vae("4")  ->  features: expected
            vae(4, latent=-1)  ->  latent: expected a whole number of at least 1, got -1
            vae(4, latent=2.5)  ->  latent: expected
            vae(4, hidden=(0,))  ->  hidden: expected a whole number of at least 1, got 0
            vae(4, hidden=None)  ->  hidden: expected
            vae(4, activation="tan")  ->  activation: expected one of
            vae(4, likelihood="poisson")  ->  likelihood: expected one of
            vae(4, likelihood="categorical")  ->  levels: expected
            vae(4, likelihood="bernoulli", scale=1.0)  ->  scale: is the noise
            vae(4, scale=-1.0)  ->  scale: expected a positive number
            vae(4, classes=1)  ->  classes: expected at least 2
            vae(4, network="convolutional")  ->  network: 'convolutional' takes images
            m1(4, hidden=(-3,))  ->  hidden: expected
            m1((2, 2))  ->  features: expected
            m2(4, classes=0)  ->  classes: expected
            m2(4, classes=2, alpha=-0.1)  ->  alpha: expected
            m2((2, 2), classes=2)  ->  features: expected
            autoencoder(4, 0)  ->  code: expected
            autoencoder(4, 2, top_k=3)  ->  top_k: expected at most the 2 numbers
            autoencoder(4, 2, corruption=1.0)  ->  corruption: expected
            autoencoder(4, 2, corruption="a lot")  ->  corruption: expected
            autoencoder(4, 2, sparsity=nan)  ->  sparsity: expected
            autoencoder(4, 2, sparsity="l1")  ->  sparsity: expected
            autoencoder(4, 2, target="low")  ->  target: expected
            autoencoder(4, 2, kind="sparse")  ->  kind: expected
            ppca(4, 4)  ->  latent: expected fewer than the 4 features
            ppca(4, 2, floor=0)  ->  floor: expected a positive number
            ppca(4, 2, prior="strong")  ->  prior: expected one of
            factor_analysis(4, 2, guide="AutoNormal")  ->  guide: expected one of
            principal_components(x, 9)  ->  latent: expected fewer than the 4 features
            principal_components(with_value(nan), 1)  ->  x: expected a matrix of finite numbers
            gaussian_mixture(0)  ->  components: expected
            gaussian_mixture(2, covariance="round")  ->  covariance: expected
            gaussian_mixture(2, concentration=0)  ->  concentration: expected a positive number
            hidden_markov(-2)  ->  states: expected
            hidden_markov(2, categories=3)  ->  categories: only categorical emissions have them
            gan(4, latent=0)  ->  latent: expected
            gan(4, hidden="8")  ->  hidden: expected
            dcgan((1, 8))  ->  shape: expected (channels, height, width)
            dcgan(filters=0)  ->  filters: expected
            ConvolutionalCritic((1, 4, 4))  ->  shape: expected (channels, height, width)
            ConvolutionalCritic((1, 8, 8), norm="layer")  ->  norm: expected one of
            lapgan((1, 8, 8), levels=9)  ->  levels: images of 8 x 8 pixels can be halved 3 time(s), got 9
            laplacian_pyramid(x, 1)  ->  images: expected a tensor of real numbers, rows x channels x height x width
            from_pyramid([x, x])  ->  bands: expected the tensors of a pyramid, the finest first
            gran(steps=0)  ->  steps: expected
            rbm(4, 0)  ->  hidden: expected
            rbm(4, 2, scale=-1.0)  ->  scale: expected
            rbm(4, 2, scale="wide")  ->  scale: expected
            gaussian_rbm(4, 0)  ->  hidden: expected
            dbm(4, (3,))  ->  hidden: expected units of at least 2 layer(s)
            dbm(4, updates=0)  ->  updates: expected
            dbn(4, (3,))  ->  hidden: expected units of at least 2 layer(s)
            helmholtz(4, ())  ->  hidden: expected units of at least 1 layer(s)
            gsn(4, corruption=0)  ->  corruption: expected
            energy_model(nn.Identity(), tail=0)  ->  tail: expected a positive number
            rbm_stack(x, (3, 2))  ->  data: a rbm_stack takes zeros and ones
            denoising_diffusion(4, steps=1)  ->  steps: expected
            denoising_diffusion(4, schedule="square")  ->  schedule: expected
            denoising_diffusion((4, 4))  ->  features: expected columns, or images
            denoising_diffusion((1, 3, 3))  ->  layers: 3 levels halve an image 2 times
            binomial_diffusion(4, steps=1)  ->  steps: expected
            binomial_diffusion(4, layers=0)  ->  layers: expected
            pg.check(binomial_diffusion(4), x)  ->  data: a binomial_diffusion takes zeros and ones
            real_nvp(1)  ->  features: one column depends on no other
            maf(4, hidden=(2,))  ->  hidden: expected widths of at least 4
            real_nvp((4, 4))  ->  features: expected a number of columns or (channels, height, width)
            real_nvp((1, 28, 28), scales=4)  ->  scales: images of 28 x 28 pixels can be halved 2 time(s)
            real_nvp(4, levels=1)  ->  levels: expected a whole number of at least 2 and at most 4096, got 1
            real_nvp(4, margin=0.5)  ->  margin: expected a number between 0 and 0.5
            nice(4, prior="cauchy")  ->  prior: expected one of
            glow(4, steps=0)  ->  steps: expected
            glow((1, 3, 3))  ->  features: glow couples halves of the channels
            naf(4, units=0)  ->  units: expected
            ffjord(4, method="euler")  ->  method: expected one of
            ffjord(4, tolerance=0)  ->  tolerance: expected a positive number
            bits_per_dimension(nan, 784)  ->  evidence: expected an Evidence or a finite number
            spline_flow(4, bins=1)  ->  bins: expected
            spline_flow(4, bound="wide")  ->  bound: expected
            scalar_flow("gamma")  ->  base: expected
            scalar_flow("beta", concentrations=(1.0, -1.0))  ->  concentrations: expected
            scalar_flow("beta", concentrations=3.0)  ->  concentrations: expected
            char_rnn(1)  ->  symbols: expected a whole number of at least 2, got 1
            char_rnn(3, cell="transformer")  ->  cell: expected one of
            classifier(1)  ->  classes: expected at least 2
            classifier(2, linear(4, 2), hidden=(8,))  ->  hidden: are the widths of the built-in networks
        """,
        TypeError: """
            classifier(2, "cnn")  ->  network: expected a torch.nn.Module or None, got str
            dbn(4, layers=[fit, fit])  ->  layers: expected fits of rbm, got a fit of 'ppca'
            energy_model("network")  ->  network: expected a torch network
            m1_m2("m1.pt", classes=2)  ->  m1: expected a fit of m1
            m1_m2(fit, classes=2)  ->  m1: expected a fit of m1 (or of vae, a perceptron without classes), got a fit of 'ppca'
        """,
    },
    "Settings of an algorithm or an objective": {
        ValueError: """
            ELBO(beta=-1)  ->  beta: expected a finite number of at least 0, got -1
            ELBO(particles=0)  ->  particles: expected
            ELBO(time_step="one")  ->  time_step: expected
            IWAE(particles=-1)  ->  particles: expected a whole number of at least 1, got -1
            IWAE(chunk=0)  ->  chunk: expected a whole number of at least 1, got 0
            flow_guide("spline")  ->  kind: expected one of
            flow_guide(layers=0)  ->  layers: expected
            Adversarial("friendly")  ->  kind: expected one of
            Adversarial(penalty="l2")  ->  penalty: expected
            Adversarial("wasserstein", clip=0)  ->  clip: expected a positive number
            Adversarial(critic_steps=0)  ->  critic_steps: expected
            Adversarial(schedule="in turn")  ->  schedule: expected one of 'alternating', 'simultaneous'
            Adversarial(schedule="simultaneous", critic_steps=5)  ->  critic_steps: players that move at once move once each
            Adversarial(averaging=1.0)  ->  averaging: expected a finite number of at least 0 and below 1
            Adversarial("wasserstein", penalty="none")  ->  penalty: the default critic is not Lipschitz by construction
            Divergence(lambda u: u * u.log() + 1)  ->  f: f(1) has to be 0
            Divergence(lambda u: -u * u + 1)  ->  f: expected a convex function
            Divergence(lambda u: u * u.log(), lambda t: t.exp())  ->  conjugate: at t = f'(u)
            WAE("sinkhorn")  ->  kind: expected one of
            WAE(kernel="linear")  ->  kernel: expected one of
            WAE("mmd", critic=nn.Identity())  ->  critic: 'mmd' has none
            EBGAN(noise=0)  ->  noise: expected a positive number
            EBGAN(entropy=-1)  ->  entropy: expected
            EBGAN(penalty_weight=-1)  ->  penalty_weight: expected
            EBGAN(averaging=1.0)  ->  averaging: expected a finite number of at least 0 and below 1
            EBGAN(pulling_away=-1)  ->  pulling_away: expected
            pg.fit(gan(4), x, SVI(EBGAN(energy=nn.AvgPool1d(4), pulling_away=0.1), steps=1))  ->  pulling_away: expected an energy that calls a torch.nn.Linear last
            ConditionalAdversarial(critic_steps=0)  ->  critic_steps: expected
            ConditionalAdversarial(penalty="gradient")  ->  penalty: expected
            ConditionalAdversarial(penalty_weight=0)  ->  penalty_weight: expected a positive number
            ConditionalAdversarial(averaging=1.0)  ->  averaging: expected a finite number of at least 0 and below 1
            pg.fit(gan(4), x, SVI(ConditionalAdversarial({"y": nn.Identity()}), steps=1))  ->  critics: ['y'] are not observed
            AdversarialTraining(radius=0)  ->  radius: expected a positive number
            AdversarialTraining(norm="1")  ->  norm: expected one of
            AdversarialTraining(bounds=(1, 0))  ->  bounds: expected two numbers
            AdversarialTraining(clean=1)  ->  clean: expected
            pg.fit(normal, x, SVI(AdversarialTraining(entry="pixels"), steps=1))  ->  entry: the model of 'normal' takes no 'pixels'
            DomainAdversarial(domains=1)  ->  domains: expected
            pg.fit(normal, x, SVI(DomainAdversarial(), steps=1))  ->  domain: the model of 'normal' takes no 'domain'
            ContrastiveDivergence(steps=0)  ->  steps: expected
            ContrastiveDivergence(chains=5)  ->  chains: without persistent=True
            ContrastiveDivergence(temperatures=5)  ->  temperatures: chains that start at the rows
            ContrastiveDivergence(persistent=True, temperatures=1)  ->  temperatures: expected
            ContrastiveDivergence(persistent=True, restart=1.0)  ->  restart: expected
            WakeSleep(guide="wake")  ->  guide: 'wake' weighs particles
            Walkback(steps=0)  ->  steps: expected
            SVI(steps=0)  ->  steps: expected
            SVI(steps=10, epochs=1)  ->  give steps or epochs
            SVI(batch_size=-1)  ->  batch_size: expected
            SVI(lr=0)  ->  lr: expected a positive number
            SVI(lr="fast")  ->  lr: expected a positive number
            SVI(lr={"critic": nan})  ->  lr: expected a positive number
            SVI(optimiser="newton")  ->  optimiser: expected one of
            SVI(clip_norm=-1.0)  ->  clip_norm: expected a positive number
            EM(steps=0)  ->  steps: expected
            EM(tolerance=-1)  ->  tolerance: expected
            CAVI(tolerance=2)  ->  tolerance: expected
            NUTS(draws=0)  ->  draws: expected
            Laplace(steps=0)  ->  steps: expected
            Pathfinder(paths=0)  ->  paths: expected
            Pathfinder(draws=50)  ->  draws: expected
            NUTS(chains=-1)  ->  chains: expected
            NUTS(target_accept=1.5)  ->  target_accept: expected
            Plateau(window=0)  ->  window: expected
            Patience(checks=0)  ->  checks: expected
            pg.fit(normal, x, SVI(stratify="y"))  ->  stratify: no entry 'y'
            pg.fit(normal, x, SVI(lr={"critic": 0.1}, steps=1))  ->  lr: ELBO has no player
            pg.fit(normal, x, SVI(steps=1), seed=-1)  ->  seed: expected a whole number of at least 0
            pg.fit(normal, x, SVI(steps=1), seed=0.5)  ->  seed: expected
            pg.fit(normal, x, SVI(steps=1), device="abacus")  ->  device: 
            pg.fit(normal, x, SVI(steps=1), validate_every=0)  ->  validate_every: expected
            pg.fit(normal, x, SVI(steps=1), every=10)  ->  every: it says how often a checkpoint is written; give checkpoint=
            pg.fit(normal, x, SVI(steps=1), checkpoint="run", every=0)  ->  every: expected at least 1 step
            pg.fit(normal, x, SVI(steps=1), checkpoint=text)  ->  checkpoint: 
            pg.fit(normal, x, SVI(steps=1), checkpoint=kept)  ->  checkpoint: it belongs to a run of 2 steps, and now there are 1
            pg.fit(normal, x, SVI(steps=2, lr=0.5), checkpoint=kept)  ->  checkpoint: 
            pg.fit(normal, x + 1.0, SVI(steps=2), checkpoint=kept)  ->  checkpoint: 
            pg.compare(normal, x, {"SVI": SVI(steps=1)}, folder=text)  ->  folder: 
            pg.fit(normal, x, SVI(steps=1), validation=x[:, :3])  ->  validation: expected 'x' of shape
            pg.fit(gan(4), x, SVI(Adversarial(), steps=1), start=fit)  ->  start: that fit is of the program 'ppca'
        """,
        TypeError: """
            Divergence("kl")  ->  f: expected a function, got str
            pg.exploitability(fit, EM())  ->  algorithm: expected the SVI that played the game, got EM
            EBGAN(energy="quadratic")  ->  energy: expected a torch network or None
            WAE("gan", critic=3)  ->  critic: expected a torch network or None
            AdversarialTraining(objective="ELBO")  ->  objective: expected
            Adversarial(critic="perceptron")  ->  critic: expected a torch network or None
            SVI(objective="ELBO")  ->  objective: expected
            SVI(schedule="cosine")  ->  schedule: expected a function
            pg.fit(normal, x, SVI(steps=1), checkpoint="run", every=0.5)  ->  every: expected a whole number of steps, or a time
            pg.fit(normal, x, SVI(steps=1), checkpoint="run", every="30s")  ->  every: expected a whole number of steps, or a time
            pg.fit(normal, x, SVI(steps=1), checkpoint=3)  ->  checkpoint: expected text or a Path
            pg.compare(normal, x, {"SVI": SVI(steps=1)}, folder=3)  ->  folder: expected text or a Path
            pg.fit(normal, x, SVI)  ->  algorithm: expected an instance such as SVI()
            pg.fit(normal, x, "SVI")  ->  algorithm: expected an instance
            pg.fit(normal, x, SVI(steps=1), dtype="float64")  ->  dtype: expected torch.float32 or torch.float64
            pg.fit(normal, x, SVI(steps=1), callbacks=print)  ->  callbacks: expected
            pg.fit(normal, x, SVI(steps=1), start="saved")  ->  start: expected a fit
        """,
    },
    "Algorithms of your own": {
        ValueError: """
            ChainPosterior({})  ->  draws: expected chains x draws x shape, as many chains and draws of every site
            ChainPosterior({"loc": x[0]})  ->  draws: expected chains x draws x shape, as many chains and draws of every site
            DrawsPosterior({"loc": x, "scale": x[:3]})  ->  draws: expected draws x shape, as many draws of every site
        """,
        TypeError: """
            Outcome({"loc": x[0, 0]})  ->  posterior: expected what was learned, such as PointPosterior
            Outcome(PointPosterior)  ->  posterior: expected what was learned, such as PointPosterior
        """,
    },
    "Questions to a fit": {
        ValueError: """
            fit.evidence(x[:, :3])  ->  data: the fit of 'ppca' was made on x (rows, 4), and cannot take x (rows, 3)
            fit.evidence(x[:, :1])  ->  data: the fit of 'ppca' was made on x (rows, 4), and cannot take x (rows, 1)
            fit.evidence(x[0])  ->  data: the fit of 'ppca' was made on x (rows, 4), and cannot take x (rows)
            fit.predict(x[:, :, None], draws=1)  ->  data: the fit of 'ppca' was made on x (rows, 4)
            fit.posterior(torch.cat([x, x], 1), draws=1)  ->  data: the fit of 'ppca' was made on x (rows, 4)
            codes(fit, x[:, :3])  ->  data: the fit of 'ppca'
            reconstructions(fit, x[:, :3])  ->  data: the fit of 'ppca'
            anomaly_scores(fit, x[:, :3])  ->  data: the fit of 'ppca'
            active_units(fit, x[:, :3])  ->  data: the fit of 'ppca'
            code_means(fit, x[:, :3])  ->  data: the fit of 'ppca'
            fit.evidence(with_value(nan))  ->  data 'x': 1 value(s) are NaN
            fit.predict(x[:0])  ->  data 'x': expected at least one row
            fit.evidence({"rows": x})  ->  the model needs the argument 'x'
            fit.posterior(draws=0)  ->  draws: expected a whole number of at least 1, got 0
            fit.predict(draws=-1)  ->  draws: expected
            fit.evidence(particles=-1)  ->  particles: expected a whole number of at least 1, got -1
            fit.evidence(draws=2.5)  ->  draws: expected
            fit.evidence(chunk=0)  ->  chunk: expected
            pg.AIS(temperatures=[0.0, 0.5])  ->  temperatures: expected a whole number of at least 1, or inverse
            pg.AIS(chains=1)  ->  chains: expected
            fit.marginal_likelihood(draws=0)  ->  draws: expected
            fit.to_arviz(draws=0)  ->  draws: expected
            fit.diagnose(draws=0)  ->  draws: expected
            fit.sample(0)  ->  n: expected a whole number of at least 1, got 0
            fit.sample(2.5)  ->  n: expected
            fit.sample(3, seed=-1)  ->  seed: expected a whole number of at least 0
            fit.posterior(draws=1, seed="a")  ->  seed: expected
            fit.sample(3, given={"y": 1})  ->  given: no site or input named ['y']
            fit.sample(3, given={"z": torch.zeros(2, 2)})  ->  given: 'z' has shape (2, 2), expected (3, 2)
            fit.sample(3, given={"loc_standard": torch.zeros(7)})  ->  given: 'loc_standard' has shape (7,), expected (4,)
            fit.sample(3, given={"precision": -1.0})  ->  given: 'precision': got a value outside of the support of its Exponential
            fit.sample(3, given={"z": nan})  ->  given: 'z': expected finite numbers
            codes(fit, site="code")  ->  site: 'code' is not a local latent site
            active_units(fit, site="code")  ->  site: expected one of z
            active_units(fit, threshold=-1)  ->  threshold: expected
            codes(fit, draws=0)  ->  draws: expected
            pg.compare_rows(x, x[:5])  ->  made: expected at least 20 rows
            pg.modes_covered(x, x[:2], within=0)  ->  within: expected a positive number
            noising_fit.predict({"x": x, "mask": x})  ->  data 'mask': expected booleans, True where x is observed
            inpaint(noising_fit, x, x[:, :3] > 0)  ->  data 'mask': expected the shape of x
            inpaint(noising_fit, x, x > 0, draws=0)  ->  draws: expected
            inpaint(noising_fit, x, x > 0, particles=2, resamples=2)  ->  particles: a particle filter goes through
            ddim_sample(noising_fit, 2, steps=9)  ->  steps: expected
            ddim_sample(noising_fit, 2, eta=2.0)  ->  eta: expected a number from 0 to 1
            guided_sample(noising_fit, lambda x: x, 2)  ->  log_density: expected one number for each of 2 rows
            bits_per_character(fit, x[0])  ->  data: the fit of 'ppca'
            pg.prior_predictive(normal, x, draws=0)  ->  draws: expected
            pg.stream([x], rows=0)  ->  rows: expected
            pg.fit(normal, pg.stream([x], rows=2), SVI(steps=1))  ->  rows: expected those of one pass, got 2
            pg.fit(normal, pg.stream([x], rows=len(x)), SVI(steps=1, batch_size=2))  ->  batch_size: the batches of a stream
            pg.compare(normal, pg.stream([x], rows=len(x)), {"SVI": SVI()})  ->  holdout: rows of a stream
            pg.prior_predictive(normal, x, draws=1, seed=-1)  ->  seed: expected
            pg.prior_predictive(normal, x[:0], draws=1)  ->  data 'x': expected at least one row
        """,
        TypeError: """
            pg.stream(iter([x]), rows=10)  ->  batches: a list_iterator can be walked through once
            pg.stream(x, rows=10)  ->  batches: expected an iterable of batches
            fit.sample(3, given=[1.0])  ->  given: expected a mapping
            fit.sample(3, given={"z": "code"})  ->  given: 'z': expected numbers
            fit.evidence(x.numpy().astype(str))  ->  data 'x': expected a tensor or an array of numbers
        """,
        KeyError: """
            fit.module("decoder")  ->  "no network named 'decoder' in this fit; there is: none"
        """,
        pg.IncompatibleError: """
            pg.fit(gan(4), x, SVI(Adversarial(), steps=1)).evidence()  ->  the program 'gan' has no density
            pg.fit(gan(4), x, SVI(Adversarial(), steps=1)).posterior()  ->  SVI(Adversarial) learned no posterior of z
            pg.fit(autoencoder(4, 2), x, SVI(steps=1)).sample(3)  ->  'autoencoder' gives z a flat (improper) prior
            pg.fit(maf(4), x, SVI(steps=1)).posterior()  ->  'maf' has no latent sites
            reconstructions(pg.fit(maf(4), x, SVI(steps=1)))  ->  'maf' has no mean of 'x' in closed form
            pg.prior_predictive(ppca(4, 2, prior="flat"), x, draws=1)  ->  'ppca' gives
        """,
    },
    "Looking inside": {
        ValueError: """
            saliency(net, x)  ->  x: the network cannot read rows of shape (4,)
            saliency(net, images[0, 0])  ->  x: the network cannot read rows of shape (6,)
            saliency(net, images, target=3)  ->  target: expected a whole number from 0 to 2
            saliency(net, images, target=[0, 1])  ->  target: expected a whole number from 0 to 2, or one for each of the 12 rows
            saliency(net, images * nan)  ->  x: expected finite numbers
            deconvnet(linear(4, 2), x)  ->  network: it has no rectifier
            deconvnet(net, images, layer="9")  ->  layer: there is no '9'; it has '0', '1', '2'
            guided_backprop(net, images, 2, layer="0")  ->  target: expected a whole number from 0 to 1
            occlusion(net, x)  ->  x: expected images, rows x channels x height x width
            occlusion(net, images[0])  ->  x: expected images, rows x channels x height x width, got shape (1, 6, 6); one image
            occlusion(net, images, size=7)  ->  size: expected a square of at most 6 pixels
            occlusion(net, images, size=2, stride=3)  ->  stride: expected at most the 2 pixels
            activation_maximisation(net, (1, 6, 6), 5)  ->  target: expected a whole number from 0 to 2
            activation_maximisation(net, (6,), 0)  ->  x: the network cannot read rows of shape (6,)
            activation_maximisation(net, (1, 6, 6), 0, penalty=0.0)  ->  penalty: 0 takes both bounds
            activation_maximisation(net, (1, 6, 6), 0, low=1.0, high=0.0)  ->  high: expected more than low
            adversarial_example(net, images + 1, 1)  ->  x: expected numbers from 0.0 to 1.0
            adversarial_example(net, images, 3)  ->  target: expected a whole number from 0 to 2
            adversarial_example(net, images, torch.zeros(12, 2))  ->  target: expected finite codes of shape (12, 3)
            adversarial_example(net, images, 1, c=0.0)  ->  c: expected a positive number
            adversarial_example(net, images, 1, within=1.0)  ->  within: expected a number between 0 and 1
            filters(linear(4, 2))  ->  network: expected one with convolutions, got Linear without any
            filters(net, "1")  ->  layer: expected a convolution or a linear layer, '1' is ReLU
            activation_maps(linear(4, 2), x)  ->  network: expected one with convolutions
            top_patches(net, images, channel=2)  ->  channel: expected one from 0 to 1, got 2
            top_patches(net, images, channel=-1)  ->  channel: expected
            top_patches(net, images, 0, "3")  ->  layer: expected one that gives maps of channels
            nearest_images(net, images, images[:, :, 1:])  ->  training: expected rows of shape (1, 6, 6)
            nearest_images(net, images, images[:5])  ->  count: expected at most the 5 training rows
            nearest_images(nn.Flatten(), images, images)  ->  layer: the network has no linear layer
            tsne(x[:4])  ->  codes: expected at least 5 rows
            mds(torch.ones(9, 3))  ->  codes: all rows are equal
            som(x, grid=(8, 1))  ->  grid: expected
            som(x[:, :1])  ->  codes: a map of two dimensions
            embed_layers(net, images, "umap")  ->  method: expected one of 'tsne', 'mds', 'som'
        """,
        TypeError: """
            saliency(fit, x)  ->  network: expected a torch.nn.Module, such as fit.module("encoder"), got Fit
            saliency(nn.ReLU, x)  ->  network: expected a torch.nn.Module, such as fit.module("encoder"), got the class itself
            saliency(net, "digits.npy")  ->  x: expected rows as a tensor or an array of real numbers, got str
            activation_maps(net, images, 3)  ->  layer: expected the name of a layer, got int
            embed_layers(net, images, layers="0")  ->  layers: expected names of layers in a list
        """,
    },
    "Files": {
        ValueError: """
            pg.load("no/such/folder")  ->  path: no saved fit at no/such/folder
            pg.load(text)  ->  path: no saved fit at
            pg.load(text.parent)  ->  path: no saved fit at
            pg.load(damaged("short"))  ->  path:
            pg.load(damaged("flipped"))  ->  path:
            pg.load(damaged("missing"))  ->  path:
            pg.load(damaged("rewritten"))  ->  path:
            pg.load(saved, program=gan(4))  ->  program: the saved parameters do not belong to 'gan'
            pg.load(saved, program=ppca(4, 3))  ->  program: the saved parameters do not belong to 'ppca'
            pg.load(saved, program=factor_analysis(4, 2))  ->  program: the saved parameters do not belong to
            pg.load(saved, program=ppca(3, 2))  ->  data: ppca(features=3) takes rows of 3 columns
            fit.save(text)  ->  path:
            fit.save(text.parent)  ->  path:
            fit.save(text / "fit")  ->  path:
            pg.load_data("iris")  ->  name: expected one of
            pg.load_data("digits", split="dev")  ->  split: 'digits' is published whole
            pg.load_data("crabs", length=5)  ->  length: 'crabs' is not a text
        """,
        TypeError: """
            pg.load(None)  ->  path: expected text or a Path, got NoneType
            pg.load(saved, program="ppca")  ->  program: expected a model function
            fit.save(3)  ->  path: expected text or a Path, got int
        """,
        AttributeError: """
            pg.load(saved).evidence()  ->  evidence needs the program
        """,
    },
    "Comparisons": {
        ValueError: """
            pg.compare(normal, x, {})  ->  algorithms: expected at least one
            pg.compare(normal, x, {"SVI": SVI()}, holdout=1.0)  ->  holdout: expected a share
            pg.compare(normal, x[:3], {"SVI": SVI()})  ->  holdout: 0.2 of 3 rows
            pg.compare(normal, x, {"SVI": SVI()}, test=x[:, :3])  ->  test: expected 'x' of shape ('rows', 4)
            pg.compare(normal, x, {"SVI": SVI()}, seeds=[-1])  ->  seeds: expected
            pg.compare(normal, x, {"SVI": SVI()}, seeds=[0, 0])  ->  seeds: expected each of them once
            pg.compare(normal, x, {"SVI": SVI()}, particles=0)  ->  particles: expected
            pg.compare(normal, x, {"SVI": SVI()}, n_jobs=0)  ->  n_jobs: expected
            pg.compare(normal, with_value(nan), {"SVI": SVI()})  ->  data 'x': 1 value(s) are NaN
            pg.compare(ppca(4, 2), with_value(nan), {"SVI": SVI()})  ->  data 'x': 1 value(s) are NaN
            pg.compare(ppca(4, 2), x[:, :3], {"SVI": SVI()})  ->  data: ppca(features=4) takes rows of 4 columns
        """,
        TypeError: """
            pg.compare(normal, x, [SVI()])  ->  algorithms: expected a mapping
            pg.compare(normal, x, {"SVI": SVI})  ->  algorithms['SVI']: expected an algorithm, got the class SVI
            pg.compare(normal, x, {"SVI": SVI()}, seeds=3)  ->  seeds: expected several whole numbers
        """,
    },
}
