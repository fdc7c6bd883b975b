"""Names of Pyro and torch that are not public and that we rely on: one test each, so that an upgrade says which it broke."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoCallable, AutoGuideList, AutoNormal
from torch import Tensor

CANARIES: dict[str, Callable[[], Any]] = {}


def canary(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def kept(check: Callable[[], Any]) -> Callable[[], Any]:
        CANARIES[name] = check
        return check

    return kept


X = torch.tensor([0.5, -0.5, 1.0])


def mixture(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def enumerated() -> poutine.Trace:
    model = poutine.enum(config_enumerate(mixture), first_available_dim=-2)
    trace = poutine.trace(model).get_trace(X)
    trace.compute_log_prob()
    trace.pack_tensors()
    return trace


@canary("pyro.primitives: class _Subsample of a plate's choice of rows")
def _() -> None:
    def model() -> None:
        with pyro.plate("rows", 5, subsample_size=2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    node = poutine.trace(model).get_trace().nodes["rows"]
    assert node["type"] == "sample" and type(node["fn"]).__name__ == "_Subsample"


@canary("ELBO._guess_max_plate_nesting counts the plates of any object with max_plate_nesting")
def _() -> None:
    elbo = TraceEnum_ELBO()
    assert elbo.max_plate_nesting == float("inf")
    pyro.infer.ELBO._guess_max_plate_nesting(elbo, mixture, lambda x: None, (X,), {})
    assert elbo.max_plate_nesting == 1


@canary('infer["_deterministic"] of pyro.deterministic')
def _() -> None:
    node = poutine.trace(lambda: pyro.deterministic("twice", torch.ones(2))).get_trace().nodes["twice"]
    assert node["infer"]["_deterministic"] is True and node["is_observed"]


@canary("pyro.poutine.runtime._PYRO_STACK: the handlers in force")
def _() -> None:
    from pyro.poutine.runtime import _PYRO_STACK

    before = len(_PYRO_STACK)
    with poutine.trace() as handler:
        assert len(_PYRO_STACK) == before + 1 and _PYRO_STACK[-1] is handler


@canary("pyro.poutine.messenger._bound_partial: a handler around a function")
def _() -> None:
    from pyro.poutine.messenger import _bound_partial

    made = poutine.scale(mixture, scale=0.5)
    assert isinstance(made, _bound_partial) and callable(made.func)


@canary("pyro.infer.traceenum_elbo._compute_dice_elbo and ELBO._get_traces")
def _() -> None:
    from pyro.infer.traceenum_elbo import _compute_dice_elbo

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Delta(torch.tensor([-1.0, 1.0])).to_event(1))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    model = config_enumerate(mixture)
    ((traced, guided),) = elbo._get_traces(model, guide, (X,), {})
    assert torch.allclose(-_compute_dice_elbo(traced, guided), torch.as_tensor(elbo.loss(model, guide, X)))


@canary("ParamStoreDict._constraints by name, and __getitem__ for every read")
def _() -> None:
    with pyro.get_param_store().scope():
        pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        store = pyro.get_param_store()
        assert store._constraints["scale"] is dist.constraints.positive
        read: list[str] = []
        kind, plain = type(store), type(store).__getitem__
        kind.__getitem__ = lambda self, name: read.append(name) or plain(self, name)  # type: ignore[method-assign]
        try:
            pyro.param("scale")
        finally:
            kind.__getitem__ = plain  # type: ignore[method-assign]
        assert read == ["scale"]


@canary("PyroModule._pyro_name, and <name>_unconstrained beside it")
def _() -> None:
    class Net(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = pyro.nn.PyroParam(torch.ones(2), constraint=dist.constraints.positive)

    class Outer(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

    assert Outer().inner._pyro_name == "inner" and "scale_unconstrained" in Outer().inner._parameters


@canary("packed traces: _pyro_dims, _dim_to_symbol, _enumerate_dim, _enumerate_symbol")
def _() -> None:
    trace = enumerated()
    infer, packed = trace.nodes["z"]["infer"], trace.nodes["x"]["packed"]["unscaled_log_prob"]
    assert infer["_enumerate_dim"] == -2 and len(packed._pyro_dims) == packed.dim() == 2
    assert infer["_enumerate_symbol"] in packed._pyro_dims
    assert trace.nodes["x"]["infer"]["_dim_to_symbol"][-2] == infer["_enumerate_symbol"]


@canary("EnumMessenger: _dim_to_id, _param_dims, _value_dims, and _markov_scope inside pyro.markov")
def _() -> None:
    def chain() -> None:
        z = 0
        for t in pyro.markov(range(2)):
            z = pyro.sample(f"z{t}", dist.Categorical(torch.eye(2)[z] + 0.1))

    handler = poutine.enum(first_available_dim=-1)
    trace = poutine.trace(handler(config_enumerate(chain))).get_trace()
    infer = trace.nodes["z1"]["infer"]
    assert infer["_enumerate_dim"] in infer["_dim_to_id"] and "_markov_scope" in infer
    assert {"z0", "z1"} <= handler._value_dims.keys() and "z1" in handler._param_dims


@canary("AutoGuide: _setup_prototype, _prototype_frames, _model, prototype_trace; AutoContinuous._unpack_latent")
def _() -> None:
    from pyro.infer.autoguide import AutoDiagonalNormal

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    guide = AutoNormal(model)
    guide._setup_prototype(X)
    assert "z" in guide.prototype_trace.nodes and "data" in guide._prototype_frames and callable(guide._model[0])
    flat = AutoDiagonalNormal(model)
    flat._setup_prototype(X)
    ((site, part),) = flat._unpack_latent(torch.arange(3.0))
    assert site["name"] == "z" and part.tolist() == [0.0, 1.0, 2.0]


@canary("AutoCallable._guide inside an AutoGuideList")
def _() -> None:
    def part(x: Tensor) -> dict[str, Tensor]:
        return {}

    parts = AutoGuideList(mixture)
    parts.append(AutoCallable(mixture, part))
    assert parts[0]._guide is part


@canary("SubsampleMessenger._subsample(name, size, subsample_size, subsample, ...), a static method")
def _() -> None:
    import inspect

    from pyro.poutine.subsample_messenger import SubsampleMessenger

    assert isinstance(SubsampleMessenger.__dict__["_subsample"], staticmethod)
    names = list(inspect.signature(SubsampleMessenger._subsample).parameters)
    assert names[:4] == ["name", "size", "subsample_size", "subsample"]


@canary("pyro.primitives._masked_observe: what sample() calls for obs_mask")
def _() -> None:
    called: list[str] = []
    outer = pyro.primitives._masked_observe
    pyro.primitives._masked_observe = lambda name, *args, **kwargs: called.append(name) or outer(name, *args, **kwargs)
    try:
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(2), obs_mask=torch.tensor([True, False]))
    finally:
        pyro.primitives._masked_observe = outer
    assert called == ["y"]


@canary(
    "stable distributions: _standard_stable, _unsafe_standard_stable, _safe_shift; sites <name>_uniform, _exponential"
)
def _() -> None:
    from pyro.distributions import stable as transforms
    from pyro.infer.reparam import LatentStableReparam
    from pyro.infer.reparam import stable as reparam

    for module in (transforms, reparam):
        assert callable(module._standard_stable) and callable(module._unsafe_standard_stable)
    assert callable(reparam._safe_shift)
    model = poutine.reparam(lambda: pyro.sample("x", dist.Stable(1.5, 0.0)), {"x": LatentStableReparam()})
    assert {"x_uniform", "x_exponential"} <= poutine.trace(model).get_trace().nodes.keys()


@canary("HMC: _sample_r, _kinetic_energy, _potential_energy_last")
def _() -> None:
    from pyro.infer import NUTS

    kernel = NUTS(poutine.block(mixture, hide=["z"]))
    assert callable(kernel._sample_r) and callable(kernel._kinetic_energy)
    assert hasattr(kernel, "_potential_energy_last")


@canary("Messenger._process_message: one door for every statement")
def _() -> None:
    from pyro.poutine.messenger import Messenger

    seen: list[str] = []

    class Door(Messenger):
        def _process_message(self, msg: Any) -> None:
            seen.append(msg["name"])
            super()._process_message(msg)

    with Door():
        pyro.sample("x", dist.Normal(0.0, 1.0))
    assert seen == ["x"]


@canary("MaskedDistribution._mask, MixtureSameFamily._component_distribution, OneHotCategorical._categorical")
def _() -> None:
    mask = torch.tensor([True, False])
    assert torch.equal(dist.Normal(torch.zeros(2), 1.0).mask(mask)._mask, mask)
    parts = dist.Normal(torch.zeros(2), 1.0)
    assert dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)._component_distribution is parts
    assert dist.OneHotCategorical(torch.ones(3))._categorical.probs.shape == (3,)


@canary("torch: Transform._inv_call, Distribution._validate_args, Module._buffers and _parameters")
def _() -> None:
    assert torch.distributions.ExpTransform()._inv_call(torch.ones(1)).tolist() == [0.0]
    assert isinstance(torch.distributions.Distribution._validate_args, bool)
    assert "running_mean" in torch.nn.BatchNorm1d(2)._buffers and "weight" in torch.nn.Linear(1, 1)._parameters


@canary("reparameterised sites: <name>_decentered and <name>_centered of LocScaleReparam")
def _() -> None:
    from pyro.infer.reparam import LocScaleReparam

    model = poutine.reparam(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), {"x": LocScaleReparam(0.0)})
    assert "x_decentered" in poutine.trace(model).get_trace().nodes


@canary("obs_mask: sites <name>_observed and <name>_unobserved")
def _() -> None:
    def model() -> None:
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(2), obs_mask=torch.tensor([True, False]))

    assert {"y_observed", "y_unobserved", "y"} <= poutine.trace(model).get_trace().nodes.keys()


@canary("pyro.infer.util.Dice._get_log_factors, MarginalRing and require_backward: a guide summed out")
def _() -> None:
    from ppl_gen.handlers.expectation import expected_elbo

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Delta(torch.tensor([-1.0, 1.0])).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    ((traced, guided),) = elbo._get_traces(mixture, guide, (X,), {})
    assert torch.allclose(-expected_elbo(traced, guided), torch.as_tensor(elbo.loss(mixture, guide, X)))


@canary("torch._fused_adam_ and torch._fused_adamw_, called as torch.optim does")
def _() -> None:
    from ppl_gen.inference.fused_adam import FusedAdam

    param = torch.nn.Parameter(torch.ones(2))
    optimiser = torch.optim.Adam([param], lr=0.5, fused=True)
    param.grad = torch.ones(2)
    optimiser.step()
    assert FusedAdam.serves(optimiser)
    FusedAdam(optimiser).step([torch.ones(2)])
    assert torch.allclose(param.detach(), torch.zeros(2), atol=1e-4)  # Adam's step on equal gradients is the rate


@pytest.mark.parametrize("name", CANARIES)
def test_pyro_and_torch_still_mean_by_a_private_name_what_we_rely_on(name: str) -> None:
    CANARIES[name]()
