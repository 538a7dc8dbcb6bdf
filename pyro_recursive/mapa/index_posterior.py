"""The posterior over given codes, by the likelihood of any model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.joint_site import outer_shape
from pyro_recursive.guides.mixture_distributions import Mixture
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.mapa.empirical_model import DecodedCodes, OnCodes, with_noise
from pyro_recursive.mapa.loss import MAPA_ELBO
from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.isolation import SharedNoise, isolated


class CodeMixture(Mixture):
    """A mixture of codes ``[*batch, K, D]`` or ``[K, D]``: points, or normals of one scale."""

    def __init__(self, log_weights: Tensor, codes: Tensor, scale: Tensor | None) -> None:
        self.codes, self.scale = codes, scale
        super().__init__(log_weights, codes.shape[:-2], codes.shape[-1])

    def table(self, u: Tensor) -> Tensor:
        """Return the log-density of the normal around each code, ``[*batch, K]``."""
        if self.scale is None:
            raise NotImplementedError("Codes are points without a density: give them a scale.")
        normal = torch.distributions.Normal(self.codes, self.scale, validate_args=False)
        return normal.log_prob(u[..., None, :]).sum(-1)

    def draw(self, index: Tensor, present: Sequence[int] | None = None) -> Tensor:
        """Return the code ``index`` of each row, with noise if there is a scale."""
        codes = self.codes.expand(*index.shape, *self.codes.shape[-2:])
        index = index[..., None, None].expand(*index.shape, 1, codes.shape[-1])
        return with_noise(codes.gather(-2, index).squeeze(-2), self.scale)


@dataclass(frozen=True)
class IndexPosterior:
    """The posterior of a site's index of codes; the model's plates take ``nesting`` dims."""

    model: Callable
    site: str
    latents: LatentBlock
    nesting: int

    def __call__(self, call: GuideCall, decoded: DecodedCodes) -> Tensor:
        """Return the posterior by the model's likelihood, ``[*batch, K]`` nats.

        It is the derivative of the log-evidence in the log-weights, with other enumerated sites
        summed; each entry of the plates around has its own.
        """
        log_weights = self.at_rows(decoded.log_weights.detach(), call).requires_grad_()
        decoded = DecodedCodes(decoded.codes.detach(), log_weights)
        (grad,) = torch.autograd.grad(self._minus_evidence(call, decoded), log_weights)
        return (grad / grad.sum(-1, keepdim=True)).log()

    def at_rows(self, log_weights: Tensor, call: GuideCall) -> Tensor:
        """Repeat log-weights for all rows and the plates around, ``[*batch, K]``."""
        rows = log_weights.expand(*call.sizes(self.latents), log_weights.shape[-1])
        rows = self.latents.expand_rows(rows)
        batch = torch.broadcast_shapes(outer_shape(), rows.shape[:-1])
        return rows.expand(*batch, -1).clone()

    def _minus_evidence(self, call: GuideCall, decoded: DecodedCodes) -> Tensor:
        """Run the model on codes, given all other latents, isolated."""
        outer = [frame for frame in get_plates() if frame.vectorized]
        nesting = max([self.nesting, *(-frame.dim for frame in outer)])
        minibatch = {name: plate.indices for name, plate in call.plates.items()}
        with (
            isolated(noise=SharedNoise()),
            torch.enable_grad(),
            poutine.broadcast(),
            _Around(outer),
            SubstituteByName(minibatch),
        ):
            handled = OnCodes(self.site, lambda plate: decoded, normalise_masked=False)
            others = {name: value for name, value in call.given.items() if name != self.site}
            known = poutine.condition(handled(self.model), data=others)
            guide = SimpleNamespace(site=self.site, others=_nothing, end_step=_nothing)
            guide.empiricalized = lambda model: known
            loss = MAPA_ELBO(max_plate_nesting=nesting)
            return loss.differentiable_loss(self.model, guide, *call.args, **call.kwargs)


class _Around(Messenger):
    """Adds the plates around, which a block hides, to sites."""

    def __init__(self, frames: Sequence[Any]) -> None:
        super().__init__()
        self.frames = tuple(frames)

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            msg["cond_indep_stack"] = msg["cond_indep_stack"] + self.frames


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The other latents, which are known, and the end of a step, which is none."""
