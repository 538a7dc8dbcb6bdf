"""Guides of every kind in use: losses, the evidence, predictions, other data, names, growth."""

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    MIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    RecursiveMixture_ELBO,
    log_marginal,
)
from tests import models
from tests.models import Row
from tests.models.guides import (
    KIND,
    KINDS,
    SMOOTH,
    Encoder,
    estimators_of,
    gradients_of,
    kinds,
    latents_in,
    made,
    no_guide,
    of,
    quiet,
)
from tests.models.losses import OF_MIXTURES
from tests.oracles.recordings import Pinned, Recorded

slow = partial(pytest.param, marks=pytest.mark.slow)

# Losses.


@kinds("mixture_encoders", "mixture_unlike", "mixture_by_hand")
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("Stratified_ELBO", {}),
        ("Stratified_ELBO", {"estimator": "stl"}),
        ("SIWAE_ELBO", {}),
        ("MISELBO", {}),
    ],
)
def test_stratified_loop_equals_one_pass(loss: str, options: dict, kind: str) -> None:
    """With the same draws both give the same value, whatever the components are."""
    s, guide = of("markov", kind)
    make = partial(OF_MIXTURES[loss], 1, 2, **options)
    with Recorded() as recorded:
        one_pass = make().loss(s.model, guide, *s.args)
    with Pinned(recorded.values, {}, total=2 * len(guide.members)):
        looped = make(vectorize_particles=False).loss(s.model, guide, *s.args)
    assert looped == pytest.approx(one_pass, rel=1e-8)


@kinds("mixture", "mixture_encoders", "mixture_unlike", "mixture_auto_normal")
def test_learned_weights_need_a_score(kind: str) -> None:
    s, guide = of("data_plate", kind)
    for estimator in SMOOTH:
        loss = IWAE_ELBO(3, estimator=estimator)
        with pytest.raises(NotImplementedError, match="_component' is not reparam"), quiet():
            loss.loss_and_grads(s.model, guide, *s.args)


@kinds("gaussian", "table", "encoder_full", "flow_encoder", "refined", "mixture")
def test_mean_field_loss(kind: str) -> None:
    """Pyro's `TraceMeanField_ELBO` is the ELBO, and takes no mixture."""
    s, guide = of("data_plate", kind)
    values = []
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        pyro.set_rng_seed(3)
        if kind == "mixture" and values:
            with pytest.raises(NotImplementedError, match="fully reparameterized"):
                loss.loss(s.model, guide, *s.args)
        else:
            values.append(loss.loss(s.model, guide, *s.args))
    assert values == pytest.approx(values[:1] * len(values))


# The evidence: no guide changes what its weights estimate.

EVIDENCE = ("full", "table", "encoder", "flow_encoder", "mixture", "mixture_unlike", "refined")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        *(("exact_plate", kind) for kind in EVIDENCE),
        *(slow("exact_groups", kind.name) for kind in KINDS if "recursive" not in kind.name),
    ],
)
def test_weights_estimate_the_evidence(row: str, kind: str) -> None:
    """Wide guides, 20 000 samples: within 4 standard errors of log p(x)."""
    s, guide = of(row, kind)
    widen(guide, math.log(1.1))
    with quiet():
        found = log_marginal(s.model, guide, *s.args, num_particles=20_000, diagnostics=True)
    expected = s.row.evidence(*s.args)  # type: ignore[misc]
    expected = expected if found.log_marginal.dim() else expected.sum()
    error = (found.log_marginal - expected).abs() / found.standard_error
    assert found.standard_error.max() < 0.2 and error.max() < 4


@torch.no_grad()
def widen(guide: nn.Module, log_scale: float) -> None:
    """Centre every distribution at zero, with wider tails than the posterior."""
    for name, parameter in guide.named_parameters():
        central = ("free_global_unconstrained", "free_local_unconstrained", "start")
        if "slope" in name or "loc" in name.split(".")[-1] or name.endswith(central):
            parameter.mul_(0.1)
        if "scale_unconstrained" in name or "scales." in name:
            parameter.fill_(math.exp(log_scale))
    for module in guide.modules():
        if isinstance(module, AmortizedGuide):
            for latents in module.groups:
                for name, parameter in module.named_parameters():
                    if name.endswith(("_unconstrained", "start")):
                        parameter[..., latents.size : 2 * latents.size] = log_scale
        if isinstance(module, FlowGuide):
            for head in (m for m in module.modules() if hasattr(m, "bias") and hasattr(m, "flow")):
                half = len(head.bias) // 2
                head.bias[:half], head.bias[half:] = 0.0, log_scale


# Predictions, data of another size or dtype.

PREDICTIVE = ("full", "table", "encoder", "flow_encoder", "mixture", "mixture_encoders")


@pytest.mark.quick(5)
@kinds(*PREDICTIVE, "recursive", "refined", "refined_table", "refined_mixture")
@pytest.mark.parametrize("row", ["hierarchy", "supports"])
def test_predictive(row: str, kind: str) -> None:
    """One by one and in one pass: the latents' shapes, and draws that differ."""
    s, guide = of(row, kind)
    trace = poutine.trace(s.model).get_trace(*s.args)
    for parallel in (False, True):
        drawn = Predictive(s.model, guide=guide, num_samples=5, parallel=parallel)(*s.args)
        for name, site in latents_in(trace).items():
            shape = tuple(size for size in drawn[name].shape if size != 1)
            assert shape == (5, *(size for size in site["value"].shape if size != 1))
            assert drawn[name].std(0).min() > 0 or name == "factor"


OTHER_DATA = ("encoder", "encoder_full", "flow_encoder", "mixture_encoders")


@kinds(*OTHER_DATA, "recursive_conditional", "refined", "refined_by_network")
@pytest.mark.parametrize("row", ["data_plate", "modules", "explicit_subsample"])
def test_other_data(row: str, kind: str) -> None:
    """A guide with encoders takes data of another size, and then the first ones again."""
    s, guide = of(row, kind)
    other = s.row.other_args()  # type: ignore[misc]
    loss = IWAE_ELBO(3, estimator=estimators_of(KIND[kind], guide)[0])
    for args in (other, s.args):
        assert math.isfinite(loss.loss(s.model, guide, *args))
    shape = (len(other[-1]),)
    assert guide(*other)["z"].shape == shape
    assert Predictive(s.model, guide=guide, num_samples=4)(*other)["z"].shape == (4, *shape)


@kinds("table", "mixture_table", "recursive_table", "refined_table")
def test_tables_are_of_one_size(kind: str) -> None:
    _, guide = of("data_plate", kind)
    with pytest.raises(ValueError, match=r"'data' has 7 entries.*parameters for 4.*encoder"):
        guide(torch.zeros(7))


@kinds("full", "table", "encoder", "flow_encoder", "mixture_encoders", "recursive")
def test_float32_from_the_start(kind: str) -> None:
    torch.set_default_dtype(torch.float32)
    s, guide = of("nested", kind)
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    loss = MIWAE_ELBO(2, 3, estimator=estimators_of(KIND[kind], guide)[0])
    with quiet():
        assert loss.differentiable_loss(s.model, guide, *s.args).dtype == torch.float32


# Names.


@pytest.mark.parametrize("free", [True, False])
def test_two_guides_of_one_name_are_told_apart(free: bool) -> None:
    """Pyro's store would give the second guide the parameters of the first."""
    x = models.data()

    def make(**options: Any) -> AmortizedGuide:
        return AmortizedGuide(models.local, None if free else Encoder(1, 2), **options)

    first, second = make(), make()
    first(x)
    with pytest.raises(ValueError, match=r"Another guide named 'AmortizedGuide'.*name="):
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


# Training.


@pytest.mark.filterwarnings("ignore:.*have no part in the mixture")
@kinds("recursive", "recursive_table", "recursive_encoders", "recursive_conditional")
@pytest.mark.parametrize("row", ["nested", slow("data_plate"), slow("markov")])
def test_growing_through_all_stages(row: str, kind: str) -> None:
    s, guide = of(row, kind)
    svi = SVI(s.model, guide, Adam({"lr": 0.01}), RecursiveMixture_ELBO(4))
    seen = []
    for _ in range(guide.num_steps + 8):
        seen.append(guide.stage.kind)
        with quiet():
            assert math.isfinite(svi.step(*s.args))
    assert set(seen) == {"first", "propose", "refine", "joint"}
    assert guide.stage.kind == "joint"
