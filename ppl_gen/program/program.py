"""What a user writes: a generative program, and recipes that build one from data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppl_gen.arguments import require_function, require_instance, require_mapping, require_text
from ppl_gen.errors import require_flag, require_whole
from ppl_gen.handlers.opened import opened
from ppl_gen.program.extensions import CAVIUpdates, EMSteps, Energy, TimeSteps, Transition

__all__ = ["Program", "Recipe", "as_recipe", "with_known_kwargs"]


@dataclass(frozen=True)
class Program:
    """A Pyro model, optionally a Pyro guide, and what the pair offers beyond them.

    p(x, z) is ``model``; q(z | x) is ``guide``. Both are called with the data: a tensor as the first positional
    argument, a mapping as keyword arguments. The rows stand in one plate, ``pyro.plate(data_plate, len(x))``.

    Args:
        model: a Pyro model: a function or a `pyro.nn.PyroModule`.
        guide: a Pyro guide, an autoguide class or instance, or None (SVI then takes `AutoNormal` and says so). A class
            with options is `functools.partial(AutoMultivariateNormal, init_scale=0.1)`.
        data_plate: the name of the plate over the rows.
        name: what tables and messages call the program; the model's name unless given.
        start: plausible values of latent sites, called under the fit's seed: where EM, NUTS and autoguides begin.
        relabel: puts draws of exchangeable components into one order, ``relabel(draws) -> draws``; applied after NUTS.
        evidence: exact log p(x) per row, local latents integrated out: called with the data, at the current parameters;
            in a program with global sites ``evidence(values, *data)``, at these values of them.
        local_posterior: exact p(z | x) of latent sites inside the data plate, where it is known in closed form:
            ``local_posterior(values, *data)`` gives a distribution over the rows for each such site.
        imputes: what `Fit.predict` draws of rows that are seen in part, where the model itself reads no mask:
            ``imputes(values, seen, *data)`` gives, for the observed site of the entry x, rows with the entries that are
            ``seen`` (booleans in the shape of x) as they are and the others drawn.
        notes: what `Fit.notes` says of every fit of it, by topic: where an answer is approximate, say.
        em: closed-form E- and M-steps.
        cavi: closed-form coordinate updates.
        energy: an unnormalised density.
        time_steps: a chain of latents that the ELBO may enter at a sampled time step.
        transition: a chain of rows that is learned by its steps.
        terms: named terms that are added to the loss of every objective and are no part of the density (a penalty, a
            classifier's loss): called with the data, each gives nats per row; rescaled on minibatches as the rows are.
        data_dim: the dimension of the data's arrays along which the rows run: 1 for words x documents or for batches of
            sequences, time x rows x features; arrays with fewer dimensions have the rows in their last.

    Raises:
        TypeError: if ``model`` or ``guide`` cannot be called.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def coin(x):
        ...     heads = pyro.sample("heads", dist.Beta(1.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Bernoulli(heads), obs=x)
        >>> Program(coin)
        Program(coin)
    """

    model: Callable[..., Any]
    guide: Any = None
    data_plate: str = "data"
    name: str = ""
    start: Callable[[], Mapping[str, Tensor]] | None = None
    relabel: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    evidence: Callable[..., Tensor] | None = field(default=None, metadata={"offer": "exact evidence"})
    local_posterior: Callable[..., Mapping[str, Any]] | None = None
    imputes: Callable[..., Mapping[str, Tensor]] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    em: EMSteps | None = field(default=None, metadata={"offer": "EM steps", "kind": EMSteps})
    cavi: CAVIUpdates | None = field(default=None, metadata={"offer": "CAVI updates", "kind": CAVIUpdates})
    energy: Energy | None = field(default=None, metadata={"offer": "energy", "kind": Energy})
    time_steps: TimeSteps | None = field(default=None, metadata={"offer": "time steps", "kind": TimeSteps})
    transition: Transition | None = field(default=None, metadata={"offer": "transition", "kind": Transition})
    terms: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    data_dim: int = 0

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise TypeError(
                f"model: expected a Pyro model (a function or a PyroModule), got {type(self.model).__name__}"
            )
        if self.guide is not None and not callable(self.guide):
            raise TypeError(
                f"guide: expected a Pyro guide, an autoguide class or None, got {type(self.guide).__name__}"
            )
        object.__setattr__(self, "model", opened(self.model))
        object.__setattr__(self, "guide", opened(self.guide))
        made = self.guide.func if isinstance(self.guide, partial) else None
        if isinstance(made, type) and self.guide.args:
            raise TypeError(
                f"guide: a partial of the class {made.__name__} is called with the model; give its options by name"
            )
        self._check_offers()
        stuck = [name for name, term in self.terms.items() if not callable(term)]
        if stuck:
            raise TypeError(f"terms: expected functions of the data, got something else for {', '.join(stuck)}")
        if not self.name:
            object.__setattr__(self, "name", getattr(self.model, "__name__", type(self.model).__name__))

    def _check_offers(self) -> None:
        """What a program offers of its own is of the kind that will be asked of it."""
        require_text("data_plate", self.data_plate, "the name of a plate")
        require_text("name", self.name)
        require_whole("data_dim", self.data_dim, least=0)
        require_mapping("terms", self.terms, "a mapping from names to functions")
        require_mapping("notes", self.notes, "a mapping from topics to sentences")
        for offer in ("start", "relabel", "evidence", "local_posterior", "imputes"):
            require_function(offer, getattr(self, offer))
        for own in fields(self):
            if "kind" in own.metadata:
                require_instance(own.name, getattr(self, own.name), own.metadata["kind"])

    @property
    def drawn_by_chain(self) -> bool:
        """Whether a Markov chain draws its rows, which then have no normalised density."""
        return self.energy is not None or self.transition is not None

    @classmethod
    def offer_fields(cls) -> dict[str, str]:
        """The fields that are offers where they are given, and what the vocabulary calls them.

        >>> Program.offer_fields()["em"]
        'EM steps'
        """
        return {own.name: own.metadata["offer"] for own in fields(cls) if "offer" in own.metadata}

    def __getstate__(self) -> dict[str, Any]:
        from ppl_gen.workspace.isolation import (
            copied,  # pickling makes Pyro's autoguides forget their model: a copy may
        )

        kept = dict(self.__dict__)
        return {**kept, "guide": copied(self.guide) if isinstance(self.guide, torch.nn.Module) else self.guide}

    def __repr__(self) -> str:
        guide = "" if self.guide is None else f", guide={_name_of(self.guide)}"
        return f"Program({self.name}{guide})"

    def _repr_html_(self) -> str:
        from ppl_gen.program.display import program_html

        return program_html(self)


def _name_of(guide: Any) -> str:
    kind = guide.func if isinstance(guide, partial) else guide  # of a class with options
    return getattr(kind, "__name__", type(kind).__name__)


@dataclass(frozen=True)
class Recipe:
    """Builds a program from the whole training data, once per fit and under its seed.

    Fresh network weights and constants that depend on the data (scales of priors, starting values, variance floors)
    belong here: inside ``model(x)`` a minibatch would change them.

    Args:
        build: ``build(data) -> Program``.
        name: what tables and messages call the program; ``build``'s name unless given.
        as_given: whether ``build`` takes floats in the dtype that the user gave; else they are converted to the fit's.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def centred(x):
        ...     middle = x.mean()
        ...     def model(x):
        ...         loc = pyro.sample("loc", dist.Normal(middle, 10.0))
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        ...     return Program(model)
        >>> Recipe(centred)
        Recipe(centred)
    """

    build: Callable[[Any], Program]
    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    as_given: bool = False

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise TypeError(f"build: expected a function from data to a Program, got {type(self.build).__name__}")
        require_text("name", self.name)
        require_mapping("arguments", self.arguments)
        require_flag("as_given", self.as_given)
        if not self.name:
            object.__setattr__(self, "name", getattr(self.build, "__name__", type(self.build).__name__))

    def __repr__(self) -> str:
        inside = ", ".join([self.name, *(f"{key}={value!r}" for key, value in self.arguments.items())])
        return f"Recipe({inside})"

    def __call__(self, data: Any) -> Program:
        """The program for ``data``; raises TypeError if ``build`` returns anything else."""
        program = self.build(data)
        if not isinstance(program, Program):
            raise TypeError(f"the recipe {self.name!r} must return a Program, got {type(program).__name__}")
        return program


def as_recipe(program: Program | Recipe | Callable[..., Any]) -> Recipe:
    """A recipe from whatever a user may pass: a recipe, a program, or a plain Pyro model."""
    if isinstance(program, Recipe):
        return program
    if isinstance(program, Program):
        return Recipe(lambda data: program, name=program.name)
    if isinstance(program, type):
        raise TypeError(f"program: got the class {program.__name__}; pass a model function, a Program or a Recipe")
    if callable(program):
        made = Program(program)
        return Recipe(lambda data: made, name=made.name)
    raise TypeError(f"program: expected a model function, a Program or a Recipe, got {type(program).__name__}")


def with_known_kwargs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` called with only those keyword arguments that its signature names."""
    target = function.forward if isinstance(function, torch.nn.Module) else function
    parameters = inspect.signature(target).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return function
    known = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{key: value for key, value in kwargs.items() if key in known})

    call.__name__ = getattr(function, "__name__", type(function).__name__)
    return call
