"""Sums over enumerated latents: the ring, gradients that do not vanish, guides, evaluation."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.ops import packed
from pyro.ops.rings import LogRing
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    AmortizedGuide,
    CompiledSVI,
    FlowGuide,
    MixtureGuide,
    RecursiveMixtureGuide,
    SemiAmortizedGuide,
    log_marginal,
)
from pyro_recursive.evaluation import gaps, importance_weights
from pyro_recursive.evaluation.evidence import particles_per_chunk
from pyro_recursive.evaluation.search import Search
from pyro_recursive.tracing.enumeration import StableRing
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.tracing.program import Program
from tests.models.enumerated import ENUMERATED, PARALLEL, gmm
from tests.models.losses import LOSSES, OF_MIXTURES
from tests.models.row import data

ROW = {row.name: row for row in ENUMERATED}


def pack(values: Tensor, dims: str) -> Tensor:
    return packed.pack(values, dict(zip(range(-len(dims), 0), dims, strict=True)))


@pytest.mark.parametrize("dims", ["", "a", "ab", "abc", "bc"])
def test_the_ring_sums_as_pyros_own(dims: str) -> None:
    terms = [("ab", 2, 3), ("bc", 3, 4), ("cn", 4, 5), ("a", 2), ("bn", 3, 5)]
    values = [torch.randn(*sizes) for _, *sizes in terms]
    sizes = {"a": 2, "b": 3, "c": 4, "n": 5}
    found, expected = (
        ring(dim_to_size=sizes).sumproduct(
            [pack(v, name) for v, (name, *_) in zip(values, terms, strict=True)], set(dims)
        )
        for ring in (StableRing, LogRing)
    )
    order = [found._pyro_dims.index(dim) for dim in expected._pyro_dims]
    torch.testing.assert_close(found.permute(*order), expected)


def test_impossible_values_have_no_gradient() -> None:
    """A sum of zeros is zero: its derivatives are 0, not NaN."""
    values = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf], [1.0, 2.0]])
    leaf = values.requires_grad_()
    found = StableRing(dim_to_size={"n": 3, "y": 2}).sumproduct([pack(leaf, "ny")], "y")
    assert found.tolist() == pytest.approx([0.0, -math.inf, math.log(math.e + math.e**2)])
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    expected = torch.cat([torch.tensor([[1.0, 0.0], [0.0, 0.0]]), values[2:].softmax(-1)])
    torch.testing.assert_close(gradient, expected)


LOST = {  # Pyro's gradients
    torch.float32: {15: 0.999, 20: 0.017, 30: 8e-7, 80: 2e-28, 100: 0.0, 200: 0.0},
    torch.float64: {36: 1.0, 40: 0.019, 60: 4e-11},
}


@pytest.mark.parametrize(("dtype", "g"), [(dtype, g) for dtype in LOST for g in LOST[dtype]])
def test_gradients_that_disagreeing_factors_lose(dtype: torch.dtype, g: float) -> None:
    """A prior and a likelihood that disagree by g nats and 1.5 g: the exact gradient is 1."""
    torch.set_default_dtype(dtype)
    locs = torch.tensor([math.sqrt(3 * g), 0.0])

    def model() -> None:
        logits = pyro.param("logits", lambda: torch.tensor([float(g), 0.0]))
        y = pyro.sample("y", dist.Categorical(logits=logits), infer=PARALLEL)
        pyro.sample("x", dist.Normal(locs[y], 1.0), obs=torch.tensor(0.0))

    def slope(loss: Any) -> float:
        pyro.clear_param_store()
        value = loss.differentiable_loss(model, lambda: None)
        if type(loss) is IWAE_ELBO:
            exact = g + 0.5 * math.log(2 * math.pi) - math.log1p(math.exp(-g / 2))
            assert value.item() == pytest.approx(exact, rel=1e-6)
        return torch.autograd.grad(value, pyro.param("logits").unconstrained())[0][0].item()

    lost = pytest.approx(LOST[dtype][g], rel=0.3, abs=1e-30)
    assert slope(TraceEnum_ELBO(max_plate_nesting=0)) == lost
    assert slope(IWAE_ELBO(1)) == pytest.approx(1.0, rel=1e-3)
    assert slope(IWAE_ELBO(4)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("name", ROW)
def test_float32(name: str) -> None:
    row, values = ROW[name], []
    for dtype in (torch.float64, torch.float32):
        pyro.clear_param_store()
        torch.set_default_dtype(dtype)
        pyro.set_rng_seed(1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Plate '.*' encloses latent site")
            x = row.x().to(dtype) if row.x().is_floating_point() else row.x()
            poutine.trace(row.guide).get_trace(x)
            loss = IWAE_ELBO(1, estimator="score" if row.discrete else "pathwise")
            value = loss.differentiable_loss(row.model, row.guide, x)
        assert value.dtype == dtype
        values.append(value.item())
    assert math.isfinite(values[1])


# Guides.

GUIDES: dict[str, Callable[[Callable], Any]] = {
    "amortized": AmortizedGuide,
    "table": lambda model: AmortizedGuide(model, plate="data"),
    "encoder": lambda model: AmortizedGuide(model, nn.Linear(1, 2), inputs=column),
    "flow": lambda model: FlowGuide(model, transforms=2, hidden=(4,)),
    "mixture": lambda model: MixtureGuide(model, 2, plate="data"),
    "recursive": lambda model: RecursiveMixtureGuide(model, 2, plate="data"),
    "refined": lambda model: SemiAmortizedGuide(model, GUIDES["encoder"](model), draws=2, steps=2),
    "refined_once": lambda model: SemiAmortizedGuide(model, GUIDES["encoder"](model), steps=1),
}
MIXTURES = ("mixture", "recursive")
OF_GUIDES = [(guide, "IWAE_ELBO") for guide in GUIDES if guide not in MIXTURES]
OF_GUIDES += [("mixture", loss) for loss in OF_MIXTURES if loss != "RecursiveMixture_ELBO"]
OF_GUIDES += [("recursive", "RecursiveMixture_ELBO")]


def column(x: Tensor) -> Tensor:
    return x.unsqueeze(-1)


@pytest.mark.parametrize(("guide", "loss"), OF_GUIDES)
@pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site")
def test_guides_skip_enumerated_sites(guide: str, loss: str) -> None:
    """Value and gradients are those of the model with the sum by hand."""
    found, row, state = [], ROW["siblings"], {}
    for model in (row.model, row.collapsed):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        made = GUIDES[guide](model)
        make = {**LOSSES, **OF_MIXTURES}[loss]
        made(data())
        made.load_state_dict(state := state or made.state_dict())
        pyro.set_rng_seed(3)
        value = make(2, 3).loss_and_grads(model, made, data())
        grads = [p.grad.flatten() for p in made.parameters() if p.grad is not None]
        found.append(torch.cat([torch.tensor([value]), *grads]))
    assert len(found[0]) > 2
    torch.testing.assert_close(*found)


def test_pyros_guides_leave_them_out_by_block() -> None:
    found, row = [], ROW["siblings"]
    for model in (row.model, row.collapsed):
        pyro.clear_param_store()
        guide = AutoNormal(poutine.block(model, hide=["y"]))
        guide(data())
        pyro.set_rng_seed(3)
        found.append(IWAE_ELBO(3, estimator="dreg").loss_and_grads(model, guide, data()))
    assert found[0] == pytest.approx(found[1])


def test_a_marked_site_of_the_guide_is_sampled() -> None:
    def model(x: Tensor, infer: Any = None) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3), infer=infer)
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x: Tensor, infer: Any = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(0.4))

    values = []
    for infer in ({}, PARALLEL, {"enumerate": "parallel", "num_samples": 3}):
        pyro.set_rng_seed(0)
        values.append(IWAE_ELBO(4, estimator="vimco").loss(model, guide, data(), infer))
    assert values == pytest.approx(values[:1] * 3)


def test_the_guides_trace_stays_as_it_is() -> None:
    """A second run of the model on it has no dims of the first."""
    row = ROW["gmm"]
    program = Program(row.model, row.guide, (row.x(),))
    guide = program.run_guide()
    before = dict(guide.nodes["z"]["infer"])
    for dim in (-3, -5):
        model = program.run_model(guide, dim)
        assert list(model.nodes["z"]["infer"]["_dim_to_id"]) == [dim]
        assert model.nodes["z"]["fn"].batch_shape == (3, *[1] * (-dim - 2), 4)
    assert guide.nodes["z"]["infer"] == before


def test_plates_without_a_size() -> None:
    """Pyro does not expand the prior of a latent there, whose value is one for each row."""
    x, found = data(), []
    for size in (None, len(x)):

        def model(x: Tensor, size: int | None = size) -> None:
            with pyro.plate("data", size):
                fn = dist.Categorical(torch.ones(len(x), 3))
                y = pyro.sample("y", fn, infer=PARALLEL)
                z = pyro.sample("z", dist.Normal(1.0 * y, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x: Tensor, size: int | None = size) -> None:
            with pyro.plate("data", size):
                pyro.sample("z", dist.Normal(x, 1.0))

        pyro.set_rng_seed(0)
        found.append(IWAE_ELBO(1).loss(model, guide, x))
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("size", [1, 3])
def test_latents_of_one_value(size: int) -> None:
    """Beside one of several values, and alone."""

    def model(x: Tensor, is_enumerated: bool) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if is_enumerated:
                y = pyro.sample("y", dist.Categorical(torch.ones(1)), infer=PARALLEL)
                z = z + y
            if size > 1:
                z = z + pyro.sample("more", dist.Categorical(torch.ones(size)), infer=PARALLEL)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, is_enumerated: bool) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    for vectorize in (True, False, "vmap"):
        found = []
        for is_enumerated in (False, True):
            pyro.set_rng_seed(0)
            loss = IWAE_ELBO(4, vectorize_particles=vectorize)
            found.append(loss.loss(model, guide, data(), is_enumerated))
        assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize("mode", [True, "vmap"])
def test_models_of_one_sample(mode: bool | str) -> None:
    """``locs[y]`` of latent locations has no dim for samples: it runs under `torch.vmap`."""

    def model(x: Tensor, collapsed: bool) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            if collapsed:
                parts = dist.Categorical(weights), dist.Normal(locs, 1.0)
                pyro.sample("x", dist.MixtureSameFamily(*parts), obs=x)
            else:
                y = pyro.sample("y", dist.Categorical(weights), infer=PARALLEL)
                pyro.sample("x", dist.Normal(locs[y], 1.0), obs=x)

    def guide(x: Tensor, collapsed: bool) -> None:
        pyro.sample("weights", dist.Dirichlet(torch.full((3,), 3.0)))
        pyro.sample("locs", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    found = []
    for collapsed in (False, True):
        pyro.set_rng_seed(0)
        loss = IWAE_ELBO(4, num_estimates=2, vectorize_particles=mode)
        found.append(loss.loss(model, guide, data(), collapsed))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_sites_that_some_calls_enumerate() -> None:
    """Labels may be given in one call; more plates may come in another."""

    def model(x: Tensor, y: Tensor | None = None, copies: int = 0) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            infer = {} if y is not None else PARALLEL
            y = pyro.sample("y", dist.Bernoulli(0.3), obs=y, infer=infer)
            if copies:
                with pyro.plate("copies", copies, dim=-2):
                    pyro.sample("more", dist.Normal(z + y, 1.0), obs=x.expand(copies, -1))
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x: Tensor, *rest: Any) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x, labels = data()[:1], (None, torch.tensor([0.0]), torch.tensor([1.0]))
    for copies in (0, 2):
        values = []
        for label in labels:
            pyro.set_rng_seed(0)
            values.append(-torch.tensor(IWAE_ELBO(1).loss(model, guide, x, label, copies)))
        torch.testing.assert_close(values[0], torch.logaddexp(*values[1:]))


def test_one_sample_of_a_global_latent() -> None:
    """Its sum is that of a joint weight; several samples have none for each row."""
    row, values = ROW["outside"], []
    for option in ("joint", "elbo"):
        pyro.set_rng_seed(1)
        loss = IWAE_ELBO(1, num_estimates=4, global_latents=option)
        values.append(loss.loss(row.model, row.guide, row.x()))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("name", ["hmm", "nested"])
def test_warm_up_leaves_enumerated_latents(name: str) -> None:
    """They are a part of the likelihood."""
    row, found = ROW[name], []
    for model in (row.model, row.collapsed):
        pyro.set_rng_seed(0)
        with KLWarmup(0.5):
            found.append(IWAE_ELBO(2).loss(model, row.guide, row.x()))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_warm_up_of_priors_that_depend_on_them() -> None:
    row = ROW["gmm"]
    with pytest.raises(ValueError, match=r"'y' and 'z' .*scales 1 and 0.5"), KLWarmup(0.5):
        IWAE_ELBO(2).loss(row.model, row.guide, row.x())


# Evaluation.


def test_evidence_and_weights() -> None:
    row, x = ROW["gmm"], data()
    row.model(x)
    logits, locs = torch.tensor([0.2, -0.4, 0.5]), torch.tensor([-1.5, 0.2, 2.0])
    parts = dist.Categorical(logits=logits), dist.Normal(locs, (0.9**2 + 0.7**2) ** 0.5)
    exact = dist.MixtureSameFamily(*parts).log_prob(x)
    torch.testing.assert_close(
        log_marginal(row.model, row.guide, x, num_particles=200_000), exact, rtol=0, atol=0.01
    )
    found = []
    for model in (row.model, row.collapsed):
        pyro.set_rng_seed(4)
        found.append(importance_weights(model, row.guide, x, chunk_size=500))
    torch.testing.assert_close(found[0].log_weights, found[1].log_weights)
    torch.testing.assert_close(found[0].pareto_k, found[1].pareto_k)


def test_gaps_of_the_guide() -> None:
    found, row, state = [], ROW["siblings"], {}
    for model in (row.model, row.collapsed):
        pyro.clear_param_store()
        guide = GUIDES["encoder"](model)
        guide(data())
        guide.load_state_dict(state := state or guide.state_dict())
        pyro.set_rng_seed(3)
        search = Search(steps=5, lr=0.1)
        found.append(gaps(model, guide, data(), num_particles=20, search=search))
    for one, other in zip(*found, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


def test_chunks_have_room_for_all_values() -> None:
    gmm_rows, chain = ROW["gmm"], ROW["hmm"]
    for row, values in ((gmm_rows, 3), (chain, 4)):  # a transition has two values of two
        pyro.clear_param_store()  # both have `locs`, of two shapes
        one, other = (
            particles_per_chunk(Program(model, row.guide, (row.x(),)))
            for model in (row.model, row.collapsed)
        )
        assert one == other // values


# Compiled steps.


@pytest.mark.parametrize("engine", ["graph"])
def test_compiled_steps(engine: str) -> None:
    losses = []
    for make in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        options = {"engine": engine} if make is CompiledSVI else {}
        svi = make(gmm, ROW["gmm"].guide, Adam({"lr": 0.05}), IWAE_ELBO(4), **options)
        losses.append([svi.step(data()) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("validate", [True, False])
def test_scales_of_other_shapes_do_not_go_together(validate: bool) -> None:
    """Without validation, too: that takes no look at their values."""

    def model(scale: Any, other: Any) -> None:
        with pyro.plate("data", 4):
            with poutine.scale(scale=scale):
                y = pyro.sample("y", dist.Bernoulli(0.3), infer=PARALLEL)
            with poutine.scale(scale=other):
                pyro.sample("x", dist.Normal(y, 1.0), obs=torch.zeros(4))

    loss, rows = IWAE_ELBO(2), torch.full((4,), 0.5)
    with pyro.validation_enabled(validate):
        assert math.isfinite(loss.loss(model, lambda *args: None, rows, rows.clone()))
        for other in (0.5, torch.tensor(0.5)):
            with pytest.raises(ValueError, match=r"of shape \[4\] and (0.5|of shape \[\]):"):
                loss.loss(model, lambda *args: None, rows, other)


def test_a_sum_across_the_plates_of_the_data_names_what_is_outside() -> None:
    def model() -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3), infer=PARALLEL)
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(g + k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(4))

    def guide() -> None:
        pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'k', 'z' are summed together, and 'k' is outside the"):
        IWAE_ELBO(2, global_latents="elbo").loss(model, guide)
