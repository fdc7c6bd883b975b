"""Which gradient estimator each latent site gets, read off the dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppl_gen.errors import IncompatibleError
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.program.checks import require_enumerable
from ppl_gen.program.info import Site

__all__ = ["Estimators", "choose_estimators", "refuse_tied_rows"]


@dataclass(frozen=True)
class Estimators:
    """Which latent site is dealt with how."""

    model_sums: tuple[str, ...] = ()
    guide_sums: tuple[str, ...] = ()
    analytic: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    reparameterised: tuple[str, ...] = ()

    def notes(self) -> dict[str, str]:
        """One line per kind, for `Fit.notes`."""
        words = {
            "summed out in the model": self.model_sums,
            "summed out in the guide": self.guide_sums,
            "analytic KL": self.analytic,
            "score function with baseline": self.score,
            "reparameterised": self.reparameterised,
        }
        said = "; ".join(f"{how}: {', '.join(names)}" for how, names in words.items() if names)
        return {"gradients": said} if said else {}


def choose_estimators(setting: Setting, enumerate_sites: bool = True) -> Estimators:
    """Choose from the dry run; raises IncompatibleError naming a latent site that nothing can train."""
    info, guide_sites = setting.info, setting.info.guide_sites or {}
    latent = {site.name: site for site in info.sites.values() if site.latent}
    in_model = tuple(name for name, site in latent.items() if name not in guide_sites)
    stuck = [name for name in in_model if not latent[name].finite]
    if stuck:
        raise IncompatibleError(f"latent site(s) {stuck} are not in the guide and cannot be summed out")
    require_enumerable(info, in_model)
    if in_model and not enumerate_sites:
        raise IncompatibleError(f"enumerate=False: the guide must draw the discrete site(s) {list(in_model)}")
    shared = {name: site for name, site in guide_sites.items() if name in latent}
    sums = enumerate_sites and not info.unenumerable
    summed = tuple(n for n, s in shared.items() if s.finite and s.discrete and sums)
    rest = {n: s for n, s in shared.items() if n not in summed}
    score = tuple(n for n, s in rest.items() if not s.reparameterised)
    ordered = [n for n in latent if n in shared] == [n for n in shared]
    apart = {n for n in rest if not (in_model and latent[n].local)}  # a local prior may depend on a site summed out
    analytic = tuple(
        n for n, s in rest.items() if n in apart and n not in score and ordered and _has_closed_form(latent[n], s)
    )
    return Estimators(in_model, summed, analytic, score, tuple(n for n in rest if n not in score and n not in analytic))


def _has_closed_form(model_site: Site, guide_site: Site) -> bool:
    """Only pairs of the same family: torch registers some mixed pairs, infinite where supports differ."""
    names = {
        "Normal",
        "MultivariateNormal",
        "Gamma",
        "Beta",
        "Dirichlet",
        "Exponential",
        "Laplace",
        "LowRankMultivariateNormal",
    }
    return model_site.distribution == guide_site.distribution and model_site.distribution in names


def refuse_tied_rows(setting: Setting, sums: Sequence[str]) -> None:
    """A sum over a global site would hold N / B inside its logarithm, which is neither unbiased nor a bound."""
    if sums and setting.minibatches and setting.info.rows_plate(sums) is None:
        names = [name for name in sums if not setting.info.sites[name].local]
        raise IncompatibleError(
            f"the discrete site(s) {names} stand outside the data plate and are summed out in the model, which "
            "minibatches do not allow; leave batch_size out, or draw them in the guide"
        )
