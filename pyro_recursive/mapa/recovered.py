"""What priors recovered from codes have in common, and how their arguments are checked."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RecoveredPrior", "weighted_codes"]


class RecoveredPrior(nn.Module, ABC):
    """A continuous prior made of codes: calling it builds a distribution over vectors ``[D]``.

    The distribution has batch ``[]`` and densities in nats; plates expand it. Priors are made by
    `pyro_recursive.mapa.recover_prior`. They are frozen, unless made ``trainable``;
    ``.to(device)`` moves them, and they can be copied and pickled.

    ``kind`` is the name of the kind, ``size`` D, ``num_codes`` how many codes were given, and
    ``held_out_log_prob`` the mean log-density in nats of codes that a first fit did not see, None
    where none were held out.
    """

    kind: str
    held_out_log_prob: float | None = None

    def __init__(self, size: int, num_codes: int) -> None:
        super().__init__()
        self.size, self.num_codes = size, num_codes

    @abstractmethod
    def forward(self) -> Any:
        """Return the distribution, batch ``[]`` and event ``[D]``."""

    def from_normal(self, noise: Tensor) -> Tensor:
        """Return what standard normals become, ``[..., D]`` to ``[..., D]``: draws of the prior.

        With one latent, ``decoder(prior.from_normal(w))`` is the decoder of the same model with the
        prior ``w ~ N(0, 1)``, to be integrated over ``w`` by quadrature.

        Raises NotImplementedError for mixtures, which are no map of normals.
        """
        raise NotImplementedError(
            f"The {self.kind!r} prior is a mixture and no map of normals: recover one of kind "
            "'copula' or 'flow', or integrate its density over z."
        )

    def extra_repr(self) -> str:
        """Show what the prior was made of."""
        held_out = self.held_out_log_prob
        last = "" if held_out is None else f", held_out_log_prob={held_out:.3f}"
        return f"size={self.size}, num_codes={self.num_codes}{last}"


def weighted_codes(codes: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the codes with any weight, ``[N, D]``, and the logarithms of weights of sum one.

    Raises:
        TypeError: the codes are no floating-point numbers.
        ValueError: the codes are not ``[N, D]`` or not finite; the weights do not fit them.
    """
    if not codes.is_floating_point():
        raise TypeError(f"codes must be floating-point numbers, got {codes.dtype}")
    if codes.dim() != 2 or not codes.numel():
        raise ValueError(
            f"codes must be [N, D], unconstrained vectors of a latent site; got "
            f"{list(codes.shape)}. Codes of a scalar site are codes[:, None]."
        )
    codes = codes.detach()
    finite = codes.isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(codes)} codes have entries that are not finite, the "
            f"first at row {int((~finite).nonzero()[0, 0])}: look at the encoder."
        )
    if log_weights is None:
        return codes, codes.new_full((len(codes),), -math.log(len(codes)))
    log_weights = log_weights.detach().to(codes)
    if log_weights.shape != codes.shape[:1]:
        raise ValueError(
            f"log_weights must be {list(codes.shape[:1])} for codes {list(codes.shape)}, got "
            f"{list(log_weights.shape)}"
        )
    if log_weights.isnan().any() or not log_weights.logsumexp(0).isfinite():
        raise ValueError("log_weights must be logarithms: no NaN, no +inf, and one above -inf")
    used = log_weights > -math.inf
    return codes[used], log_weights[used].log_softmax(0)


def check_spread(codes: Tensor, kind: str) -> None:
    """Raise ValueError where a coordinate of the codes is a constant: it has no density."""
    size = codes.abs().amax(0)
    constant = codes.std(0, correction=0) <= 10 * torch.finfo(codes.dtype).eps * size
    if constant.any():
        raise ValueError(
            f"All {len(codes)} codes have the same coordinates {constant.nonzero()[:, 0].tolist()} "
            f"(of {codes.shape[1]}), and a {kind!r} prior would have no finite density: the latent "
            "is not used. Leave it out of the model, or ask for kind='kernels' with a scale."
        )
