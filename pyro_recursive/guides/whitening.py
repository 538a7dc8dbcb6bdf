"""Coordinates in units of the posterior: ``u = loc + L v``, in which a guide trains on v."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_recursive.guides.gaussian_families import scale_tril_of

Gaussian = tuple[Tensor, Tensor]  # a location [D] and a Cholesky factor L of the covariance [D, D]


class Whitening(nn.Module):
    """The map ``u = loc + L v`` to unconstrained values from those that a guide trains on.

    With ``N(loc, L L')`` near the posterior, the posterior of v is near ``N(0, I)``. Both are
    buffers: the `state_dict` of the guide has them.

    Raises:
        ValueError: L is no Cholesky factor, or has not the shape ``[D, D]`` of ``loc``, ``[D]``.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale_tril", scale_tril.detach().clone())
        size = len(loc)
        is_factor = (
            scale_tril.shape == (size, size)
            and bool(loc.isfinite().all() and scale_tril.isfinite().all())
            and torch.equal(scale_tril.tril(), scale_tril)
            and bool((scale_tril.diagonal() > 0).all())
        )
        if not is_factor:
            raise ValueError(
                f"whiten=(loc, scale_tril) needs a finite Cholesky factor [{size}, {size}], got "
                f"{list(scale_tril.shape)}. Give torch.linalg.cholesky(covariance)."
            )

    @property
    def log_det(self) -> Tensor:
        """``log |du / dv|``, a constant."""
        return self.scale_tril.diagonal().log().sum()

    def unconstrained(self, v: Tensor) -> Tensor:
        """Return ``loc + L v``, ``[*batch, D]``."""
        return self.loc + self.stretched(v)

    def stretched(self, step: Tensor) -> Tensor:
        """Return ``L v``, ``[*batch, D]``."""
        return step @ self.scale_tril.mT

    def whitened(self, u: Tensor) -> Tensor:
        """Return v, ``[*batch, D]``."""
        centred = (u - self.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).squeeze(-1)

    def whitened_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Gaussian:
        """Return the Gaussian of v where u has this one.

        ``[*batch, D]`` and ``[*batch, D, D]``.
        """
        solved = torch.linalg.solve_triangular(self.scale_tril, scale_tril, upper=False)
        return self.whitened(loc), solved

    def gaussian(self, loc: Tensor, scale_tril: Tensor) -> Gaussian:
        """Return the Gaussian of u where v has this one; undoes `whitened_gaussian`."""
        return self.unconstrained(loc), self.scale_tril @ scale_tril

    def marginals(self, posterior: Any) -> tuple[Tensor, Tensor]:
        """Return means and scales of u where v has a Gaussian distribution, ``[*batch, D]``."""
        factor = self.scale_tril @ scale_tril_of(posterior)
        return self.unconstrained(posterior.mean), factor.square().sum(-1).sqrt()
