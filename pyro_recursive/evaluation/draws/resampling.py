"""Which draws to take, by their importance weights (sampling importance resampling)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_recursive.evaluation.psis import psis

__all__ = ["chosen"]


def chosen(log_weights: Tensor, count: int, plates: Sequence[str], *, smooth: bool) -> Tensor:
    """Return the numbers of `count` draws, with replacement, for each entry on its own.

    :param log_weights: ``[S, *plates]`` in nats
    :param smooth: whether the weights are Pareto-smoothed first
    :return: numbers below S, ``[count, *plates]``
    :raises ValueError: an entry has no draw with any weight, or one without a number
    """
    _check(log_weights, plates)
    weights = psis(log_weights).log_weights if smooth else log_weights
    columns = weights.flatten(1).T if weights.dim() > 1 else weights.unsqueeze(0)
    index = torch.multinomial(columns.softmax(-1), count, replacement=True)
    return index.T.reshape(count, *log_weights.shape[1:])


def _check(log_weights: Tensor, plates: Sequence[str]) -> None:
    dead = ~(log_weights.amax(0).abs() < torch.inf)
    if bool(dead.any()):
        place = tuple(dead.nonzero()[0].tolist())
        entry = f" at {place} of plates {list(plates)}" if plates else ""
        raise ValueError(
            f"None of {len(log_weights)} draws from the guide has a weight{entry} (the largest "
            f"log-weight is {log_weights.amax(0)[place].item()}): there is nothing to resample "
            "from. The guide draws where the model has no density."
        )
