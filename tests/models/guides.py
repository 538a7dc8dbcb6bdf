"""Every kind of guide of the package, for any model of the table.

`KINDS` are the guides; a `Setting` is a model with what a guide of any kind needs to be told about
it; `MODELS` are the rows of the table, each model once, and a few more supports, plates and shapes.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_recursive import (
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
)
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.gaussian_families import LowRank
from pyro_recursive.guides.marginals import log_density
from pyro_recursive.guides.semi_amortized.updates import LearnedUpdate
from pyro_recursive.tracing.handlers import FlatPriors
from pyro_recursive.tracing.sites import sites
from tests.models import INDEX, ROWS, Row, normal, observe

# The models.


def supports(x: Tensor) -> None:
    """Supports of every kind, inside and outside the plate."""
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.5))
    steps = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    ordered = pyro.sample(
        "ordered", dist.TransformedDistribution(steps, dist.transforms.OrderedTransform())
    )
    with pyro.plate("data", len(x)):
        positive = pyro.sample("positive", dist.HalfNormal(1.0))
        unit = pyro.sample("unit", dist.Beta(2.0, 2.0))
        between = pyro.sample("between", dist.Uniform(-1.0, 2.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        loc = (share * ordered).sum(-1) + unit * between + factor[..., 2, 1]
        pyro.sample("x", dist.Normal(loc, positive + 0.5), obs=x)


def inner_events(x: Tensor) -> None:
    """An inner plate to the left of the rows', and events on both."""
    with pyro.plate("data", len(x), dim=-1):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("copy", 3, dim=-2):
            v = pyro.sample("v", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(w.sum(-1) + v[..., 0], 1.0), obs=x.expand(3, -1))


def series(x: Tensor) -> None:
    """One time series, without a plate."""
    z = torch.zeros(())
    for t in pyro.markov(range(len(x))):
        z = normal(f"z{t}", 0.8 * z, 0.7)
        observe(z, x[t], f"x{t}")


def mixture_prior(x: Tensor) -> None:
    """A latent whose support is that of a mixture's components."""
    parts = dist.Gamma(torch.tensor([2.0, 9.0]), 1.0)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
        observe(z, x)


def improper(x: Tensor) -> None:
    """Flat priors, which cannot be drawn from, outside and inside the plate."""
    loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        flat = dist.ImproperUniform(constraints.positive, (), (2,))
        width = pyro.sample("width", flat).sum(-1)
        pyro.sample("x", dist.Normal(loc - width, width.reciprocal()), obs=x)


def angles(x: Tensor) -> None:
    """Densities with a period, over angles inside and outside the plate."""
    a = pyro.sample("a", dist.VonMises(0.3, 0.5))
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.VonMises(a, 2.0))
        pair = pyro.sample("pair", dist.SineBivariateVonMises(0.0, 1.0, 1.0, 2.0, correlation=0.5))
        observe(b.cos() + pair.sin().sum(-1), x)


def bounds(x: Tensor) -> None:
    """Supports that depend on another latent, on the data, and on both in each row."""
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    low = pyro.sample("low", dist.Uniform(x.min() - 1.0, x.max() + 1.0))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Uniform(x - 1.0, x + b))
        observe(c + a + low, x)


def no_guide(*args: Any) -> None:
    raise NotImplementedError


MORE = [
    Row(model.__name__, lambda model=model: (model, no_guide))
    for model in (supports, inner_events, series, mixture_prior, improper, angles, bounds)
]
# Rows that differ from another one in their guide alone.
SAME_MODEL = {
    *("delta_log_density", "lazy_parameter", "mixed_below", "guide_list"),
    *("auto_normal", "auto_normal_subsample", "auto_delta", "auto_delta_local", "auto_messenger"),
    *("auto_multivariate", "auto_low_rank", "auto_iaf", "auto_gaussian"),
    *("messenger_of_prior", "messenger_subsample", "easy_guide", "easy_unsized"),
    *("unsized_guide", "exact_ragged"),
}
MODELS = [row for row in ROWS if row.name not in SAME_MODEL] + MORE
ROW = {row.name: row for row in MODELS}

# Rows whose data have the rows of the latents in their second dim.
TRANSPOSED = {
    *("grid_reversed", "exact_grid_reversed", "exact_loop_of_plate"),
    *("sequential_of_vectorized", "vectorized_of_sequential"),
}
EXPLICIT: dict[str, Callable] = {
    "explicit_subsample": lambda x, index: pyro.plate("data", len(x), subsample=index),
    "exact_subsample": lambda x: pyro.plate("data", len(x), subsample=torch.tensor(INDEX)),
}


# What guides are told.


class Encoder(nn.Module):
    """A linear map of the sum of each row to n outputs; ``rank`` dims of the input are rows."""

    def __init__(self, rank: int, n: int) -> None:
        super().__init__()
        self.rank = rank
        self.slope = nn.Parameter(0.1 * torch.randn(n))
        self.start = nn.Parameter(0.2 * torch.randn(n) - 0.1)

    def forward(self, rows: Tensor, *told: Tensor) -> Tensor:
        """Encode rows; ``told`` are the parameters of the components before this one."""
        summed = rows.reshape(*rows.shape[: self.rank], -1).sum(-1, keepdim=True)
        found = summed * self.slope + self.start
        return found + sum(0.1 * each[..., : found.shape[-1]] for each in told)


def transposed(x: Tensor, *rest: Any) -> Tensor:
    return x.mT


@dataclass(frozen=True)
class Setting:
    """A model with what guides of every kind need to know of it."""

    row: Row
    model: Callable
    by_hand: Callable
    args: tuple

    @property
    def options(self) -> dict[str, Any]:
        """What every guide is told about this model."""
        inputs = {"inputs": transposed} if self.row.name in TRANSPOSED else {}
        return {"create_plates": EXPLICIT.get(self.row.name), **inputs}

    @cached_property
    def plate(self) -> str | None:
        """The first vectorised plate around a latent site."""
        trace = poutine.trace(FlatPriors()(self.model)).get_trace(*self.args)
        frames = (f for site in latents_in(trace).values() for f in site["cond_indep_stack"])
        return next((frame.name for frame in frames if frame.vectorized), None)

    def encoder(self, family: Any = "diagonal") -> Encoder:
        """Make an encoder for the latents in the plate of the rows, as many as there are."""
        probe = AmortizedGuide(self.model, nn.Identity(), family=family, **self.options)
        probe.prepare(*self.args)
        (latents,) = [latents for latents in probe.groups if latents.local]
        return Encoder(len(latents.rows), probe.num_parameters(latents))

    def amortized(self, family: Any = "diagonal") -> AmortizedGuide:
        return AmortizedGuide(self.model, self.encoder(family), family=family, **self.options)


# The kinds.

FLOW = {"transforms": 2, "hidden": (4,)}
SCHEDULE = Schedule(first=2, propose=2, refine=2, joint=2, draws=64)


@dataclass(frozen=True)
class Kind:
    """A kind of guide.

    ``rows`` says where the distribution of a row comes from: "joint" (there is one for all rows),
    "table", "encoder" or "auto". ``auto`` says which guides of Pyro's are components, if any are.
    """

    name: str
    build: Callable[[Setting], LatentGuide]
    rows: str = "joint"
    auto: str = ""

    @property
    def recursive(self) -> bool:
        return self.name.startswith("recursive")

    @property
    def mixture(self) -> bool:
        return "mixture" in self.name or self.recursive


def joint(make: Callable, *args: Any, **options: Any) -> Callable[[Setting], LatentGuide]:
    return lambda s: make(s.model, *args, **options, **s.options)


def table(make: Callable, *args: Any, **options: Any) -> Callable[[Setting], LatentGuide]:
    return lambda s: make(s.model, *args, plate=s.plate or "data", **options, **s.options)


def mixture(s: Setting, *components: Callable, **options: Any) -> MixtureGuide:
    return MixtureGuide(s.model, list(components), **options, **s.options)


def flow(s: Setting) -> FlowGuide:
    return FlowGuide(s.model, encoder=s.encoder(), **FLOW, **s.options)


def encoders(s: Setting) -> MixtureGuide:
    return mixture(s, s.amortized(), s.amortized(), weights="shared")


def unlike(s: Setting) -> MixtureGuide:
    return mixture(s, s.amortized(), flow(s), weights=Encoder(s.encoder().rank, 2))


def auto_normals(s: Setting) -> MixtureGuide:
    options = {"create_plates": s.options["create_plates"], "init_scale": 0.8}
    return mixture(s, *(autoguide.AutoNormal(s.model, **options) for _ in range(2)))


def auto_diagonals(s: Setting) -> MixtureGuide:
    return mixture(s, *(autoguide.AutoDiagonalNormal(s.model, init_scale=0.8) for _ in range(2)))


def recursive_encoders(s: Setting, **options: Any) -> RecursiveMixtureGuide:
    options |= {"weights": "shared", "schedule": SCHEDULE, **s.options}
    return RecursiveMixtureGuide(s.model, [s.amortized(), s.amortized()], **options)


def refined(s: Setting, guide: LatentGuide, **options: Any) -> SemiAmortizedGuide:
    """Refine with the same draws in each call, so that there is one density to compare with."""
    return SemiAmortizedGuide(s.model, guide, steps=2, seed=1, **options)


def refined_by_network(s: Setting) -> SemiAmortizedGuide:
    return refined(s, s.amortized("full"), update=LearnedUpdate(hidden=(4,)))


def refined_second_order(s: Setting) -> SemiAmortizedGuide:
    return refined(s, s.amortized(), mode="second_order", checkpoint=True)


RECURSIVE = partial(RecursiveMixtureGuide, paths=0, schedule=SCHEDULE)
KINDS = [
    Kind("gaussian", joint(AmortizedGuide)),
    Kind("full", joint(AmortizedGuide, family="full")),
    Kind("low_rank", joint(AmortizedGuide, family=LowRank(2))),
    Kind("table", table(AmortizedGuide), "table"),
    Kind("encoder", lambda s: s.amortized(), "encoder"),
    Kind("encoder_full", lambda s: s.amortized("full"), "encoder"),
    Kind("flow", joint(FlowGuide, **FLOW)),
    Kind("flow_encoder", flow, "encoder"),
    Kind("mixture", joint(MixtureGuide, 2)),
    Kind("mixture_table", table(MixtureGuide, 2), "table"),
    Kind("mixture_encoders", encoders, "encoder"),
    Kind("mixture_unlike", unlike, "encoder"),
    Kind("mixture_auto_normal", auto_normals, "auto", auto="sites"),
    Kind("mixture_auto_diagonal", auto_diagonals, auto="joint"),
    Kind(
        "mixture_by_hand",
        lambda s: mixture(s, s.by_hand, s.amortized(), weights="shared"),
        "encoder",
        auto="hand",
    ),
    Kind("recursive", joint(RECURSIVE, 2)),
    Kind("recursive_table", table(RECURSIVE, 2), "table"),
    Kind("recursive_encoders", recursive_encoders, "encoder"),
    Kind("recursive_conditional", partial(recursive_encoders, conditional=True), "encoder"),
    Kind("refined", lambda s: refined(s, s.amortized()), "encoder"),
    Kind("refined_second_order", refined_second_order, "encoder"),
    Kind("refined_by_network", refined_by_network, "encoder"),
    Kind("refined_table", lambda s: refined(s, table(AmortizedGuide)(s), mode="svi"), "table"),
    Kind("refined_mixture", lambda s: refined(s, encoders(s)), "encoder"),
    Kind("whitened", joint(AmortizedGuide, family="full", whiten=True)),
]
KIND = {kind.name: kind for kind in KINDS}


def kinds(*names: str) -> Any:
    return pytest.mark.parametrize("kind", names)


# Guides that are made.


def setting(row: Row) -> Setting:
    return Setting(row, *row.build(), row.args())


def made(row: Row, kind: Kind) -> tuple[Setting, Any]:
    """Build a guide, make its parameters, and move them off the symmetric points they start at."""
    s = setting(row)
    guide = kind.build(s)
    with quiet():
        guide.prepare(*s.args)
        guide(*s.args)  # Pyro's guides make their parameters now
    bring_together(guide)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return s, guide


def of(row: str, kind: str) -> tuple[Setting, Any]:
    return made(ROW[row], KIND[kind])


@torch.no_grad()
def bring_together(guide: nn.Module) -> None:
    """Let the components of a mixture overlap, so that they have a say about each other's draws."""
    first, *others = getattr(getattr(guide, "guide", guide), "components", [None])
    for other in others:
        if type(other) is type(first):
            other.load_state_dict(first.state_dict())
        elif hasattr(first, "free_global") and hasattr(other, "flow_global"):
            bias = other.flow_global.bias
            bias[: len(bias) // 2] = first.free_global[: len(bias) // 2]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warning that one weight covers all data; every other one is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Plate '.*' encloses latent site")
        yield


def members_of(guide: LatentGuide) -> tuple[int, ...]:
    """Return the indices of the components that make up the mixture; none where there is none."""
    return getattr(getattr(guide, "guide", guide), "members", ())


SMOOTH = ("pathwise", "dreg", "stl")
SCORED = ("vimco", "dreg+vimco")


def estimators_of(kind: Kind, guide: LatentGuide) -> tuple[str, ...]:
    return SCORED if kind.mixture and len(members_of(guide)) > 1 else SMOOTH


def latents_in(trace: poutine.Trace) -> dict[str, Any]:
    return {site["name"]: site for site in sites(trace) if not site["is_observed"]}


def density_at(guide: Any, args: tuple, values: dict[str, Tensor]) -> Tensor:
    """Return the guide's log-density at values, of all but what the model masks."""
    guide.prepare(*args)
    call = guide.new_call(args, {})
    call.given.update(values)
    found = []
    for group in guide.groups:
        u, keep = call.block_of(group, values).pack(values), group.keep(call.kept)
        found.append(log_density(guide.posterior(group, call), u, keep).sum())
        if group.whitening is not None:
            found[-1] = found[-1] - group.whitening.log_det
    return torch.stack(found)


def gradients_of(loss: Any, s: Setting, guide: LatentGuide) -> dict[str, Tensor | None]:
    for parameter in guide.parameters():
        parameter.grad = None
    with quiet():
        value = loss.loss_and_grads(s.model, guide, *s.args)
    assert math.isfinite(value)
    return {name: parameter.grad for name, parameter in guide.named_parameters()}
