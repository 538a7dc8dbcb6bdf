"""Each engine takes the steps of the graph, and a wrong one takes none."""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_recursive import IWAE_ELBO, CompiledSVI, fit
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.training.compiled import engines
from pyro_recursive.training.compiled.compiled_step import CompiledStep
from pyro_recursive.training.compiled.loop_graph import changed_inputs

pytestmark = pytest.mark.filterwarnings("ignore:Plate 'data' encloses")

X = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    scale = pyro.param("scale", lambda: torch.tensor(0.8))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


def mixed(x: Tensor) -> None:
    """Rows of two kinds."""
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * kind, 1.0), obs=x)


def mixed_guide(x: Tensor) -> None:
    logits = pyro.param("logits", lambda: torch.linspace(-1.0, 1.0, 4))
    with pyro.plate("data", len(x)):
        pyro.sample("kind", dist.Bernoulli(logits=logits))


def gamma_guide(x: Tensor) -> None:
    rate = pyro.param("rate", lambda: torch.tensor(1.2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Gamma(rate.exp(), 2.0))


def gamma_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def trained(make: Callable[..., Any], program: tuple, loss: Any, steps: Callable) -> list[Tensor]:
    """Return what ``steps`` returns, the parameters after it and the next random number."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    losses = steps(make(*program, Adam({"lr": 0.05}), loss()))
    found = [p.detach().clone() for _, p in pyro.get_param_store().named_parameters()]
    return [torch.as_tensor(losses), *found, torch.rand(())]


def twenty(svi: Any) -> list[float]:
    return [svi.step(X) for _ in range(20)]


def check_same(one: list[Tensor], other: list[Tensor]) -> None:
    for expected, found in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def named(engine: Any) -> Callable[..., CompiledSVI]:
    return partial(CompiledSVI, engine=engine, strict=True)


PROGRAMS = {
    "bernoulli": ((mixed, mixed_guide), partial(IWAE_ELBO, 4, estimator="vimco")),
    "gamma": ((gamma_model, gamma_guide), partial(IWAE_ELBO, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["flat", "loop", "replay"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_random_numbers_drawn_in_the_graph_are_those_of_svi(program: str, engine: str) -> None:
    own, loss = PROGRAMS[program]
    check_same(trained(SVI, own, loss, twenty), trained(named(engine), own, loss, twenty))


def blocks(svi: Any) -> Tensor:
    """Take a whole block, then steps on data that lie elsewhere."""
    svi.step(X)
    svi.step(X)
    first = svi.run(64, X)
    return torch.cat([first, svi.run(3, X + 1), svi.run(64, X - 1), svi.run(70, X * 2)])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["flat", "loop", "replay"])
def test_data_may_lie_elsewhere_after_a_whole_block(engine: str) -> None:
    own = (model, guide), partial(IWAE_ELBO, 3, estimator="dreg"), blocks
    check_same(trained(named("graph"), *own), trained(named(engine), *own))


class Wrong(engines.CallEngine):
    """Takes steps that are right but for one of its tensors."""

    def __init__(self, step: Any, wrong: Callable[[Any], Tensor], count: int) -> None:
        super().__init__(step, step.module, "replay")
        self.wrong, self.later = wrong(step), count

    def run(self, count: int) -> None:
        super().run(count)
        if count >= self.later:
            self.wrong.add_(1e-3 if self.wrong.is_floating_point() else 1)


WRONG: dict[str, Callable[[Any], Tensor]] = {
    "parameters": lambda step: step.groups[0].values,
    "moments": lambda step: step.groups[0].slots["exp_avg_sq"],
    "counts": lambda step: step.groups[0].steps,
    "losses": lambda step: step.losses,
}


@pytest.mark.quick("1-counts")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("count", [1, 2])
def test_a_wrong_engine_never_trains(
    wrong: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lambda step, compiled: Wrong(step, WRONG[wrong], count)  # noqa: E731
    monkeypatch.setattr(engines, "ReplayEngine", made)
    monkeypatch.setattr(engines, "LoopEngine", made)
    monkeypatch.setattr(engines, "compile_graph", lambda module, tensors, **options: module)
    own = (model, guide), partial(IWAE_ELBO, 3)

    def steps(svi: CompiledSVI) -> list[float]:
        losses = twenty(svi)
        (found,) = svi._steps._steps.values()
        assert isinstance(found[0], CompiledStep) and found[0].engine.name == "flat"
        return losses

    check_same(trained(SVI, *own, twenty), trained(named("auto"), *own, steps))
    with pytest.raises(NotImplementedError, match="'replay' takes other steps than the graph"):
        trained(named("replay"), *own, twenty)


def test_an_engine_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(engines, "compile_graph", broken)
    own = (model, guide), partial(IWAE_ELBO, 3), twenty
    with pytest.warns(UserWarning, match="run eagerly: engine 'flat': RuntimeError: no compiler"):
        found = trained(partial(CompiledSVI, engine="flat"), *own)
    check_same(trained(SVI, *own), found)


class Scaled(engines.CallEngine):
    """Takes steps of which the later losses are wrong by a factor."""

    def run(self, count: int) -> None:
        super().run(count)
        self.step.losses[1:] *= SCALE


SCALE = 1 + 2e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_loss_of_an_engine_has_a_small_tolerance(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the tolerance is greater than this error."""
    make = lambda step, compiled: Scaled(step, step.module, "replay")  # noqa: E731
    monkeypatch.setattr(engines, "ReplayEngine", make)
    monkeypatch.setattr(engines, "compile_graph", lambda module, tensors, **options: module)

    def steps(svi: Any) -> list[float]:
        return [svi.step(X.to(dtype)) for _ in range(3)]

    is_wrong = dtype == torch.float64
    takes = pytest.raises(NotImplementedError, match="takes other steps than the graph")
    torch.set_default_dtype(dtype)
    try:
        with takes if is_wrong else nullcontext():
            trained(named("replay"), (model, guide), partial(IWAE_ELBO, 3), steps)
    finally:
        torch.set_default_dtype(torch.float64)


class Stale(engines.CallEngine):
    """Takes steps on the argument, or the rows of a table, with which it was made."""

    def __init__(self, step: Any, compiled: Any) -> None:
        super().__init__(step, step.module, "replay")

    def rebind(self) -> None:
        super().rebind()
        table = self.step.table
        owner = self.step.inputs[0] if table is None else table.index
        number = next(n for n, each in enumerate(self.tensors) if each is owner)
        self.tensors[number] = owner.clone() if table is None else owner[:1].expand_as(owner)


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ReplayEngine", Stale)
    monkeypatch.setattr(engines, "compile_graph", lambda module, tensors, **options: module)


@pytest.mark.usefixtures("stale")
def test_steps_on_other_arguments_are_compared_again() -> None:
    def steps(svi: Any) -> list[float]:
        return [svi.step(X) for _ in range(5)] + [svi.step(X + 1.0) for _ in range(5)]

    own = (model, guide), partial(IWAE_ELBO, 3), steps
    with pytest.raises(NotImplementedError, match="a compiled step differs from an eager one"):
        trained(named("replay"), *own)
    with pytest.warns(UserWarning, match="a compiled step differs from an eager one"):
        check_same(trained(SVI, *own), trained(partial(CompiledSVI, engine="replay"), *own))


@pytest.mark.usefixtures("stale")
def test_an_engine_is_checked_on_several_minibatches() -> None:
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="'replay' takes other steps than the graph"):
        fit(model, guide, X, loss=IWAE_ELBO(1), batch_size=1, epochs=2, compile="replay")


FIXED = torch.tensor([[[0.3, 1.0, -0.5]]], dtype=torch.float64)


def smoothed(x: Tensor) -> None:
    model(torch.nn.functional.conv1d(x[None, None], FIXED, padding=1)[0, 0])


@pytest.mark.slow
def test_replayed_steps_compute_convolutions_anew() -> None:
    """Their results have no buffer of their own in generated code."""

    def steps(svi: Any) -> list[float]:
        return [svi.step(x) for _ in range(3) for x in (X, X, X, X + 1.0, X.flip(0))]

    own = (smoothed, guide), partial(IWAE_ELBO, 3), steps
    check_same(trained(SVI, *own), trained(named("replay"), *own))


def _by_argument(x: Tensor) -> None:
    torch.ops.aten.add.out(x, 1.0, out=x)


def _by_piece(x: Tensor) -> None:
    x.unbind()[1].add_(1.0)


def _by_list(x: Tensor) -> None:
    torch._foreach_add_([x.view(-1)], 1.0)


def _by_batch_norm(x: Tensor) -> None:
    torch.nn.functional.batch_norm(torch.ones(2, 3), x, torch.ones(3), training=True)


CHANGES = [_by_argument, _by_piece, _by_list, _by_batch_norm, lambda x: x[0].mul_(2.0)]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_changes_is_known(change: Callable[[Tensor], None]) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        change(y)
        return x + y

    assert changed_inputs(make_fx(function)(torch.ones(3), torch.ones(3))) == [1]


def test_names_of_engines_are_checked() -> None:
    with pytest.raises(ValueError, match=r"engine must be an engine .*'graph'.*, got 'fast'"):
        trained(partial(CompiledSVI, engine="fast"), (model, guide), partial(IWAE_ELBO, 3), twenty)


@pytest.mark.slow
def test_an_engine_that_cannot_be_bound_again_gives_way() -> None:
    def broken() -> None:
        raise RuntimeError("no room")

    def steps(svi: Any) -> list[float]:
        losses = [svi.step(X) for _ in range(4)]
        if isinstance(svi, CompiledSVI):
            (found,) = svi._steps._steps.values()
            engine: Any = found[0].engine
            engine.rebind = broken
        return losses + [svi.step(X + 1.0) for _ in range(6)]  # where they lie changes

    own = (model, guide), partial(IWAE_ELBO, 3), steps
    check_same(trained(SVI, *own), trained(named("graph"), *own))


@pytest.mark.usefixtures("in_the_foreground")
def test_an_interrupt_ends_a_run_between_two_blocks() -> None:
    made: list[CompiledSVI] = []

    def interrupted(svi: CompiledSVI) -> list[float]:
        svi.run(4, X)
        (found,) = svi._steps._steps.values()
        engine: Any = found[0].engine
        function, calls = engine.function, iter(range(1000))

        def interrupting(*tensors: Tensor) -> None:
            function(*tensors)
            if next(calls) == 3:
                signal.raise_signal(signal.SIGINT)

        engine.function = interrupting
        with pytest.raises(KeyboardInterrupt):
            svi.run(1000, X)
        made.append(svi)
        return []

    trained(named("graph"), (model, guide), partial(IWAE_ELBO, 3), interrupted)
    steps = [
        (int(state["step"]), int(group.steps[0]))
        for group in next(iter(made[0]._steps._steps.values()))[0].groups
        for member in group.members
        for state in member.optimizer.state_dict()["state"].values()
    ]
    assert set(steps) == {(68, 68)}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("program", [*PROGRAMS, "normal"])
def test_captured_steps_are_those_of_svi(program: str) -> None:
    """A weight of the latents that changes is seen, and draws in the graph are fresh."""
    own, loss = PROGRAMS.get(program, ((model, guide), partial(IWAE_ELBO, 3)))

    def steps(svi: Any) -> list[float]:
        losses = []
        for step in range(20):
            with KLWarmup((step + 1) / 20):
                losses.append(svi.step(X.cuda()))
        return losses

    with torch.device("cuda"):
        check_same(trained(SVI, own, loss, steps), trained(named("replay"), own, loss, steps))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_blocks_do_not_wait_for_the_device() -> None:
    def steps(svi: CompiledSVI) -> Tensor:
        data = X.cuda()
        svi.step(data)
        svi.step(data)
        svi.run(64, data)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return svi.run(100, data)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    own = (model, guide), partial(IWAE_ELBO, 3), steps
    with torch.device("cuda"):
        check_same(trained(named("flat"), *own), trained(named("replay"), *own))
