"""Normalising flows of the zuko library: as Pyro distributions, by kind, with a learnt affine head.

zuko is an optional dependency, imported only where a flow is built.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.distributions import AffineTransform, Transform

FLOWS = ("coupling", "spline", "iaf", "maf")
SLOPE = 0.1  # bounds scales by 0.1 and 10, against heavy tails in early steps


def build_flow(
    flow: str | Callable, size: int, context: int, transforms: int, hidden: Sequence[int]
) -> nn.Module:
    """Build a zuko flow over vectors of length ``size``; those with a name start as the identity.

    Arguments and errors are those of `FlowGuide`; ``context`` is 0 for none.
    """
    zuko = _zuko()
    if isinstance(flow, str):
        return _named(zuko, flow, size, context, transforms=transforms, hidden_features=hidden)
    built = flow(size, context)
    if not isinstance(built, zuko.lazy.Flow):
        raise TypeError(f"flow returned {type(built).__name__}; it must return a zuko flow.")
    inexact = (zuko.flows.GF, zuko.flows.CNF, zuko.flows.FFJTransform)
    for part in built.modules():
        univariate = getattr(part, "univariate", None)
        if isinstance(part, inexact) or univariate is zuko.transforms.GaussianizationTransform:
            raise NotImplementedError(
                f"{type(built).__name__} flows are inverted only to about 1e-4. Use another flow."
            )
    return built


def _named(zuko: Any, kind: str, size: int, context: int, **options: Any) -> nn.Module:
    options["activation"] = nn.ELU
    options["univariate"] = partial(zuko.transforms.MonotonicAffineTransform, slope=SLOPE)
    if kind == "spline":
        options["univariate"] = zuko.transforms.MonotonicRQSTransform
        options["shapes"] = [(8,), (8,), (7,)]
    family = zuko.flows.NICE if kind in ("coupling", "spline") else zuko.flows.MAF
    flow = family(size, context, **options)
    if kind != "maf":  # zuko's cheap direction is the density, and a guide draws in each step
        flow = zuko.lazy.Flow(flow.transform.inv, flow.base)
    for part in flow.modules():  # affine and spline transforms are identities where all is zero
        last: Any = part if isinstance(part, nn.ParameterList) else ()
        if isinstance(part, zuko.nn.MLP | zuko.nn.MaskedMLP):
            last = part[-1].parameters()
        for parameter in last:
            nn.init.zeros_(parameter)
    return flow


def check_flow(flow: str | Callable) -> None:
    """Raise where zuko is missing, or no flow has this name."""
    _zuko()
    if not callable(flow) and flow not in FLOWS:
        raise ValueError(f"flow must be one of {FLOWS} or a function, got {flow!r}.")


def _zuko() -> Any:
    try:
        # Importing zuko turns the validation of all distributions off; this restores it.
        with pyro.settings.context(validate_distributions_torch=False):
            import zuko
    except ImportError as error:
        raise ImportError("FlowGuide needs zuko: pip install 'pyro_recursive[flows]'") from error
    return zuko


class ZukoDistribution(TorchDistribution):
    """A zuko ``NormalizingFlow`` over real vectors: batch ``[*batch]``, event ``[D]``.

    For its own last draw (the same tensor, not equal values) ``log_prob`` returns the density that
    was computed with the draw, without an inverse: its derivative by a parameter is the total one,
    through the draw as well. For partial derivatives pass ``u.view_as(u)``.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: Any, *, validate_args: bool | None = None) -> None:
        base = flow.base
        support = base.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is not constraints.real:
            raise ValueError(f"The flow's base has support {support}. Use a Gaussian base.")
        self.flow = flow
        # (draw, its log-density, whether gradients were on): shared with what `expand` returns.
        self._last: list[tuple[Tensor, Tensor, bool]] = []
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


class FlowTransform(Transform):
    """The map from the noise of a flow ``[..., D]`` to its draws, which keeps its last Jacobian."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: ZukoDistribution) -> None:
        super().__init__()
        self.flow = flow.flow
        self._last: tuple[Tensor, Tensor] | None = None  # draws and their log |du / d noise|

    def _call(self, x: Tensor) -> Tensor:
        drawn, log_det = self.flow.transform.inv.call_and_ladj(x)
        self._last = drawn, log_det
        return drawn

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow.transform(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy / dx|``, ``[...]``."""
        if self._last is not None and self._last[0] is y:
            return self._last[1]
        return self.flow.transform.inv.call_and_ladj(x)[1]


class AffineFlow(nn.Module):
    """Builds ``u = loc(c) + scale(c) * f(noise; c)`` from a zuko flow ``f`` and a context ``c``.

    The affine head is learnt and linear in the context. It gives the flow the location and scale of
    the data, where splines and networks need unit scale.
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
        """Return the flow given a context and the affine head's locations and log-scales."""
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
