"""What changes from epoch to epoch: the learning rate, and the weight of the latents."""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["KLWarmup", "burda_schedule"]


def burda_schedule(optimizer: Optimizer, num_stages: int = 8) -> LambdaLR:
    r"""Multiply the learning rate by :math:`10^{-i/7}` for :math:`3^i` epochs, i = 0, 1, ...

    Eight stages take ``(3**8 - 1) / 2 = 3280`` epochs; the rate changes after epochs 1, 4, 13, 40,
    121, 364 and 1093, and stays at its last value from there on. Fewer stages are the beginning of
    the same schedule. Step it once per epoch, as `fit` does.

    :param optimizer: any torch optimiser; the paper takes Adam(lr=1e-3, eps=1e-4)
    :param num_stages: at least 1
    :raises ValueError: ``num_stages`` is below 1

    From 'Importance Weighted Autoencoders' (Burda et al., arXiv 1509.00519).

    >>> import torch
    >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
    >>> scheduler = burda_schedule(optimizer, num_stages=2)
    >>> for epoch in range(2):
    ...     optimizer.step()
    ...     scheduler.step()
    >>> [round(rate, 6) for rate in scheduler.get_last_lr()]
    [0.00072]
    """
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1, got {num_stages}.")
    ends = list(accumulate(3**stage for stage in range(num_stages)))
    return LambdaLR(optimizer, lambda epoch: 10 ** -(bisect_right(ends[:-1], epoch) / 7))


class KLWarmup(Messenger):
    """Weights the densities of all latents, in model and guide, and leaves the observed sites.

    Around a call of an ELBO it turns the sum of ``log p(x | z) + log p(z) - log q(z)`` into
    ``log p(x | z) + weight * (log p(z) - log q(z))``, in nats. Auxiliary sites of a guide, and the
    Delta sites which hold the Jacobian of its transforms, are latent and weighted too. Observed
    means as Pyro sees it: `pyro.factor` and what is under `poutine.condition` stay as they are.

    :param weight: above 0; 1 changes nothing
    :raises ValueError: ``weight`` is not above 0

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> with pyro.poutine.trace() as trace, KLWarmup(0.25):
    ...     model()
    >>> trace.trace.nodes["z"]["scale"]
    0.25
    """

    def __init__(self, weight: float) -> None:
        """Take the weight."""
        if not weight > 0:
            raise ValueError(f"The weight of the latents must be above 0, got {weight}.")
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = self.weight * msg["scale"]
