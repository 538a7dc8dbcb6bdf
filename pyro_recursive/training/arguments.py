"""What `fit` checks before anything changes."""

import os
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_recursive.tracing.arguments import check_integers
from pyro_recursive.training.aggressive import Aggressive
from pyro_recursive.training.minibatches import Data

__all__ = ["check_combination", "check_loss", "check_optimizer"]


def check_loss(*losses: ELBO | None) -> None:
    """Raise where a loss is no instance of an ELBO."""
    for loss in losses:
        if loss is not None and not isinstance(loss, ELBO):
            raise TypeError(
                f"loss must be a pyro.infer.ELBO, got {loss!r}. Pass an instance such as "
                "Trace_ELBO()."
            )


def check_optimizer(optimizer: Any) -> None:
    """Raise where the maker of an optimiser is an optimiser, or makes Pyro's."""
    of_pyro = str(getattr(optimizer, "__module__", None)).startswith("pyro.optim")
    if of_pyro or isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise TypeError(
            f"optimizer must make a torch optimiser from a list of parameters, got a "
            f"{type(optimizer).__name__}. Pass e.g. functools.partial(torch.optim.Adam, lr=1e-3); "
            "pyro.optim optimisers belong in a loop of SVI.step."
        )


def check_combination(
    kl_warmup: int,
    patience: float | None,
    validation: Data | None,
    resume: bool,
    checkpoint: str | os.PathLike | None,
    aggressive: Aggressive | None,
) -> None:
    """Raise where arguments need others, or are out of their range."""
    check_integers(kl_warmup=kl_warmup)
    if kl_warmup < 0:
        raise ValueError(f"kl_warmup must be 0 (none) or a number of epochs, got {kl_warmup}.")
    if patience is not None and not patience >= 1:
        raise ValueError(f"patience must be at least 1 epoch, or None, got {patience}.")
    if patience is not None and validation is None:
        raise ValueError(f"patience={patience} needs a validation loss. Pass validation data.")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs a file to resume from. Pass it as checkpoint.")
    if aggressive is not None and not isinstance(aggressive, Aggressive):
        raise TypeError(f"aggressive must be an Aggressive, got {aggressive!r}. Pass Aggressive().")
    if aggressive is not None and validation is None:
        raise ValueError(
            "Aggressive training ends when the mutual information on validation data stops "
            "growing. Pass validation data."
        )
