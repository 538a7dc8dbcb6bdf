"""The posterior over codes: of rows by the likelihood of a model, and as a guide's mixture."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.mixture_distributions import Mixture
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.mapa.empirical_model import DecodedCodes, OnCodes, with_noise
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.isolation import SharedNoise, isolated
from pyro_recursive.tracing.plates import Particles, PlateLayout, outer_shape
from pyro_recursive.tracing.program import Program, no_model
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import SiteTable


class CodeMixture(Mixture):
    """A mixture of codes ``[*batch, K, D]`` or ``[K, D]``: points, or normals of one scale."""

    def __init__(self, log_weights: Tensor, codes: Tensor, scale: Tensor | None) -> None:
        self.codes, self.scale = codes, scale
        super().__init__(log_weights, codes.shape[:-2], codes.shape[-1])

    def table(self, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the log-density of the normal around each code, ``[*batch, K]``."""
        if self.scale is None:
            raise NotImplementedError("Codes are points without a density: give them a scale.")
        normal = torch.distributions.Normal(self.codes, self.scale, validate_args=False)
        each = normal.log_prob(u[..., None, :])
        return (each if keep is None else torch.where(keep.unsqueeze(-2), each, 0.0)).sum(-1)

    def draw(self, index: Tensor, present: Sequence[int] | None = None) -> Tensor:
        """Return the code ``index`` of each row, with noise if there is a scale."""
        codes = self.codes.expand(*index.shape, *self.codes.shape[-2:])
        index = index[..., None, None].expand(*index.shape, 1, codes.shape[-1])
        return with_noise(codes.gather(-2, index).squeeze(-2), self.scale)


def index_posterior(guide: Any, call: GuideCall, decoded: DecodedCodes) -> Tensor:
    """Return the posterior over codes by the likelihood of a guide's model, ``[*batch, K]`` nats.

    It is the derivative of the log-evidence in the log-weights. Other enumerated sites are summed,
    other latents have the call's values, and each entry of outer plates has its own posterior.
    """
    (latents,), site = guide.groups, str(guide.site)
    log_weights = at_rows(decoded.log_weights.detach(), latents, call).requires_grad_()
    decoded = DecodedCodes(decoded.codes.detach(), log_weights)
    outer = [frame for frame in get_plates() if frame.vectorized]
    nesting = max([guide.nesting, *(-frame.dim for frame in outer)])
    minibatch = {name: plate.indices for name, plate in call.plates.items()}
    others = {name: value for name, value in call.given.items() if name != site}
    handled = OnCodes(site, lambda plate: decoded, normalise_masked=False)(guide.own_model())
    known = Program(poutine.condition(handled, data=others), no_model, call.args, call.kwargs)
    with (
        isolated(noise=SharedNoise()),
        torch.enable_grad(),
        poutine.broadcast(),
        _Around(outer),
        SubstituteByName(minibatch),
    ):
        nothing = poutine.Trace()
        trace = known.run_model(nothing, -nesting - 2)
        run = ParticleRun(trace, nothing, SiteTable(trace, nothing), [], [])
        evidence = densities([run], PlateLayout(Particles(1, 1), nesting, ())).reparameterized
    (grad,) = torch.autograd.grad(evidence, log_weights)
    return (grad / grad.sum(-1, keepdim=True)).log()


def at_rows(log_weights: Tensor, latents: LatentBlock, call: GuideCall) -> Tensor:
    """Repeat log-weights for all rows and the plates around, ``[*batch, K]``."""
    rows = log_weights.expand(*call.sizes(latents), log_weights.shape[-1])
    rows = latents.expand_rows(rows)
    batch = torch.broadcast_shapes(outer_shape(), rows.shape[:-1])
    return rows.expand(*batch, -1).clone()


class _Around(Messenger):
    """Adds to each site the outer plates that a block hides."""

    def __init__(self, frames: Sequence[Any]) -> None:
        super().__init__()
        self.frames = tuple(frames)

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            msg["cond_indep_stack"] = msg["cond_indep_stack"] + self.frames
