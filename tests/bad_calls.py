"""Every public callable with one valid call each; every parameter of it is then given what it should not take."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import inspect
import io
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from bad_by_design import BY_DESIGN, NOT_CALLED
from bad_values import kind_of, numpy_of, values
from conftest import generators, settings, store
from torch import Tensor, nn

import ppl_gen as pg
from ppl_gen import data as data_module
from ppl_gen import distances, inference, looking, models, report
from ppl_gen.fits.saved import SavedFit
from ppl_gen.inference import SVI, Adversarial, ContrastiveDivergence

__all__ = ["EXEMPT", "Call", "Target", "accepts_numpy", "calls", "judge", "public", "targets"]

#: Public names that are not called by a user, and why.
EXEMPT = {
    "AdversarialExamples": "made by adversarial_example",
    "Algorithm": "an abstract class",
    "Comparison": "made by pg.compare; its methods are called below",
    "Embedding": "made by tsne, mds and som",
    "Fit": "made by pg.fit; its methods are called below",
    "Game": "an abstract class",
    "IncompatibleError": "an error",
    "Iterative": "an abstract class",
    "Loss": "what a game returns to the driver",
    "MissingExtraError": "an error",
    "Neighbours": "made by nearest_images",
    "NonFiniteError": "an error",
    "RankError": "an error",
    "Objective": "an abstract class",
    "Patches": "made by top_patches",
    "Player": "what a game tells the driver",
    "PrincipalComponents": "made by principal_components",
    "Status": "an enumeration",
    "FitWarning": "a warning",
    "by_step": "a function of the user's and anything",
    "constant": "takes anything",
}
#: Methods of `pg.Fit` that others of the package call.
_INNER = {"bound"}
_PLAIN = {"beta": 0.5, "lr": 0.01}


@dataclass(frozen=True)
class Target:
    """One public callable, its valid arguments, and what is then done with what it gives (a refusal may come there)."""

    name: str
    function: Callable[..., Any]
    valid: dict[str, Any] = field(default_factory=dict)
    then: Callable[[Any], Any] = lambda result: result

    def parameters(self) -> list[inspect.Parameter]:
        return [p for p in inspect.signature(self.function).parameters.values() if p.name != "self"]

    def call(self, **changed: Any) -> Any:
        return self.then(self.function(**{**self.valid, **changed}))


@dataclass(frozen=True)
class Call:
    """One bad value for one parameter of one callable."""

    target: Target
    parameter: inspect.Parameter
    label: str
    make: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.target.name}({self.parameter.name}={self.label})"


# ------------------------------------------------------------------------------------------------- valid arguments
def normal(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).expand([2]).to_event(1), obs=x)


def _numbers(rows: int = 6, columns: int = 2) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _images() -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _fit(algorithm: Any, validation: Any = None) -> Any:
    return pg.fit(normal, _numbers(), algorithm, validation=validation, progress=False)


def _fit_gan(objective: Any) -> Any:
    return pg.fit(models.gan(2, latent=2, hidden=(3,)), _numbers(), SVI(objective, steps=1), progress=False)


def _fit_codes(objective: Any) -> Any:
    return pg.fit(models.vae(2, latent=2, hidden=(3,)), _numbers(), SVI(objective, steps=1), progress=False)


def labels(x: Tensor, y: Tensor, domain: Tensor) -> None:
    weights = pyro.param("weights", torch.eye(2))
    with pyro.plate("data", len(x)):
        features = pyro.deterministic("features", x @ weights, event_dim=1)
        pyro.sample("y", dist.Categorical(logits=features), obs=y)


def _fit_labels(objective: Any) -> Any:
    data = {"x": _numbers(), "y": torch.arange(6) % 2, "domain": torch.arange(6) // 3}
    return pg.fit(labels, data, SVI(objective, steps=1), progress=False)


def _fit_rbm(objective: Any) -> Any:
    return pg.fit(models.rbm(2, 2, sweeps=2), (_numbers() > 0).double(), SVI(objective, steps=1), progress=False)


@functools.cache
def _fitted(name: str) -> pg.Fit:
    programs: dict[str, tuple[Any, Any]] = {
        "normal": (normal, _numbers()),
        "vae": (models.vae(2, latent=2, hidden=(3,)), _numbers()),
        "char_rnn": (models.char_rnn(3, hidden=2), torch.arange(12).reshape(3, 4) % 3),
        "denoising_diffusion": (models.denoising_diffusion(2, steps=3, hidden=3, layers=1), _numbers()),
        "m1": (models.m1(2, latent=2, hidden=(3,)), _numbers()),
        "gan": (models.gan(2, latent=2, hidden=(3,)), _numbers()),
    }
    objective = Adversarial() if name == "gan" else inference.ELBO()
    return pg.fit(*programs[name], SVI(objective, steps=2), progress=False)


@functools.cache
def _compared() -> pg.Comparison:
    with _quiet():
        return pg.compare(
            normal, _numbers(8), {"a": SVI(steps=2), "b": SVI(steps=3)}, particles=2, draws=2, progress=False
        )


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ppl-gen-bad-calls-"))


@functools.cache
def _saved() -> Path:
    return _fitted("normal").save(_folder() / "saved")


def _checked(rows: Any) -> Callable[[Any], Any]:
    return lambda recipe: pg.check(recipe, rows())


def _binary() -> Tensor:
    return (_numbers() > 0).double()


def _fit_helmholtz(objective: Any) -> Any:
    return pg.fit(models.helmholtz(2, (2,)), _binary(), SVI(objective, steps=1), progress=False)


def _fit_gsn(objective: Any) -> Any:
    return pg.fit(models.gsn(2, hidden=(2,)), _numbers(), SVI(objective, steps=1), progress=False)


@functools.cache
def _energy() -> pg.Fit:
    fit: pg.Fit = _fit_rbm(ContrastiveDivergence())
    return fit


_ZOO: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "affine_flow": ({"features": 2}, _numbers),
    "autoencoder": ({"features": 2, "code": 2, "hidden": (3,)}, _numbers),
    "binomial_diffusion": (
        {"features": 2, "steps": 3, "hidden": 3, "layers": 1},
        lambda: (_numbers() > 0).double(),
    ),
    "char_rnn": ({"symbols": 3, "hidden": 2}, lambda: torch.arange(12).reshape(3, 4) % 3),
    "classifier": ({"classes": 2, "hidden": (3,)}, lambda: {"x": _numbers(), "y": torch.arange(6) % 2}),
    "dcgan": ({"shape": (1, 8, 8), "latent": 2, "filters": 2}, _images),
    "dbm": ({"visible": 2, "hidden": (2, 2), "updates": 1, "sweeps": 2}, _binary),
    "dbn": ({"visible": 2, "hidden": (2, 2), "sweeps": 2}, _binary),
    "energy_model": ({"network": nn.Linear(2, 1), "sweeps": 2}, _numbers),
    "gaussian_rbm": ({"visible": 2, "hidden": 2, "sweeps": 2}, _numbers),
    "gsn": ({"features": 2, "hidden": (2,), "sweeps": 2}, _numbers),
    "helmholtz": ({"visible": 2, "hidden": (2,)}, _binary),
    "denoising_diffusion": ({"features": 2, "steps": 3, "hidden": 3, "layers": 1}, _numbers),
    "factor_analysis": ({"features": 3, "latent": 1}, lambda: _numbers(8, 3)),
    "ffjord": ({"features": 2, "hidden": (3,), "method": "rk4", "steps": 2}, _numbers),
    "gan": ({"features": 2, "latent": 2, "hidden": (3,)}, _numbers),
    "gaussian_mixture": ({"components": 2}, _numbers),
    "glow": ({"features": (1, 2, 2), "steps": 1, "channels": 2}, lambda: _numbers(6, 4).reshape(6, 1, 2, 2)),
    "gran": ({"shape": (1, 8, 8), "latent": 2, "steps": 2, "hidden": 3, "filters": 2}, _images),
    "hidden_markov": ({"states": 2}, lambda: _numbers(3, 4)),
    "iaf": ({"features": 2, "layers": 1, "hidden": (3,)}, _numbers),
    "lapgan": ({"shape": (1, 8, 8), "levels": 1, "latent": 2, "filters": 2, "hidden": (3,)}, _images),
    "m1": ({"features": 2, "latent": 2, "hidden": (3,)}, _numbers),
    "m2": (
        {"features": 2, "classes": 2, "latent": 2, "hidden": (3,)},
        lambda: {"x": _numbers(), "y": torch.arange(6) % 2},
    ),
    "maf": ({"features": 2, "layers": 1, "hidden": (3,)}, _numbers),
    "naf": ({"features": 2, "layers": 1, "hidden": (3,), "units": 2}, _numbers),
    "nice": ({"features": 2, "layers": 2, "hidden": (3,)}, _numbers),
    "ppca": ({"features": 3, "latent": 1}, lambda: _numbers(8, 3)),
    "rbm": ({"visible": 2, "hidden": 2, "sweeps": 2}, lambda: (_numbers() > 0).double()),
    "real_nvp": ({"features": 2, "layers": 2, "hidden": (3,)}, _numbers),
    "scalar_flow": ({"bins": 4}, lambda: _numbers()[:, 0]),
    "spline_flow": ({"features": 2, "layers": 2, "hidden": (3,), "bins": 4}, _numbers),
    "vae": ({"features": 2, "latent": 2, "hidden": (3,)}, _numbers),
}
_TINY = {"draws": 2, "seed": 0}


def targets() -> list[Target]:
    """All of them; `pg.fit` and others are looked up here, as the guard of the tests replaces them."""
    fit, coded, compared = _fitted("normal"), _fitted("vae"), _compared()
    zoo = [Target(f"models.{n}", getattr(models, n), valid, _checked(rows)) for n, (valid, rows) in _ZOO.items()]
    asked = {
        "dataset": {},
        "diagnose": {"draws": 30, "seed": 0},
        "evidence": {"particles": 2, **_TINY},
        "marginal_likelihood": {"draws": 20, "particles": 2, "seed": 0},
        "module": {"name": "decoder"},
        "posterior": _TINY,
        "predict": _TINY,
        "sample": {"n": 2, "seed": 0},
        "save": {"path": _folder() / "fit"},
        "to_arviz": _TINY,
    }
    return [
        *_driver(),
        *zoo,
        Target("models.m1_m2", models.m1_m2, {"m1": _fitted("m1"), "classes": 2, "latent": 2, "hidden": (3,)}),
        *(Target(f"Fit.{n}", getattr(coded if n == "module" else fit, n), valid) for n, valid in asked.items()),
        *(Target(f"Comparison.{n}", getattr(compared, n)) for n in ("best", "plot", "table", "posteriors")),
        Target("Comparison.report", compared.report, {"path": _folder() / "report.html"}),
        Target("Comparison.save", compared.save, {"path": _folder() / "comparison"}),
        *(Target(f"SavedFit.{n}", getattr(pg.load(_saved()), n)) for n in ("to_arviz", "diagnose")),
        *_algorithms(),
        *_pictures(coded),
        *_views(),
        Target("models.bits_per_dimension", models.bits_per_dimension, {"evidence": -3.0, "dimensions": 2}),
        Target("models.ConvolutionalCritic", models.ConvolutionalCritic, {"shape": (1, 8, 8), "filters": 2}),
        Target("models.laplacian_pyramid", models.laplacian_pyramid, {"images": _images(), "levels": 1}),
        Target("models.from_pyramid", models.from_pyramid, {"bands": models.laplacian_pyramid(_images(), 1)}),
        Target("distances.mmd", distances.mmd, {"x": _numbers(), "y": _numbers()}),
        Target(
            "distances.frechet_distance",
            distances.frechet_distance,
            {"features_a": _numbers(), "features_b": _numbers()},
        ),
        *_diffused(),
        Target("models.bits_per_character", models.bits_per_character, {"fit": _fitted("char_rnn")}),
        Target(
            "models.rbm_stack",
            models.rbm_stack,
            {"x": _binary(), "hidden": (2, 2), "algorithm": SVI(ContrastiveDivergence(), steps=1)},
        ),
        Target("models.principal_components", models.principal_components, {"x": _numbers(), "latent": 1}),
        Target("PrincipalComponents.codes", models.principal_components(_numbers(), 1).codes, {"x": _numbers()}),
        *_texts(),
    ]


def _streamed(batches: Any, rows: int) -> Any:
    """A stream is looked at when it is used."""
    return pg.check(normal, pg.stream(batches, rows=rows))


def _driver() -> Iterator[Target]:
    quick = {"program": normal, "data": _numbers(), "algorithm": SVI(steps=1)}
    yield Target("pg.fit", pg.fit, {**quick, "progress": False})
    yield Target("pg.check", pg.check, {"program": normal, "data": _numbers()})
    yield Target("pg.prior_predictive", pg.prior_predictive, {"program": normal, "data": _numbers(), **_TINY})
    yield Target("pg.stream", _streamed, {"batches": [_numbers()], "rows": len(_numbers())})
    small = {"particles": 2, "draws": 2, "progress": False}
    yield Target(
        "pg.compare", pg.compare, {"program": normal, "data": _numbers(10), "algorithms": {"a": SVI(steps=1)}, **small}
    )
    rows = _numbers(20)
    yield Target("pg.compare_rows", pg.compare_rows, {"data": rows, "made": rows + 1.0})
    yield Target("pg.modes_covered", pg.modes_covered, {"rows": rows, "modes": rows[:2], "within": 1.0})
    played = {"fit": _fitted("gan"), "algorithm": SVI(Adversarial(), steps=1), "steps": 1, "looks": 2}
    yield Target("pg.exploitability", pg.exploitability, played)
    walk = {"temperatures": 5, "chains": 4, "burn": 1}
    yield Target("pg.AIS", pg.AIS, walk, lambda method: _energy().evidence(method=method))
    yield Target("pg.load", pg.load, {"path": _saved(), "program": normal})
    yield Target("pg.load_data", pg.load_data, {"name": "alice", "length": 8})
    yield Target("pg.Program", pg.Program, {"model": normal}, lambda program: pg.check(program, _numbers()))
    yield Target("pg.Recipe", pg.Recipe, {"build": lambda data: pg.Program(normal)}, lambda r: pg.check(r, _numbers()))


def _algorithms() -> Iterator[Target]:
    yield Target("inference.SVI", SVI, {"steps": 1}, _fit)
    yield Target("inference.NUTS", inference.NUTS, {"draws": 4, "warmup": 4, "chains": 1}, _fit)
    yield Target("inference.EM", inference.EM, {"steps": 1}, lambda em: pg.fit(models.ppca(2, 1), _numbers(), em))
    mixture = models.gaussian_mixture(2)
    yield Target(
        "inference.Laplace", inference.Laplace, {"steps": 1}, lambda laplace: pg.fit(mixture, _numbers(), laplace)
    )
    one = {"paths": 1, "steps": 1, "draws": 100}
    yield Target("inference.Pathfinder", inference.Pathfinder, one, lambda paths: pg.fit(mixture, _numbers(), paths))
    yield Target("inference.CAVI", inference.CAVI, {"steps": 1}, lambda cavi: pg.fit(mixture, _numbers(), cavi))
    for objective in (inference.ELBO, inference.IWAE):
        yield Target(f"inference.{objective.__name__}", objective, {}, lambda o: _fit(SVI(o, steps=1)))
    yield Target("inference.Adversarial", Adversarial, {}, _fit_gan)
    yield Target("inference.Divergence", inference.Divergence, {"f": lambda u: u * u.log()})
    yield Target(
        "inference.flow_guide",
        inference.flow_guide,
        {"layers": 1},
        lambda g: pg.check(pg.Program(normal, g), _numbers()),
    )
    yield Target("inference.ConditionalAdversarial", inference.ConditionalAdversarial, {}, _fit_gan)
    yield Target("inference.EBGAN", inference.EBGAN, {}, _fit_gan)
    yield Target("inference.WAE", inference.WAE, {"kind": "gan"}, _fit_codes)
    yield Target("inference.AdversarialTraining", inference.AdversarialTraining, {"steps": 1}, _fit_labels)
    yield Target("inference.DomainAdversarial", inference.DomainAdversarial, {}, _fit_labels)
    yield Target("inference.SimpleDiffusion", inference.SimpleDiffusion, {})
    yield Target("inference.ContrastiveDivergence", ContrastiveDivergence, {}, _fit_rbm)
    yield Target("inference.WakeSleep", inference.WakeSleep, {}, _fit_helmholtz)
    yield Target("inference.Walkback", inference.Walkback, {}, _fit_gsn)
    for rule in (inference.Plateau, inference.Patience):
        yield Target(f"inference.{rule.__name__}", rule, {}, lambda r: _fit(SVI(steps=2, stop_rule=r), _numbers()))


def _pictures(coded: pg.Fit) -> Iterator[Target]:
    for name in ("codes", "reconstructions", "anomaly_scores"):
        yield Target(f"models.{name}", getattr(models, name), {"fit": coded, "seed": 0})
    small = {"plot_manifold": {"n": 2}, "plot_reconstructions": {"rows": 2}, "plot_samples": {"n": 2}}
    for name in ("plot_codes", "plot_manifold", "plot_reconstructions", "plot_samples", "plot_traversal"):
        extra = {"method": "pca"} if name == "plot_codes" else small.get(name, {})
        yield Target(f"report.{name}", getattr(report, name), {"fit": coded, **extra})


def _views() -> Iterator[Target]:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    asked = {"network": net, "x": images}
    more: dict[str, dict[str, Any]] = {
        "activation_maps": {},
        "adversarial_example": {"target": 1, "c": 1.0, "steps": 2},
        "deconvnet": {},
        "embed_layers": {"method": "mds"},
        "guided_backprop": {},
        "nearest_images": {"training": images},
        "occlusion": {"size": 2},
        "saliency": {},
        "top_patches": {"channel": 0},
    }
    for name, extra in more.items():
        yield Target(f"looking.{name}", getattr(looking, name), {**asked, **extra})
    yield Target("looking.filters", looking.filters, {"network": net})
    best = {"network": net, "shape": (1, 4, 4), "steps": 2}
    yield Target("looking.activation_maximisation", looking.activation_maximisation, best)
    for name, extra in {"mds": {}, "som": {"epochs": 1, "grid": (2, 2)}, "tsne": {"perplexity": 2.0}}.items():
        yield Target(f"looking.{name}", getattr(looking, name), {"codes": _numbers(), **extra})


def _diffused() -> Iterator[Target]:
    valid = {"fit": _fitted("denoising_diffusion"), "seed": 0}
    yield Target("models.ddim_sample", models.ddim_sample, {**valid, "n": 2})
    yield Target(
        "models.guided_sample", models.guided_sample, {**valid, "n": 2, "log_density": lambda x: -(x[:, 0] ** 2)}
    )
    seen = _numbers(4) > 0
    yield Target("models.inpaint", models.inpaint, {**valid, "data": _numbers(4), "mask": seen, "resamples": 1})


def _texts() -> Iterator[Target]:
    yield Target("data.Rows", data_module.Rows, {"entries": {"x": _numbers()}})
    yield Target("data.encoded", data_module.encoded, {"text": "alice"})
    yield Target("data.decoded", data_module.decoded, {"codes": torch.zeros(2, 3, dtype=torch.int64)})
    yield Target("data.text_rows", data_module.text_rows, {"text": "alice was here", "length": 4})


def public() -> Iterator[str]:
    """Every public name, as `Target` names it."""
    for module, short in (
        (pg, "pg"),
        (inference, "inference"),
        (models, "models"),
        (report, "report"),
        (looking, "looking"),
        (data_module, "data"),
        (distances, "distances"),
    ):
        again = pg.__all__ if module is not pg else []
        yield from (f"{short}.{name}" for name in module.__all__ if name not in EXEMPT and name not in again)
    for made in (pg.Fit, pg.Comparison, SavedFit):
        for name, member in vars(made).items():
            if callable(member) and not name.startswith("_") and name not in _INNER:
                yield f"{made.__name__}.{name}"


def calls() -> Iterator[Call]:
    """All fixed bad calls, in a fixed order."""
    for target in targets():
        for parameter in target.parameters():
            for label, make in values(parameter):
                if f"{target.name}({parameter.name}={label})" not in NOT_CALLED:
                    yield Call(target, parameter, label, make)


# ------------------------------------------------------------------------------------------------------ judgement
_SAYS = re.compile(
    r"expect|takes|needs|must|give |pass |cannot|no such|no saved|no site|not observed|ha(?:s|ve) |[Nn]ame it|there is|reads|holds|did you mean|one of"
)
#: Words by which a message may name a parameter besides its own name.
_ALSO = {
    "data": "data|'x'|entr|rows",
    "entries": "entr",
    "validation": "validation|data",
    "test": "test|data",
    "fit": "fit",
    "x": "x|features|data",
    "batches": "batches|data",
    "row": "row|data|argument",
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            plt.close("all")


def _state() -> Any:
    return generators(), settings(), store()


def judge(call: Call) -> str:
    """ "" where the call is refused as it should be, or right by design; else what is wrong with the answer."""
    before = _state()
    verdict = "" if (answer := _answer(call)) and _right(call) else answer
    return verdict if verdict or _state() == before else "state: something global changed"


def _answer(call: Call) -> str:
    try:
        with _quiet():
            call.target.call(**{call.parameter.name: call.make()})
    except (ValueError, TypeError, KeyError) as error:
        text = str(error).splitlines()[0] if str(error) else ""
        known = _ALSO.get(call.parameter.name, re.escape(call.parameter.name))
        if re.search(rf"(?<![A-Za-z])(?:{known}|{re.escape(call.parameter.name)})", text) and _SAYS.search(str(error)):
            return ""
        return f"unnamed: {type(error).__name__}: {text[:120]}"
    except Exception as error:
        return f"raw: {type(error).__name__}: {str(error)[:120]}"
    return "accepted"


def _right(call: Call) -> bool:
    return any(fnmatch.fnmatchcase(str(call), pattern) for pattern in BY_DESIGN)


def accepts_numpy() -> Iterator[tuple[Target, str, Any]]:
    """Every whole number, number, flag and seed of the valid calls and of the defaults, in numpy's types."""
    for target in targets():
        for parameter in target.parameters():
            if kind_of(parameter) in ("whole", "number", "flag", "seed") and parameter.name != "n_jobs":
                value = target.valid.get(parameter.name, parameter.default)
                for other in numpy_of(value):
                    yield target, parameter.name, other
