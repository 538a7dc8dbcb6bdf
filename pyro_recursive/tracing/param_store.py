"""Entries of Pyro's parameter store under a module's name that are not the module's parameters.

The store outlives modules. Pyro copies stored values into a `PyroParam` but not into other
parameters: the program would then run with the module's parameters and train those of the store. A
guide therefore decides: a state loaded since its last call replaces the entries of the store;
otherwise the values of the store replace those of the guide.
"""

from collections.abc import Iterator

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

PYRO_PARAM = "_unconstrained"  # how Pyro names the tensor behind a PyroParam


@torch.no_grad()
def load_from_store(module: PyroModule, name: str) -> None:
    """Copy the values of Pyro's store into a module's parameters.

    Pyro does so for a `PyroParam`, where it is read by a module that is called.
    """
    store = pyro.get_param_store()
    for key, parameter in _stored(module, name):
        held = store[key]
        if held is parameter:
            continue
        if held.shape != parameter.shape:
            raise ValueError(
                f"Pyro's store has '{key}' of shape {tuple(held.shape)}, and this guide's "
                f"is {tuple(parameter.shape)}. Call pyro.clear_param_store(), or give name=."
            )
        parameter.copy_(held)
        store[key] = parameter


def evict_stale(module: PyroModule, name: str) -> None:
    """Delete entries of Pyro's store that have the name of a module's parameter but are others."""
    store = pyro.get_param_store()
    stored = _names()
    for own, parameter in module.named_parameters(name):
        key = stored.get(own.removesuffix(PYRO_PARAM))
        if key is not None and store[key].unconstrained() is not parameter:
            del store[key]


def shared_parameter(module: PyroModule, name: str) -> tuple[str, Tensor] | None:
    """Return the stored name of a parameter that Pyro's store shares, and the parameter."""
    store = pyro.get_param_store()
    shared = (pair for pair in _stored(module, name) if store[pair[0]] is pair[1])
    return next(shared, None)


def _stored(module: PyroModule, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the module's parameters with their names in Pyro's store, where it has them.

    Those with a constraint are left to Pyro.
    """
    store, stored = pyro.get_param_store(), _names()
    for own, parameter in module.named_parameters(name):
        key = stored.get(own.removesuffix(PYRO_PARAM))
        if key is not None and store[key].unconstrained() is store[key]:
            yield key, parameter


def _names() -> dict[str, str]:
    """Return the names in Pyro's store by those that torch gives."""
    return {name.replace("$$$", "."): name for name in pyro.get_param_store()}
