"""Growing mixtures whose components come from the paths of an optimiser."""

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from benchmarks.tasks.posteriors import labels, square
from pyro_recursive import AmortizedGuide, RecursiveMixture_ELBO, RecursiveMixtureGuide, Schedule
from pyro_recursive.evaluation import importance_weights, psis
from pyro_recursive.guides.mixture import paths
from pyro_recursive.guides.pathfinder.gaussians import Gaussians
from pyro_recursive.guides.pathfinder.mixture import PathMixture, PathReport

SHORT = Schedule(first=2, propose=2, refine=2, joint=2)


def step(guide: RecursiveMixtureGuide, *args: Any, model: Callable | None = None) -> float:
    """Return the loss of a training step, without an update."""
    return RecursiveMixture_ELBO(4).loss_and_grads(model or guide.model, guide, *args)


def elbo(guide: RecursiveMixtureGuide) -> float:
    weights = importance_weights(guide.model, guide, num_particles=20_000)
    return weights.log_weights.mean().item()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_both_roots_are_members_after_one_step(seed: int) -> None:
    problem = square()
    torch.manual_seed(seed)
    guide = RecursiveMixtureGuide(problem.model, 3, schedule=SHORT)
    assert guide.steps_left == guide.num_steps == 2 + 2 * 4 + 2
    step(guide)
    assert guide.members == (0, 1)
    torch.testing.assert_close(guide.component_weights(), torch.full((2,), 0.5), atol=0.03, rtol=0)
    assert problem.log_evidence - elbo(guide) < 0.013


def test_members_from_paths_are_not_those_that_the_store_has() -> None:
    """An earlier guide of the same name left its parameters in Pyro's store."""

    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 9.0)), 0.1), obs=x)

    for x in torch.tensor([2.0, -5.0]):
        guide = RecursiveMixtureGuide(model, 2, schedule=SHORT)
        step(guide, x)
        assert guide.component(0).free_global[0].item() == pytest.approx(x.item(), abs=0.01)
        del guide
        gc.collect()


@pytest.mark.slow
def test_all_labels_are_members_after_one_step() -> None:
    problem = labels()
    torch.manual_seed(0)
    guide = RecursiveMixtureGuide(problem.model, 6, family="full", paths=32, schedule=SHORT)
    step(guide)
    assert guide.members == tuple(range(6)) and guide.report.paths == 32
    torch.testing.assert_close(
        guide.component_weights(), torch.full((6,), 1 / 6), atol=0.02, rtol=0
    )
    assert problem.log_evidence - elbo(guide) < 0.06


SCALES = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


def conjugate(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z[..., None, :], SCALES).to_event(1), obs=x)


@pytest.mark.parametrize("seed", range(6))
def test_a_gaussian_posterior_has_one_component_and_no_growth(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5, 3)
    guide = RecursiveMixtureGuide(conjugate, 2, schedule=SHORT)
    step(guide, x)
    assert guide.members == (0,) and guide.left_out == (1,) and guide.trials == []
    assert (guide.stage.kind, guide.steps_left) == ("joint", 1)
    variance = 1 / (len(x) / SCALES.square() + 0.25)
    mean = variance * x.sum(0) / SCALES.square()
    loc, log_scale = guide.component(0).free_global.detach().split(3)
    torch.testing.assert_close(loc, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_scale.exp(), variance.sqrt(), atol=1e-4, rtol=0)


# --- The stages


def found(*num_paths: int, ratios: Tensor | None = None) -> PathMixture:
    """Return what paths could have found, equal weights at 1, 2, ..."""
    count = len(num_paths)
    loc = torch.arange(1.0, count + 1)[:, None]
    ratios = torch.randn(4000) if ratios is None else ratios
    elbo, k = ratios.mean().item(), psis(ratios).pareto_k.item()
    weights = (1 / count,) * count
    report = PathReport(elbo, 0.0, k, weights, num_paths, sum(num_paths), 0, 1, 1, 1)
    gaussians = Gaussians(loc, torch.ones(count, 1, 1))
    return PathMixture(gaussians, torch.tensor(weights).log(), ratios, report)


def some() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))


def starting(
    monkeypatch: pytest.MonkeyPatch, result: PathMixture, count: int, **options: Any
) -> RecursiveMixtureGuide:
    """Return a guide after its first step, from a given result of paths."""
    monkeypatch.setattr(paths, "mixture_of_paths", lambda *_, **__: result)
    guide = RecursiveMixtureGuide(some, count, schedule=SHORT, **options)
    step(guide)
    return guide


def test_members_are_trained_together_and_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = starting(monkeypatch, found(3, 2, 1), 4)
    assert guide.members == (0, 1, 2) and guide.is_growing
    torch.testing.assert_close(guide.component_weights(), torch.full((3,), 1 / 3))
    met = [(guide.stage, guide.steps_taken, guide.steps_left)]
    for _ in range(guide.steps_left - 1):
        guide.count_step()
        met.append((guide.stage, guide.steps_taken, guide.steps_left))
    stages = [("first", None, 2), *[("propose", 3, 2)] * 2, *[("refine", 3, 2)] * 2]
    stages += [("joint", None, 2)] * 2
    assert [stage for stage, *_ in met] == stages
    assert [left for *_, left in met] == [7, 6, 5, 4, 3, 2, 1]


def test_all_components_train_together_from_the_first_step(monkeypatch: Any) -> None:
    guide = starting(monkeypatch, found(1, 1), 2)
    for m in range(2):
        grad = guide.component(m).get_parameter("free_global_unconstrained").grad
        assert grad is not None and grad.abs().min() > 0
    guide.count_step()
    assert guide.stage.kind == "joint" and guide.steps_left == 2


@pytest.mark.parametrize(
    ("counts", "noise", "ends"),
    [((3, 2), 0.05, True), ((7, 1), 0.05, False), ((3, 2), 0.4, False)],
    ids=["enough", "a mode of one path", "far from the evidence"],
)
def test_growth_ends_where_nothing_is_left(
    counts: tuple[int, ...], noise: float, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gap is half the variance of normal log-weights: 0.001 and 0.08 nats."""
    guide = starting(monkeypatch, found(*counts, ratios=noise * torch.randn(4000)), 3)
    assert guide.is_growing is not ends and guide.members == (0, 1)
    if ends:
        assert guide.progress[3:].tolist() == [1, 1, 0]


@pytest.mark.parametrize(("counts", "ends"), [((5, 3), True), ((7, 1), False)])
def test_a_resumed_guide_decides_by_the_paths_of_the_first_run(
    counts: tuple[int, ...], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by those of its own first step; a state without counts never ends growth early."""
    ratios = 0.4 * torch.randn(4000)  # far from the evidence, at first
    guide = starting(monkeypatch, found(*counts, ratios=ratios), 3)
    others, state = found(*((7, 1) if ends else (5, 3)), ratios=ratios), guide.state_dict()
    resumed, old = (starting(monkeypatch, others, 3, name=name) for name in ("resumed", "old"))
    resumed.load_state_dict(state)
    old.load_state_dict(state | {"progress": state["progress"].clamp(max=1)})
    for each in (guide, resumed, old):
        assert each.is_growing and each.members == (0, 1)
        each.end_if_complete(0.05 * torch.randn(4000))
    assert guide.is_growing is resumed.is_growing is not ends
    assert old.is_growing


def test_a_loaded_guide_has_no_new_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = starting(monkeypatch, found(2, 1), 3)
    monkeypatch.setattr(paths, "mixture_of_paths", None)
    pyro.clear_param_store()
    other = RecursiveMixtureGuide(some, 3, schedule=SHORT)
    other.prepare()
    other.load_state_dict(guide.state_dict())
    copied = copy.deepcopy(guide)
    for each in (other, copied):
        pyro.clear_param_store()
        assert not each.starts_from_paths and each.members == (0, 1)
        step(each)
        assert each.stage[:2] == ("propose", 2)


def test_without_a_gaussian_it_grows_from_its_start_with_one_warning() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("f", torch.where(z.abs() < 0.7, -0.5 * z.square(), -math.inf))

    guide = RecursiveMixtureGuide(model, 2, schedule=SHORT, init_scale=0.01)
    with pytest.warns(UserWarning, match="grows from its start, as paths") as caught:
        step(guide)
        step(guide)
    assert [w.filename for w in caught] == [__file__]
    assert guide.members == (0,) and guide.stage[:2] == ("propose", 1)


# --- Where paths have no place


def rows_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def learned(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(1.0), constraint=constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, theta))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def subsampled(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=3) as rows:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def branching(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if z.item() > 0 else 2.0
    pyro.sample("x", dist.Normal(z, scale).expand([len(x)]).to_event(1), obs=x)


def encoders(**options: Any) -> RecursiveMixtureGuide:
    inputs = {"inputs": lambda x: x[:, None]}
    parts = [AmortizedGuide(rows_model, nn.Linear(1, 2), **inputs) for _ in range(2)]
    return RecursiveMixtureGuide(rows_model, parts, **options)


def mixture(model: Callable, **fixed: Any) -> Callable[..., RecursiveMixtureGuide]:
    return lambda **options: RecursiveMixtureGuide(model, 2, **fixed, **options)


ELSEWHERE: dict[str, tuple[Callable[..., RecursiveMixtureGuide], str]] = {
    "encoders": (encoders, "no Gaussian with parameters of its own"),
    "rows": (mixture(rows_model, plate="data"), "rows have Gaussians of their own"),
    "learned": (mixture(learned), "parameter 'theta'"),
    "subsampled": (mixture(subsampled), "Plate 'data' is subsampled"),
    "a start": (mixture(rows_model, init_loc_fn="mean"), "init_loc_fn="),
    "weights": (mixture(rows_model, learn_weights=False), "learn_weights=False"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_programs_grow_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = ELSEWHERE[name]
    monkeypatch.setattr(paths, "mixture_of_paths", None)
    guide = make(schedule=SHORT)
    step(guide, torch.randn(5))
    assert guide.members == (0,) and guide.stage == ("first", 0, 2)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=f"cannot start from 3 paths: .*{message}"):
        step(make(schedule=SHORT, paths=3), torch.randn(5))


@pytest.mark.filterwarnings("ignore:Samples run one by one")
def test_runs_one_by_one_have_paths_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "mixture_of_paths", None)
    guide = RecursiveMixtureGuide(branching, 2, schedule=SHORT)
    step(guide, torch.randn(5))
    assert guide.members == (0,)
    monkeypatch.setattr(paths, "mixture_of_paths", lambda *_, **__: found(2))
    pyro.clear_param_store()
    guide = RecursiveMixtureGuide(branching, 2, schedule=SHORT, paths=2)
    step(guide, torch.randn(5))
    assert guide.component(0).free_global.tolist() == [1.0, 0.0]


def test_no_paths_are_growth_from_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "mixture_of_paths", None)
    guide = RecursiveMixtureGuide(some, 2, schedule=SHORT, paths=0)
    step(guide)
    assert guide.members == (0,) and guide.stage == ("first", 0, 2)
    with pytest.raises(ValueError, match="paths must be an integer >= 0"):
        RecursiveMixtureGuide(some, 2, paths=-1)


# --- In whitened coordinates


def test_members_are_the_same_gaussians_in_whitened_coordinates() -> None:
    """Those of full covariances; both roots of an elongated posterior keep places and scales."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        mean = torch.stack([z[..., 0] ** 2, z[..., 0] + 10 * z[..., 1]], -1)
        pyro.sample("x", dist.Normal(mean, 0.2).to_event(1), obs=torch.tensor([4.0, 1.0]).to(z))

    found = []
    for whiten in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(3)
        guide = RecursiveMixtureGuide(model, 2, family="full", whiten=whiten, schedule=SHORT)
        step(guide)
        assert guide.members == (0, 1)
        call = guide.new_call((), {})
        marginals = [guide.component(m).marginals(guide.groups[0], call) for m in range(2)]
        found.append(
            sorted([loc[0].item(), scale[0].item(), scale[1].item()] for loc, scale in marginals)
        )
    torch.testing.assert_close(*map(torch.tensor, found), atol=0.01, rtol=0)
    assert found[1][1][0] == pytest.approx(2.0, abs=0.02)
