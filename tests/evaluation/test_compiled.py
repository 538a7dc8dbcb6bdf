"""Evaluation with ``compile=True``: the numbers of eager passes from the same seed.

Graphs are not compiled here but in the slow tests at the end. `REFUSED` are the models and kinds of
guide whose samples are evaluated eagerly, with the reason.
"""

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_recursive import AmortizedGuide, log_marginal
from pyro_recursive.evaluation import importance_weights, passes, posterior_draws
from tests.models import ROWS, Row
from tests.models.enumerated import ENUMERATED
from tests.models.guides import KINDS, MODELS, Kind, made, quiet

COUNT = 30  # samples: three chunks of 8 and a ragged one
REFUSED: dict[str, str] = {}  # by row, or by row and kind of guide
OF_KINDS = ("subsample_size", "hierarchy", "nested", "mask_handler", "mixture_prior")
EAGERLY = "Samples are drawn and weighed eagerly: "
Make = Callable[[], tuple[Any, Any, tuple]]


def evidence(*args: Any, **options: Any) -> list[Tensor]:
    return list(log_marginal(*args, num_particles=COUNT, diagnostics=True, **options))


def weights(*args: Any, **options: Any) -> list[Tensor]:
    return [importance_weights(*args, num_particles=COUNT, **options).log_weights]


def draws(*args: Any, **options: Any) -> list[Tensor]:
    found = posterior_draws(*args, num_draws=COUNT, **options)
    return [each.value for each in found.sites.values()]


def values(make: Make, function: Callable, **options: Any) -> list[Tensor]:
    """Return what a function finds from a fixed seed, and a random number after it."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, args = make()
    with quiet():
        function(model, guide, *args)  # creates parameters
        torch.manual_seed(1)
        found = function(model, guide, *args, chunk_size=8, **options)
    return [*found, torch.rand(())]


FUNCTIONS = (evidence, weights, draws)


def check(
    make: Make,
    graphs: list[int],
    refused: str | None = None,
    functions: Sequence[Callable] = FUNCTIONS,
) -> None:
    """Compare functions with eager ones, where these evaluate."""
    for function in functions:
        try:
            expected = values(make, function)
        except (NotImplementedError, ValueError):
            continue  # the tests of evaluation say which
        graphs.clear()
        if refused is not None:
            with pytest.warns(UserWarning, match=EAGERLY + refused):
                values(make, function, compile=True)
            continue
        found = values(make, function, compile=True)
        assert graphs and graphs[0] == 2  # compared, and the third chunk
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.quick("obs_mask")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_results_on_any_model_are_those_of_eager_passes(row: Row, graphs: list[int]) -> None:
    own = evidence, draws  # weights are those of the evidence
    check(lambda: (*row.build(), row.args()), graphs, REFUSED.get(row.name), own)


@pytest.mark.quick("hmm")
@pytest.mark.parametrize("name", ["gmm", "hmm", "recapture", "nested", "loop"])
def test_results_on_an_enumerated_model_are_those_of_eager_passes(
    name: str, graphs: list[int]
) -> None:
    row = next(row for row in ENUMERATED if row.name == name)
    check(lambda: (row.model, row.guide, (row.x(),)), graphs)


def with_kind(name: str, kind: Kind, graphs: list[int]) -> None:
    row = next(row for row in MODELS if row.name == name)

    def make() -> tuple[Any, Any, tuple]:
        setting, guide = made(row, kind)
        return setting.model, guide, setting.args

    own = FUNCTIONS[KINDS.index(kind) % len(FUNCTIONS)]
    check(make, graphs, REFUSED.get(f"{name} {kind.name}"), [own])


@pytest.mark.quick("gaussian")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_results_of_any_guide_are_those_of_eager_passes(kind: Kind, graphs: list[int]) -> None:
    with_kind(OF_KINDS[KINDS.index(kind) % len(OF_KINDS)], kind, graphs)


# Hazards.


def normal(x: Tensor, scale: float = 1.0) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.deterministic("square", mean**2)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, scale), obs=x)


def made_normal() -> tuple[Any, Any, tuple]:
    return normal, AutoNormal(normal), (torch.arange(4.0),)


def test_resampled_draws_and_deterministic_sites_are_those_of_eager_passes(
    graphs: list[int],
) -> None:
    def resampled(*args: Any, **options: Any) -> list[Tensor]:
        found = posterior_draws(*args, num_draws=40, num_proposals=30, resample="psis", **options)
        return [found["mean"], found["square"], *found.log_densities]

    expected = values(made_normal, resampled)
    found = values(made_normal, resampled, compile=True)
    assert graphs == [2, 4]  # chunks of proposals, and of draws
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("count", [1, 8, 16, 20])
def test_calls_of_fewer_than_three_chunks_are_not_compiled(count: int, graphs: list[int]) -> None:
    def few(*args: Any, **options: Any) -> list[Tensor]:
        return [log_marginal(*args, num_particles=count, **options)]

    assert values(made_normal, few) == values(made_normal, few, compile=True)
    assert not graphs


def test_draws_of_several_chunks_do_not_share_memory(graphs: list[int]) -> None:
    """A guide that returns the noise itself."""

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    found = values(lambda: (normal, guide, (torch.zeros(2),)), draws, compile=True)
    assert graphs[0] == 2
    assert len(found[0].unique()) == COUNT


def test_what_changes_between_calls_is_seen(graphs: list[int]) -> None:
    """Data, parameters, Python values and closures."""
    scale = 1.0
    guide = AutoNormal(normal)

    def model(x: Tensor, factor: float) -> None:
        normal(x * factor, scale)

    def compare(*args: Any) -> None:
        found = [
            log_marginal(model, guide, *args, num_particles=COUNT, chunk_size=8, compile=each)
            for each in (False, True)
        ]
        torch.testing.assert_close(found[1], found[0])
        seen.append(found[0].item())

    seen, x = list[float](), torch.arange(4.0)
    guide(x)
    compare(x, 1.0)
    compare(x + 1.0, 1.0)
    x.mul_(2.0)
    compare(x, 1.0)
    compare(x, 0.5)
    compare(x[:3], 0.5)
    scale = 2.0
    compare(x[:3], 0.5)
    with torch.no_grad():
        guide.locs.mean.add_(1.0)
    compare(x[:3], 0.5)
    with poutine.scale(scale=3.0):
        compare(x[:3], 0.5)
    assert len(set(seen)) == len(seen)
    assert all(calls >= 1 for calls in graphs)


class Normalised(nn.Module):
    """An encoder with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))
        self.head = nn.Linear(3, 1)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.head(self.layers(x)).squeeze(-1), 1.0))


@pytest.mark.quick(1)
@pytest.mark.parametrize("is_training", [True, False])
def test_modules_keep_their_mode_and_their_buffers(is_training: bool, graphs: list[int]) -> None:
    module = Normalised().train(is_training)
    before = [buffer.clone() for buffer in module.buffers()]
    check(lambda: (module.model, module.guide, (torch.randn(4, 2),)), graphs)
    for old, new in zip(before, module.buffers(), strict=True):
        torch.testing.assert_close(new, old, rtol=0.0, atol=0.0)


def test_what_is_read_in_python_runs_eagerly(graphs: list[int]) -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = 1.0 if mean.isfinite().all() else math.nan
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, scale), obs=x)

    def make() -> tuple[Any, Any, tuple]:
        return model, AutoNormal(model), (torch.arange(4.0),)

    check(
        make, graphs, r"values that vary in each step are read in Python after site 'mean' \(test_"
    )


def test_what_changes_in_each_run_runs_eagerly(graphs: list[int]) -> None:
    class Model(nn.Module):
        count = 0

        def forward(self, x: Tensor) -> None:
            self.count += 1
            normal(x, 1.0 + self.count)

    def make() -> tuple[Any, Any, tuple]:
        model = Model()
        return model, AutoNormal(model), (torch.ones(3),)

    check(make, graphs, ".*count changes in each run")


@pytest.mark.slow
def test_tensors_that_runs_change_in_place_are_those_of_eager_passes(graphs: list[int]) -> None:
    def make() -> tuple[Any, Any, tuple]:
        count = torch.zeros(())

        def model(x: Tensor) -> None:
            normal(x, 1.0 + count.add_(1.0) / 100.0)

        return model, AutoNormal(model), (torch.ones(3),)

    check(make, graphs)


@pytest.mark.parametrize("function", [evidence, weights, draws])
@pytest.mark.parametrize("compile", [False, True])
def test_a_guide_is_freed_with_its_last_reference(
    function: Callable, compile: bool, graphs: list[int]
) -> None:
    """A notebook makes its guide again under the same name, before the garbage collector runs."""
    model, _, args = made_normal()

    def evaluated() -> weakref.ref:
        guide = AmortizedGuide(model)
        values(lambda: (model, guide, args), function, compile=compile)
        return weakref.ref(guide)

    gc.disable()
    try:
        assert evaluated()() is None
    finally:
        gc.enable()


def test_samples_that_run_one_by_one_are_not_compiled(graphs: list[int]) -> None:
    def looped(*args: Any, **options: Any) -> list[Tensor]:
        return evidence(*args, vectorize_particles=False, **options)

    with pytest.warns(UserWarning, match=EAGERLY + "they run one by one"):
        found = values(made_normal, looped, compile=True)
    assert all(map(torch.equal, found, values(made_normal, looped)))
    assert not graphs


def test_handlers_that_see_sites_run_eagerly(graphs: list[int]) -> None:
    class Counting(Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            names.append(msg["name"])

    def seen(**options: Any) -> list[str]:
        names.clear()
        with Counting():
            log_marginal(model, guide, *args, num_particles=COUNT, chunk_size=8, **options)
        return list(names)

    names = list[str]()
    model, guide, args = made_normal()
    seen()
    with pytest.warns(UserWarning, match=EAGERLY + "Counting"):
        found = seen(compile=True)
    assert found == seen()


def test_machine_code_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, tensors: list[Tensor]) -> Callable:
        return lambda *given: [each + 1e-6 for each in module(*given)]

    expected = values(made_normal, evidence)
    monkeypatch.setattr(passes, "compile_graph", wrong)
    with pytest.warns(UserWarning, match=EAGERLY + "a compiled pass differs from an eager one"):
        found = values(made_normal, evidence, compile=True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("error", "is_used"), [(0.02, True), (1.0, False)])  # in nats
def test_float32_results_may_differ_by_rounding_alone(
    error: float, is_used: bool, graphs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = passes.compile_graph

    def rounded(module: Any, tensors: list[Tensor]) -> Callable:
        run = traced(module, tensors)
        return lambda *given: [each + error * (each < -1e4) for each in run(*given)]

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))

    x = torch.full((2000,), 10.0, dtype=torch.float32)  # log-weights near -1e5, of rounding 0.01
    monkeypatch.setattr(passes, "compile_graph", rounded)
    with quiet() if is_used else pytest.warns(UserWarning, match="differs from an eager one"):
        values(lambda: (model, guide, (x,)), weights, compile=True)
    assert graphs == [2 if is_used else 1]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: Any, tensors: list[Tensor]) -> Callable:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(passes, "compile_graph", missing)
    with pytest.warns(UserWarning, match=EAGERLY + ".*No working C"):
        values(made_normal, evidence, compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("function", [evidence, draws])
def test_compiled_results_are_those_of_eager_passes(function: Callable) -> None:
    expected = values(made_normal, function)
    for one, other in zip(expected, values(made_normal, function, compile=True), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_compiled_results_of_discrete_latents_are_those_of_eager_passes() -> None:
    """Their draws stay in the graph."""
    row = next(row for row in ROWS if row.name == "discrete")
    expected = values(lambda: (*row.build(), row.args()), weights)
    found = values(lambda: (*row.build(), row.args()), weights, compile=True)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)
