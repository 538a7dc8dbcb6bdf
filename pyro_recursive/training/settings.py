"""What a run was called with, as far as a resumed run must be called with the same."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from pyro.infer import ELBO
from torch import Tensor
from torch.optim import Optimizer

from pyro_recursive.training.checkpoint import CheckpointError
from pyro_recursive.training.minibatches import Minibatches

__all__ = ["check_optimizer_options", "check_settings", "optimizer_options", "settings_of"]

SPEED = {"foreach", "fused", "capturable", "differentiable"}  # how an optimiser computes, not what


def settings_of(
    batches: Minibatches, loss: ELBO, aggressive: Any, **numbers: Any
) -> dict[str, Any]:
    """Return by name what decides about a run, in plain values; before anything has run.

    :param aggressive: an `Aggressive`, or None
    """
    options = {f"loss.{name}": value for name, value in _options_of(loss).items()}
    phase = {} if aggressive is None else vars(aggressive)
    found = {
        **numbers,
        "rows of data": batches.rows,
        "batch_size": batches.size,
        "shuffle": batches.order is not None,
        "loss": type(loss).__qualname__,
        **options,
        "aggressive": aggressive is not None,
        **{f"aggressive.{name}": value for name, value in phase.items()},
    }
    return {name: _plain(value) for name, value in found.items()}


def check_settings(path: Path, saved: Mapping[str, Any] | None, live: Mapping[str, Any]) -> None:
    """Raise where a run is resumed with other settings than it was begun with.

    Files that are older than a setting are not checked for it. No seed is not another one: the file
    has the random states.

    :raises CheckpointError: naming the file, and each setting with both values
    """
    free = {"seed"} if live.get("seed") is None else set()
    differing = _differing(saved or {}, {k: v for k, v in live.items() if k not in free})
    if differing:
        raise CheckpointError(
            f"Checkpoint '{path}' was written with {differing[0]}, and this call has "
            f"{differing[1]}. Use the settings of the run that wrote it, or another file."
        )


def optimizer_options(optimizer: Optimizer) -> dict[str, Any]:
    """Return the learning rate and all else that an optimiser was made with."""
    return {k: _plain(v) for k, v in optimizer.defaults.items() if k not in SPEED}


def check_optimizer_options(
    path: Path, saved: Mapping[str, Any] | None, optimizer: Optimizer
) -> None:
    """Raise where an optimiser was made with other options, which its state would overwrite.

    :raises CheckpointError: naming the file, and each option with both values
    """
    differing = _differing(saved or {}, optimizer_options(optimizer))
    if differing:
        raise CheckpointError(
            f"Checkpoint '{path}' was written with an optimizer of {differing[0]}, and this call "
            f"has {differing[1]}. Use the options of the run that wrote it, as its state decides "
            "(a scheduler can change the learning rate), or another file."
        )


def _differing(saved: Mapping[str, Any], live: Mapping[str, Any]) -> tuple[str, str] | None:
    names = [name for name in live if name in saved and saved[name] != live[name]]
    if not names:
        return None
    one, other = (", ".join(f"{name}={each[name]!r}" for name in names) for each in (saved, live))
    return one, other


def _options_of(loss: ELBO) -> dict[str, Any]:
    """Return what a loss keeps of its constructor's arguments: counters of its own may differ."""
    kept = vars(loss)
    names = {
        name
        for kind in type(loss).__mro__
        if "__init__" in vars(kind) and kind is not object
        for name in inspect.signature(vars(kind)["__init__"]).parameters
    }
    # Pyro's losses write the nesting that they find in the first call on themselves.
    names -= {"self", "max_plate_nesting", "max_iarange_nesting"}
    found = {name: kept.get(name, kept.get(f"_{name}", ...)) for name in sorted(names)}
    return {name: value for name, value in found.items() if value is not ...}


def _plain(value: Any) -> Any:
    """Return a value in plain types, the same in each process: no addresses."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Real):  # of NumPy, too, which a file could not be read with
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        inside = ", ".join(f"{name}={each!r}" for name, each in named.items())
        return named.get("name") or f"{type(value).__qualname__}({inside})"
    return getattr(value, "__qualname__", type(value).__qualname__)
