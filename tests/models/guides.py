"""Every kind of guide of the package, for any model of the table.

`KINDS` are the guides; a `Setting` is a model with what a guide of any kind needs to be told about
it; `MODELS` are the rows of the table, each model once, and a few more supports, plates and shapes.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor, nn

from pyro_recursive import (
    AmortizedGuide,
    MixtureGuide,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
)
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.flow.guide import FlowGuide
from pyro_recursive.guides.gaussian_families import LowRank
from pyro_recursive.guides.semi_amortized.updates import LearnedUpdate
from pyro_recursive.tracing.sites import sites
from tests.models import INDEX, ROWS, Row, normal, observe

# The models.


def supports(x: Tensor) -> None:
    """Supports of every kind, inside and outside the plate."""
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.5))
    steps = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
    )
    ordered = pyro.sample("ordered", steps)
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


def no_guide(*args: Any) -> None:
    raise NotImplementedError


MORE = [
    Row("supports", lambda: (supports, no_guide)),
    Row("inner_events", lambda: (inner_events, no_guide)),
    Row("series", lambda: (series, no_guide), plates=()),
    Row("mixture_prior", lambda: (mixture_prior, no_guide)),
]
# Rows that differ from another one in their guide alone.
SAME_MODEL = {
    *("delta_log_density", "shared_parameter", "lazy_parameter", "mixed_below", "mixture"),
    *("auto_normal", "auto_normal_subsample", "auto_delta", "auto_delta_local", "guide_list"),
    *("auto_multivariate", "auto_low_rank", "auto_iaf", "auto_gaussian", "auto_messenger"),
    *("messenger_of_prior", "messenger_subsample", "auxiliary_outside"),
}
MODELS = [row for row in ROWS if row.name not in SAME_MODEL] + MORE
ROW = {row.name: row for row in MODELS}

PLATES: dict[str, str | None] = {
    **dict.fromkeys(["no_plate", "exact_no_plate", "exact_global", "series"]),
    **dict.fromkeys(["sequential", "sequential_twice", "sequential_global"]),
    **dict.fromkeys(["sequential_subsample", "sequential_mixed"]),
    **dict.fromkeys(["nested", "exact_groups"], "group"),
    **dict.fromkeys(["grid", "grid_reversed", "exact_grid_reversed", "crossed"], "row"),
    **dict.fromkeys(["sequential_of_vectorized", "vectorized_of_sequential"], "item"),
    "exact_loop_of_plate": "item",
}
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
    """A linear map of the sum of each row to n numbers; ``rank`` dims of the input are rows."""

    def __init__(self, rank: int, n: int) -> None:
        super().__init__()
        self.rank = rank
        self.slope = nn.Parameter(0.1 * torch.randn(n))
        self.start = nn.Parameter(0.2 * torch.randn(n) - 0.1)

    def forward(self, rows: Tensor) -> Tensor:
        summed = rows.reshape(*rows.shape[: self.rank], -1).sum(-1, keepdim=True)
        return summed * self.slope + self.start


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
        options: dict[str, Any] = {"create_plates": EXPLICIT.get(self.row.name)}
        if self.row.name in TRANSPOSED:
            options["inputs"] = transposed
        return options

    @property
    def plate(self) -> str:
        return PLATES.get(self.row.name, "data") or "data"

    def encoder(self, family: Any = "diagonal") -> Encoder:
        """Make an encoder for the latents in the plate of the rows, as many as there are."""
        probe = AmortizedGuide(self.model, nn.Identity(), family=family, **self.options)
        probe.prepare(*self.args)
        (latents,) = [latents for latents in probe.groups if latents.local]
        return Encoder(len(latents.rows), probe.num_parameters(latents))

    def amortized(self, family: Any = "diagonal", **more: Any) -> AmortizedGuide:
        encoder = self.encoder(family)
        return AmortizedGuide(self.model, encoder, family=family, **self.options | more)


def transposed(x: Tensor, *rest: Any) -> Tensor:
    return x.mT


FLOW = {"transforms": 2, "hidden": (4,)}
SCHEDULE = Schedule(first=2, propose=2, refine=2, joint=2, draws=64)

# The kinds.


@dataclass(frozen=True)
class Kind:
    """A kind of guide.

    ``rows`` says where the distribution of a row comes from: "joint" (there is one for all rows),
    "table", "encoder" or "auto". ``auto`` says which guides of Pyro's are components, if any are.
    """

    name: str
    build: Callable[[Setting], LatentGuide]
    rows: str = "joint"
    mixture: bool = False
    learned: bool = True  # the weights of a mixture
    auto: str = ""

    @property
    def recursive(self) -> bool:
        return self.name.startswith("recursive")


def joint(make: Callable, *args: Any, **options: Any) -> Callable[[Setting], LatentGuide]:
    return lambda s: make(s.model, *args, **options, **s.options)


def table(make: Callable, *args: Any, **options: Any) -> Callable[[Setting], LatentGuide]:
    return lambda s: make(s.model, *args, plate=s.plate, **options, **s.options)


def pair_of(make: Callable) -> Callable[[Setting], LatentGuide]:
    """A mixture of two guides of Pyro's."""

    def build(s: Setting) -> MixtureGuide:
        create_plates = s.options["create_plates"]
        guides = [make(s.model, create_plates=create_plates, init_scale=0.8) for _ in range(2)]
        return MixtureGuide(s.model, guides, **s.options)

    return build


def flow(s: Setting) -> FlowGuide:
    return FlowGuide(s.model, encoder=s.encoder(), **FLOW, **s.options)


def encoders(s: Setting) -> MixtureGuide:
    return MixtureGuide(s.model, [s.amortized(), s.amortized()], weights="shared", **s.options)


def unlike(s: Setting) -> MixtureGuide:
    weights = WeightsOf(s.encoder())
    return MixtureGuide(s.model, [s.amortized(), flow(s)], weights=weights, **s.options)


def by_hand(s: Setting) -> MixtureGuide:
    return MixtureGuide(s.model, [s.by_hand, s.amortized()], weights="shared", **s.options)


def recursive_encoders(s: Setting, **options: Any) -> RecursiveMixtureGuide:
    return RecursiveMixtureGuide(
        s.model,
        [s.amortized(), s.amortized()],
        weights="shared",
        schedule=SCHEDULE,
        **s.options | options,
    )


class Told(Encoder):
    """An encoder that is also told the parameters of the components before it."""

    def forward(self, rows: Tensor, told: Tensor | None = None) -> Tensor:
        found = super().forward(rows)
        return found if told is None else found + 0.1 * told[..., : found.shape[-1]]


def recursive_conditional(s: Setting) -> RecursiveMixtureGuide:
    guide = recursive_encoders(s, conditional=True)
    for component in guide.components:
        component.encoder.__class__ = Told
    return guide


def refined(s: Setting, guide: LatentGuide, **options: Any) -> SemiAmortizedGuide:
    """Refine with the same draws in each call, so that there is one density to compare with."""
    return SemiAmortizedGuide(s.model, guide, steps=2, seed=1, **options)


def _continuous(make: Callable, model: Callable, create_plates: Any = None, **options) -> Callable:
    return make(model, **options)


class WeightsOf(nn.Module):
    """The first two numbers of an encoder as logits."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = Encoder(encoder.rank, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.encoder(rows)


MIXTURE: dict[str, Any] = {"mixture": True}
RECURSIVE = partial(RecursiveMixtureGuide, schedule=SCHEDULE)
KINDS = [
    Kind("gaussian", joint(AmortizedGuide)),
    Kind("full", joint(AmortizedGuide, family="full")),
    Kind("low_rank", joint(AmortizedGuide, family=LowRank(2))),
    Kind("table", table(AmortizedGuide), "table"),
    Kind("encoder", lambda s: s.amortized(), "encoder"),
    Kind("encoder_full", lambda s: s.amortized("full"), "encoder"),
    Kind("flow", joint(FlowGuide, **FLOW)),
    Kind("flow_encoder", flow, "encoder"),
    Kind("mixture", joint(MixtureGuide, 2), **MIXTURE),
    Kind("mixture_table", table(MixtureGuide, 2), "table", **MIXTURE),
    Kind("mixture_equal", joint(MixtureGuide, 2, learn_weights=False), learned=False, **MIXTURE),
    Kind("mixture_encoders", encoders, "encoder", **MIXTURE),
    Kind("mixture_unlike", unlike, "encoder", **MIXTURE),
    Kind("mixture_auto_normal", pair_of(autoguide.AutoNormal), "auto", auto="sites", **MIXTURE),
    Kind(
        "mixture_auto_diagonal",
        pair_of(partial(_continuous, autoguide.AutoDiagonalNormal)),
        auto="joint",
        **MIXTURE,
    ),
    Kind("mixture_by_hand", by_hand, "encoder", auto="hand", **MIXTURE),
    Kind("recursive", joint(RECURSIVE, 2), **MIXTURE),
    Kind("recursive_table", table(RECURSIVE, 2), "table", **MIXTURE),
    Kind("recursive_encoders", recursive_encoders, "encoder", **MIXTURE),
    Kind("recursive_conditional", recursive_conditional, "encoder", **MIXTURE),
    Kind("refined", lambda s: refined(s, s.amortized()), "encoder"),
    Kind(
        "refined_second_order",
        lambda s: refined(s, s.amortized(), mode="second_order", checkpoint=True),
        "encoder",
    ),
    Kind(
        "refined_by_network",
        lambda s: refined(s, s.amortized("full"), update=LearnedUpdate(hidden=(4,))),
        "encoder",
    ),
    Kind("refined_table", lambda s: refined(s, table(AmortizedGuide)(s), mode="svi"), "table"),
    Kind("refined_mixture", lambda s: refined(s, encoders(s)), "encoder", **MIXTURE),
]
KIND = {kind.name: kind for kind in KINDS}


def kinds(*names: str) -> Any:
    return pytest.mark.parametrize("kind", names)


# Guides that are made.


def setting(row: Row) -> Setting:
    model, by_hand = row.build()
    return Setting(row, model, by_hand, row.args())


def made(row: Row, kind: Kind) -> tuple[Setting, LatentGuide]:
    """Build a guide, make its parameters, and move them off the symmetric points they start at."""
    s = setting(row)
    guide = kind.build(s)
    with quiet():
        guide.prepare(*s.args)
        guide(*s.args)  # Pyro's guides make their parameters now
    bring_together(guide)
    shake(guide)
    return s, guide


def shake(guide: nn.Module, scale: float = 0.01) -> None:
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def bring_together(guide: nn.Module) -> None:
    """Let the components of a mixture overlap, so that they have a say about each other's draws."""
    first, *others = getattr(getattr(guide, "guide", guide), "components", [None])
    for other in others:
        if type(other) is type(first):
            other.load_state_dict(first.state_dict())
        elif hasattr(first, "free_global") and hasattr(other, "flow_global"):
            _centre(other.flow_global.bias, first.free_global)


@torch.no_grad()
def _centre(bias: Tensor, free: Tensor) -> None:
    bias[: len(bias) // 2] = free[: len(bias) // 2]


def of(row: str, kind: str) -> tuple[Setting, Any]:
    return made(ROW[row], KIND[kind])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warning that one weight covers all data; every other one is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Plate '.*' encloses latent site")
        yield


def members_of(guide: LatentGuide) -> tuple[int, ...]:
    """Return the numbers of the components that make up the mixture; none where there is none."""
    return getattr(getattr(guide, "guide", guide), "members", ())


SMOOTH = ("pathwise", "dreg", "stl")
SCORED = ("vimco", "dreg+vimco")


def estimators_of(kind: Kind, guide: LatentGuide) -> tuple[str, ...]:
    draws = kind.mixture and len(members_of(guide)) > 1 and kind.learned
    return SCORED if draws else SMOOTH


def latents_in(trace: poutine.Trace) -> dict[str, Any]:
    return {site["name"]: site for site in sites(trace) if not site["is_observed"]}


def density_at(guide: Any, args: tuple, values: dict[str, Tensor]) -> Tensor:
    """Return the guide's log-density at values, all members of a mixture together."""
    guide.prepare(*args)
    call = guide.new_call(args, {})
    call.given.update(values)
    packed = [(group, group.pack(values)) for group in guide.groups]
    return torch.stack([guide.posterior(group, call).log_prob(u).sum() for group, u in packed])


def gradients_of(loss: Any, s: Setting, guide: LatentGuide) -> dict[str, Tensor | None]:
    for parameter in guide.parameters():
        parameter.grad = None
    with quiet():
        value = loss.loss_and_grads(s.model, guide, *s.args)
    assert math.isfinite(value)
    return {name: parameter.grad for name, parameter in guide.named_parameters()}
