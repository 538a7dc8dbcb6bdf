"""Nothing that a program depends on is forgotten by its graph: scenarios against `SVI`."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_recursive import (
    IWAE_ELBO,
    SIWAE_ELBO,
    AmortizedGuide,
    CompiledSVI,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    fit,
)
from pyro_recursive.tracing.graphs.calls import Call
from pyro_recursive.tracing.graphs.python_state import PythonState
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.training.compiled.steps import CompiledSteps
from tests.training.compiled.scenarios import (
    X,
    adam,
    before_and_after,
    check,
    guide,
    results,
    shifted,
    traced,
)

pytestmark = pytest.mark.filterwarnings("ignore:Plate 'data' encloses")


# Python values.

SETTINGS = {"shift": 0.0}
NAMESPACE = ModuleType("settings_of_a_test")
NAMESPACE.shift = 0.0  # type: ignore[attr-defined]
GLOBAL = 0.0


class Shift:
    by_class = 0.0

    def __init__(self) -> None:
        self.own, self.many = 0.0, [0.0]

    def of_global(self) -> float:
        return GLOBAL

    def in_class(self, x: Tensor) -> None:
        shifted(x, self.by_class)

    def in_method(self, x: Tensor) -> None:
        shifted(x, self.of_global())

    def in_attribute(self, x: Tensor) -> None:
        shifted(x, self.own)

    def in_sum(self, x: Tensor) -> None:
        shifted(x, sum(self.many))


def in_dict(x: Tensor) -> None:
    shifted(x, SETTINGS["shift"])


def in_global(x: Tensor) -> None:
    shifted(x, GLOBAL)


def in_module(x: Tensor) -> None:
    shifted(x, NAMESPACE.shift)


def in_default(x: Tensor, shift: float = 0.0) -> None:
    shifted(x, shift)


def in_keyword(x: Tensor, *, shift: float = 0.0) -> None:
    shifted(x, shift)


OWNER, PARTIAL = Shift(), partial(shifted, shift=0.0)


def in_closure() -> tuple[Callable, Callable]:
    shift = 0.0

    def model(x: Tensor) -> None:
        shifted(x, shift)

    def change(to: float) -> None:
        nonlocal shift
        shift = to

    return model, change


def _set_default(to: float) -> None:
    in_default.__defaults__ = (to,)


CLOSURE = in_closure()
HERE = vars(sys.modules[__name__])
READERS: dict[str, tuple[Callable, Callable[[float], Any]]] = {
    "closure": CLOSURE,
    "dict": (in_dict, lambda to: SETTINGS.update(shift=to)),
    "global": (in_global, lambda to: HERE.update(GLOBAL=to)),
    "module": (in_module, lambda to: setattr(NAMESPACE, "shift", to)),
    "default": (in_default, _set_default),
    "keyword": (in_keyword, lambda to: in_keyword.__kwdefaults__.update(shift=to)),
    "partial": (PARTIAL, lambda to: PARTIAL.keywords.update(shift=to)),
    "attribute": (OWNER.in_attribute, lambda to: setattr(OWNER, "own", to)),
    "class": (OWNER.in_class, lambda to: setattr(Shift, "by_class", to)),
    "method": (OWNER.in_method, lambda to: HERE.update(GLOBAL=to)),
    "entry": (OWNER.in_sum, lambda to: OWNER.many.__setitem__(0, to)),
    "longer": (OWNER.in_sum, lambda to: OWNER.many.__setitem__(slice(1, None), [to] * bool(to))),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_python_values_are_compared(reader: tuple[Callable, Callable]) -> None:
    model, change = reader
    change(0.0)
    state = PythonState({"model": model})
    assert state.changed() is None
    try:
        change(5.0)
        assert state.changed() is not None
    finally:
        change(0.0)


@pytest.mark.quick("closure")
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_python_values_that_change_are_seen(reader: tuple[Callable, Callable]) -> None:
    model, change = reader

    def scenario(make: Callable[..., Any]) -> list[Any]:
        change(0.0)
        return before_and_after(model, lambda: change(5.0))(make)

    try:
        check(scenario)
    finally:
        change(0.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (((X, None), {}), ((None, X), {})),
        (((X, 2), {}), ((2, X), {})),
        ((({"a": X, "b": None},), {}), (({"a": None, "b": X},), {})),
        (((), {"image": X, "text": None}), ((), {"image": None, "text": X})),
    ],
)
def test_calls_whose_tensor_is_elsewhere_have_other_graphs(one: Any, other: Any) -> None:
    assert Call(*one).key == Call(*one).key
    assert Call(*one).key != Call(*other).key


def test_each_of_two_data_may_be_missing() -> None:
    def model(image: Tensor | None = None, text: Tensor | None = None) -> None:
        shifted(X if image is None else image, 0.0 if text is None else text)

    def own_guide(*data: Any) -> None:
        guide(X)

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(model, own_guide, adam(), IWAE_ELBO(3))
        losses = [svi.step(X + 1.0, None) for _ in range(4)]
        return losses + [svi.step(None, X + 1.0) for _ in range(4)]

    check(scenario)


def test_data_of_closures_may_be_rebound_or_change_in_place() -> None:
    def scenario(make: Callable[..., Any], is_rebound: bool) -> list[Any]:
        data = SimpleNamespace(x=X.clone())

        def change() -> None:
            data.x = data.x + 3.0 if is_rebound else data.x.add_(3.0)

        def model() -> None:
            shifted(data.x)

        def own_guide() -> None:
            guide(data.x)

        svi = make(model, own_guide, adam(), IWAE_ELBO(3))
        losses = [svi.step() for _ in range(4)]
        change()
        return losses + [svi.step() for _ in range(4)]

    for is_rebound in (False, True):
        check(partial(scenario, is_rebound=is_rebound))


def test_parameters_with_an_entry_of_minus_infinity_are_compared_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_logits(x: Tensor) -> None:
        logits = pyro.param("logits", lambda: torch.tensor([0.0, 1.0, 2.0]).log())
        with pyro.plate("data", len(x)):
            loc = (logits.softmax(0) * torch.tensor([3.0, 0.5, -0.5])).sum()
            pyro.sample("z", dist.Normal(loc, 0.7))

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(shifted, with_logits, adam(), IWAE_ELBO(2))
        return [svi.step(X) for _ in range(4)]

    compared = list[bool]()
    compare = CompiledSteps._compared

    def counted(self: Any, key: Any, step: Any, call: Any) -> Tensor:
        result = compare(self, key, step, call)
        compared.append(step.is_compared)
        return result

    monkeypatch.setattr(CompiledSteps, "_compared", counted)
    check(scenario)
    assert compared == [True]


@pytest.mark.slow
def test_attributes_of_a_loss_may_change() -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        loss = IWAE_ELBO(2)
        svi = make(shifted, guide, adam(), loss)
        losses = [svi.step(X) for _ in range(4)]
        loss.num_particles = 5
        return losses + [svi.step(X) for _ in range(4)]

    check(scenario)


# Modules.


class Net(nn.Module):
    """An encoder with dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1, 3, bias=False), nn.BatchNorm1d(3), nn.Dropout(0.4), nn.Linear(3, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def encoded(net: nn.Module) -> Callable:
    def own_guide(x: Tensor) -> None:
        pyro.module("net", net)
        loc, scale = net(x[:, None]).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    return own_guide


@pytest.mark.quick("dreg")
@pytest.mark.parametrize("estimator", ["pathwise", "stl", "dreg"])
def test_dropout_and_batch_norm_are_those_of_svi(estimator: Any) -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        net = Net()
        svi = make(shifted, encoded(net), adam(), IWAE_ELBO(3, estimator=estimator))
        losses = [svi.step(X) for _ in range(5)]
        net.eval()
        losses += [svi.step(X) for _ in range(3)]
        net.train()
        return [*losses, *(svi.step(X) for _ in range(3)), *net.buffers()]

    check(scenario)


@pytest.mark.quick("dreg")
@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_both_runs_of_a_guide_have_the_same_dropout(estimator: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def scenario(make: Callable[..., Any]) -> list[Any]:
        net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 2))

        def own_guide(x: Tensor) -> None:
            pyro.module("net", net)
            loc, scale = net(x[:, None]).unbind(-1)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("y", dist.Normal(loc + 0.5 * z, scale.exp()))  # depends on a sample

        svi = make(model, own_guide, adam(), IWAE_ELBO(3, estimator=estimator))
        return [svi.step(X) for _ in range(6)]

    check(scenario)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:bias was not registered")
def test_parameters_may_be_frozen() -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        net = nn.Linear(1, 2)
        svi = make(shifted, encoded(net), adam(), IWAE_ELBO(3))
        losses = [svi.step(X) for _ in range(4)]
        net.bias.requires_grad_(False)
        losses += [svi.step(X) for _ in range(4)]
        net.bias.requires_grad_(True)
        return losses + [svi.step(X) for _ in range(4)]

    check(scenario)


@pytest.mark.slow
@pytest.mark.parametrize("base", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_of_the_user_train_as_those_of_pyro(base: Any) -> None:
    class Own(base):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(shifted, Own(shifted), adam(), IWAE_ELBO(3))
        return [svi.step(X) for _ in range(6)]

    check(scenario)


def test_what_the_class_of_the_user_sets_in_each_run_is_not_pyros() -> None:
    class Own(AutoNormal):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            self.plates = dict(self.plates)
            return found

    with pytest.raises(NotImplementedError, match=r"guide\.plates changes in each run"):
        svi = traced(shifted, Own(shifted), adam(), IWAE_ELBO(3))
        for _ in range(2):
            svi.step(X)


# Parameters and optimisers.


@pytest.mark.slow
def test_a_cleared_store_starts_anew() -> None:
    check(before_and_after(shifted, pyro.clear_param_store))


def test_storage_of_parameters_may_be_replaced() -> None:
    def change() -> None:
        parameter = pyro.get_param_store()._params["loc"]
        parameter.data = torch.tensor(2.0)

    check(before_and_after(shifted, change))


def test_states_of_the_optimiser_are_those_of_svi() -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        optim = adam()
        svi = make(shifted, guide, optim, IWAE_ELBO(3))
        losses = [svi.step(X) for _ in range(6)]
        state = optim.get_state()
        found = [v for _, each in sorted(state.items()) for v in each["state"][0].values()]
        found = [torch.as_tensor(each).clone() for each in found]
        for each in optim.optim_objs.values():
            saved = each.state_dict()
            saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"] + 1.0
            saved["state"][0]["step"] = torch.tensor(2.0)
            each.load_state_dict(saved)
        return [*losses, *found, *(svi.step(X) for _ in range(3))]

    check(scenario)


@pytest.mark.quick("plateau")
@pytest.mark.parametrize("kind", ["exponential", "plateau", "edited"])
def test_learning_rates_may_change(kind: str) -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}}
        optim: Any = adam()
        if kind == "exponential":
            optim = pyro.optim.ExponentialLR({**settings, "gamma": 0.5})
        elif kind == "plateau":
            optim = pyro.optim.ReduceLROnPlateau({**settings, "patience": 0, "factor": 0.1})
        svi, losses = make(shifted, guide, optim, IWAE_ELBO(3)), []
        for _ in range(7):
            losses.append(svi.step(X))
            if kind == "edited":
                for each in optim.optim_objs.values():
                    each.param_groups[0]["lr"] *= 0.5
            else:
                optim.step(*([1.0] if kind == "plateau" else []))
        return losses

    check(scenario)


@pytest.mark.slow
def test_parameters_may_appear_in_a_later_form_of_call() -> None:
    def own_guide(x: Tensor, flag: bool) -> None:
        shift = pyro.param("later", lambda: torch.tensor(0.3)) if flag else 0.0
        loc = pyro.param("loc", lambda: torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + shift, 1.0))

    def model(x: Tensor, flag: bool) -> None:
        shifted(x)

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(model, own_guide, adam(), IWAE_ELBO(3))
        flags = [False] * 3 + [True, False] * 5
        return [svi.step(X, flag) for flag in flags]

    check(scenario)


@pytest.mark.slow
def test_parameters_that_a_call_does_not_reach_are_updated_as_by_pyro() -> None:
    def own_guide(x: Tensor, flag: bool) -> None:
        shift = pyro.param("shift", lambda: torch.tensor(0.3))
        loc = pyro.param("loc", lambda: torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + shift if flag else loc, 1.0))

    def model(x: Tensor, flag: bool) -> None:
        shifted(x)

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(model, own_guide, adam(), IWAE_ELBO(3))
        flags = [False] * 4 + [True] * 4 + [False] * 4
        return [svi.step(X, flag) for flag in flags]

    check(scenario)


# Arguments.


@pytest.mark.slow
def test_arguments_of_any_form() -> None:
    def model(batch: dict[str, Any], factor: float, *rest: Any) -> None:
        shifted(batch["x"], factor * sum(map(torch.mean, batch["more"])))

    def own_guide(batch: dict[str, Any], *rest: Any) -> None:
        guide(batch["x"])

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi, losses = make(model, own_guide, adam(), IWAE_ELBO(3)), []
        for step in range(12):
            rows = torch.randn(9, 2)[::2].t()[step % 2]  # a new object, not contiguous
            batch = {"x": rows[: 1 if step % 3 == 2 else 4], "more": [rows.float(), rows]}
            losses.append(svi.step(batch, float(step % 2)))
        return losses

    check(scenario)


def test_float32_parameters_and_data_train_as_under_svi() -> None:
    def own_guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor(0.1, dtype=torch.float32))
        scale = pyro.param("scale", lambda: torch.tensor(0.8), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.double(), scale))

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(shifted, own_guide, adam(), IWAE_ELBO(3))
        return [svi.step(X) for _ in range(6)]

    for one, other in zip(results(scenario, SVI), results(scenario, traced), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6, check_dtype=True)


# Handlers and stages.


@pytest.mark.slow
def test_handlers_around_steps_may_change_from_step_to_step() -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi, losses = make(shifted, guide, adam(), IWAE_ELBO(3)), []
        mask = torch.tensor([True, True, False, True])
        for step in range(12):
            around: Any = poutine.scale(scale=1.0 + step % 3)
            if step % 4 == 3:
                around = poutine.mask(mask=mask)
            with around, poutine.block(hide=["z"]):
                losses.append(svi.step(X))
        return losses

    check(scenario)


def test_the_weight_of_the_latents_may_change_in_each_step() -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi, losses = make(shifted, guide, adam(), IWAE_ELBO(3, estimator="dreg")), []
        for step in range(12):
            with KLWarmup((step + 1) / 12):
                losses.append(svi.step(X))
        return losses

    check(scenario)


def test_handlers_that_look_at_sites_see_eager_steps() -> None:
    class Counter(Messenger):
        count = 0

        def _pyro_sample(self, msg: Any) -> None:
            self.count += 1

    pyro.clear_param_store()
    svi, counts = CompiledSVI(shifted, guide, adam(), IWAE_ELBO(3), engine="graph"), []
    with pytest.warns(UserWarning, match="Counter around a step may see its sites"):
        for _ in range(4):
            with Counter() as seen:
                svi.step(X)
            counts.append(seen.count)
    assert counts[1:] == counts[-1:] * 3 and counts[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("many", "paths"), [(False, 0), (True, 0), (False, None)])
def test_a_mixture_grows_as_under_svi(many: bool, paths: int | None) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))

    schedule = Schedule(first=12, propose=8, refine=8, draws=64)

    def scenario(make: Callable[..., Any]) -> list[Any]:
        mixture = RecursiveMixtureGuide(model, 2, paths=paths, schedule=schedule)
        joint = SIWAE_ELBO(2) if paths is None else None
        svi, stages = make(model, mixture, adam(), RecursiveMixture_ELBO(4, joint=joint)), []
        if many and isinstance(svi, CompiledSVI):
            svi.run(68)
            assert mixture.members == (0, 1) and mixture.steps_taken == 40
            return []
        losses = []
        for step in range(68):
            with nullcontext() if paths is None else KLWarmup((step + 1) / 68):
                losses.append(svi.step())
            stages.append([*mixture.progress.tolist()])
        return [losses, stages]

    if many:
        results(scenario, traced)
    else:
        check(scenario)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*have no part in the mixture")
def test_members_without_weight_are_dropped_as_under_svi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_recursive.losses.recursive_mixture.WATCHED_EVERY", 3)
    monkeypatch.setattr("pyro_recursive.guides.mixture.recursive.ROWS", 5)

    def model(x: Tensor) -> None:
        shifted(x, pyro.param("shift", lambda: torch.tensor(0.3)))

    def scenario(make: Callable[..., Any]) -> list[Any]:
        schedule = Schedule(first=1, propose=1, refine=1)
        options = {"plate": "data", "weights": "shared", "schedule": schedule}
        mixture = RecursiveMixtureGuide(model, 3, **options)
        mixture.prepare(X)
        mixture.progress.copy_(torch.tensor([5, 0, 0, 1, 1, 1]))
        with torch.no_grad():
            mixture.weights.local_0.fill_(-100.0)
            mixture.weights.local_1.fill_(-100.0)
        svi, losses, progress = make(model, mixture, adam(), RecursiveMixture_ELBO(4)), [], []
        for _ in range(9):
            losses.append(svi.step(X))
            progress.append(mixture.progress.tolist())
        assert progress[4:6] == [[5, 5, 0, 1, 5, 5], [5, 6, 0, 1, 0, 0]]
        return [losses, progress]

    check(scenario)


# Random numbers.


def test_noise_is_fresh_in_each_step_and_the_same_from_the_same_seed() -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(shifted, guide, Adam({"lr": 0.0}), Trace_ELBO())
        return [svi.step(X) for _ in range(8)] + list(
            svi.run(100, X)[:0] if isinstance(svi, CompiledSVI) else ()
        )

    losses = results(scenario, traced)[:8]
    assert len({each.item() for each in losses}) == 8
    again = results(scenario, traced)[:8]
    assert losses == again


# Values read in Python.


@pytest.mark.slow
def test_masks_read_in_python_have_graphs_of_their_own() -> None:
    def model(x: Tensor, mask: Tensor) -> None:
        kept = x[mask]  # of a size that the mask decides
        shift = 0.1 * float(mask.sum())
        shifted(kept, shift if bool(mask.all()) else -shift)

    def own_guide(x: Tensor, mask: Tensor) -> None:
        guide(x[mask])

    masks = [torch.tensor(each) for each in ([True] * 4, [True, False] * 2, [False] * 3 + [True])]

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(model, own_guide, adam(), IWAE_ELBO(3))
        return [svi.step(X + step, masks[step % 3 if step > 5 else 0]) for step in range(14)]

    check(scenario)


@pytest.mark.slow
def test_masked_latents_are_left_out_as_in_eager_steps() -> None:
    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    masks = [torch.tensor([True, True, False, True]), torch.tensor([True, False, False, True])]

    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(model, guide, adam(), IWAE_ELBO(3))
        return [svi.step(X, masks[step % 2 if step > 4 else 0]) for step in range(10)]

    check(scenario)


def test_seeded_generators_give_the_same_numbers_in_each_step() -> None:
    def model(x: Tensor) -> None:
        generator = torch.Generator().manual_seed(3)
        shifted(x, torch.empty(4).normal_(generator=generator))

    check(before_and_after(model, lambda: None))


def _compares(x: Tensor) -> None:
    z = pyro.sample("one", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(1.0 if z > 0 else -1.0, 1.0).expand(x.shape).to_event(), obs=x)


def _reads(x: Tensor) -> None:
    z = pyro.sample("one", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.item(), 1.0).expand(x.shape).to_event(), obs=x)


def _leaves(x: Tensor) -> None:
    z = pyro.sample("one", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(float(z.detach().numpy()), 1.0).expand(x.shape).to_event(), obs=x)


def _seeds(x: Tensor) -> None:
    torch.manual_seed(0)
    z = pyro.sample("one", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(), obs=x)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_compares, r"read in Python after site 'one' \(test_hazards.py:\d+\)"),
        (_reads, r"read in Python after site 'one' \(test_hazards.py:\d+\)"),
        (_leaves, r"read in Python after site 'one' \(test_hazards.py:\d+\)"),
        (_seeds, "the random state is set back after draws that matter"),
    ],
)
def test_what_cannot_be_traced_runs_eagerly_with_one_warning(model: Callable, message: str) -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi = make(model, AmortizedGuide(model), adam(), IWAE_ELBO(1))
        return [svi.step(X) for _ in range(5)]

    with pytest.warns(UserWarning, match="Training steps run eagerly: ") as caught:
        check(scenario, partial(CompiledSVI, engine="graph"))
    assert len(caught) == 1
    with pytest.raises(NotImplementedError, match=message):
        results(scenario, traced)


def test_networks_whose_graph_does_not_run_take_eager_steps() -> None:
    """LSTMs in float32 have a kernel whose gradient does not run in a graph of `fit`."""
    embedding = nn.Embedding(5, 2, dtype=torch.float32)
    lstm = nn.LSTM(2, 2, batch_first=True, dtype=torch.float32)

    def model(x: Tensor) -> None:
        pyro.module("embedding", embedding)
        pyro.module("lstm", lstm)
        loc = lstm(embedding(x))[0]
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(loc.new_zeros(()), 1.0))
            states = dist.Normal(loc + z[..., None, None], loc.new_ones(()))
            pyro.sample("x", states.to_event(2), obs=torch.zeros_like(loc))

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.1)), 1.0))

    symbols = torch.arange(24).reshape(6, 4) % 5
    options: Any = {"epochs": 3, "batch_size": 2, "compile": "replay", "progress": False}
    with pytest.warns(UserWarning, match="Training steps run eagerly: the graph of a step"):
        assert fit(model, guide, symbols, loss=Trace_ELBO(), **options).steps == [3, 6, 9]
