r"""Sum-product contraction of packed log-factors: sums out enumerated dims and multiplies along plates.

Pyro's plated elimination (Obermeyer et al., "Tensor Variable Elimination for Plated Factor Graphs", 2019) decides what
is summed in which plate; within one plate context the sum is done here, one dim after the other, in log space:

.. math:: m(\text{rest}) = \log \sum_k \exp \sum_{f \ni k} f(k, \text{rest}).

Pyro's own kernel exponentiates each factor by itself, which gives minus infinity where two factors contradict each
other (in float32 from a hundred nats on), and takes four to eight times as long on chains of small tables.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from torch import Tensor

__all__ = ["Factor", "Step", "backward_draws", "contract", "dims_of", "log_sum_exp", "named"]

# The name of the dim that holds several draws; packed dims are letters, so a blank never collides.
_DRAWS = " "


@dataclass(frozen=True, eq=False)
class Factor:
    """One packed log-factor.

    ``value.dim() == len(value._pyro_dims)``; ``plates`` are the symbols of the plates it lies in (those of size one are
    left out, as packing drops them); ``scale`` multiplies the sum it takes part in, outside of every logsumexp.
    """

    site: str
    value: Tensor
    plates: frozenset[str]
    scale: float | Tensor = 1.0

    @property
    def dims(self) -> str:
        return dims_of(self.value)


@dataclass(frozen=True, eq=False)
class Step:
    """One elimination: the packed factors added before ``symbol`` was summed out. Backward sampling reads it."""

    symbol: str
    operands: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Elimination:
    symbol: str
    operands: tuple[int, ...]
    output: str


def dims_of(value: Tensor) -> str:
    """The symbols of a packed tensor's dims, in order."""
    return value._pyro_dims  # type: ignore[attr-defined]


def named(value: Tensor, dims: str) -> Tensor:
    """Write the dim symbols on a packed tensor (torch operations drop them)."""
    value._pyro_dims = dims  # type: ignore[attr-defined]
    return value


def log_sum_exp(value: Tensor, dim: int) -> Tensor:
    """``torch.logsumexp`` whose gradient is zero, not NaN, where every entry is minus infinity.

    >>> x = torch.full((2,), -torch.inf, requires_grad=True)
    >>> torch.autograd.grad(log_sum_exp(x, 0), x)[0]
    tensor([0., 0.])
    """
    return torch.logsumexp(value.clamp(min=torch.finfo(value.dtype).min), dim)


@lru_cache(maxsize=256)
def _plan(inputs: tuple[str, ...], sizes: tuple[tuple[str, int], ...], symbols: frozenset[str]) -> list[_Elimination]:
    """Eliminate next what makes the smallest table; cached, as a fit contracts one structure many times."""
    size_of = dict(sizes)
    terms: dict[int, str] = dict(enumerate(inputs))
    holders: dict[str, set[int]] = {s: {i for i, dims in terms.items() if s in dims} for s in sorted(symbols)}

    def cost(symbol: str) -> int:
        return math.prod(size_of[d] for d in set().union(*(terms[i] for i in holders[symbol])))

    costs = {symbol: cost(symbol) for symbol in holders if holders[symbol]}
    plan = []
    while costs:
        symbol = min(costs, key=lambda s: (costs[s], s))
        operands = tuple(sorted(holders[symbol]))
        output = "".join(sorted(set().union(*(terms[i] for i in operands)) - {symbol}))
        plan.append(_Elimination(symbol, operands, output))
        del costs[symbol]
        new = len(inputs) + len(plan) - 1
        for i in operands:
            for other in terms.pop(i):
                holders.get(other, set()).discard(i)
        terms[new] = output
        for other in output:
            if other in costs:
                holders[other].add(new)
                costs[other] = cost(other)
    return plan


def _aligned(value: Tensor, dims: str) -> Tensor:
    """A view of a packed tensor with the given dims, size one where it has none."""
    own = dims_of(value)
    if own == dims:
        return value
    order = [own.index(d) for d in dims if d in own]
    if order != sorted(order):
        value = value.permute(order)
    return value[tuple(slice(None) if d in own else None for d in dims)] if len(own) < len(dims) else value


def _added(operands: Sequence[Tensor], dims: str) -> Tensor:
    """The sum of packed tensors, broadcast to the given dims; without their names."""
    total = _aligned(operands[0], dims)
    for operand in operands[1:]:
        total = total + _aligned(operand, dims)
    return total


def _eliminated(operands: Sequence[Tensor], step: _Elimination) -> Tensor:
    """The sum of packed operands with one dim summed out in log space, packed by ``step.output``."""
    table = "".join(sorted(step.output + step.symbol))
    return named(log_sum_exp(_added(operands, table), table.index(step.symbol)), step.output)


def _union(terms: Iterable[Tensor]) -> str:
    return "".join(sorted(set().union(*(dims_of(term) for term in terms))))


class _Ring(LogRing):
    """Pyro's log ring with the elimination above in place of opt_einsum; ``steps`` records it for backward sampling."""

    def __init__(self, sizes: Mapping[str, int], steps: list[Step] | None = None) -> None:
        super().__init__(dim_to_size=dict(sizes))
        self._key = tuple(sorted(sizes.items()))
        self.steps = steps

    def sumproduct(self, terms: Sequence[Tensor], dims: Iterable[str]) -> Tensor:
        plan = _plan(tuple(dims_of(term) for term in terms), self._key, frozenset(dims))
        pool: list[Tensor | None] = list(terms)
        for step in plan:
            operands = [pool[i] for i in step.operands]
            for i in step.operands:
                pool[i] = None
            if self.steps is not None:
                self.steps.append(Step(step.symbol, tuple(x for x in operands if x is not None)))
            pool.append(_eliminated([x for x in operands if x is not None], step))
        left = [x for x in pool if x is not None]
        return left[0] if len(left) == 1 else named(_added(left, _union(left)), _union(left))


def _components(factors: Sequence[Factor], symbols: frozenset[str]) -> list[list[Factor]]:
    """Groups of factors that share summed dims, directly or through others; a factor without any is its own group."""
    groups: list[tuple[set[str], list[Factor]]] = []
    for factor in factors:
        mine = symbols.intersection(factor.dims)
        touching = [group for group in groups if not mine.isdisjoint(group[0])]
        if len(touching) == 1:
            touching[0][0].update(mine)
            touching[0][1].append(factor)
            continue
        merged = (set(mine).union(*(g[0] for g in touching)), [f for g in touching for f in g[1]] + [factor])
        groups = [group for group in groups if group not in touching] + [merged]
    return [members for _, members in groups]


def _common_scale(component: Sequence[Factor]) -> float | Tensor:
    """The one scale of factors that are summed together, which alone can be taken outside the logsumexp."""
    first = component[0].scale
    for factor in component:
        scale = factor.scale
        if isinstance(scale, Tensor) and not factor.plates.issuperset(dims_of(scale)):
            raise ValueError(
                f"site '{factor.site}': its poutine.scale varies along dims that are not plates of the site."
            )
        same = scale is first or (
            torch.equal(torch.as_tensor(scale), torch.as_tensor(first))
            if isinstance(scale, Tensor) or isinstance(first, Tensor)
            else math.isclose(scale, first, rel_tol=1e-9)
        )
        if not same:
            raise ValueError(
                f"sites '{component[0].site}' and '{factor.site}' are summed together over discrete sites, but their "
                f"scales differ ({first} and {scale}). Give both the same poutine.scale (one number, or one weight per "
                "row), and do not subsample a plate that lies inside the data plate."
            )
    return first


def contract(
    factors: Sequence[Factor], symbols: frozenset[str], keep: str = "", steps: list[Step] | None = None
) -> Tensor:
    r"""Sum ``symbols`` out of a product of factors, multiply along all plates but ``keep``.

    .. math:: \log \sum_{\text{symbols}} \prod_{\text{plates} \setminus \text{keep}} \prod_f \exp f

    Returns a tensor of the shape of the plate ``keep`` (a scalar where ``keep`` is empty). ``steps`` collects the
    eliminations for :func:`backward_draws`.

    Raises ValueError where scales differ within one sum, and where crossing plates make the sum exponentially large.

    >>> f = named(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), "ab")  # plate a, enumerated b
    >>> rows = contract([Factor("x", f, frozenset("a"))], frozenset("b"), keep="a")
    >>> torch.allclose(rows, f.logsumexp(1))
    True
    """
    total: Tensor | None = None
    for component in _components(factors, symbols):
        dims = {d for factor in component for d in factor.dims if d in symbols}
        scale = _common_scale(component)
        wide = keep + "".join(set(dims_of(scale)) - set(keep)) if isinstance(scale, Tensor) else keep
        term = _contracted(component, dims, wide, steps) if dims else component[0].value
        term = _summed(_scaled(term, scale), keep)
        total = term if total is None else total + term
    if total is None:
        raise ValueError("nothing to contract: no factor was given.")
    return total[...]  # a view without the names of the packed dims


def _scaled(value: Tensor, scale: float | Tensor) -> Tensor:
    """A packed tensor times its scale, whose dims it has afterwards too."""
    if isinstance(scale, Tensor):
        dims = _union([value, scale])
        return named(_aligned(value, dims) * _aligned(scale, dims), dims)
    return value if scale == 1 else named(value * scale, dims_of(value))


def _summed(value: Tensor, keep: str) -> Tensor:
    """A packed tensor summed over all dims but those in ``keep``."""
    dims = [i for i, d in enumerate(dims_of(value)) if d not in keep]
    return named(value.sum(dims), "".join(d for d in dims_of(value) if d in keep)) if dims else value


def _contracted(component: Sequence[Factor], dims: set[str], keep: str, steps: list[Step] | None) -> Tensor:
    """One component with ``dims`` summed out and plates multiplied, packed by what it has of ``keep``."""
    sizes = {d: size for factor in component for d, size in zip(factor.dims, factor.value.shape, strict=True)}
    ring = _Ring(sizes, steps)
    if len({factor.plates for factor in component}) == 1:
        result = _summed(ring.sumproduct([factor.value for factor in component], dims), keep)
    else:
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for factor in component:
            tree.setdefault(factor.plates, []).append(factor.value)
        try:
            result = contract_to_tensor(tree, dims, target_ordinal=frozenset(keep), ring=ring)
        except NotImplementedError as error:
            sites = ", ".join(sorted({factor.site for factor in component})[:6])
            raise ValueError(
                f"the plates around the sites {sites} cross, so that a sum over their discrete sites is exponentially "
                "large. Nest one plate in the other, or make one of them a sequential plate (a for loop)."
            ) from error
    return named(torch.where(result <= torch.finfo(result.dtype).min / 2, -torch.inf, result), dims_of(result))


def backward_draws(
    steps: Sequence[Step],
    draws: int,
    generator: torch.Generator | None = None,
    wanted: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    """Joint draws of all summed dims: the eliminations are undone last to first, each dim given those drawn before.

    On a chain this is forward filtering, backward sampling. It ends early where all ``wanted`` dims are drawn. Returns
    packed index tensors by symbol, each with the plates of its site and, first, the dim of the draws.
    """
    drawn: dict[str, Tensor] = {}
    for step in reversed(steps):
        if wanted is not None and wanted <= drawn.keys():
            break
        given = []
        for term in step.operands:
            term = named(term.detach(), dims_of(term))
            for symbol in [d for d in dims_of(term) if d in drawn]:
                term = packed.gather(term, drawn[symbol], symbol)
            given.append(term)
        rest = _union(given).replace(step.symbol, "")
        logits = _added(given, rest + step.symbol)
        probs = torch.softmax(logits.reshape(-1, logits.shape[-1]), -1)
        if rest.startswith(_DRAWS):
            index = torch.multinomial(probs, 1, generator=generator).reshape(logits.shape[:-1])
        else:
            index = torch.multinomial(probs, draws, replacement=True, generator=generator)
            index, rest = index.t().reshape(draws, *logits.shape[:-1]), _DRAWS + rest
        drawn[step.symbol] = named(index, rest)
    return drawn
