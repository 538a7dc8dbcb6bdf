"""Entries of Pyro's parameter store under a module's name that are not the module's parameters.

The store outlives modules. Pyro copies stored values into a `PyroParam` but not into other
parameters: the program would then run with the module's parameters and train those of the store. A
guide therefore decides: a state loaded since its last call replaces the entries of the store;
otherwise the values of the store replace those of the guide.
"""

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

PYRO_PARAM = "_unconstrained"  # how Pyro names the tensor behind a PyroParam


@torch.no_grad()
def load_from_store(module: PyroModule, name: str) -> None:
    """Copy the values of Pyro's store into a module's parameters, as Pyro does for `PyroParam`."""
    store = pyro.get_param_store()
    stored = _names()
    for own, parameter in module.named_parameters(name):
        held = store[stored[own]] if own in stored else parameter
        if held is parameter:
            continue
        if held.shape != parameter.shape:
            raise ValueError(
                f"Pyro's store has '{stored[own]}' of shape {tuple(held.shape)}, and this guide's "
                f"is {tuple(parameter.shape)}. Call pyro.clear_param_store(), or give name=."
            )
        parameter.copy_(held)
        store[stored[own]] = parameter


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
    stored = _names()
    for own, parameter in module.named_parameters(name):
        if own in stored and store[stored[own]] is parameter:
            return stored[own], parameter
    return None


def _names() -> dict[str, str]:
    """Return the names in Pyro's store by those that torch gives."""
    return {name.replace("$$$", "."): name for name in pyro.get_param_store()}
