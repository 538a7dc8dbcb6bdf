"""Normalising flows of the zuko library as Pyro distributions, and with a learnt affine head."""

import copy
from itertools import chain
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.distributions import AffineTransform

__all__ = ["AffineFlow", "ZukoDistribution"]


class ZukoDistribution(TorchDistribution):
    """A zuko ``NormalizingFlow`` over real vectors: batch ``[*batch]``, event ``[D]``.

    ``log_prob`` takes any values, ``[*sample, *batch, D]`` to ``[*sample, *batch]`` in nats. Of its
    own last draw (the same tensor, not equal numbers) it returns the density that came with the
    draw, so that no inverse is computed. That density is a function of the parameters and the
    noise: its derivative by a parameter is the total one, through the draw as well. For the partial
    ones pass another tensor of the same numbers, as in ``log_prob(u.view_as(u))``.

    Raises:
        ValueError: the flow's base is not over all real vectors.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: Any, *, validate_args: bool | None = None) -> None:
        _check_support(flow)
        self.flow = flow
        # (draw, its log-density, whether gradients were on): shared with what `expand` returns.
        self._last: list[tuple[Tensor, Tensor, bool]] = []
        base = flow.base
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ZukoDistribution":
        """Return the flow with a larger batch; its parameters broadcast."""
        expanded = ZukoDistribution(self.flow.expand(torch.Size(batch_shape)), validate_args=False)
        expanded._validate_args = self._validate_args
        expanded._last = self._last
        return expanded

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return reparameterised draws, ``[*sample, *batch, D]``, and keep their log-density."""
        return self.push(self.flow.base.rsample(torch.Size(sample_shape)))

    def push(self, noise: Tensor) -> Tensor:
        """Return the draws that noise becomes, ``[..., *batch, D]``, and keep their log-density."""
        drawn, log_det = self.flow.transform.inv.call_and_ladj(noise)
        log_prob = self.flow.base.log_prob(noise) - log_det
        self._last[:] = [(drawn, log_prob, torch.is_grad_enabled())]
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density at any values that broadcast to the batch."""
        if self._validate_args:
            self._validate_sample(value)
        for drawn, log_prob, with_graph in self._last:
            # A draw that was made a variable later, or without gradients, is scored anew with them.
            same_graph = with_graph and value.requires_grad == log_prob.requires_grad
            if value is drawn and (same_graph or not torch.is_grad_enabled()):
                return log_prob
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.flow.log_prob(value.expand(shape + self.event_shape))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last draw: tensors with a graph cannot be copied."""
        return {**self.__dict__, "_last": []}


class AffineFlow(nn.Module):
    """Builds ``u = loc(c) + scale(c) * f(noise; c)`` from a zuko flow ``f`` and a context ``c``.

    The learnt affine head gives the flow the place and the scale of the data, where splines and
    networks want unit scale. With a context it is a linear function of it.
    """

    def __init__(self, flow: nn.Module, context: int, loc: Tensor, scale: float) -> None:
        super().__init__()
        initial = torch.cat([loc, torch.full_like(loc, scale).log()])
        self.flow = flow.to(loc)
        self.bias, self.linear = nn.Parameter(initial), None
        if context:
            self.linear = nn.Linear(context, len(initial), bias=False).to(loc)

    def head(self, context: Tensor | None) -> Tensor:
        """Return locations and log-scales, ``[*batch, 2 D]``; without a context ``[2 D]``."""
        return self.bias if self.linear is None else self.bias + self.linear(context)

    def forward(self, context: Tensor | None, batch_shape: torch.Size) -> ZukoDistribution:
        """Return the flow given a context ``[*batch, n]``, or none: batch ``[*batch]``.

        Built without gradients it stays without those of its parameters; a value's are kept.
        """
        return self.at(context, self.head(context), batch_shape)

    def at(self, context: Tensor | None, head: Tensor, shape: torch.Size) -> ZukoDistribution:
        """Return the flow given a context and what the affine head makes of one."""
        from zuko.distributions import NormalizingFlow
        from zuko.transforms import ComposedTransform

        loc, log_scale = head.chunk(2, -1)
        # The networks run when a density is asked for, under the grad mode of that time.
        flow = (self.flow if torch.is_grad_enabled() else _frozen(self.flow))(context)
        affine = AffineTransform(loc, log_scale.exp(), event_dim=1)
        transform = ComposedTransform(affine.inv, flow.transform)
        return ZukoDistribution(NormalizingFlow(transform, flow.base.expand(shape)))


def _frozen(module: nn.Module) -> nn.Module:
    """Copy a module without its tensors, which are shared and have no gradient."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor.detach() for tensor in tensors})


def _check_support(flow: Any) -> None:
    support = flow.base.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is not constraints.real:
        raise ValueError(
            f"The flow's base has support {support}, and latents are real vectors: use a flow with "
            "a Gaussian base."
        )
