"""Learning rates that change from epoch to epoch."""

from bisect import bisect_right
from itertools import accumulate

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["burda_schedule"]


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
