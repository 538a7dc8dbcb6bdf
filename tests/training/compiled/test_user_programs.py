"""Programs as users write them: compiled steps see what these depend on, or are eager steps."""

import itertools
import multiprocessing
import random
import sys
import threading
from array import array
from collections import ChainMap, UserDict
from collections.abc import Callable
from configparser import ConfigParser
from contextvars import ContextVar
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from scipy import sparse, stats
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from pyro_recursive import IWAE_ELBO, CompiledSVI
from pyro_recursive.tracing.graphs.python_state import PythonState
from pyro_recursive.training.compiled import steps
from tests.training.compiled.scenarios import (
    X,
    adam,
    before_and_after,
    check,
    check_eager,
    guide,
    shifted,
)

pytestmark = pytest.mark.filterwarnings("ignore:Plate 'data' encloses")

# Values that change between steps: (model, change).

Case = tuple[Callable, Callable[[], Any]]
GLOBAL = 0.0


def private_attribute(base: type) -> Case:
    class Model(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._shift = 0.0

        def forward(self, x: Tensor) -> None:
            shifted(x, self._shift)

    model = Model()
    return model, lambda: setattr(model, "_shift", 3.0)


def local_import() -> Case:
    sys.modules["settings_of_a_user"] = module = ModuleType("settings_of_a_user")
    module.shift = 0.0  # type: ignore[attr-defined]

    def model(x: Tensor) -> None:
        from settings_of_a_user import shift  # type: ignore[import-not-found]

        shifted(x, shift)

    return model, lambda: setattr(module, "shift", 3.0)


def by_globals() -> Case:
    globals()["GLOBAL"] = 0.0
    return lambda x: shifted(x, globals()["GLOBAL"]), lambda: globals().update(GLOBAL=3.0)


def context_variable() -> Case:
    variable = ContextVar("shift", default=0.0)
    return lambda x: shifted(x, variable.get()), lambda: variable.set(3.0)


def distribution() -> Case:
    prior = dist.Normal(torch.zeros(4), 1.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", prior), 1.0), obs=x)

    return model, lambda: setattr(prior, "loc", torch.ones(4))


def data_set() -> Case:
    data = TensorDataset(X)
    return lambda x: shifted(data.tensors[0]), lambda: setattr(data, "tensors", (X + 3.0,))


def numbers() -> Case:
    data = X.numpy().copy()
    return lambda x: shifted(torch.tensor(data)), lambda: np.add(data, 3.0, out=data)


def long_list() -> Case:
    data = [0.1] * 100
    return lambda x: shifted(x, sum(data)), lambda: data.__setitem__(50, 3.0)


def sparse_matrix() -> Case:
    data = sparse.csr_matrix(np.diag(X.numpy()))
    change = partial(np.add, data.data, 3.0, out=data.data)
    return lambda x: shifted(torch.tensor(data.diagonal())), change


def containers() -> Case:
    data, own, view = UserDict(shift=0.0), {"shift": 0.0}, array("d", [0.0])
    seen = ChainMap(own)

    def change() -> None:
        data["shift"], own["shift"], view[0] = 1.0, 1.0, 1.0

    return lambda x: shifted(x, data["shift"] + seen["shift"] + view[0]), change


def base_class() -> Case:
    class Base:
        shift = 0.0

    class Model(Base):
        def run(self, x: Tensor) -> None:
            shifted(x, self.shift)

    return Model().run, lambda: setattr(Model, "shift", 3.0)


def schedule() -> Case:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    rates = optimizer.param_groups[0]
    return lambda x: shifted(x, optimizer.param_groups[0]["lr"]), lambda: rates.update(lr=3.0)


def progress_bar() -> Case:
    bar = tqdm(total=10, disable=True)
    return lambda x: shifted(x, bar.n / 10), lambda: setattr(bar, "n", 5)


def shared_number(kind: Callable[..., Any]) -> Case:
    number = kind("d", 0.0)
    return lambda x: shifted(x, number.value), lambda: setattr(number, "value", 3.0)


def frozen_distribution() -> Case:
    """A method of a library reads what the program does not name."""
    prior = stats.norm(1.0)
    return lambda x: shifted(x, float(prior.mean())), lambda: setattr(prior, "args", (3.0,))


def configuration() -> Case:
    settings = ConfigParser()
    settings["model"] = {"shift": "0.0"}
    change = partial(settings["model"].__setitem__, "shift", "3.0")
    return lambda x: shifted(x, float(settings["model"]["shift"])), change


def event() -> Case:
    is_late = threading.Event()
    return lambda x: shifted(x, 3.0 if is_late.is_set() else 0.0), is_late.set


CHANGED = {
    "private of a module": partial(private_attribute, nn.Module),
    "private of a Pyro module": partial(private_attribute, PyroModule),
    **{f.__name__: f for f in (local_import, by_globals, context_variable, distribution)},
    **{f.__name__: f for f in (data_set, numbers, long_list, sparse_matrix, schedule)},
    **{f.__name__: f for f in (containers, base_class, progress_bar, configuration)},
    **{f.__name__: f for f in (frozen_distribution, event)},
    "shared number": partial(shared_number, multiprocessing.Value),
    "raw number": partial(shared_number, multiprocessing.RawValue),
}


@pytest.mark.parametrize("make", CHANGED.values(), ids=CHANGED)
def test_values_are_compared(make: Callable[[], Case]) -> None:
    model, change = make()
    state = PythonState({"model": model})
    assert state.changed() is None
    change()
    assert state.changed() is not None


@pytest.mark.quick("containers")
@pytest.mark.parametrize("make", CHANGED.values(), ids=CHANGED)
def test_values_that_change_are_seen(make: Callable[[], Case]) -> None:
    def scenario(make_svi: Callable[..., Any]) -> list[Any]:
        return before_and_after(*make())(make_svi)

    check(scenario)


def test_tensors_that_runs_change_in_place_are_part_of_the_graph() -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        count = torch.zeros((), dtype=torch.int64)

        def model(x: Tensor) -> None:
            shifted(x, count.add_(1) / 10)

        return [*before_and_after(model, lambda: None)(make), count]

    check(scenario)


def test_tensors_that_runs_leave_alone_are_not_copied() -> None:
    pyro.clear_param_store()
    data, count = torch.zeros(4), torch.zeros(())
    svi = CompiledSVI(
        lambda x: shifted(x, data + count.add_(1)), guide, adam(), IWAE_ELBO(3), engine="graph"
    )
    for _ in range(4):
        svi.step(X)
    ((made,),) = svi._steps._steps.values()
    places = {each.data_ptr() for each in made.step.changed}
    assert count.data_ptr() in places
    assert data.data_ptr() not in places
    assert data.data_ptr() in {each.data_ptr() for each in made.step.gradients.constants}


def test_too_many_forms_are_told_after_another_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor) -> None:
        shifted(x, next(numbers) if len(x) == 4 else 0.0)

    pyro.clear_param_store()
    numbers = iter(range(100))
    monkeypatch.setattr(steps, "MAX_FORMS", 2)
    svi = CompiledSVI(model, guide, adam(), IWAE_ELBO(3), engine="graph")
    with pytest.warns(UserWarning, match="Training steps run eagerly") as caught:
        for count in (4, 3, 2, 1):
            for _ in range(3):
                svi.step(X[:count])
    assert sum("have had 2 forms" in str(each.message) for each in caught) == 1


def test_a_value_that_stays_is_compiled_after_many_that_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def model(x: Tensor, scale: float) -> None:
        with poutine.scale(scale=scale):
            shifted(x)

    made: Any = None

    def scenario(make: Callable[..., Any]) -> list[Any]:
        nonlocal made
        made = make(model, guide, adam(), IWAE_ELBO(3))
        scales = [0.1, 0.2, 0.3, 0.4, 0.5, *[1.0] * 5]
        return [made.step(X, scale) for scale in scales]

    monkeypatch.setattr(steps, "MAX_FORMS", 3)
    check_eager(scenario, "arguments have had 3 forms or values; pass .* as tensors")
    assert list(made._steps._steps) == list(made._steps._graphs)[-1:]


# Values that change in each run.


def counter() -> Callable:
    owner = SimpleNamespace(count=0)

    def model(x: Tensor) -> None:
        owner.count += 1
        shifted(x, owner.count / 10)

    return model


def in_dictionary() -> Callable:
    counts = {"runs": 0}

    def model(x: Tensor) -> None:
        counts["runs"] += 1
        shifted(x, counts["runs"] / 10)

    return model


def in_list() -> Callable:
    runs: list[int] = []

    def model(x: Tensor) -> None:
        runs.append(1)
        shifted(x, len(runs) / 10)

    return model


def in_array() -> Callable:
    counts = np.zeros(2)

    def model(x: Tensor) -> None:
        counts[1] += 1
        shifted(x, float(counts[1]) / 10)

    return model


def in_shared_number() -> Callable:
    count = multiprocessing.Value("d", 0.0)

    def model(x: Tensor) -> None:
        count.value += 1
        shifted(x, count.value / 10)

    return model


def hooked() -> Callable:
    net, seen = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), list[Tensor]()
    net[1].register_full_backward_hook(lambda module, before, after: seen.append(after[0]))

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        shifted(x, net(x[:, None]).squeeze(-1) + 0.1 * len(seen))

    return model


def drawing(draw: Callable[[], float]) -> Callable:
    return lambda x: shifted(x, 5.0 if draw() < 0.1 else 0.0)


def iterating(values: Any) -> Callable:
    return lambda x: shifted(x, next(values))


def changing_argument(x: Tensor) -> None:
    shifted(x.mul_(1.1))


EACH_RUN = {
    "counter": (counter, "model -> owner.count changes in each run"),
    "dictionary": (in_dictionary, r"model -> counts\['runs'\] changes in each run"),
    "hook": (hooked, "model -> seen changes in each run"),
    "list": (in_list, "model -> runs changes in each run"),
    "array": (in_array, "model -> counts changes in each run"),
    "random": (lambda: drawing(random.random), "the state of random changes"),
    "Random": (lambda: drawing(random.Random(1).random), "model -> draw changes"),
    "NumPy": (lambda: drawing(np.random.rand), "the state of numpy.random.* changes"),
    "generator of NumPy": (lambda: drawing(np.random.default_rng(1).random), "model -> draw"),
    "count": (lambda: iterating(itertools.count()), "model -> values is an iterator"),
    "generator": (lambda: iterating(float(n > 6) for n in range(99)), "model -> values is an"),
    "shared": (in_shared_number, "model -> count.* changes in each run"),
    "argument": (lambda: changing_argument, "model or guide change an argument in place"),
}


@pytest.mark.quick("counter", "argument")
@pytest.mark.parametrize(("make", "message"), EACH_RUN.values(), ids=EACH_RUN)
def test_values_that_change_in_each_run_are_those_of_eager_steps(
    make: Callable[[], Callable], message: str
) -> None:
    def scenario(make_svi: Callable[..., Any]) -> list[Any]:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        svi, x = make_svi(make(), guide, adam(), Trace_ELBO()), X.clone()
        return [*(svi.step(x) for _ in range(10)), *x]

    check_eager(scenario, message)


# Gradients.


def named_parameters() -> list[Tensor]:
    return [each for _, each in pyro.get_param_store().named_parameters()]


@pytest.mark.quick(1)
@pytest.mark.parametrize("is_recorded", [True, False])
def test_hooks_of_parameters_run(is_recorded: bool) -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi, seen = make(shifted, guide, pyro.optim.SGD({"lr": 0.05}), IWAE_ELBO(3)), []

        def hook(gradient: Tensor) -> Any:
            return seen.append(gradient.norm()) if is_recorded else 0.1 * gradient

        losses = [svi.step(X) for _ in range(4)]
        for parameter in named_parameters():
            parameter.register_hook(hook)
        return [*losses, *(svi.step(X) for _ in range(4)), *seen]

    check_eager(scenario, "a parameter has hooks")


@pytest.mark.parametrize("first", [4, 1])  # the second step compiles
def test_gradients_from_elsewhere_are_added(first: int) -> None:
    def scenario(make: Callable[..., Any]) -> list[Any]:
        svi, losses = make(shifted, guide, adam(), IWAE_ELBO(3)), []
        for step in range(12):
            if step % 5 == first:
                (3.0 * pyro.param("loc")).backward()
            elif step % 5 == 2:
                pyro.param("loc").grad = None
            losses.append(svi.step(X))
        return losses

    check(scenario)


class Trainer:
    """Trains with methods of its own as model and guide, and notes how it goes."""

    weight = 0.0

    def __init__(self, make: Callable[..., Any]) -> None:
        self.svi = make(self.model, self.guide, adam(), IWAE_ELBO(3))
        self.epoch, self.losses = 0, list[float]()

    def shift(self) -> float:
        return self.weight

    def model(self, x: Tensor) -> None:
        shifted(x, self.shift())

    def guide(self, x: Tensor) -> None:
        guide(x)

    def train(self) -> list[float]:
        for self.epoch in range(12):
            if self.epoch == 4:
                self.weight = 3.0
            elif self.epoch == 8:
                self.shift = lambda: 1.0  # type: ignore[method-assign]
            self.losses.append(self.svi.step(X))
        return self.losses


def test_what_an_object_notes_of_its_training_is_no_part_of_its_model() -> None:
    check(lambda make: Trainer(make).train())  # not one of 8 graphs, and then eager
