"""Fit: the frozen result of any algorithm, and what can be asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ppl_gen.arguments import require_text
from ppl_gen.data.batching import Dataset, as_dataset
from ppl_gen.fitting.posteriors.base import JudgedBy, Posterior
from ppl_gen.fitting.run import Status
from ppl_gen.handlers.whole_plates import whole_plates
from ppl_gen.nn.copies import plain_copy
from ppl_gen.program.info import ProgramInfo
from ppl_gen.program.program import Program, Recipe
from ppl_gen.workspace.closures import same_again
from ppl_gen.workspace.isolation import copied, isolated, validation_off
from ppl_gen.workspace.memory import unremembered
from ppl_gen.workspace.workspace import ProgramState, Workspace

if TYPE_CHECKING:
    import pandas
    import xarray

    from ppl_gen.diagnostics.verdicts import Verdict
    from ppl_gen.evidence.annealed import AIS
    from ppl_gen.evidence.estimates import Evidence

__all__ = ["Fit", "Status", "require_fit"]


@dataclass(frozen=True, repr=False, eq=False)
class Fit:
    """What an algorithm learned: parameters, posterior, history, status, seed and cost. A value: nothing changes it.

    Everything random takes a ``seed`` (the fit's own unless given) and leaves the global generators alone.
    """

    program: Program
    algorithm: str
    settings: str
    data: Dataset
    info: ProgramInfo
    state: ProgramState
    learned: Posterior
    guide: Any = None
    extra_modules: Mapping[str, nn.Module] = field(default_factory=dict)
    module_names: Mapping[str, nn.Module] = field(default_factory=dict)
    records: Mapping[str, list[float]] = field(default_factory=dict)
    checks: Mapping[str, list[float]] = field(default_factory=dict)
    status: Status = Status.FINISHED
    message: str = ""
    seed: int = 0
    cost: Mapping[str, float | str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    recipe: Recipe | None = None
    guide_source: str | None = None  # what makes guide and posterior again: see `ppl_gen.inference.restore`
    criterion: bool = False  # whether the algorithm has a rule that says when it has converged
    computed: dict[Any, Any] = field(init=False, default_factory=dict, compare=False)  # k-hats, made once

    def __repr__(self) -> str:
        head = f"{self.program.name}, {self.algorithm}, seed={self.seed}"
        ended = f"{head}: {self.status}, {self.cost.get('seconds', 0.0):.1f} s; {self.message}"
        return f"Fit({ended}; {self._judged()})"

    def _judged(self) -> str:
        """The verdict where it is known: to show a fit must not cost what judging it may cost."""
        found = self.computed.get("verdict")
        return "not diagnosed yet: fit.verdict says whether to trust it" if found is None else f"verdict: {found}"

    def _repr_html_(self) -> str:
        from ppl_gen.fits.display import fit_html

        return fit_html(self)

    @property
    def params(self) -> dict[str, Tensor]:
        """Learned parameters by Pyro's names, in the user's (constrained) units; networks as ``name$$$weight``."""
        return {name: value.detach().clone() for name, value in self.state.params.items()}

    @property
    def point(self) -> dict[str, Tensor] | None:
        """Values of the global sites where the algorithm learned points (EM), else None."""
        return None if self.learned.point is None else dict(self.learned.point)

    @property
    def judged_by(self) -> JudgedBy:
        """What tells whether its draws are right, by the kind of its posterior; weights need a guide."""
        said = self.learned.judged_by
        return said if said in ("chains", None) else "draws" if self.guide is None else "weights"

    @cached_property
    def history(self) -> xarray.Dataset:
        """What every step recorded, over the dimension ``step`` (and validation over ``check``)."""
        import xarray

        columns = {name: ("step", values) for name, values in self.records.items()}
        length = max((len(values) for values in self.records.values()), default=0)
        coords = {"step": list(range(1, length + 1))}
        tree = xarray.Dataset(columns, coords=coords)
        if self.checks:
            steps = [int(step) for step in self.checks["step"]]
            rest = {name: ("check", values) for name, values in self.checks.items() if name != "step"}
            tree = tree.assign_coords(check=steps).assign(rest)
        return tree

    @property
    def joint(self) -> Callable[..., Any]:
        """The program's model as a density of what was learned: without the sites that are mere predictions."""
        from ppl_gen.program.unlearned import joint

        return joint(self.program.model, self.info)

    def module(self, name: str) -> nn.Module:
        """A trained copy of the network that the program (or objective) knows by ``name``, in evaluation mode.

        Raises:
            KeyError: if there is none; the message lists the names there are.
        """
        require_text("name", name, "the name of a network")
        if name in self.extra_modules:
            return plain_copy(self.extra_modules[name]).eval()
        with self.bound() as workspace:
            if name not in self.module_names:
                known = sorted({*self.module_names, *self.extra_modules}) or ["none"]
                lacking = f"; not loaded: {self.notes['not loaded']}" if "not loaded" in self.notes else ""
                raise KeyError(f"no network named {name!r} in this fit; there is: {', '.join(known)}{lacking}")
            module = self.module_names[name]
            workspace.adopt(module, name)
            return copied(module).eval()

    @contextlib.contextmanager
    def bound(self, seed: int | None = None) -> Iterator[Workspace]:
        """The program at its learned parameters, networks in evaluation mode, plates whole, under a seed."""
        parts = {"model": self.program.model, "guide": self.guide}
        # All that training knew, not only what model and guide will register: what a program offers beside them (its
        # evidence, energy or time steps) calls the same networks without a `pyro.module` statement of its own.
        modules = {**self.module_names, **{n: part for n, part in parts.items() if isinstance(part, nn.Module)}}
        with (
            isolated(self.seed if seed is None else seed, dtype=self.data.dtype),
            Workspace(self.state, device=self.data.device, dtype=self.data.dtype, training=False, modules=modules) as w,
            whole_plates(),
            validation_off(),
            torch.no_grad(),
            unremembered(),
            same_again(self.program, self.guide),
        ):
            yield w

    def dataset(self, data: Any = None) -> Dataset:
        """``data`` checked and cast as the training data were; the training data themselves when None.

        Raises:
            ValueError, TypeError: for what is no data, or unlike the rows that the program was fitted to.
        """
        if data is None:
            return self.data
        from ppl_gen.draws.new_data import check_rows

        made = as_dataset(data, self.program.model, like=self.data, missing=True)
        check_rows(self, made)
        return made

    def posterior(self, data: Any = None, draws: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Joint draws of the latent sites given ``data`` (the training data when None): draws x shape of the site.

        Latents of rows that were not fitted are drawn given these rows at each draw of the globals: by the program's
        ``local_posterior``, by an amortised guide, or as `ppl_gen.draws.local_draws.local_draws` says. Training rows
        passed again are the training rows. Of rows in which nothing is observed the posterior is the prior (given the
        globals), and that is what is drawn.

        Raises:
            IncompatibleError: if the program has no latent sites, the algorithm learned no posterior of them, or the
                latents of these rows cannot be drawn given them (the site is named).

        Warns:
            UserWarning: naming site and rows, where draws are not to be trusted.
        """
        from ppl_gen.draws.predictive import posterior_draws

        return posterior_draws(self, data, draws, seed)

    def predict(self, data: Any = None, draws: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Posterior predictive draws of what is missing from ``data``: draws x rows x shape.

        If nothing is missing (or ``data`` is None), replicates of the observed sites. Latents are drawn given what is
        observed of each row, as `posterior` draws them.

        Entries may be missing too: ``{"x": x, "mask": seen}``, where a program reads a mask (`ppca`), or says how its
        rows are completed (``Program.imputes``: `denoising_diffusion`, approximately, as ``notes["completion"]`` says);
        these then come with what is seen as it is.

        Raises:
            IncompatibleError: for a mask that the program can do nothing with.
            ValueError: for a mask that is not of booleans, in the shape of x where the program completes rows.
        """
        from ppl_gen.draws.imputed import asks_to_complete, completed_rows
        from ppl_gen.draws.predictive import predictive_draws

        if asks_to_complete(self, data):
            return completed_rows(self, data, draws, seed)
        return predictive_draws(self, data, draws, seed)

    def sample(self, n: int, given: Mapping[str, Any] | None = None, *, seed: int | None = None) -> dict[str, Tensor]:
        """Run the program with its observations removed on ``n`` rows: new rows, one parameter draw each call.

        ``given`` fixes sites (``{"y": 3}``) or inputs of the model (arrays of ``n`` rows).
        """
        from ppl_gen.draws.sampling import sample_rows

        return sample_rows(self, n, given or {}, seed)

    def evidence(
        self,
        data: Any = None,
        *,
        particles: int = 100,
        draws: int = 100,
        chunk: int = 1000,
        seed: int | None = None,
        method: AIS | None = None,
    ) -> Evidence:
        """Log predictive density per row, log 1/S sum_s p(x_i | theta_s), local latents integrated out.

        ``method=pg.AIS(...)`` estimates the normaliser of an energy where it cannot be enumerated.

        Raises:
            IncompatibleError: if the program has no normalised density.
        """
        from ppl_gen.draws.new_data import require_shared
        from ppl_gen.evidence.energies import energy_evidence, has_energy
        from ppl_gen.evidence.estimates import row_evidence

        rows = self.dataset(data)
        require_shared(self, rows)
        if method is None and not has_energy(self.program):
            return row_evidence(self, rows, particles=particles, draws=draws, chunk=chunk, seed=seed)
        return energy_evidence(self, rows, method, particles=particles, draws=draws, chunk=chunk, seed=seed)

    def marginal_likelihood(self, *, draws: int = 2000, particles: int = 100, seed: int | None = None) -> Evidence:
        """log p(all data) in nats, globals and locals integrated out, by importance weighting.

        Where the guide misses part of the posterior, as its weights or short chains from its draws show, the error is
        infinite and a UserWarning says so. At least ``draws``: more where they cost next to nothing.
        """
        from ppl_gen.evidence.estimates import marginal_likelihood

        return marginal_likelihood(self, draws=draws, particles=particles, seed=seed)

    def to_arviz(
        self,
        *,
        draws: int = 1000,
        seed: int | None = None,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """ArviZ's tree: posterior, posterior_predictive, log_likelihood, prior, prior_predictive, observed_data, ...

        Axes are called as the plates that run along them, and labelled with the index and the columns of the pandas
        objects that the data were given as (an entry ``x`` has ``x_column``).

        Args:
            draws: how many, of what is not drawn yet.
            seed: of all randomness here.
            coords: labels by the name of the axis.
            dims: by site or entry of the data, the names of all axes of one value, as `arviz.from_dict` takes them.

        Raises:
            ValueError: for an unknown site or axis, or another number of names or labels than there are.
            TypeError: for what is no such mapping.

        Example:
            >>> import pyro, torch, ppl_gen as pg
            >>> import pyro.distributions as dist
            >>> from ppl_gen.inference import SVI
            >>> def model(x):
            ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
            ...     with pyro.plate("town", len(x)):
            ...         pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
            >>> fit = pg.fit(model, torch.randn(3, 2), SVI(steps=5))
            >>> tree = fit.to_arviz(draws=20, dims={"loc": ["axis"]}, coords={"axis": ["east", "north"]})
            >>> tree["posterior"]["loc"].dims, tree["log_likelihood"]["x"].dims
            (('chain', 'draw', 'axis'), ('chain', 'draw', 'town'))
        """
        from ppl_gen.diagnostics.export import to_arviz

        return to_arviz(self, draws=draws, seed=seed, coords=coords, dims=dims)

    def diagnose(self, *, draws: int = 1000, seed: int | None = None) -> pandas.DataFrame:
        """A table as `arviz.summary` gives it; ``attrs["verdict"]`` says plainly whether to trust the fit.

        Chains get R-hat and ESS; variational draws get ``attrs["pareto_k"]`` (and one per row where latents are local).

        Warns:
            FitWarning: once for a variational fit that is not to be trusted.
        """
        from ppl_gen.diagnostics.complaints import warn_of_weights
        from ppl_gen.diagnostics.diagnosis import diagnose

        frame = diagnose(self, draws=draws, seed=seed)
        self.computed["diagnosis"] = frame.copy()  # which `save` keeps
        warn_of_weights(self, self.computed["verdict"])
        return frame

    @property
    def verdict(self) -> Verdict:
        """Whether to trust the fit: ``grade``, ``reason`` and ``advice``, as `diagnose` finds them; computed once.

        The first look at a variational fit that is not to be trusted also gives a `FitWarning`.

        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import EM
        >>> from ppl_gen.models import ppca
        >>> pg.fit(ppca(2, latent=1), torch.randn(50, 2), EM(), seed=0).verdict.grade
        'trust'
        """
        from ppl_gen.diagnostics.complaints import warn_of_weights
        from ppl_gen.diagnostics.diagnosis import verdict

        found = verdict(self)
        warn_of_weights(self, found)
        return found

    def save(self, path: str | Path) -> Path:
        """Write a folder (weights in safetensors, the rest JSON and netCDF; no pickle), in one step.

        Nothing is judged for it: what the last `diagnose` said is kept, where there was one.
        """
        from ppl_gen.fits.saving import save_fit

        return save_fit(self, path)


def require_fit(value: Any) -> None:
    """Raise TypeError unless ``value`` is a fit with its program.

    >>> require_fit("saved")
    Traceback (most recent call last):
    ...
    TypeError: fit: expected a fit, of pg.fit or of pg.load with its program, got str
    """
    from ppl_gen.fits.result import Fit

    if not isinstance(value, Fit):
        raise TypeError(f"fit: expected a fit, of pg.fit or of pg.load with its program, got {type(value).__name__}")
