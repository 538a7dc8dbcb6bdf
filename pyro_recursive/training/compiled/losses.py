"""Losses as they are traced: those with stages one stage at a time, Pyro's by their gradients."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, ReweightedWakeSleep
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_recursive.losses.base import LogWeightELBO
from pyro_recursive.tracing.param_store import parameters_in, unconstrained
from pyro_recursive.tracing.protocols import StagedLoss

ENDLESS = 2**31  # steps


class TracedLoss(NamedTuple):
    """A loss of a model and a guide: with its graph, and what a step depends on beside arguments.

    ``stage`` returns that, and for how many steps it stays the same: 0 where a step runs eagerly.
    ``advance`` notes a number of compiled steps, with the arguments of the first; ``roots`` are
    what its Python values are reached from.
    """

    differentiable: Callable[..., Tensor]
    stage: Callable[[], tuple[Any, int]]
    advance: Callable[..., None]
    roots: dict[str, Any]


def traced_loss(model: Callable, guide: Callable, loss: ELBO) -> TracedLoss:
    """Return a loss in the form that is traced."""
    if isinstance(loss, ReweightedWakeSleep):
        raise TypeError("ReweightedWakeSleep has two losses. Train with pyro.infer.SVI.")
    roots = {"model": model, "guide": guide, "loss": loss}
    if isinstance(loss, StagedLoss):
        staged = partial(loss.stage_loss, model, guide)
        advance = partial(loss.count_steps, guide)
        return TracedLoss(staged, partial(loss.stage_of, guide), advance, roots)
    differentiable: Callable[..., Tensor] = partial(_from_gradients, loss)
    if isinstance(loss, LogWeightELBO):
        differentiable = loss.differentiable_loss
    run = partial(differentiable, model, guide)
    return TracedLoss(run, lambda: (None, ENDLESS), lambda *_, **__: None, roots)


def _from_gradients(
    loss: ELBO, model: Callable, guide: Callable, /, *args: Any, **kwargs: Any
) -> Tensor:
    """Return a loss of Pyro with the gradients that it gives the parameters."""
    forgotten = ForgottenGradients()
    forgotten.forget(vars(pyro.get_param_store())["_params"].values())
    try:
        with forgotten, poutine.trace(param_only=True) as captured:
            value: Any = loss.loss_and_grads(model, guide, *args, **kwargs)
        leaves = _leaves(parameters_in(captured.trace).values())
        reached = [each for each in leaves if each.grad is not None]
        gradients = [each.grad for each in reached]
    finally:
        for parameter, gradient in forgotten.before.items():
            parameter.grad = gradient
    return _WithGradients.apply(torch.as_tensor(value), gradients, *reached)


class ForgottenGradients(Messenger):
    """Sets parameters' gradients aside in ``before``, also of those not in Pyro's store."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[Tensor, Tensor | None] = {}

    def forget(self, parameters: Iterable[Tensor]) -> None:
        for parameter in _leaves(parameters):
            if parameter not in self.before:  # else it is that of an earlier particle
                self.before[parameter] = parameter.grad
                parameter.grad = None

    def _pyro_post_param(self, message: Any) -> None:
        self.forget([unconstrained(message["value"])])


def _leaves(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters that need a gradient, each once."""
    return list({id(each): each for each in parameters if each.requires_grad}.values())


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        return None, None, *(outer[0] * each for each in ctx.gradients)
