"""Every guide of the package on every kind of model: what works, and what is refused in words.

`KINDS` are the guides, `MODELS` the models of `tests.models` and a few more. `refusal` says what
must be refused; everything else must work: the sites of a trace, the density at the guide's own and
at foreign values, and every loss with a gradient for every parameter.
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
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MISELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    SIWAE_ELBO,
    AmortizedGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    Stratified_ELBO,
    log_marginal,
)
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.flow.guide import FlowGuide
from pyro_recursive.guides.gaussian_families import LowRank
from pyro_recursive.guides.semi_amortized.updates import LearnedUpdate
from pyro_recursive.tracing.sites import sites, subsample_sites
from tests import models
from tests.models import Programs, Row
from tests.product.test_any_model import Pinned

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
    *(
        "auto_normal",
        "auto_normal_subsample",
        "auto_delta",
        "auto_delta_local",
        "auto_multivariate",
    ),
    *("auto_low_rank", "auto_iaf", "auto_gaussian", "auto_messenger", "guide_list"),
    *("messenger_local", "messenger_of_prior", "messenger_subsample", "auxiliary_outside"),
}
MODELS = [row for row in models.ROWS if row.name not in SAME_MODEL] + MORE

# The plate of the rows, where it is not "data"; None where no vectorised plate holds all data.
PLATES: dict[str, str | None] = {
    **dict.fromkeys(["no_plate", "exact_no_plate", "exact_global", "series"]),
    **dict.fromkeys(["sequential", "sequential_twice", "sequential_global", "exact_loop"]),
    **dict.fromkeys(["sequential_subsample", "sequential_mixed"]),
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


def recursive_encoders(s: Setting, **options: Any) -> RecursiveMixtureGuide:
    return RecursiveMixtureGuide(
        s.model,
        [s.amortized(), s.amortized()],
        weights="shared",
        schedule=SCHEDULE,
        **s.options | options,
    )


def encoders(s: Setting) -> MixtureGuide:
    return MixtureGuide(s.model, [s.amortized(), s.amortized()], weights="shared", **s.options)


def refined(s: Setting, guide: LatentGuide, **options: Any) -> SemiAmortizedGuide:
    """Refine with the same draws in each call, so that there is one density to compare with."""
    return SemiAmortizedGuide(s.model, guide, steps=2, seed=1, **options)


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
    Kind("mixture_encoders", encoders, "encoder", mixture=True),
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
        lambda s: MixtureGuide(s.model, [s.by_hand, s.amortized()], weights="shared", **s.options),
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
        lambda s: RecursiveMixtureGuide(s.model, 2, schedule=SCHEDULE, plate=s.plate, **s.options),
        "table",
        mixture=True,
    ),
    Kind("recursive_encoders", recursive_encoders, "encoder", mixture=True),
    Kind("recursive_conditional", recursive_conditional, "encoder", mixture=True),
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
    Kind(
        "refined_table",
        lambda s: refined(s, AmortizedGuide(s.model, plate=s.plate, **s.options), mode="svi"),
        "table",
    ),
    Kind("refined_mixture", lambda s: refined(s, encoders(s)), "encoder", mixture=True),
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
    by_row = PLATES.get(row.name, "data") is not None
    if kind.rows == "table" and not by_row:
        return ValueError, "No latent site is inside a vectorised plate 'data'"
    if row.name in DISCRETE:
        return NotImplementedError, r"Latent site 'k\w*' is discrete.*enumerate.*AutoGuideList"
    if row.name == "sequential_subsample":
        return ValueError, r"Plate 'data' of latent site 'z\d' is a loop over a minibatch"
    if kind.rows == "encoder" and not by_row:
        return ValueError, "has an encoder, and there are no rows to encode.*plate="
    if kind.rows == "joint" and row.name in SUBSAMPLED:
        return ValueError, r"Plate 'data' of latent site 'z' is subsampled \(2 of 4\).*plate="
    return _refusal_of_others(row, kind)


def _refusal_of_others(row: Row, kind: Kind) -> Refused | None:
    """The same for what the components of a mixture cannot do."""
    if kind.auto in ("sites", "joint") and row.name in LOOPS:
        return NotImplementedError, "does not support sequential pyro.plate"
    if kind.auto in ("sites", "joint") and row.name == "mixture_prior":
        return NotImplementedError, "Cannot transform MixtureSameFamilyConstraint"
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


def members_of(guide: LatentGuide) -> tuple[int, ...]:
    """Return the numbers of the components that make up the mixture; none where there is none."""
    return getattr(getattr(guide, "guide", guide), "members", ())


def stratified_refusal(row: Row, guide: LatentGuide) -> Refused | None:
    if isinstance(guide, SemiAmortizedGuide):
        return TypeError, "needs a mixture guide of this package.*got SemiAmortizedGuide"
    if loss_refusal(row):
        return loss_refusal(row)
    if len(guide.groups) > 1:
        return NotImplementedError, "one mixture over the global latents.*leave out plate="
    return None


def applies(row: Row, kind: Kind) -> bool:
    """Leave out a guide by hand where the row has none of the kind."""
    if kind.auto == "hand":
        unfit = row.name in {"constrained", "auto_normal_global", "reparam"}
        return not unfit and row not in MORE
    return True


COMBINATIONS = [(row, kind) for row in MODELS for kind in KINDS if applies(row, kind)]
# In the quick loop every model meets some kinds, and some models every kind.
QUICK_KINDS = {"encoder", "mixture_encoders", "recursive", "refined"}
QUICK_MODELS = {"supports", "nested"}
ALIKE = {  # as others are, but for what their own guides make of them: the quick loop will do
    *("annealed_subsample", "annealed_mixed", "masked_discrete", "masked_mixed", "mixed_global"),
    *("exact_no_plate", "exact_far_dim", "exact_subsample", "exact_masked", "exact_loop"),
    *("exact_grid", "exact_grid_reversed", "exact_loop_of_plate", "sequential_twice", "size_one"),
}
EVERY_LOSS = {"explicit_subsample", "hierarchy"}
# Where the guide's steps depend on the model's parameters, differentiably.
SHARED = {("explicit_subsample", "refined_second_order")}


def over(chosen: list[tuple[Row, Kind]]) -> Any:
    ids = [f"{row.name}-{kind.name}" for row, kind in chosen]
    return pytest.mark.parametrize("row,kind", chosen, ids=ids)


def is_quick(row: Row, kind: Kind) -> bool:
    return kind.name in QUICK_KINDS or row.name in QUICK_MODELS


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


def bring_together(guide: nn.Module) -> None:
    """Let the components of a mixture overlap, so that they have a say about each other's draws."""
    first, *others = getattr(getattr(guide, "guide", guide), "components", [None])
    for other in others:
        if type(other) is type(first):
            other.load_state_dict(first.state_dict())
        elif hasattr(first, "free_global") and hasattr(other, "flow_global"):
            _centre(other.flow_global.bias, first.free_global)


def shake(guide: nn.Module, scale: float = 0.01) -> None:
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


def check_trace(s: Setting, guide: LatentGuide, kind: Kind) -> None:
    guide.eval()  # a table of refined rows moves in training
    trace = poutine.trace(guide).get_trace(*s.args)
    minibatch = subsample_sites(trace)
    prior = poutine.trace(poutine.replay(s.model, trace=minibatch)).get_trace(*s.args)
    expected, found = latents_in(prior), latents_in(trace)
    auxiliary = {name for name, site in found.items() if site["infer"].get("is_auxiliary")}
    assert found.keys() - auxiliary == expected.keys()
    assert all(name.endswith("_component") for name in auxiliary)
    members = len(members_of(guide)) if kind.mixture else 1
    assert len(auxiliary) == (len(guide.groups) if members > 1 else 0)
    for name, site in expected.items():
        assert found[name]["value"].shape == site["value"].shape
        assert site["fn"].support.check(found[name]["value"]).all()
    for source in (found, expected):  # the guide's own values, and foreign ones
        values = {name: source[name]["value"].detach().clone() for name in expected}
        check_density(s, guide, trace, prior, values)
    guide.train()


def check_density(
    s: Setting, guide: LatentGuide, trace: poutine.Trace, prior: poutine.Trace, values: dict
) -> None:
    """Replay a guide on values, and compare with its posterior under the supports' transforms."""
    replayed = trace.copy()
    for name, value in values.items():
        replayed.nodes[name] = {**replayed.nodes[name], "value": value}
    again = poutine.trace(poutine.replay(guide, trace=replayed)).get_trace(*s.args)
    # Without the scale of minibatches.
    each = [site["fn"].log_prob(site["value"]).sum() for site in latents_in(again).values()]

    def by_hand() -> Tensor:
        call = guide.new_call(s.args, {})
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


def estimators_of(kind: Kind, guide: LatentGuide) -> tuple[str, ...]:
    draws = kind.mixture and len(members_of(guide)) > 1 and kind.learned
    return SCORED if draws else SMOOTH


def multi_sample_losses(kind: Kind, guide: LatentGuide) -> Iterator[Any]:
    names = estimators_of(kind, guide)
    for i, estimator in enumerate(names):
        yield IWAE_ELBO(10, estimator=estimator)
        yield (CIWAE_ELBO(10, estimator=estimator), PIWAE_ELBO(2, 10, estimator=estimator))[i % 2]
    yield MIWAE_ELBO(1, 10, estimator=names[0], vectorize_particles=False)


def pyro_losses() -> Iterator[Any]:
    yield Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=4)
    yield Trace_ELBO()
    yield TraceGraph_ELBO()
    yield RenyiELBO(alpha=0.5, num_particles=3)


def gradients_of(loss: Any, s: Setting, guide: LatentGuide) -> dict[str, Tensor | None]:
    for parameter in guide.parameters():
        parameter.grad = None
    with quiet():
        value = loss.loss_and_grads(s.model, guide, *s.args)
    assert math.isfinite(value)
    return {name: parameter.grad for name, parameter in guide.named_parameters()}


def check_gradients(loss: Any, s: Setting, guide: LatentGuide) -> None:
    """No parameter of a member of the mixture is without a gradient."""
    found = gradients_of(loss, s, guide)
    outside = [f"components.{m}." for m in range(9) if m not in getattr(guide, "members", range(9))]
    single = len(getattr(guide, "members", ())) == 1
    for name, gradient in found.items():
        if any(map(name.startswith, outside)) or (single and name.startswith("weights")):
            continue
        if name == "guide.free_local_unconstrained":
            assert gradient is None  # a table that keeps what its rows become
            continue
        if "scale_tril" in name and gradient is not None and gradient.numel() == 1:
            continue  # the unit diagonal alone
        assert gradient is not None and gradient.isfinite().all(), (type(loss), name)
        assert gradient.ne(0).any(), (type(loss).__name__, name)


def check_losses(s: Setting, guide: LatentGuide, kind: Kind, *, every: bool) -> None:
    refused = loss_refusal(s.row)
    if refused:
        with pytest.raises(refused[0], match=refused[1]):
            IWAE_ELBO(3, estimator=estimators_of(kind, guide)[0]).loss(s.model, guide, *s.args)
    else:
        losses = list(multi_sample_losses(kind, guide))
        for loss in losses if every else losses[1:2]:
            if isinstance(loss, PIWAE_ELBO) and (s.row.name, kind.name) in SHARED:
                with pytest.raises(ValueError, match="Parameter 'mu' belongs to model and guide"):
                    loss.loss_and_grads(s.model, guide, *s.args)
            else:
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


def check_stratified(s: Setting, guide: LatentGuide, *, every: bool) -> None:
    refused = stratified_refusal(s.row, guide)
    for loss in list(stratified_losses())[: None if every else 1]:
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


@over([pair for pair in COMBINATIONS if is_quick(*pair)])
def test_works_or_is_refused(row: Row, kind: Kind) -> None:
    check(row, kind, every=False)


@pytest.mark.slow
@over([(r, k) for r, k in COMBINATIONS if not is_quick(r, k) and r.name not in ALIKE])
def test_works_or_is_refused_elsewhere(row: Row, kind: Kind) -> None:
    check(row, kind, every=False)


@pytest.mark.slow
@over([(row, kind) for row, kind in COMBINATIONS if row.name in EVERY_LOSS])
def test_every_loss(row: Row, kind: Kind) -> None:
    check(row, kind)


# The table of models and kinds by name, for what follows.

ROW = {row.name: row for row in MODELS}
MIXTURES = [kind.name for kind in KINDS if kind.mixture]


def of(row: str, kind: str) -> tuple[Setting, Any]:
    return made(ROW[row], KIND[kind])


def kinds(*names: str) -> Any:
    return pytest.mark.parametrize("kind", names)


class Recorded(Messenger):
    """Keeps the first value of every latent site that passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            self.values.setdefault(msg["name"], msg["value"].detach())


STRATIFIED = {
    "stratified": partial(Stratified_ELBO, 2),
    "stl": partial(Stratified_ELBO, 2, estimator="stl"),
    "siwae": partial(SIWAE_ELBO, 2),
    "miselbo": partial(MISELBO, 2),
}


@kinds("mixture_encoders", "mixture_unlike", "mixture_by_hand")
@pytest.mark.parametrize("loss", STRATIFIED)
def test_stratified_loop_equals_one_pass(loss: str, kind: str) -> None:
    """With the same draws both give the same value, whatever the components are."""
    s, guide = of("markov", kind)
    with Recorded() as recorded:
        one_pass = STRATIFIED[loss]().loss(s.model, guide, *s.args)
    total = 2 * len(guide.members)
    with Pinned(recorded.values, {}, total=total):
        looped = STRATIFIED[loss](vectorize_particles=False).loss(s.model, guide, *s.args)
    assert looped == pytest.approx(one_pass, rel=1e-8)


@kinds("mixture", "mixture_encoders", "mixture_unlike", "mixture_auto_normal")
@pytest.mark.parametrize("estimator", SMOOTH)
def test_learned_weights_need_a_score(estimator: str, kind: str) -> None:
    s, guide = of("data_plate", kind)
    with pytest.raises(NotImplementedError, match=r"_component' is not reparam.*'vimco'"), quiet():
        IWAE_ELBO(3, estimator=estimator).loss_and_grads(s.model, guide, *s.args)


@kinds("mixture", "recursive")
def test_mean_field_loss_wants_no_mixture(kind: str) -> None:
    """Pyro's `TraceMeanField_ELBO` takes reparameterised guides; the others it scores rightly."""
    s, guide = of("data_plate", kind)
    if len(guide.members) > 1:
        with pytest.raises(NotImplementedError, match="fully reparameterized"):
            TraceMeanField_ELBO().loss_and_grads(s.model, guide, *s.args)


@kinds("gaussian", "table", "encoder_full", "flow_encoder", "refined")
def test_mean_field_loss_is_the_elbo(kind: str) -> None:
    s, guide = of("data_plate", kind)
    values = []
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        pyro.set_rng_seed(3)
        values.append(loss.loss(s.model, guide, *s.args))
    assert values[0] == pytest.approx(values[1])


# The evidence: no guide changes what its weights estimate.


EVIDENCE = ("full", "table", "encoder", "flow_encoder", "mixture", "mixture_unlike", "refined")


@kinds(*EVIDENCE)
def test_weights_estimate_the_evidence(kind: str) -> None:
    check_evidence("exact_plate", kind)


@pytest.mark.slow
@kinds(*(kind.name for kind in KINDS if "recursive" not in kind.name))
def test_weights_estimate_the_evidence_of_groups(kind: str) -> None:
    check_evidence("exact_groups", kind)


def check_evidence(row: str, kind: str) -> None:
    """Wide guides, 20 000 samples: within 4 standard errors of log p(x)."""
    s, guide = of(row, kind)
    widen(guide)
    with quiet():
        found = log_marginal(s.model, guide, *s.args, num_particles=20_000, diagnostics=True)
    expected = s.row.evidence()  # type: ignore[misc]
    expected = expected if found.log_marginal.dim() else expected.sum()
    error = (found.log_marginal - expected).abs() / found.standard_error
    assert found.standard_error.max() < 0.2 and error.max() < 4


def widen(guide: nn.Module, scale: float = 1.1) -> None:
    """Centre every distribution at zero, with wider tails than the posterior."""
    log_scale = math.log(scale)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "slope" in name or "loc" in name.split(".")[-1]:
                parameter.mul_(0.1)
            if name.endswith(("free_global_unconstrained", "free_local_unconstrained", "start")):
                parameter.mul_(0.1)
            if "scale_unconstrained" in name or "scales." in name:
                parameter.fill_(scale)
    for module in guide.modules():
        if isinstance(module, AmortizedGuide):
            _widen(module, log_scale)
        if isinstance(module, FlowGuide):
            for head in (m for m in module.modules() if hasattr(m, "bias") and hasattr(m, "flow")):
                _set_halves(head.bias, log_scale)


def _widen(module: AmortizedGuide, log_scale: float) -> None:
    for latents in module.groups:
        size = latents.size
        for name, parameter in module.named_parameters():
            if name.endswith(("_unconstrained", "start")):
                with torch.no_grad():
                    parameter[..., size : 2 * size] = log_scale


@torch.no_grad()
def _set_halves(bias: Tensor, log_scale: float) -> None:
    half = len(bias) // 2
    bias[:half] = 0.0
    bias[half:] = log_scale


@torch.no_grad()
def _centre(bias: Tensor, free: Tensor) -> None:
    bias[: len(bias) // 2] = free[: len(bias) // 2]


# Predictions, and data of another size.


PREDICTIVE = ("full", "table", "encoder", "flow_encoder", "mixture", "mixture_encoders")


@kinds(*PREDICTIVE, "recursive", "refined", "refined_table", "refined_mixture")
@pytest.mark.parametrize("row", ["hierarchy", "supports"])
def test_predictive(row: str, kind: str) -> None:
    """One by one and in one pass: the latents' shapes, and draws that differ."""
    s, guide = of(row, kind)
    trace = poutine.trace(s.model).get_trace(*s.args)
    for parallel in (False, True):
        predict = Predictive(s.model, guide=guide, num_samples=5, parallel=parallel)
        drawn = predict(*s.args)
        for name, site in latents_in(trace).items():
            shape = tuple(size for size in drawn[name].shape if size != 1)
            assert shape == (5, *(size for size in site["value"].shape if size != 1))
            assert drawn[name].std(0).min() > 0 or name == "factor"


OTHER_DATA = ("encoder", "encoder_full", "flow_encoder", "mixture_encoders")


@kinds(*OTHER_DATA, "recursive_conditional", "refined", "refined_by_network")
@pytest.mark.parametrize("row", ["data_plate", "modules", "methods", "explicit_subsample"])
def test_other_data(row: str, kind: str) -> None:
    """A guide with encoders takes data of another size, and gives a datum what it gave before."""
    s, guide = of(row, kind)
    other = s.row.other_args()  # type: ignore[misc]
    estimator = estimators_of(KIND[kind], guide)[0]
    for args in (other, s.args):
        assert math.isfinite(IWAE_ELBO(3, estimator=estimator).loss(s.model, guide, *args))
    shape = (len(other[-1]),)
    assert guide(*other)["z"].shape == shape
    assert Predictive(s.model, guide=guide, num_samples=4)(*other)["z"].shape == (4, *shape)


@kinds("table", "mixture_table", "recursive_table", "refined_table")
def test_tables_are_of_one_size(kind: str) -> None:
    _, guide = of("data_plate", kind)
    with pytest.raises(ValueError, match=r"'data' has 7 entries.*parameters for 4.*encoder"):
        guide(torch.zeros(7))


@kinds("gaussian", "encoder", "mixture_encoders", "flow_encoder", "refined")
def test_plates_that_come_later(kind: str) -> None:
    """A model whose plates depend on its arguments is known by its first call."""
    s, guide = of("deeper", kind)
    with pytest.raises(ValueError, match="z"), quiet():
        names = estimators_of(KIND[kind], guide)
        IWAE_ELBO(3, estimator=names[0]).loss(s.model, guide, *ROW["deeper"].other_args())


# Saved, copied, converted.

SAVED = ("full", "table", "encoder", "flow_encoder", "mixture_table", "mixture_encoders")
ALL_SAVED = (*SAVED, "mixture_auto_normal", "recursive_encoders")


def density_at(guide: Any, args: tuple, values: dict[str, Tensor]) -> Tensor:
    """Return the guide's log-density at values, all members of a mixture together."""
    guide.prepare(*args)
    call = guide.new_call(args, {})
    call.given.update(values)
    packed = [(group, group.pack(values)) for group in guide.groups]
    return torch.stack([guide.posterior(group, call).log_prob(u).sum() for group, u in packed])


def some_values(s: Setting) -> dict[str, Tensor]:
    trace = poutine.trace(s.model).get_trace(*s.args)
    return {name: site["value"] for name, site in latents_in(trace).items()}


@kinds(*ALL_SAVED)
def test_state_dict(kind: str) -> None:
    s, guide = of("nested", kind)
    values = some_values(s)
    fresh = KIND[kind].build(s)
    fresh.prepare(*s.args)
    with pyro.get_param_store().scope():
        fresh(*s.args)
    fresh.load_state_dict(guide.state_dict())
    expected = density_at(guide, s.args, values)
    with pyro.get_param_store().scope():
        torch.testing.assert_close(density_at(fresh, s.args, values), expected)


@kinds(*ALL_SAVED)
def test_param_store(kind: str, tmp_path: Path) -> None:
    """What Pyro's store saved goes to a new guide of the same name, and is trained from there."""
    s, guide = of("nested", kind)
    svi = SVI(s.model, guide, SGD({"lr": 1e-4}), Trace_ELBO())
    svi.step(*s.args)
    values = some_values(s)
    expected = density_at(guide, s.args, values)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pyro.get_param_store().load(tmp_path / "store")
    fresh = KIND[kind].build(s)
    fresh(*s.args)
    torch.testing.assert_close(density_at(fresh, s.args, values), expected)
    before = [p.detach().clone() for p in fresh.parameters()]
    SVI(s.model, fresh, SGD({"lr": 1e-4}), Trace_ELBO()).step(*s.args)
    assert any((p != q).any() for p, q in zip(fresh.parameters(), before, strict=True))


@kinds(*SAVED, "recursive_encoders")  # Pyro's own guides cannot be copied after a call
@pytest.mark.parametrize("how", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_copies(how: Callable, kind: str) -> None:
    """A copy of a prepared guide has the same density, and leaves the original alone."""
    s, guide = of("nested", kind)
    values = some_values(s)
    expected = density_at(guide, s.args, values)
    other = how(guide)
    with pyro.get_param_store().scope():
        torch.testing.assert_close(density_at(other, s.args, values), expected)
        shake(other, 0.5)
        assert (density_at(other, s.args, values) != expected).all()
    torch.testing.assert_close(density_at(guide, s.args, values), expected)


@kinds(*SAVED, "recursive_encoders")
def test_float32_and_back(kind: str) -> None:
    s, guide = of("nested", kind)
    values = some_values(s)
    expected = density_at(guide, s.args, values)
    guide.float()
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    args = tuple(arg.float() for arg in s.args)
    narrow = {name: value.float() for name, value in values.items()}
    found = density_at(guide, args, narrow)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    pyro.clear_param_store()
    guide.double()
    torch.testing.assert_close(density_at(guide, s.args, values), expected, rtol=1e-3, atol=1e-3)


@kinds("full", "table", "encoder", "flow_encoder", "mixture_encoders", "recursive")
def test_float32_from_the_start(kind: str) -> None:
    torch.set_default_dtype(torch.float32)
    s, guide = of("nested", kind)
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    loss = MIWAE_ELBO(2, 3, estimator=estimators_of(KIND[kind], guide)[0])
    with quiet():
        assert loss.differentiable_loss(s.model, guide, *s.args).dtype == torch.float32


# Names.


def named(name: str | None) -> AmortizedGuide:
    return AmortizedGuide(models.local, Encoder(1, 2), name=name)


def test_two_names_live_together() -> None:
    x, guides = models.data(), [named("one"), named("two")]
    svis = [SVI(models.local, guide, Adam({"lr": 0.1}), Trace_ELBO()) for guide in guides]
    for svi in svis:
        svi.step(x)
    before = [guide.encoder.start.detach().clone() for guide in guides]
    svis[0].step(x)
    assert (guides[0].encoder.start != before[0]).any()
    assert (guides[1].encoder.start == before[1]).all()


@pytest.mark.parametrize("free", [True, False])
def test_two_guides_of_one_name_are_told_apart(free: bool) -> None:
    """Pyro's store would give the second guide the parameters of the first."""
    x = models.data()

    def make(**options: Any) -> AmortizedGuide:
        encoder = None if free else Encoder(1, 2)
        return AmortizedGuide(models.local, encoder, **options)

    first, second = make(), make()
    first(x)
    with pytest.raises(ValueError, match=r"Another guide named 'AmortizedGuide'.*name=.*scope"):
        second(x)
    with pyro.get_param_store().scope():
        second(x)
    first(x)  # the owner of the store's entries goes on
    make(name="other")(x)
    pyro.clear_param_store()
    second(x)
    with pytest.raises(ValueError, match="Another guide named"):
        first(x)
    del second, first  # what nobody holds any more stands in nobody's way
    make()(x)


def test_guides_may_share_an_encoder() -> None:
    encoder = Encoder(1, 2)
    for _ in range(2):
        AmortizedGuide(models.local, encoder)(models.data())


# Other programs around the guides.


def enumerated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = models.normal("z", 0.0, 1.0)
        k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        models.observe(z + k, x)


@kinds("gaussian", "table", "encoder", "flow_encoder")
def test_discrete_sites_enumerated_in_the_model(kind: str) -> None:
    row = Row("enumerated", lambda: (config_enumerate(enumerated), no_guide))
    s, guide = made(row, KIND[kind])
    assert guide(*s.args).keys() == {"z"}
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    for name, gradient in gradients_of(loss, s, guide).items():
        assert gradient is not None and gradient.ne(0).any(), name


def test_hidden_sites_have_a_guide_of_their_own() -> None:
    """A discrete latent by hand, the others by a guide of the package, in one plate."""
    plates: list[pyro.plate] = []

    def plate(x: Tensor) -> pyro.plate:
        plates[:] = [pyro.plate("data", len(x))]
        return plates[0]

    others = poutine.block(models.mixed, hide=["k"])
    amortized = AmortizedGuide(others, Encoder(1, 2), create_plates=plate)

    def guide(x: Tensor) -> None:
        amortized(x)
        with plates[0]:
            pyro.sample("k", dist.Bernoulli(logits=models.real("b", 0.3) * x))

    loss = IWAE_ELBO(4, estimator="dreg+vimco")
    assert math.isfinite(loss.loss_and_grads(models.mixed, guide, models.data()))


@kinds("encoder", "mixture_encoders", "recursive_encoders", "flow_encoder", "refined")
@pytest.mark.slow
def test_training_lowers_the_loss(kind: str) -> None:
    row = Row("far", locals_at(4.0))
    s, guide = made(row, KIND[kind])
    loss = Stratified_ELBO(4) if "mixture" in kind else Trace_ELBO(4)
    evaluate = partial(Trace_ELBO(100).loss, s.model, guide, *s.args)
    before = evaluate()
    svi = SVI(s.model, guide, Adam({"lr": 0.05}), loss)
    for _ in range(40):
        svi.step(*s.args)
    assert evaluate() < before - 1


def locals_at(place: float) -> Callable[[], Programs]:
    return lambda: (lambda x: models.local(x + place), no_guide)


@kinds("recursive", "recursive_table", "recursive_encoders", "recursive_conditional")
def test_growing_through_all_stages(kind: str) -> None:
    check_growth("nested", kind)


@pytest.mark.slow
@kinds("recursive", "recursive_table", "recursive_encoders", "recursive_conditional")
@pytest.mark.parametrize("row", ["data_plate", "markov", "inner_events"])
def test_growing_through_all_stages_elsewhere(row: str, kind: str) -> None:
    check_growth(row, kind)


def check_growth(row: str, kind: str) -> None:
    s, guide = of(row, kind)
    svi = SVI(s.model, guide, Adam({"lr": 0.01}), RecursiveMixture_ELBO(4))
    seen = []
    for _ in range(guide.num_steps + 8):
        seen.append(guide.stage.kind)
        with quiet():
            assert math.isfinite(svi.step(*s.args))
    assert set(seen) == {"first", "propose", "refine", "joint"}
    assert guide.stage.kind == "joint"


# What else must be refused.


def encoded(n: int = 2, **options: Any) -> AmortizedGuide:
    return AmortizedGuide(models.local, Encoder(1, n), **options)


def stopped(x: Tensor) -> None:
    """A guide that lacks a site."""


REFUSED = {
    "encoder_size": (
        lambda x: encoded(3)(x),
        ValueError,
        r"encoder returned shape \(4, 3\).*\['z'\] in plate 'data' need \(4, 2\).*inputs=",
    ),
    "linear_weights": (
        lambda x: MixtureGuide(models.local, [encoded(), encoded()])(x),
        ValueError,
        "weights='linear' needs inputs that are one tensor.*weights='shared'",
    ),
    "linear_weights_of_a_dict": (
        lambda x: MixtureGuide(
            models.local,
            [encoded(inputs=lambda x: {"x": x}), encoded()],
            weights="linear",
        )(x),
        ValueError,
        "weights='linear' needs inputs that are one tensor",
    ),
    "unknown_weights": (
        lambda x: MixtureGuide(models.local, 2, weights="best"),
        ValueError,
        "weights must be one of",
    ),
    "unknown_family": (
        lambda x: AmortizedGuide(models.local, family="banana"),
        ValueError,
        r"family must be one of .*LowRank\(2\)",
    ),
    "unknown_plate": (
        lambda x: AmortizedGuide(models.local, plate="rows")(x),
        ValueError,
        r"No latent site is inside a vectorised plate 'rows'; those of the latents are \['data'\]",
    ),
    "sequential_plate": (
        lambda x: AmortizedGuide(models.sequential, plate="data")(x),
        ValueError,
        "No latent site is inside a vectorised plate 'data'",
    ),
    "no_components": (
        lambda x: MixtureGuide(models.local, []),
        ValueError,
        "at least one component",
    ),
    "nested_mixture": (
        lambda x: MixtureGuide(models.local, [MixtureGuide(models.local, 2), encoded()]),
        ValueError,
        "cannot be a component of a mixture",
    ),
    "auto_delta": (
        lambda x: MixtureGuide(models.local, [autoguide.AutoDelta(models.local)] * 2)(x),
        NotImplementedError,
        "AutoDelta, does not sample site 'z'.*Use AmortizedGuide",
    ),
    "missing_site": (
        lambda x: MixtureGuide(models.local, [stopped, models.local_guide])(x),
        ValueError,
        r"stopped, does not sample \['z'\]",
    ),
    "other_sites": (
        lambda x: MixtureGuide(
            models.hierarchy,
            [autoguide.AutoDiagonalNormal(models.hierarchy), encoded_hierarchy()],
            weights="shared",
        )(x),
        ValueError,
        "AutoDiagonalNormal has one joint density over .*leave out plate=",
    ),
    "explicit_subsample": (
        lambda x: AmortizedGuide(models.subsampled, plate="data")(x, torch.tensor([0, 2])),
        ValueError,
        r"is given the minibatch of plate 'data' \(subsample=\).*create_plates=",
    ),
    "not_a_mixture": (
        lambda x: Stratified_ELBO(2).loss(models.local, encoded(), x),
        TypeError,
        "needs a mixture guide.*got AmortizedGuide",
    ),
    "not_recursive": (
        lambda x: RecursiveMixture_ELBO(2).loss_and_grads(
            models.local, MixtureGuide(models.local, 2), x
        ),
        TypeError,
        "needs a RecursiveMixtureGuide, got MixtureGuide",
    ),
    "two_groups": (
        lambda x: SIWAE_ELBO(2).loss(
            models.hierarchy,
            MixtureGuide(models.hierarchy, [encoded_hierarchy()] * 2, weights="shared"),
            x,
        ),
        NotImplementedError,
        "one mixture over the global latents",
    ),
    "recursive_by_hand": (
        lambda x: RecursiveMixtureGuide(models.local, [encoded(), models.local_guide]),
        TypeError,
        "must be AmortizedGuide or FlowGuide",
    ),
    "recursive_of_one": (
        lambda x: RecursiveMixtureGuide(models.local, 1),
        ValueError,
        "at least 2 components, got 1",
    ),
}


def encoded_hierarchy() -> AmortizedGuide:
    return AmortizedGuide(models.hierarchy, Encoder(1, 2))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_remedy(name: str) -> None:
    run, error, message = REFUSED[name]
    with pytest.raises(error, match=message), quiet():
        run(models.data())


# On a device.


@pytest.mark.cuda
@kinds("mixture_encoders", "mixture_unlike", "recursive_encoders", "refined")
def test_cuda(kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    s, guide = of("data_plate", kind)
    pyro.clear_param_store()
    guide.to("cuda")
    x = s.args[0].to("cuda")

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), device="cuda"):
            z = pyro.sample("z", dist.Normal(torch.zeros((), device="cuda"), 1.0))
            models.observe(z, x)

    loss = RecursiveMixture_ELBO(4) if KIND[kind].recursive else Stratified_ELBO(4)
    if isinstance(guide, SemiAmortizedGuide):
        guide.attach(model)
        loss = Trace_ELBO()
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss)
    for _ in range(3):
        assert math.isfinite(svi.step(x))
    assert guide(x)["z"].device.type == "cuda"


def test_bounds_of_their_own_in_each_row_are_refused() -> None:
    def model(x: Tensor, high: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), high))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x = torch.randn(4, 1)
    with pytest.raises(NotImplementedError, match="'z' has bounds of its own in each row"):
        AmortizedGuide(model, nn.Linear(1, 2))(x, torch.arange(1.0, 5.0))
    assert AmortizedGuide(model, nn.Linear(1, 2), name="b")(x, torch.ones(4))["z"].shape == (4,)


def test_a_minibatch_after_all_rows_keeps_the_scale_of_the_model() -> None:
    """The guide was prepared with all rows; the model says that fewer are a part of them."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    guide = AmortizedGuide(model, nn.Linear(1, 2))
    guide.prepare(torch.randn(6, 1))
    trace = poutine.trace(guide).get_trace(torch.randn(3, 1))
    assert trace.nodes["z"]["scale"] == 2.0
    assert guide(torch.randn(6, 1))["z"].shape == (6,)
