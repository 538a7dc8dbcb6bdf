"""A guide's name and parameters in Pyro's store, and what failed calls and states do to them.

The store outlives modules. Pyro copies stored values into a `PyroParam` but not into other
parameters: the program would then run with the module's parameters and train those of the store. A
guide therefore decides: a state loaded, or a result computed, since its last call replaces the
entries of the store; otherwise the values of the store replace those of the guide.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

PYRO_PARAM = "_unconstrained"  # how Pyro names the tensor behind a PyroParam
# The guide that last ran under a name: Pyro's store is by name, and would mix up two of them.
_OWNERS: WeakValueDictionary[str, PyroModule] = WeakValueDictionary()


def unconstrained(value: Any) -> Tensor:
    """Return the leaf of a parameter; under module_local_params the value is that leaf."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def parameters_in(trace: poutine.Trace) -> dict[str, Tensor]:
    """Return the leaves of the parameters in a trace of ``param_only=True``, by their names."""
    return {name: unconstrained(site["value"]) for name, site in trace.nodes.items()}


def claim_name(guide: PyroModule) -> bool:
    """Take a guide's name; return whether another guide, or none, had it.

    Raises:
        ValueError: another guide of this name has its parameters in Pyro's store.
    """
    name = guide._pyro_name
    if _OWNERS.get(name) is guide:
        return False
    if is_of_another(guide):
        raise ValueError(f"Another guide named '{name}' is in Pyro's store. Give name=.")
    _OWNERS[name] = guide
    return True


def is_of_another(guide: PyroModule) -> bool:
    """Whether Pyro's store has another guide's parameters under a guide's name."""
    name, other = guide._pyro_name, _OWNERS.get(guide._pyro_name)
    if other is None or other is guide:
        return False
    theirs = {id(p) for p in other.parameters()} - {id(p) for p in guide.parameters()}
    stored = pyro.get_param_store().named_parameters()
    return any(id(p) in theirs and key.startswith(f"{name}.") for key, p in stored)


def free_name(name: str) -> str:
    """Return a name, or that with a number where a living guide has claimed it."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in _OWNERS)


@contextmanager
def rollback(guide: PyroModule) -> Iterator[None]:
    """If the block raises, restore modules' attributes (containers shallowly) and Pyro's store."""
    containers = (dict, list, set)
    before = {
        module: {k: v.copy() if isinstance(v, containers) else v for k, v in vars(module).items()}
        for module in guide.modules()
    }
    store = pyro.get_param_store()
    stored = set(store.keys())
    try:
        yield
    except BaseException:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)
        for added in set(store.keys()) - stored:
            if added.replace("$$$", ".").startswith(f"{guide._pyro_name}."):
                del store[added]
        raise


def check_prepared(guide: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Raise for a state with parameters that `prepare` has yet to create: a hook of torch."""
    if guide.groups:
        return
    known = guide.state_dict(prefix=prefix)
    new = [key for key in state if key.startswith(prefix) and key not in known]
    if new:
        raise RuntimeError(
            f"{type(guide).__name__} has not seen its model and has no '{new[0]}'. Call "
            "guide.prepare(*args) first."
        )


def check_coordinates(guide: PyroModule) -> None:
    """Raise where a new guide would take values from Pyro's store, without their coordinates."""
    name = guide._pyro_name
    if _OWNERS.get(name) is guide:
        return
    own = {id(parameter) for parameter in guide.parameters()}
    others = [k for k, p in pyro.get_param_store().named_parameters() if id(p) not in own]
    if any(key.replace("$$$", ".").startswith(f"{name}.") for key in others):
        raise ValueError(
            f"Pyro's store has parameters of '{name}' without its whitened coordinates. Load the "
            "guide's state_dict(), or call pyro.clear_param_store()."
        )


def note_loaded(guide: Any, keys: Any) -> None:
    """Prefer the loaded state to Pyro's store in the next call: a hook of torch."""
    guide.is_loaded = True


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
