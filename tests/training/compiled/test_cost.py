"""Nothing is compiled for fewer steps than earn it back, unless it is asked for."""

from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_recursive import CompiledSVI, fit
from pyro_recursive.tracing.graphs import compiler
from pyro_recursive.training.compiled import steps
from pyro_recursive.training.compiled.steps import FEWEST, steps_to_earn

X = torch.arange(12.0, dtype=torch.float64)
NEEDED, TRACING = 12, 3  # steps, in these tests


class Compiler:
    """Stands for torch's: returns a graph as it is, and counts steps, not the loops of these."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, module: Any, *args: Any, options: dict[str, Any], aot: bool, **kwargs: Any
    ) -> Any:
        self.calls += "cpp_wrapper" not in options["config_patches"]
        return module


@pytest.fixture(autouse=True)
def compiler_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    found = Compiler()
    monkeypatch.setattr("torch._inductor.standalone_compile", found)
    monkeypatch.setattr(compiler, "_kept", OrderedDict())
    monkeypatch.setattr(steps, "FEWEST", NEEDED // 2)
    monkeypatch.setattr(steps, "TRACING", TRACING)
    monkeypatch.setattr(steps, "steps_to_earn", lambda operations: NEEDED)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return found


SHIFT = [0.0]


def model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("data", 12, subsample=x):
        pyro.sample("x", dist.Normal(mean + SHIFT[0], 1.0), obs=x)


def svi_of(**options: Any) -> CompiledSVI:
    pyro.clear_param_store()
    torch.manual_seed(0)
    optim = pyro.optim.Adam({"lr": 0.05})
    return CompiledSVI(model, AutoNormal(model), optim, Trace_ELBO(), **options)


def test_a_larger_graph_needs_fewer_steps_down_to_a_bound() -> None:
    found = [steps_to_earn(operations) for operations in (1, 100, 1000, 10**6, 10**9)]
    assert found == sorted(found, reverse=True)
    assert found[-1] in (FEWEST, FEWEST + 1)


@pytest.mark.quick("1", "13")
@pytest.mark.parametrize("number", [1, NEEDED, NEEDED + 1, NEEDED + 2])
def test_run_compiles_for_enough_steps(compiler_of_torch: Compiler, number: int) -> None:
    assert svi_of().run(number, X).shape == (number,)
    assert compiler_of_torch.calls == (number > NEEDED)  # the first step is eager in any case


def test_step_compiles_after_as_many_steps_as_earn_it_back(compiler_of_torch: Compiler) -> None:
    svi, calls, losses = svi_of(), [], []
    for _ in range(NEEDED + 3):
        losses.append(svi.step(X))
        calls.append(compiler_of_torch.calls)
    assert calls == [0] * NEEDED + [1] * 3
    svi = svi_of(engine="eager")
    assert losses == pytest.approx([svi.step(X) for _ in range(NEEDED + 3)], rel=1e-12)


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", [{"engine": "flat"}, {"strict": True}], ids=str)
def test_what_is_asked_for_is_compiled_at_once(
    compiler_of_torch: Compiler, options: dict[str, Any]
) -> None:
    svi = svi_of(**options)
    for _ in range(2):
        svi.step(X)
    assert compiler_of_torch.calls == 1


@pytest.mark.slow
def test_what_was_compiled_before_is_used_once_tracing_pays(compiler_of_torch: Compiler) -> None:
    svi_of().run(NEEDED + 1, X)
    for number in (TRACING, TRACING + 1):
        svi = svi_of()
        svi.run(number, X)
        assert bool(svi._steps._steps.get(key_of(svi))) == (number > TRACING)
    svi_of().run(TRACING + 1, X[:5])  # of another form, which is not known
    assert compiler_of_torch.calls == 1


@pytest.mark.slow
def test_what_is_in_a_folder_is_used_at_once(compiler_of_torch: Compiler, tmp_path: Path) -> None:
    svi_of().run(NEEDED + 1, X)
    svi = svi_of(cache=tmp_path / "cache")
    svi.run(2, X)
    assert svi._steps._steps.get(key_of(svi))
    assert compiler_of_torch.calls == 1


def key_of(svi: CompiledSVI) -> Any:
    (key,) = svi._steps._graphs
    return key


@pytest.mark.slow
def test_each_new_graph_is_earned(compiler_of_torch: Compiler) -> None:
    svi = svi_of()
    try:
        for shift in (1.0, 2.0, 1.0):
            SHIFT[0] = shift
            for _ in range(NEEDED + 1):
                svi.step(X)
        assert compiler_of_torch.calls == 2
        SHIFT[0] = 3.0
        for _ in range(NEEDED - 1):
            svi.step(X)
        assert compiler_of_torch.calls == 2
    finally:
        SHIFT[0] = 0.0


@pytest.mark.quick("4-3-1")
@pytest.mark.parametrize(
    ("epochs", "rows", "compiled"), [(3, 3, 0), (4, 3, 1), (12, 12, 0), (13, 12, 1), (7, 8, 0)]
)
def test_fit_compiles_for_enough_steps(
    compiler_of_torch: Compiler, epochs: int, rows: int, compiled: int
) -> None:
    calls: list[int] = []
    pyro.clear_param_store()
    history = fit(
        model,
        AutoNormal(model),
        X,
        loss=Trace_ELBO(),
        epochs=epochs,
        batch_size=rows,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        progress=False,
        on_step=lambda *step: calls.append(compiler_of_torch.calls),
        compile=True,
    )
    assert calls == [0] + [compiled] * (history.steps[-1] - 1)  # the first step is eager
