"""Priors with a normal around each code: Parzen windows, as wide as told or as codes want them."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from torch import Tensor, nn

from pyro_recursive.mapa.recovered import RecoveredPrior, check_spread
from pyro_recursive.priors.encoded_mixture import EncodedMixture

__all__ = ["CodeMixturePrior", "KDEPrior", "bandwidth", "leave_one_out"]

_WIDTHS = 32  # bandwidths that are tried
_NARROWEST, _WIDEST = 0.05, 4.0  # of them, in units of the best one for a normal
_QUERIES = 2000  # places that a bandwidth is judged by
_CHUNK_PAIRS = 2**22


class CodeMixturePrior(RecoveredPrior):
    """``p(z) = sum_i w_i N(z; c_i, scale**2 I)``: what a latent is whose location is a code.

    Trained, it learns places and weights of the codes, and one scale for each of D.
    """

    kind = "kernels"

    def __init__(
        self, codes: Tensor, log_weights: Tensor, *, scale: float | Tensor, trainable: bool = False
    ) -> None:
        super().__init__(codes.shape[1], len(codes))
        widths = torch.as_tensor(scale, dtype=codes.dtype, device=codes.device).detach()
        if widths.shape not in ((), codes.shape[1:]) or not (
            widths.isfinite().all() and (widths > 0).all()
        ):
            raise ValueError(
                f"scale must be finite and positive, a number or {list(codes.shape[1:])}; got "
                f"{scale}"
            )
        log_scale = widths.log().expand(codes.shape[1]).clone()
        self.centers = nn.Parameter(codes.clone(), requires_grad=trainable)
        self.log_scale = nn.Parameter(log_scale, requires_grad=trainable)
        self.log_weights = nn.Parameter(log_weights.clone(), requires_grad=trainable)

    def forward(self) -> Any:
        """Return the mixture, batch ``[]`` and event ``[D]``."""
        scale = self.log_scale.exp().expand_as(self.centers)
        windows = dist.Normal(self.centers, scale).to_event(1)
        return EncodedMixture(self.log_weights.log_softmax(0), windows)


class KDEPrior(RecoveredPrior):
    """``p(z) = sum_i w_i N(z; c_i, h**2 C)``, C the codes' covariance: a kernel density estimate.

    The bandwidth h maximises the mean log-density of each code under all others, see `bandwidth`.
    """

    kind = "kde"
    loc: Tensor
    scale_tril: Tensor

    def __init__(
        self,
        codes: Tensor,
        log_weights: Tensor,
        *,
        width: float | None = None,
        seed: int = 0,
        trainable: bool = False,
    ) -> None:
        super().__init__(codes.shape[1], len(codes))
        check_spread(codes, self.kind)
        loc, scale_tril = _moments(codes, log_weights)
        white = torch.linalg.solve_triangular(scale_tril, (codes - loc).mT, upper=False).mT
        if width is None:
            width = bandwidth(white, log_weights, seed=seed)
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)
        # Of the whitened codes, where all windows are round.
        self.windows = CodeMixturePrior(white, log_weights, scale=width, trainable=trainable)

    @property
    def width(self) -> float:
        """The bandwidth h, in units of the codes' spread; of a trained one the mean."""
        return self.windows.log_scale.mean().exp().item()

    def forward(self) -> Any:
        """Return the mixture, batch ``[]`` and event ``[D]``."""
        shape = transforms.LowerCholeskyAffine(self.loc, self.scale_tril)
        return dist.TransformedDistribution(self.windows(), [shape])


def bandwidth(codes: Tensor, log_weights: Tensor, *, seed: int = 0) -> float:
    """Return the h of windows ``N(c_i, h**2 I)`` that gives codes the highest `leave_one_out`.

    The best of 32 between 0.05 and 4 times the one that suits normal codes (Silverman's), 15% one
    from the next. With more than 2000 places, 2000 of them judge, all are judged by.
    """
    places, weights = _distinct(codes, log_weights)
    number, size = places.shape
    silverman = (4 / ((size + 2) * number)) ** (1 / (size + 4))
    exponents = torch.linspace(
        math.log(_NARROWEST), math.log(_WIDEST), _WIDTHS, dtype=codes.dtype, device=codes.device
    )
    widths = silverman * exponents.exp()
    queries = None
    if number > _QUERIES:
        generator = torch.Generator("cpu").manual_seed(seed)
        queries = torch.randperm(number, generator=generator)[:_QUERIES].to(codes.device)
    return widths[_scores(places, weights, widths, queries).argmax()].item()


def leave_one_out(codes: Tensor, log_weights: Tensor, widths: Tensor) -> Tensor:
    """Return the mean log-density of a code under the others' windows ``[H]``, for widths ``[H]``.

    In nats. Equal codes count as one, left out as a whole: a code that occurs twice would want
    windows of no width. ``codes`` are ``[N, D]``, ``log_weights`` ``[N]`` of sum one.
    """
    places, weights = _distinct(codes, log_weights)
    return _scores(places, weights, widths, None)


def _scores(places: Tensor, weights: Tensor, widths: Tensor, queries: Tensor | None) -> Tensor:
    number, size = places.shape
    if queries is None:
        queries = torch.arange(number, device=places.device)
    total = places.new_zeros(len(widths))
    for chunk in queries.split(max(1, _CHUNK_PAIRS // number)):
        square = torch.cdist(places[chunk], places, compute_mode="donot_use_mm_for_euclid_dist")
        square = -0.5 * square.square_()
        logits = weights.log().expand_as(square).clone()
        logits[torch.arange(len(chunk), device=chunk.device), chunk] = -math.inf
        others = -torch.log1p(-weights[chunk])
        found = [torch.logsumexp(square / h**2 + logits, 1) + others for h in widths]
        total = total + torch.stack(found) @ weights[chunk]
    constants = size * (widths.log() + 0.5 * math.log(2 * math.pi))
    return total / weights[queries].sum() - constants


def _distinct(codes: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places where codes are, ``[n, D]``, and their weights, ``[n]``."""
    places, which = codes.unique(dim=0, return_inverse=True)
    if len(places) < 2:
        raise ValueError(f"All {len(codes)} codes are equal: no bandwidth follows from them.")
    return places, log_weights.new_zeros(len(places)).index_add_(0, which, log_weights.exp())


def _moments(codes: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``[D]`` and a Cholesky factor of the covariance ``[D, D]``."""
    weights = log_weights.exp()[:, None]
    loc = (weights * codes).sum(0)
    shift = weights.sqrt() * (codes - loc)
    covariance = shift.mT @ shift
    spread = covariance.diagonal().sqrt()
    correlation = covariance / spread / spread[:, None]
    eigenvalues = torch.linalg.eigvalsh(correlation)
    if eigenvalues[0] < 100 * torch.finfo(codes.dtype).eps * eigenvalues[-1]:
        raise ValueError(
            f"{len(codes)} codes of {codes.shape[1]} numbers lie in a hyperplane, and a 'kde' "
            "prior would have no finite density: use more codes than numbers, fewer latents, or "
            "kind='kernels' with a scale."
        )
    return loc, spread[:, None] * torch.linalg.cholesky(correlation)
