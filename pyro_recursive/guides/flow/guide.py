"""Normalising-flow guides: by an encoder for each row of the data, or one joint flow."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall, run
from pyro_recursive.guides.flow.zuko_adapter import (
    AffineFlow,
    FlowTransform,
    ZukoDistribution,
    build_flow,
    check_flow,
)
from pyro_recursive.guides.marginals import log_density
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.guides.row_families import START, RowFamily
from pyro_recursive.guides.starts import InitLocFn
from pyro_recursive.guides.whitening import Gaussian


class FlowGuide(LatentGuide):
    """An autoguide that is a normalising flow, ``u = loc(c) + scale(c) * f(noise; c)``.

    All latents inside the data's plate are packed into one unconstrained vector u a row, of length
    D; an encoder maps the rows of the data to contexts c. Latents outside the plate, without an
    encoder all latents, have one joint flow without context. Constrained supports add their
    Jacobians. A flow starts as a diagonal Gaussian. Kinds, their cost,
    and sources: the page on flows of the documentation.

    Args:
        model: a Pyro model with continuous latents; hide discrete ones with `pyro.poutine.block`.
        flow: ``"coupling"`` (affine), ``"spline"`` (coupling), ``"iaf"``, ``"maf"``, or a function
            ``(size, context) -> zuko.flows.Flow`` such as `zuko.flows.NAF`; ``context`` is 0 where
            there is none.
        encoder: a module from the inputs' rows to contexts ``[*rows, context]`` of any width.
        transforms: how many transforms are composed, each of a part of u in coupling flows.
        hidden: the widths of the hidden layers of each transform's network.
        init_loc_fn, init_scale: of the Gaussian that a flow starts as; as in `AmortizedGuide`.
        whiten: as in `AmortizedGuide`; the flow starts as the Gaussian of `pathfinder`.
        plate, inputs, create_plates, name: as in `AmortizedGuide`.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(z.prod(-1), 0.1), obs=x[:, 0])
    >>> guide = FlowGuide(model, "coupling", encoder=nn.Linear(1, 8))
    >>> SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(torch.ones(3, 1)) > 0
    True
    """

    def __init__(
        self,
        model: Callable,
        flow: str | Callable[[int, int], Any] = "coupling",
        *,
        encoder: nn.Module | None = None,
        transforms: int = 4,
        hidden: Sequence[int] = (64, 64),
        init_loc_fn: InitLocFn | None = None,
        init_scale: float = 0.1,
        whiten: bool | Gaussian = False,
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        options: dict[str, Any] = {"create_plates": create_plates, "init_loc_fn": init_loc_fn}
        options["whiten"] = whiten
        super().__init__(model, plate=plate, inputs=inputs, name=name, **options)
        check_flow(flow)
        if plate is not None and encoder is None:
            raise _no_encoder(plate)
        self.flow = flow
        self.encoder: Any = encoder
        self.transforms, self.hidden, self.init_scale = transforms, tuple(hidden), init_scale

    def build(self, latents: LatentBlock, start: Tensor, raw: Any) -> None:
        """Create the flow of a block around a point, the mean of its rows."""
        context = 0
        if latents.local:
            if not self.by_row:  # in a mixture with rows
                raise _no_encoder(latents.rows[-1].name)
            few = raw[:2] if isinstance(raw, Tensor) else raw
            with poutine.block(), torch.no_grad():
                context = run(self.encoder, few, latents).shape[-1]
        flow = build_flow(self.flow, latents.size, context, self.transforms, self.hidden)
        loc = start.reshape(-1, latents.size).mean(0)
        scale = self.init_scale if latents.whitening is None else 1.0
        setattr(self, _flow(latents), AffineFlow(flow, context, loc, scale))

    def posterior(self, latents: LatentBlock, call: GuideCall) -> ZukoDistribution:
        """Return the flow of a block, batch ``[*batch]`` and event ``[D]``."""
        flow = getattr(self, _flow(latents))
        if latents.local:
            context = call.encode(self.encoder, latents)
            return flow(context, context.shape[:-1])
        return flow(None, torch.Size([1] * latents.nesting))

    def transform_of(self, latents: LatentBlock, call: GuideCall) -> Transform:
        """Return the flow of a block without rows as a map of standard normals."""
        return FlowTransform(self.posterior(latents, call))

    def variational_params(self, latents: LatentBlock, call: GuideCall) -> Tensor:
        """Return contexts with their locations and log-scales, ``[*batch, P]``."""
        flow = getattr(self, _flow(latents))
        if not latents.local:
            return flow.head(None).expand(*[1] * latents.nesting, -1)
        context = call.encode(self.encoder, latents)
        return torch.cat([context, flow.head(context)], -1)

    def row_family(self, latents: LatentBlock) -> RowFamily:
        """Return the flows that a row may have: any context, location and scale of this flow."""
        return FlowRows(getattr(self, _flow(latents)), latents.size)


class FlowRows(RowFamily):
    """One flow with any context, followed by any affine map: the networks are the same for all."""

    def __init__(self, flow: AffineFlow, size: int) -> None:
        self.flow, self.size, self.noise_dim = flow, size, size
        self.context = () if flow.linear is None else (flow.linear.in_features,)
        self.blocks = (*self.context, size, size)

    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        """Push the noise through the flow."""
        return self.distribution(params).push(noise)

    def log_prob(self, params: Tensor, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the flow's log-density; of values that are not draws by the inverse."""
        return log_density(self.distribution(params), u, keep)

    def scored_draw(
        self, params: Tensor, noise: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return draws and the log-density that came with them."""
        flow = self.distribution(params)
        u = flow.push(noise)
        return u, log_density(flow, u, keep)

    def distribution(self, params: Tensor) -> ZukoDistribution:
        """Return the flow, batch ``[*batch]`` and event ``[D]``."""
        context, head = params.split([sum(self.context), 2 * self.size], -1)
        return self.flow.at(context if self.context else None, head, params.shape[:-1])

    def start(self, loc: Tensor) -> Tensor:
        """Return a context of zeros, a location and the scale of a start."""
        context = loc.new_zeros(*loc.shape[:-1], sum(self.context))
        return torch.cat([context, loc, torch.full_like(loc, START).log()], -1)


def _no_encoder(plate: str) -> ValueError:
    return ValueError(f"A flow for each row of plate '{plate}' needs an encoder=.")


def _flow(latents: LatentBlock) -> str:
    return "flow_local" if latents.local else "flow_global"
