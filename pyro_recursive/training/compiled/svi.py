"""`CompiledSVI`: the steps of `pyro.infer.SVI` as one compiled graph each."""

import operator
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.graphs.calls import Call
from pyro_recursive.tracing.param_store import parameters_in
from pyro_recursive.training.compiled.compiled_step import CompiledStep
from pyro_recursive.training.compiled.engines import EngineName, check_engine
from pyro_recursive.training.compiled.flat import Owners
from pyro_recursive.training.compiled.losses import traced_loss
from pyro_recursive.training.compiled.steps import CompiledSteps, Training
from pyro_recursive.training.interrupts import Interrupts


class CompiledSVI:
    """`pyro.infer.SVI` with compiled steps: loss, gradients and update are one graph.

    Steps run eagerly until enough of them were taken, or are known to come in `run`, to earn the
    seconds of compiling back; with an engine by name or ``strict`` the second one compiles. A
    step has the random numbers and, to rounding, the result of `SVI.step`. `run` takes many steps
    at once on the same arguments, faster still, with other random numbers of the same law. Calls of
    another shape have a graph of their own. What cannot be compiled runs eagerly, with one warning.

    Args:
        model, guide, loss: as for `SVI`; losses of Pyro, too.
        optim: a `PyroOptim`, or a torch optimiser of all parameters: Adam, AdamW, SGD, RMSprop,
            Adagrad or Pyro's ClippedAdam.
        engine: how steps run: ``"replay"`` of recorded kernel calls, a compiled ``"loop"``, one
            ``"flat"`` call of compiled code a step, the uncompiled ``"graph"``, ``"eager"``;
            ``"auto"`` takes the fastest that can.
        strict: whether to raise where steps would run eagerly.
        cache: a folder in which compiled graphs are kept for other processes of the same user on
            the same machine; a graph that is found there is used at once.

    Raises ValueError for another engine, and with ``strict`` NotImplementedError for what cannot
    be compiled; it names where.

    >>> import pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    >>> adam = pyro.optim.Adam({"lr": 0.01})
    >>> svi = CompiledSVI(model, AutoNormal(model), adam, Trace_ELBO(), engine="graph")
    >>> svi.run(100, torch.ones(10)).shape
    torch.Size([100])
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim | Optimizer,
        loss: ELBO,
        *,
        engine: EngineName = "auto",
        strict: bool = False,
        cache: str | os.PathLike | None = None,
    ) -> None:
        check_engine(engine=engine)
        if not isinstance(optim, PyroOptim | Optimizer):
            raise TypeError(
                f"optim must be a PyroOptim or a torch optimiser, got {type(optim).__name__}."
            )
        if not isinstance(loss, ELBO):
            raise TypeError(f"loss must be a pyro.infer.ELBO, got {type(loss).__name__}.")
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self._options = engine, strict, cache
        self._trained: tuple[Any, ...] | None = None  # what the steps are those of

    @property
    def _steps(self) -> CompiledSteps:
        """The compiled steps, made anew where an attribute has another value, as `SVI` allows."""
        parts = self.model, self.guide, self.optim, self.loss
        if self._trained is None or any(map(operator.is_not, parts, self._trained)):
            traced = traced_loss(self.model, self.guide, self.loss)
            optim = self.optim
            others = partial(_parameters, optim)
            training = Training(traced, self._eager, Owners(lambda: optim), others)
            self._made = CompiledSteps(training, *self._options)
            self._trained = parts
        return self._made

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step and return the loss before it, in nats."""
        call = Call(args, kwargs)
        found = self._steps.find(call)
        if isinstance(found, CompiledStep):
            found = found.take()
        return found.item()

    def run(self, num_steps: int, *args: Any, **kwargs: Any) -> Tensor:
        """Take steps on the same arguments; return their losses ``[num_steps]``, in nats."""
        check_at_least(1, num_steps=num_steps)
        call, losses = Call(args, kwargs), list[Tensor]()
        done = 0
        while done < num_steps:
            found = self._steps.find(call, num_steps - done)
            if isinstance(found, CompiledStep):
                groups = found.groups
                with Interrupts() as interrupts:  # Ctrl-C ends the run between two blocks
                    found = found.take_many(num_steps - done).clone()
                    for group in groups:
                        group.write_counts()
                interrupts.check()
            losses.append(found.detach().reshape(-1))
            done += len(losses[-1])
        return torch.cat([each.to(losses[-1]) for each in losses])

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss in nats, without a step."""
        with torch.no_grad():
            return self.loss.loss(self.model, self.guide, *args, **kwargs)

    def _eager(self, call: Call) -> Tensor:
        with poutine.trace(param_only=True) as captured:
            loss = self.loss.loss_and_grads(self.model, self.guide, *call.args, **call.kwargs)
        parameters = dict.fromkeys(parameters_in(captured.trace).values())
        if isinstance(self.optim, PyroOptim):
            self.optim(parameters)
        else:
            self.optim.step()
        pyro.infer.util.zero_grads(parameters)
        return torch.as_tensor(loss, dtype=torch.float64)


def _parameters(optim: PyroOptim | Optimizer) -> list[Tensor]:
    """Return the parameters that an optimiser changes in each step, whatever the loss reaches."""
    groups = optim.param_groups if isinstance(optim, Optimizer) else []
    return [parameter for group in groups for parameter in group["params"]]
