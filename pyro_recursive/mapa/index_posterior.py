"""The posterior over codes that are given: by the likelihood of any model, and with any latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.guides.base import GuideCall
from pyro_recursive.guides.joint_site import outer_shape
from pyro_recursive.guides.mixture_distributions import Mixture
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.mapa.empirical_model import DecodedCodes, OnCodes, index_site, with_noise
from pyro_recursive.mapa.log_sums import IndexELBO
from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.isolation import SharedNoise, isolated

__all__ = ["CodeMixture", "IndexPosterior"]


class CodeMixture(Mixture):
    """Points, or normals of one scale around them: codes ``[*batch, K, D]`` or ``[K, D]``."""

    def __init__(self, log_weights: Tensor, codes: Tensor, scale: Tensor | None) -> None:
        self.codes, self.scale = codes, scale
        super().__init__(log_weights, codes.shape[:-2], codes.shape[-1])

    def table(self, u: Tensor) -> Tensor:
        """Return the log-density of the normal around each code, ``[*batch, K]``."""
        if self.scale is None:
            raise NotImplementedError(
                "This guide chooses among codes, which are points: it has draws and no density. "
                "Train with MAPA_ELBO; for log p(x) or another loss recover a continuous prior "
                "(guide.recovered()) or give the codes a scale."
            )
        normal = torch.distributions.Normal(self.codes, self.scale, validate_args=False)
        return normal.log_prob(u[..., None, :]).sum(-1)

    def draw(self, index: Tensor, present: Sequence[int] | None = None) -> Tensor:
        """Return the code ``index`` of each row, with noise if there is a scale."""
        codes = self.codes.expand(*index.shape, *self.codes.shape[-2:])
        place = index[..., None, None].expand(*index.shape, 1, codes.shape[-1])
        return with_noise(codes.gather(-2, place).squeeze(-2), self.scale)


@dataclass(frozen=True)
class IndexPosterior:
    """The posterior of the index of codes at one site of a model.

    ``nesting`` is how many dims the model's plates take.
    """

    model: Callable
    site: str
    latents: LatentBlock
    nesting: int

    def __call__(self, call: GuideCall, placed: DecodedCodes) -> Tensor:
        """Return the posterior by the model's likelihood, ``[*batch, K]`` nats.

        The derivative of the log-evidence by the log-weights: so it is right whatever else the
        model enumerates, and the plates around have posteriors of their own.
        """
        log_weights = self.at_rows(placed.log_weights.detach(), call).requires_grad_()
        placed = DecodedCodes(placed.codes.detach(), log_weights)
        (found,) = torch.autograd.grad(self._minus_evidence(call, placed), log_weights)
        return (found / found.sum(-1, keepdim=True)).log()

    def check_broadcasting(self, call: GuideCall, placed: DecodedCodes) -> None:
        """Run the model on some codes, and raise ValueError where it cannot.

        With another number of codes than rows: a model that reshapes its latents by the number of
        rows would be wrong in silence where there are as many codes by chance.
        """
        log_weights = self.at_rows(placed.log_weights.detach(), call).requires_grad_()
        try:
            self._minus_evidence(call, DecodedCodes(placed.codes, log_weights))
        except NotImplementedError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"The model cannot run with latent site '{self.site}' at many codes at once: one "
                "more dim on the left, and 1 in place of the plate's size where all rows share "
                "them. Count dims from the right, and let the latent broadcast against the data, "
                "as for any enumeration in Pyro; share='pair' gives every row codes of its own. "
                f"The error was: {error}"
            ) from error

    def at_rows(self, log_weights: Tensor, call: GuideCall) -> Tensor:
        """Repeat log-weights for all rows and the plates around, ``[*batch, K]``."""
        rows = log_weights.expand(*call.sizes(self.latents), log_weights.shape[-1])
        rows = self.latents.expand_rows(rows)
        batch = torch.broadcast_shapes(outer_shape(), rows.shape[:-1])
        return rows.expand(*batch, -1).clone()

    def _minus_evidence(self, call: GuideCall, placed: DecodedCodes) -> Tensor:
        """Run the model on codes, given all other latents, in a run that leaves no trace."""
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
            handled = OnCodes(self.site, lambda plate: placed, certain_where_masked=False)
            known = poutine.condition(handled(self.model), data=call.given)
            loss = IndexELBO(index_site(self.site), max_plate_nesting=nesting)
            return loss.differentiable_loss(known, _nothing, *call.args, **call.kwargs)


class _Around(Messenger):
    """Puts sites into plates that are around, and that a block hides from them."""

    def __init__(self, frames: Sequence[Any]) -> None:
        super().__init__()
        self.frames = tuple(frames)

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            msg["cond_indep_stack"] = msg["cond_indep_stack"] + self.frames


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Be the guide of a model without other latents."""
