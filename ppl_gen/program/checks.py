"""Checks of a traced program: its densities, its data plate, and whether guide and model match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from traceback import extract_tb
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import broadcast_shape

from ppl_gen.data.batching import Batch
from ppl_gen.data.calls import is_number, may_be_data
from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.last_site import LastSite
from ppl_gen.handlers.read_sites import innermost
from ppl_gen.handlers.sites import is_deterministic, sample_nodes
from ppl_gen.program.mixed import MixedDtypesError, of_another_dtype, speaks_of_dtypes
from ppl_gen.program.program import Program

if TYPE_CHECKING:
    from ppl_gen.program.dry_run import ProgramInfo, Site

__all__ = [
    "OutsideSupportError",
    "check_densities",
    "check_observed",
    "check_plate",
    "check_reparameterised",
    "check_sizes",
    "data_plate",
    "explained",
    "require_enumerable",
    "vectorised",
]


class OutsideSupportError(ValueError):
    """An observed value is impossible at the values of the latent sites that were drawn."""


def check_densities(trace: poutine.Trace) -> None:
    """Evaluate every site by itself, so that an error names it; raises ValueError or TypeError."""
    for _, node in sample_nodes(trace):
        _check_log_prob_shape(node)


def _check_log_prob_shape(node: dict[str, Any]) -> None:
    """Implicit programs have no log density to check."""
    fn, value = node["fn"], node["value"]
    if is_deterministic(node):
        return
    if isinstance(fn, dist.Delta) or "Delta" in type(getattr(fn, "base_dist", fn)).__name__:
        if tuple(fn.shape()) != tuple(value.shape):
            raise ValueError(f"at site {node['name']!r}: value {tuple(value.shape)}, distribution {tuple(fn.shape())}")
        return
    sizes = {f.dim: f.size for f in node["cond_indep_stack"] if f.vectorized}
    expected = [sizes.get(-k, 1) for k in range(max((-d for d in sizes), default=0), 0, -1)]
    weights = [w.shape for w in (node["mask"], node["scale"]) if isinstance(w, torch.Tensor)]
    try:
        actual = list(broadcast_shape(fn.batch_shape, value.shape[: value.dim() - fn.event_dim], *weights))
    except ValueError as error:
        raise ValueError(
            f"at site {node['name']!r}: shape mismatch: the value has shape {tuple(value.shape)}, but the distribution "
            f"has batch shape {tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}"
            + "".join(f", and a mask or scale has shape {tuple(shape)}" for shape in weights)
        ) from error
    while len(actual) > len(expected) and actual[0] == 1:
        actual = actual[1:]
    padded = [1] * (len(expected) - len(actual)) + actual
    expected = [a if e == -1 else e for a, e in zip(padded, expected, strict=False)]  # a plate without a size
    if any(a not in (1, e) for a, e in zip(padded, expected, strict=False)) or len(actual) > len(expected):
        raise ValueError(
            f"at site {node['name']!r}: invalid log_prob shape: expected {expected} (its plates), actual {actual}; "
            f"value {tuple(value.shape)}, batch shape {tuple(fn.batch_shape)}, event shape {tuple(fn.event_shape)}"
        )
    if node["is_observed"]:
        _check_support(node)
    else:
        _check_dtypes(node)


def _check_dtypes(node: dict[str, Any]) -> None:
    """A prior made outside in another dtype draws, and has no density at the values that algorithms try."""
    parts = [part for part in vars(innermost(node["fn"])).values() if isinstance(part, torch.Tensor)]
    if any(part.is_floating_point() and part.dtype is not node["value"].dtype for part in parts):
        try:
            node["fn"].log_prob(node["value"])
        except RuntimeError as error:
            if speaks_of_dtypes(error):
                raise RuntimeError(f"at site {node['name']!r}: {error}") from error


def _check_support(node: dict[str, Any]) -> None:
    """Torch checks observed values when a density is taken, and does not know the name of the site."""
    try:
        node["fn"].log_prob(node["value"])
    except IncompatibleError:  # a distribution without a normalised density says so by itself when one is asked for
        return
    except ValueError as error:
        text = str(error).splitlines()[0].removesuffix(", but found invalid values:")
        said = f"at site {node['name']!r}: {text}; observed values lie outside{_of_grey(node)}"
        raise OutsideSupportError(said) from error
    except (KeyError, NotImplementedError, RuntimeError) as error:
        _refuse_one_way(node, error)
        dtype = node["value"].dtype
        if dtype.is_floating_point or not str(error):  # torch's own for no density at all has no words
            raise
        raise TypeError(
            f"at site {node['name']!r}: observed values are {_spoken(dtype)}, with which its distribution cannot "
            "compute; pass numbers, x.float()"
        ) from error


def _of_grey(node: dict[str, Any]) -> str:
    """What to do with grey values, which Pyro gives a Bernoulli without a word once its validation is off."""
    value, kind = node["value"], type(innermost(node["fn"])).__name__
    if "Bernoulli" not in kind or not bool(((value >= 0) & (value <= 1)).all()):
        return ""
    return (
        ": make them zeros and ones, (x > 0.5).float() or torch.bernoulli(x); or take dist.ContinuousBernoulli, a "
        f"density of grey values; or say dist.{kind}(..., validate_args=False) for the cross-entropy as it is"
    )


def _refuse_one_way(node: dict[str, Any], error: Exception) -> None:
    """A flow that knows the density of its own last draw alone has none for a value that was observed."""
    from ppl_gen.handlers.sites import transforms_of

    flows = ", ".join(dict.fromkeys(type(t).__name__ for t in transforms_of(node["fn"])))
    if flows and isinstance(error, KeyError | NotImplementedError):
        raise ValueError(
            f"at site {node['name']!r}: it goes through {flows}, which has no inverse, so that an observed value has "
            "no density; take a flow with an inverse (affine_coupling, affine_autoregressive, spline), or leave this "
            "one to a guide"
        ) from error


def _spoken(dtype: torch.dtype) -> str:
    return "booleans" if dtype is torch.bool else f"integers ({dtype})"


class explained:
    """Context that rewords Pyro's shape errors: the site, what was found, and the edit that fixes it."""

    def __init__(self, program: Program, batch: Batch, what: str) -> None:
        self.program, self.batch, self.what, self.last = program, batch, what, LastSite()

    def __enter__(self) -> None:
        self.last.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.last.__exit__(kind, error, traceback)
        if error is None or not isinstance(
            error, ValueError | RuntimeError | TypeError | IndexError | AttributeError | AssertionError
        ):
            return
        text, where = str(error), self.last.said(error)
        head = f"the {self.what} of {self.program.name!r} failed on a dry run{where and f' ({where})'}: "
        if len(self.batch.args) == 1 and not self.batch.kwargs and is_number(self.batch.args[0]):
            raise ValueError(
                f"data {''.join(self.batch.order)!r}: expected rows along the first dimension, got a single number; "
                f"with it as a constant, {head}{text}"
            ) from error
        if isinstance(error, AssertionError):
            claim = text.partition("\n")[0] or extract_tb(error.__traceback__)[-1].line
            raise ValueError(f"{head}its own assertion does not hold: {claim}") from error
        if isinstance(error, NotImplementedError) and "does not support observe statements" in text:
            raise NotImplementedError(
                head + text.splitlines()[0] + "; for observed sites StableReparam (or, without skew, "
                "SymmetricStableReparam) does, or leave the site out of the reparameterisation"
            ) from error
        if isinstance(error, TypeError | AttributeError) and "NoneType" in text:
            raise TypeError(head + text + "; it needs what the data give as None") from error
        if any(words in text for words in ("on the same device", "device type", "expected device")):
            raise ValueError(
                head + "a tensor in its closure lives on another device than the data. Make it inside the model "
                f"(programs run under torch.device), or pass it as data with pg.constant(...).\n  torch says: {text}"
            ) from error
        if speaks_of_dtypes(error):
            raise MixedDtypesError(head + text.splitlines()[0] + self._casts()) from error
        if isinstance(error, IndexError) and "used as indices" in text:
            raise TypeError(head + text + "; an index is an integer: i.long(), or a discrete draw") from error
        if isinstance(error, IndexError):
            raise ValueError(
                head + text + "; an index goes beyond the rows it is given here, as with a plate whose size is "
                f"written out: use pyro.plate({self.program.data_plate!r}, len(x))"
            ) from error
        if "Multiple sample sites named" in text:
            raise ValueError(
                head + text.splitlines()[0] + "; every site needs a name of its own, and a plate that is opened twice "
                "is made once: `rows = pyro.plate(...)`, then `with rows:`"
            ) from error
        if "invalid log_prob shape: expected [] (its plates)" in text:
            raise ValueError(head + text.strip() + "\n" + self._advice_outside()) from error
        if "invalid log_prob shape" in text or "shape mismatch" in text.lower() or "broadcast" in text:
            raise ValueError(head + text.strip() + "\n" + self._advice(text)) from error
        if isinstance(error, TypeError) and "argument" in text and "missing" in text:
            raise TypeError(head + text + "; the data must hold that entry, or give the argument a default") from error
        if isinstance(error, ValueError) and "support" in text and "observed" in text.lower():
            raise ValueError(head + text) from error
        if hasattr(error, "add_note"):  # the program's own error stays what it is, and says on what it was run
            error.add_note(head + self._given())

    def _given(self) -> str:
        entries = {f"argument {i}": value for i, value in enumerate(self.batch.args)} | self.batch.kwargs
        tensors = ((n, v) for n, v in entries.items() if isinstance(v, torch.Tensor))
        return "it was given " + ", ".join(f"{n} of shape {tuple(v.shape)} ({v.dtype})" for n, v in tensors)

    def _casts(self) -> str:
        entries = {f"argument {i}": value for i, value in enumerate(self.batch.args)} | self.batch.kwargs
        tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
        listed = ", ".join(f"{n} ({v.dtype})" for n, v in tensors.items() if not v.is_floating_point())
        if listed:
            return f"; the data hold {listed}: compute with .float() of them"
        held = of_another_dtype(self.program.guide if self.what == "guide" else self.program.model)
        listed, mine = ", ".join(f"{n} ({dtype})" for n, dtype in held.items()), torch.get_default_dtype()
        outside = f"; made outside of the {self.what}: {listed}, and the fit computes in {mine}" if listed else ""
        other = torch.float32 if mine is torch.float64 else torch.float64
        return f"{outside}; cast with .to(x.dtype), or ask for dtype={other}"

    def _advice_outside(self) -> str:
        plate, rows = self.program.data_plate, self.batch.rows
        return (
            "  the site stands outside of every plate. Usual fixes:\n"
            "  - one draw of a vector: dist.Normal(zeros, scale).to_event(1) (NUTS and EM read it so by themselves)\n"
            f"  - a draw for each of the rows ({rows}): put it under `with pyro.plate({plate!r}, len(x)):`\n"
            "  - a draw for each of other things: a plate of their own, `with pyro.plate('groups', 8):`"
        )

    def _advice(self, text: str) -> str:
        plate, rows = self.program.data_plate, self.batch.rows
        return (
            f"  the rows ({rows}) are the last batch dimension inside pyro.plate({plate!r}, len(x)). Usual fixes:\n"
            f"  - a statement over rows outside every plate: put it under `with pyro.plate({plate!r}, len(x)):`\n"
            "  - dimensions to the right of the rows belong to the event: dist.Normal(loc, scale).to_event(1)\n"
            "  - a column (N, 1) against a vector (N,): use .squeeze(-1) or .to_event(1) on both sides\n"
            f"  - a plate whose size is written out: use pyro.plate({plate!r}, len(x))"
        )


def data_plate(program: Program, batch: Batch, trace: poutine.Trace, fewer: Fewer) -> str:
    """The name of the plate over the rows: the program's own, or the one plate that grows and shrinks with them.

    Raises:
        ValueError: where some plate of another name has as many rows as the data, and need not be theirs.
    """
    frames, rows = vectorised(trace), batch.rows
    over_rows = [name for name, frame in frames.items() if frame.size == rows]
    if program.data_plate in frames or not over_rows:
        return program.data_plate
    few = fewer()
    if program.data_plate == "data" and few is not None:
        found, sizes = few
        follow = [name for name in over_rows if name in (f := vectorised(found)) and f[name].size == sizes]
        around = [{f.name for f in n["cond_indep_stack"]} for _, n in sample_nodes(trace) if n["is_observed"]]
        if len(follow) == 1 and follow[0] in set().union(*around):
            return follow[0]
        if len(over_rows) == 1 and around and all(over_rows[0] in names for names in around):  # its size is written out
            return over_rows[0]
    if len(over_rows) > 1:
        table = "\n".join(f"  {name!r}: {_inside(trace, name)}" for name in over_rows)
        raise ValueError(
            f"the program {program.name!r} has no plate named {program.data_plate!r} (its data_plate), and several "
            f"plates with as many rows as the data ({rows}):\n{table}\nSay which holds the rows, "
            f"pg.Program(model, data_plate={over_rows[0]!r}), or open one plate for all: `rows = pyro.plate(...)`, "
            "then `with rows:`."
        )
    raise ValueError(
        f"the program {program.name!r} has no plate named {program.data_plate!r} (its data_plate), but the plate "
        f"{over_rows[0]!r} has as many rows as the data ({rows}). Name it {program.data_plate!r}, or say "
        f"pg.Program(model, data_plate={over_rows[0]!r}){_across(batch, frames)}."
    )


def _across(batch: Batch, frames: Mapping[str, Any]) -> str:
    """A plate that runs along another dimension of the data than the first may be that of the rows."""
    for value in (*batch.args, *batch.kwargs.values()):
        for dim, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
            plates = [name for name, frame in frames.items() if dim and frame.size == size != batch.rows]
            if plates:
                return f"; if the rows are dimension {dim}, pg.Program(model, data_plate={plates[0]!r}, data_dim={dim})"
    return ""


def _inside(trace: poutine.Trace, plate: str) -> str:
    names = [n for n, node in sample_nodes(trace) if plate in (f.name for f in node["cond_indep_stack"])]
    return f"site(s) {', '.join(names)}"


#: The trace of a program on fewer rows and how many these are, made when first asked for; None where it does not run.
Fewer = Callable[[], tuple[poutine.Trace, int] | None]


def vectorised(trace: poutine.Trace) -> dict[str, Any]:
    """The frames of the vectorised plates of a trace, by name."""
    return {f.name: f for _, node in sample_nodes(trace) for f in node["cond_indep_stack"] if f.vectorized}


def check_plate(batch: Batch, frame: Any) -> None:
    """Raise ValueError unless the data plate holds the rows."""
    if frame is None:
        return
    if batch.rows is not None and frame.size not in (batch.rows,) and (frame.full_size or 0) != batch.rows:
        entries = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor)]
        dims = [dim for value in entries for dim, size in enumerate(value.shape) if dim and size == frame.size]
        other = f"; or, where the rows are another dimension, pg.Program(model, data_dim={dims[0]})" if dims else ""
        raise ValueError(
            f"pyro.plate({frame.name!r}) has size {frame.size}, but the data has {batch.rows} rows here; size it by "
            f"the data it is given, pyro.plate({frame.name!r}, len(x)), so that minibatches and new rows fit too{other}"
        )


def rows_outside(batch: Batch, sites: dict[str, Site], frame: Any, fewer: Fewer) -> str:
    """Why a plate over the rows is not the data plate: a likelihood that runs over them stands outside; else "".

    On whole data the density is right, as that of a program without a data plate; a minibatch could not be rescaled.
    """
    outside = [site for site in sites.values() if site.kind == "observed" and not site.local and frame is not None]
    over_rows = [site.name for site in outside if _over_rows(site, batch.rows, fewer)]
    if not over_rows:
        return ""
    return (
        f"the observed site(s) {', '.join(map(repr, over_rows))} stand outside the data plate {frame.name!r} and run "
        "over its rows: all data count as one row, and on a minibatch their likelihood would not be rescaled. For rows "
        f"that are independent, move the statement into `with pyro.plate({frame.name!r}, len(x)):`"
    )


def check_sizes(batch: Batch, trace: poutine.Trace) -> None:
    """Raise ValueError where there are rows, and they may be those of a plate that does not say how many it holds."""
    for name, frame in vectorised(trace).items() if batch.rows is not None else ():
        inside = [n for _, n in sample_nodes(trace) if frame.size == -1 and frame in n["cond_indep_stack"]]
        batches = [torch.broadcast_shapes(_batch(n), n["fn"].batch_shape) for n in inside]
        held = [shape[frame.dim] for shape in batches if len(shape) >= -frame.dim]
        if any(size > 1 for size in held):
            raise ValueError(
                f"pyro.plate({name!r}) has no size and holds {max(held)}: say pyro.plate({name!r}, n), or, where these "
                f"are the rows of the data, pg.Program(model, data_plate={name!r})"
            )


def _batch(node: dict[str, Any]) -> torch.Size:
    shape: torch.Size = node["value"].shape
    return shape[: len(shape) - node["fn"].event_dim]


def _over_rows(site: Site, rows: int | None, fewer: Fewer) -> bool:
    """Whether a site has a dimension of rows; observations of groups, or of a constraint, have none."""
    shape = (*site.batch_shape, *site.event_shape)
    if rows is None or rows == 1 or rows not in shape:
        return False
    few = fewer()  # five groups and five rows: as many of them on fewer rows?
    if few is None or site.name not in few[0]:
        return True
    fn = few[0].nodes[site.name]["fn"]
    return (*fn.batch_shape, *fn.event_shape) != shape


def check_reparameterised(sites: dict[str, Site]) -> None:
    """Raise ValueError for a reparameterised observation whose density would lack the Jacobian of its transform.

    `pyro.infer.reparam` then observes T^-1(y) at ``<name>_decentered`` or ``<name>_base`` and counts that alone.
    """
    for name, site in sites.items():
        inner = [sites[n] for suffix in ("decentered", "base") if (n := f"{name}_{suffix}") in sites]
        if site.kind == "deterministic" and any(part.kind == "observed" for part in inner):
            raise ValueError(
                f"at site {name!r}: an observed site is reparameterised, and Pyro leaves the Jacobian of that out of "
                f"its density; take {name!r} out of the config of poutine.reparam, which is for latent sites"
            )


def require_enumerable(info: ProgramInfo, names: Sequence[str]) -> None:
    """Raise IncompatibleError, saying why, if the finite sites ``names`` cannot be summed out."""
    if names and info.unenumerable:
        raise IncompatibleError(
            f"{info.name!r}: nothing draws {', '.join(names)}, and they cannot be summed out: {info.unenumerable}. Or "
            "draw them in a guide"
        )


def check_observed(info: ProgramInfo, batch: Batch) -> None:
    """Raise ValueError if there are data and no site is observed: then they never reach the likelihood."""
    given = any(map(may_be_data, [*batch.args, *batch.kwargs.values()]))  # without data, the sites are the target
    if given and not info.select(kind="observed") and not info.select(kind="factor"):
        raise ValueError(
            f"no site of {info.name!r} is observed, so the data never reach the likelihood: write "
            "pyro.sample(..., obs=x) at the site that generates the data"
        )
