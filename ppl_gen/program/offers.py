"""The vocabulary of the contract: what a program can offer and an algorithm or objective can need."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ppl_gen.errors import IncompatibleError

__all__ = ["OFFERS", "Need", "require"]

#: One group of offers, any of which satisfies the need.
Need = tuple[str, ...]

#: Every offer and what it means. The dry run derives them, but for those that fields of `Program` declare.
OFFERS: dict[str, str] = {
    "density": "every observed site has a normalised log density",
    "latent sites": "at least one sample site is latent",
    "samples": "observed sites can be drawn",
    "differentiable samples": "gradients flow from drawn observations to every parameter",
    "finite local latents": "latent sites inside the data plate take finitely many values and can be summed out",
    "no free parameters": "every unknown is a sample site with a prior (no pyro.param, no trainable network)",
    "differentiable latents": "every latent site is continuous, or finite and can be summed out",
    "codes": "every latent site stands in the data plate, with a prior whose draws carry gradients",
    "data plate": "the rows are exchangeable and stand in one plate, so minibatches are unbiased",
    "exact evidence": "log p(x) per row in closed form",
    "energy": "an unnormalised density: free energy and a Gibbs sampler",
    "EM steps": "closed-form E- and M-steps",
    "CAVI updates": "closed-form coordinate updates of a conjugate guide",
    "transition": "a Markov chain of rows: a corruption, and a distribution that undoes it",
    "time steps": "a Markov chain of latents whose ELBO terms can be entered at any time step",
    "noise prediction": "time steps at which the noise is predicted, so that its plain error can be learned by",
}

#: Names of the zoo's models that offer something. The zoo stands above the contract, and an error has to name examples
#: all the same: the package puts the catalogue's own lookup in.
zoo: list[Callable[[str], list[str]]] = []


def require(algorithm: str, needs: Iterable[Need], program: str, offers: Iterable[str], *, why: str = "") -> None:
    """Raise `IncompatibleError` unless each need is met by an offer, printing both sides (and ``why`` one is not).

    >>> require("EM", [("density",)], "mixture", {"density"})
    >>> require("NUTS", [("density",)], "gan", {"samples"})
    Traceback (most recent call last):
    ...
    ppl_gen.errors.IncompatibleError: NUTS does not fit the program 'gan'.
      NUTS needs:   density
      gan offers:   samples
      missing:      density (every observed site has a normalised log density)
      offered by:   density: ...
    """
    needs, have = list(needs), set(offers)
    missing = [need for need in needs if not have.intersection(need)]
    if not missing:
        return
    width = max(len(algorithm), len(program)) + 9
    lines = [
        f"{algorithm} does not fit the program {program!r}.",
        f"  {algorithm + ' needs:':<{width}}" + ", ".join(" or ".join(need) for need in needs),
        f"  {program + ' offers:':<{width}}" + (", ".join(name for name in OFFERS if name in have) or "nothing"),
        f"  {'missing:':<{width}}" + "; ".join(" or ".join(f"{o} ({OFFERS[o]})" for o in need) for need in missing),
    ]
    lines += [f"  {'because:':<{width}}{why}"] if why else _who_offers(missing, width)
    raise IncompatibleError("\n".join(lines))


def _who_offers(missing: list[Need], width: int) -> list[str]:
    lines = []
    for need in missing:
        names = sorted({name for offer in need for look_up in zoo for name in look_up(offer)})
        if names:
            lines.append(f"  {'offered by:':<{width}}" + f"{' or '.join(need)}: " + ", ".join(names))
    return lines
