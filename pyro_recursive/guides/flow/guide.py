"""Normalising-flow guides: by an encoder for each row of the data, or one joint flow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_recursive.guides.base import GuideCall, LatentGuide
from pyro_recursive.guides.encoder import check_numbers, encoding
from pyro_recursive.guides.flow.kinds import build_flow, check_flow
from pyro_recursive.guides.flow.zuko_adapter import AffineFlow, ZukoDistribution
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.guides.row_families import START, RowFamily
from pyro_recursive.tracing.arguments import check_module

__all__ = ["FlowGuide"]


class FlowGuide(LatentGuide):
    """An autoguide that is a normalising flow, ``u = loc(c) + scale(c) * f(noise; c)``.

    All latents inside the data's plate are packed into one unconstrained vector u a row, of length
    D. An encoder maps the rows ``[*rows, ...]`` of the data to contexts c, ``[*rows, context]``, of
    any width; the flow f, its location and its scale depend on it. Latents outside the plate have
    one joint flow without context; without an encoder all latents have. With noise e,

        log q(u) = log N(e; 0, I) - log |df / de| - sum log scale        (nats)

    and constrained supports add their Jacobians. A flow starts as the Gaussian of its affine head,
    around a draw from the prior, so that it holds the diagonal Gaussians.

    Density and draw cost one pass of the networks in each transform, or D passes where it says so:

    ============  ===========  ===============  ==================================================
    ``flow``      draw + own   other values     kind
    ============  ===========  ===============  ==================================================
    "coupling"    1            2                affine coupling (RealNVP)
    "spline"      1            2                coupling with rational-quadratic splines (NSF)
    "iaf"         1            D                inverse autoregressive, affine
    "maf"         D            1                autoregressive, affine
    ============  ===========  ===============  ==================================================

    Other values are scored in mixtures and by all estimators but "pathwise", so "coupling" is the
    default. Over a single number (D = 1) nothing can be coupled: affine flows are Gaussian there,
    splines are not.

    Arguments:
        model: a Pyro model with continuous latents; hide discrete ones with `pyro.poutine.block`.
        flow: a name in the table, or a function ``(size, context) -> zuko.flows.Flow`` such as
            `zuko.flows.NAF`; ``context`` is 0 where there is none.
        encoder: a module from the inputs' rows to contexts. None: one flow over all latents.
        transforms: how many transforms are composed, each of a part of u in "coupling", "spline".
        hidden: the widths of the hidden layers of each transform's network.
        init_scale: the scale of the Gaussian that a flow starts as.
        plate, inputs, create_plates, name: as in `AmortizedGuide`.

    Raises:
        ImportError: zuko is not installed.
        NotImplementedError: a latent site is discrete; the flow is one of zuko's whose inverse is
            inexact (GF, CNF).
        TypeError: a function did not return a zuko flow; the encoder is no module.
        ValueError: no flow has this name; ``plate`` without an encoder; the encoder's output is
            not one context a row; no latent is in the plate.

    Sources: `Density Estimation using Real NVP` (Dinh et al., arXiv 1605.08803); `Neural Spline
    Flows` (Durkan et al., arXiv 1906.04032); `Improving Variational Inference with Inverse
    Autoregressive Flow` (Kingma et al., arXiv 1606.04934); `Masked Autoregressive Flow for Density
    Estimation` (Papamakarios et al., arXiv 1705.07057).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(z.prod(-1), 0.1), obs=x[:, 0])
    >>> x = torch.tensor([[0.5], [-1.0], [2.0]])
    >>> guide = FlowGuide(model, "coupling", encoder=nn.Linear(1, 8))
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    >>> svi.step(x) > 0
    True
    >>> guide(x[:2])["z"].shape  # data of another size
    torch.Size([2, 2])
    """

    def __init__(
        self,
        model: Callable,
        flow: str | Callable[[int, int], Any] = "coupling",
        *,
        encoder: nn.Module | None = None,
        transforms: int = 4,
        hidden: Sequence[int] = (64, 64),
        init_scale: float = 0.1,
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        check_module("encoder", encoder)
        super().__init__(model, plate=plate, inputs=inputs, create_plates=create_plates, name=name)
        check_flow(flow)
        if plate is not None and encoder is None:
            raise _no_encoder(plate)
        self.flow = flow
        self.encoder: Any = encoder
        self.transforms, self.hidden, self.init_scale = transforms, tuple(hidden), init_scale

    def build(self, latents: LatentBlock, place: Tensor, raw: Any) -> None:
        """Create the flow of a group around a point, the mean of its rows."""
        if latents.local and not self.by_row:  # in a mixture with rows
            raise _no_encoder(latents.rows[-1].name)
        context = self._context_size(latents, raw) if latents.local else 0
        flow = build_flow(self.flow, latents.size, context, self.transforms, self.hidden)
        loc = place.reshape(-1, latents.size).mean(0)
        setattr(self, _flow(latents), AffineFlow(flow, context, loc, self.init_scale))

    def posterior(self, latents: LatentBlock, call: GuideCall) -> ZukoDistribution:
        """Return the flow of a group, batch ``[*batch]`` and event ``[D]``."""
        flow = getattr(self, _flow(latents))
        if latents.local:
            context = latents.expand_rows(self._context(latents, call))
            return flow(context, context.shape[:-1])
        return flow(None, torch.Size([1] * latents.nesting))

    def variational_params(self, latents: LatentBlock, call: GuideCall) -> Tensor:
        """Return the contexts, and the locations and log-scales that the head makes of them."""
        flow = getattr(self, _flow(latents))
        if not latents.local:
            return flow.head(None).expand(*[1] * latents.nesting, -1)
        context = latents.expand_rows(self._context(latents, call))
        return torch.cat([context, flow.head(context)], -1)

    def row_family(self, latents: LatentBlock) -> RowFamily:
        """Return the flows that a row may have: any context, location and scale of this flow."""
        return FlowRows(getattr(self, _flow(latents)), latents.size)

    def _context(self, latents: LatentBlock, call: GuideCall) -> Tensor:
        inputs = call.rows(latents)
        with encoding("The encoder", latents, inputs):
            context: Tensor = self.encoder(inputs)
        rows = call.sizes(latents)
        if context.shape[:-1] != torch.Size(rows):
            raise ValueError(
                f"The encoder returned shape {tuple(context.shape)}, and the latents "
                f"{[slot.name for slot in latents.slots]} in plate '{latents.rows[-1].name}' need "
                f"one context for each row: {(*rows, 'context')}. The encoder's inputs have the "
                "rows first; inputs= selects them from the model's arguments."
            )
        check_numbers("The encoder", latents, context, inputs)
        return context

    def _context_size(self, latents: LatentBlock, raw: Any) -> int:
        """Return the width of the encoder's output, from its first rows."""
        few = raw[:2] if isinstance(raw, Tensor) else raw
        with poutine.block(), torch.no_grad(), encoding("The encoder", latents, few):
            return self.encoder(few).shape[-1]


@dataclass(frozen=True)
class FlowRows(RowFamily):
    """One flow with any context, followed by any affine map: the networks are the same for all."""

    flow: AffineFlow
    size: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """The context, if any, locations, logarithms of scales."""
        linear = self.flow.linear
        context = () if linear is None else (linear.in_features,)
        return (*context, self.size, self.size)

    @property
    def noise_dim(self) -> int:
        """D."""
        return self.size

    def draw(self, numbers: Tensor, noise: Tensor) -> Tensor:
        """Push the noise through the flow."""
        return self.distribution(numbers).push(noise)

    def log_prob(self, numbers: Tensor, u: Tensor) -> Tensor:
        """Return the flow's log-density; of values that are not draws by the inverse."""
        return self.distribution(numbers).log_prob(u)

    def scored_draw(self, numbers: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws and the log-density that came with them."""
        flow = self.distribution(numbers)
        u = flow.push(noise)
        return u, flow.log_prob(u)

    def distribution(self, numbers: Tensor) -> ZukoDistribution:
        """Return the flow, batch ``[*batch]`` and event ``[D]``."""
        context, head = numbers.split([sum(self.blocks[:-2]), 2 * self.size], -1)
        given = None if self.flow.linear is None else context
        return self.flow.at(given, head, numbers.shape[:-1])

    def start(self, loc: Tensor) -> Tensor:
        """Return a context of zeros, a place and the scale of a start."""
        context = loc.new_zeros(*loc.shape[:-1], sum(self.blocks[:-2]))
        return torch.cat([context, loc, torch.full_like(loc, START).log()], -1)


def _no_encoder(plate: str) -> ValueError:
    return ValueError(
        f"A flow for each row of plate '{plate}' needs an encoder= from the rows to "
        "contexts: networks have no table of parameters by row. Leave out plate= for one "
        "joint flow, or use AmortizedGuide for a Gaussian with parameters for each row."
    )


def _flow(latents: LatentBlock) -> str:
    return "flow_local" if latents.local else "flow_global"
