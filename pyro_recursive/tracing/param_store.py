"""What Pyro's store holds under a module's name beside the module's own parameters.

The store is by name and outlives modules. Pyro copies what is stored into a `PyroParam`, and leaves
all other parameters as they are: the program would run with a module's own, and train those of the
store. So a guide says who wins: a state loaded since its last call over the store, and else what
the store was loaded with over the guide.
"""

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

PYRO_PARAM = "_unconstrained"  # how Pyro names the tensor behind a PyroParam


@torch.no_grad()
def load_from_store(module: PyroModule, name: str) -> None:
    """Take values that Pyro's store was loaded with; Pyro does so for its `PyroParam` alone.

    Raises ValueError where a stored value has another shape.
    """
    store = pyro.get_param_store()
    stored = _names()
    for own, parameter in module.named_parameters(name):
        held = store[stored[own]] if own in stored else parameter
        if held is parameter:
            continue
        if held.shape != parameter.shape:
            raise ValueError(
                f"Pyro's store has '{stored[own]}' of shape {tuple(held.shape)}, and this guide's "
                f"is {tuple(parameter.shape)}: another guide left it. Call "
                "pyro.clear_param_store(), or tell them apart with name=."
            )
        parameter.copy_(held)
        store[stored[own]] = parameter


def evict_stale(module: PyroModule, name: str) -> None:
    """Take out of Pyro's store what has the name of a module's parameter, and is not that."""
    store = pyro.get_param_store()
    stored = _names()
    for own, parameter in module.named_parameters(name):
        key = stored.get(own.removesuffix(PYRO_PARAM))
        if key is not None and store[key].unconstrained() is not parameter:
            del store[key]


def shared_parameter(module: PyroModule, name: str) -> tuple[str, Tensor] | None:
    """Return a parameter that is in Pyro's store, but no `PyroParam`, with its name there."""
    store = pyro.get_param_store()
    stored = _names()
    for own, parameter in module.named_parameters(name):
        if own in stored and store[stored[own]] is parameter:
            return stored[own], parameter
    return None


def _names() -> dict[str, str]:
    """Return the names in Pyro's store by those that torch gives."""
    return {name.replace("$$$", "."): name for name in pyro.get_param_store()}
