"""Every guide of the package on every kind of model: what works, and what is refused in words.

`KINDS` are the guides, `MODELS` the models of `tests.models` and a few more. `refusal` says what must
be refused; everything else must work: the sites of a trace, the density at the guide's own and at
foreign values, and every loss with a gradient for every parameter.
"""

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
    config_enumerate,
)
from pyro.optim import SGD, Adam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MISELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    AmortizedGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SIWAE_ELBO,
    Stratified_ELBO,
    log_marginal,
)
from pyro_recursive.guides.families import LowRank, family_of
from pyro_recursive.guides.flow import FlowGuide
from pyro_recursive.guides.packed import PackedGuide
from pyro_recursive.sites import sites, subsample_sites
from tests import models
from tests.models import Programs, Row
from tests.test_any_model import Pinned

JOINT = "Plate '.*' encloses latent site"  # the warning that one weight covers all data


# The models: those of the table, each once, and more supports, plates and shapes.


def supports(x: Tensor) -> None:
    """Supports of every kind, inside and outside the plate."""
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.5))
    steps = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
    )
    ordered = pyro.sample("ordered", steps)
    with pyro.plate("data", len(x)):
        half = pyro.sample("half", dist.HalfNormal(1.0))
        unit = pyro.sample("unit", dist.Beta(2.0, 2.0))
        between = pyro.sample("between", dist.Uniform(-1.0, 2.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        loc = (share * ordered).sum(-1) + unit * between + factor[..., 2, 1]
        pyro.sample("x", dist.Normal(loc, half + 0.1), obs=x)


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
        z = models.normal(f"z{t}", 0.8 * z, 0.7)
        models.observe(z, x[t], f"x{t}")


def mixture_prior(x: Tensor) -> None:
    """A latent whose support is that of a mixture's components."""
    parts = dist.Gamma(torch.tensor([2.0, 9.0]), 1.0)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
        models.observe(z, x)


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
    *("auto_normal", "auto_normal_subsample", "auto_delta", "auto_delta_local", "auto_multivariate"),
    *("auto_low_rank", "auto_iaf", "auto_gaussian", "auto_messenger", "guide_list"),
    *("messenger_local", "messenger_of_prior", "messenger_subsample", "auxiliary_outside"),
}
MODELS = [row for row in models.ROWS if row.name not in SAME_MODEL] + MORE

# The plate of the rows, where it is not "data"; None where no vectorised plate holds all data.
PLATES: dict[str, str | None] = {
    **dict.fromkeys(["no_plate", "exact_no_plate", "exact_global", "series"]),
    **dict.fromkeys(["sequential", "sequential_twice", "sequential_global", "exact_loop"]),
    **dict.fromkeys(["nested", "exact_groups"], "group"),
    **dict.fromkeys(["grid", "grid_with_gap", "grid_reversed", "crossed"], "row"),
    **dict.fromkeys(["exact_grid", "exact_grid_reversed"], "row"),
    **dict.fromkeys(["sequential_of_vectorized", "vectorized_of_sequential"], "item"),
    "exact_loop_of_plate": "column",
}
# Rows whose data have the rows of the latents in their second dim.
TRANSPOSED = {
    *("grid_reversed", "exact_grid_reversed", "exact_loop_of_plate"),
    *("sequential_of_vectorized", "vectorized_of_sequential"),
}
EXPLICIT: dict[str, Callable] = {
    "explicit_subsample": lambda x, index: pyro.plate("data", len(x), subsample=index),
    "exact_subsample": lambda x: pyro.plate("data", len(x), subsample=torch.tensor(models.INDEX)),
}
SUBSAMPLED = {"subsample_size", "annealed_subsample", *EXPLICIT}
DISCRETE = {row.name for row in MODELS if row.sites == "discrete"}
LOOPS = {row.name for row in MODELS if "sequential" in row.name or "loop" in row.name}
MASKED = {"mask_handler", "mask_method", "mask_false", "obs_mask", "unequal_scales"}
# Latents inside and outside the plate of the rows: two groups, where there are rows.
TWO_GROUPS = {"crossed", "hierarchy", "auto_normal_global", "supports"}


# The guides.


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

    def pair(self, make: Callable, **options: Any) -> MixtureGuide:
        """Make a mixture of two guides of Pyro's."""
        create_plates = self.options["create_plates"]
        guides = [make(self.model, create_plates=create_plates, init_scale=0.8) for _ in range(2)]
        return MixtureGuide(self.model, guides, **self.options | options)


def transposed(x: Tensor, *rest: Any) -> Tensor:
    return x.mT


FLOW = {"transforms": 2, "hidden": (4,)}
SCHEDULE = Schedule(first=2, propose=2, refine=2, joint=2, draws=64)


@dataclass(frozen=True)
class Kind:
    """A kind of guide: ``rows`` says where each row has a distribution: "joint", "table", "encoder".

    ``of`` are the components, where it is a mixture; ``auto`` says what Pyro's guides need.
    """

    name: str
    build: Callable[[Setting], PackedGuide]
    rows: str = "joint"
    mixture: bool = False
    learned: bool = True  # the weights of a mixture
    auto: str = ""

    @property
    def recursive(self) -> bool:
        return self.name.startswith("recursive")


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


KINDS = [
    Kind("gaussian", lambda s: AmortizedGuide(s.model, **s.options)),
    Kind("full", lambda s: AmortizedGuide(s.model, family="full", **s.options)),
    Kind("low_rank", lambda s: AmortizedGuide(s.model, family=LowRank(2), **s.options)),
    Kind("table", lambda s: AmortizedGuide(s.model, plate=s.plate, **s.options), "table"),
    Kind("encoder", lambda s: s.amortized(), "encoder"),
    Kind("encoder_full", lambda s: s.amortized("full"), "encoder"),
    Kind("encoder_low_rank", lambda s: s.amortized(LowRank(1)), "encoder"),
    Kind("flow", lambda s: FlowGuide(s.model, **FLOW, **s.options)),
    Kind(
        "flow_encoder",
        lambda s: FlowGuide(s.model, encoder=s.encoder(), **FLOW, **s.options),
        "encoder",
    ),
    Kind("mixture", lambda s: MixtureGuide(s.model, 2, **s.options), mixture=True),
    Kind(
        "mixture_full",
        lambda s: MixtureGuide(s.model, 2, family="full", **s.options),
        mixture=True,
    ),
    Kind(
        "mixture_table",
        lambda s: MixtureGuide(s.model, 2, plate=s.plate, **s.options),
        "table",
        mixture=True,
    ),
    Kind(
        "mixture_equal",
        lambda s: MixtureGuide(s.model, 2, learn_weights=False, **s.options),
        mixture=True,
        learned=False,
    ),
    Kind(
        "mixture_encoders",
        lambda s: MixtureGuide(
            s.model, [s.amortized(), s.amortized()], weights="shared", **s.options
        ),
        "encoder",
        mixture=True,
    ),
    Kind(
        "mixture_unlike",
        lambda s: MixtureGuide(
            s.model,
            [s.amortized(), FlowGuide(s.model, encoder=s.encoder(), **FLOW, **s.options)],
            weights=WeightsOf(s.encoder()),
            **s.options,
        ),
        "encoder",
        mixture=True,
    ),
    Kind(
        "mixture_auto_normal",
        lambda s: s.pair(autoguide.AutoNormal),
        "auto",
        mixture=True,
        auto="sites",
    ),
    Kind(
        "mixture_auto_diagonal",
        lambda s: s.pair(partial(_continuous, autoguide.AutoDiagonalNormal)),
        mixture=True,
        auto="joint",
    ),
    Kind(
        "mixture_auto_multivariate",
        lambda s: s.pair(partial(_continuous, autoguide.AutoMultivariateNormal)),
        mixture=True,
        auto="joint",
    ),
    Kind(
        "mixture_by_hand",
        lambda s: MixtureGuide(
            s.model, [s.by_hand, s.amortized()], weights="shared", **s.options
        ),
        "encoder",
        mixture=True,
        auto="hand",
    ),
    Kind(
        "recursive",
        lambda s: RecursiveMixtureGuide(s.model, 2, schedule=SCHEDULE, **s.options),
        mixture=True,
    ),
    Kind(
        "recursive_table",
        lambda s: RecursiveMixtureGuide(
            s.model, 2, schedule=SCHEDULE, plate=s.plate, **s.options
        ),
        "table",
        mixture=True,
    ),
    Kind("recursive_encoders", recursive_encoders, "encoder", mixture=True),
    Kind("recursive_conditional", recursive_conditional, "encoder", mixture=True),
]
KIND = {kind.name: kind for kind in KINDS}


def _continuous(make: Callable, model: Callable, create_plates: Any = None, **options) -> Callable:
    return make(model, **options)


class WeightsOf(nn.Module):
    """The first two numbers of an encoder as logits."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = Encoder(encoder.rank, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.encoder(rows)


# What must be refused.

Refused = tuple[type[Exception], str]


def refusal(row: Row, kind: Kind) -> Refused | None:
    """Return the error with which a guide must refuse a model when it first sees it."""
    if row.name == "no_latents":
        return ValueError, "found no latent sites.*an empty function"
    if row.name in DISCRETE:
        return NotImplementedError, r"Latent site 'k\w*' is discrete.*enumerate.*AutoGuideList"
    if row.name == "sequential_subsample":
        return ValueError, r"Plate 'data' of latent site 'z\d' is a loop over a minibatch"
    by_row = PLATES.get(row.name, "data") is not None
    if kind.rows == "encoder" and not by_row:
        return ValueError, "has an encoder, and there are no rows to encode.*plate="
    if kind.rows == "table" and not by_row:
        return ValueError, "No latent site is inside a vectorised plate 'data'"
    if kind.rows == "joint" and row.name in SUBSAMPLED:
        return ValueError, r"Plate 'data' of latent site 'z' is subsampled \(2 of 4\).*plate="
    return _refusal_of_others(row, kind)


def _refusal_of_others(row: Row, kind: Kind) -> Refused | None:
    """The same for what the components of a mixture cannot do."""
    if kind.auto in ("sites", "joint") and row.name in LOOPS:
        return NotImplementedError, "does not support sequential pyro.plate"
    if kind.auto != "hand":
        return None
    if row.name == "factor_in_guide":
        return NotImplementedError, "factor_guide, does not sample site '.*' of the model itself"
    if row.name in MASKED:
        return NotImplementedError, r"masks site '\w+'.*Leave out the mask"
    return None


def loss_refusal(row: Row) -> Refused | None:
    """Return the error of this package's losses: no guide of the package masks a latent."""
    if row.name in MASKED:
        return ValueError, r"Model site '\w+' is masked and the guide's is not.*AutoGuideList"
    return None


def stratified_refusal(row: Row, guide: PackedGuide) -> Refused | None:
    if loss_refusal(row):
        return loss_refusal(row)
    if len(guide.groups) > 1:
        return NotImplementedError, "one mixture over the global latents.*AutoGuideList"
    return None


def applies(row: Row, kind: Kind) -> bool:
    """Leave out a guide by hand where the row has none of the kind."""
    if kind.auto == "hand":
        unfit = row.name in {"constrained", "auto_normal_global", "reparam"}
        return not unfit and row not in MORE
    return True


COMBINATIONS = [(row, kind) for row in MODELS for kind in KINDS if applies(row, kind)]
# In the quick loop every model meets some kinds, and every kind some models.
QUICK_KINDS = {"full", "encoder", "mixture_encoders", "mixture_by_hand", "recursive"}
QUICK_MODELS = {"supports", "inner_events", "nested", "hierarchy", "explicit_subsample"}


def over(combinations: list[tuple[Row, Kind]], quick: bool) -> Any:
    def is_quick(row: Row, kind: Kind) -> bool:
        return kind.name in QUICK_KINDS or row.name in QUICK_MODELS

    chosen = [pair for pair in combinations if is_quick(*pair) == quick]
    ids = [f"{row.name}-{kind.name}" for row, kind in chosen]
    return pytest.mark.parametrize("row,kind", chosen, ids=ids)


def setting(row: Row) -> Setting:
    model, by_hand = row.build()
    return Setting(row, model, by_hand, row.args())


def made(row: Row, kind: Kind) -> tuple[Setting, PackedGuide]:
    """Build a guide, make its parameters, and move them off the symmetric points they start at."""
    s = setting(row)
    guide = kind.build(s)
    for module in guide.modules():  # so that components overlap
        if isinstance(module, AmortizedGuide | FlowGuide):
            module.init_scale = 0.8
    with quiet():
        guide.prepare(*s.args)
        guide(*s.args)  # Pyro's guides make their parameters now
    shake(guide)
    return s, guide


def shake(guide: nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warning that one weight covers all data; every other one is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", JOINT)
        yield


# The sites of a trace, and the density at any values.


def latents_in(trace: poutine.Trace) -> dict[str, Any]:
    return {site["name"]: site for site in sites(trace) if not site["is_observed"]}


def check_trace(s: Setting, guide: PackedGuide, kind: Kind) -> None:
    trace = poutine.trace(guide).get_trace(*s.args)
    minibatch = subsample_sites(trace)
    prior = poutine.trace(poutine.replay(s.model, trace=minibatch)).get_trace(*s.args)
    expected, found = latents_in(prior), latents_in(trace)
    auxiliary = {name for name, site in found.items() if site["infer"].get("is_auxiliary")}
    assert found.keys() - auxiliary == expected.keys()
    assert all(name.endswith("_component") for name in auxiliary)
    members = len(guide.members) if kind.mixture else 1
    assert len(auxiliary) == (len(guide.groups) if members > 1 else 0)
    for name, site in expected.items():
        assert found[name]["value"].shape == site["value"].shape
        assert site["fn"].support.check(found[name]["value"]).all()
    for source in (found, expected):  # the guide's own values, and foreign ones
        values = {name: source[name]["value"].detach().clone() for name in expected}
        check_density(s, guide, trace, prior, values)


def check_density(
    s: Setting, guide: PackedGuide, trace: poutine.Trace, prior: poutine.Trace, values: dict
) -> None:
    """Replay a guide on values, and compare with its posterior under the supports' transforms."""
    replayed = trace.copy()
    for name, value in values.items():
        replayed.nodes[name] = {**replayed.nodes[name], "value": value}
    again = poutine.trace(poutine.replay(guide, trace=replayed)).get_trace(*s.args)
    # Without the scale of minibatches.
    each = [site["fn"].log_prob(site["value"]).sum() for site in latents_in(again).values()]

    def by_hand() -> Tensor:
        call = guide._call(s.args, {})
        call.given.update(values)
        packed = [(group, group.pack(values)) for group in guide.groups]
        return sum(guide.posterior(group, call).log_prob(u).sum() for group, u in packed)

    expected = poutine.replay(by_hand, trace=replayed)()
    for name, value in values.items():
        transform = biject_to(_support(prior.nodes[name]["fn"].support))
        expected = expected - transform.log_abs_det_jacobian(transform.inv(value), value).sum()
    assert expected.isfinite()
    torch.testing.assert_close(sum(each), expected, rtol=1e-6, atol=1e-8)


def _support(support: Any) -> Any:
    return getattr(support, "base_constraint", support) if "Mixture" in repr(support) else support


# Losses.

SMOOTH = ("pathwise", "dreg", "stl")
SCORED = ("vimco", "dreg+vimco")


def estimators_of(kind: Kind, guide: PackedGuide) -> tuple[str, ...]:
    draws = kind.mixture and len(guide.members) > 1 and kind.learned
    return SCORED if draws else SMOOTH


def multi_sample_losses(kind: Kind, guide: PackedGuide) -> Iterator[Any]:
    names = estimators_of(kind, guide)
    for i, estimator in enumerate(names):
        yield IWAE_ELBO(6, estimator=estimator)
        yield (CIWAE_ELBO(6, estimator=estimator), PIWAE_ELBO(2, 6, estimator=estimator))[i % 2]
    yield MIWAE_ELBO(2, 6, estimator=names[0], vectorize_particles=False)


def pyro_losses() -> Iterator[Any]:
    yield Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=4)
    yield Trace_ELBO()
    yield TraceGraph_ELBO()
    yield RenyiELBO(alpha=0.5, num_particles=3)


def gradients_of(loss: Any, s: Setting, guide: PackedGuide) -> dict[str, Tensor | None]:
    for parameter in guide.parameters():
        parameter.grad = None
    with quiet():
        value = loss.loss_and_grads(s.model, guide, *s.args)
    assert math.isfinite(value)
    return {name: parameter.grad for name, parameter in guide.named_parameters()}


def check_gradients(loss: Any, s: Setting, guide: PackedGuide) -> None:
    """No parameter of a member of the mixture is without a gradient."""
    found = gradients_of(loss, s, guide)
    outside = [f"components.{m}." for m in range(9) if m not in getattr(guide, "members", range(9))]
    single = len(getattr(guide, "members", ())) == 1
    for name, gradient in found.items():
        if any(map(name.startswith, outside)) or (single and name.startswith("weights")):
            continue
        assert gradient is not None and gradient.isfinite().all(), (type(loss), name)
        assert gradient.ne(0).any(), (type(loss).__name__, name)


def check_losses(s: Setting, guide: PackedGuide, kind: Kind, *, every: bool) -> None:
    refused = loss_refusal(s.row)
    if refused:
        with pytest.raises(refused[0], match=refused[1]):
            IWAE_ELBO(3, estimator=estimators_of(kind, guide)[0]).loss(s.model, guide, *s.args)
    else:
        losses = list(multi_sample_losses(kind, guide))
        for loss in losses if every else losses[:2]:
            check_gradients(loss, s, guide)
    if every:
        for loss in pyro_losses():
            check_gradients(loss, s, guide)
    if kind.mixture:
        check_stratified(s, guide, every=every)


def stratified_losses() -> Iterator[Any]:
    yield Stratified_ELBO(2, estimator="stl")
    yield SIWAE_ELBO(2)
    yield Stratified_ELBO(2)
    yield MISELBO(2)


def check_stratified(s: Setting, guide: PackedGuide, *, every: bool) -> None:
    refused = stratified_refusal(s.row, guide)
    for loss in list(stratified_losses())[: None if every else 2]:
        if refused:
            with pytest.raises(refused[0], match=refused[1]), quiet():
                loss.loss(s.model, guide, *s.args)
        else:
            check_gradients(loss, s, guide)


def check(row: Row, kind: Kind, *, every: bool = True) -> None:
    refused = refusal(row, kind)
    if refused:
        with pytest.raises(refused[0], match=refused[1]):
            made(row, kind)
        return
    s, guide = made(row, kind)
    check_trace(s, guide, kind)
    check_losses(s, guide, kind, every=every)


@over(COMBINATIONS, quick=True)
def test_works_or_is_refused(row: Row, kind: Kind) -> None:
    check(row, kind, every=False)


@pytest.mark.slow
@over(COMBINATIONS, quick=False)
def test_works_or_is_refused_elsewhere(row: Row, kind: Kind) -> None:
    check(row, kind)


@pytest.mark.slow
@over(COMBINATIONS, quick=True)
def test_every_loss(row: Row, kind: Kind) -> None:
    check(row, kind)
