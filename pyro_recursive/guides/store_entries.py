"""A guide's name in Pyro's parameter store, and what a failed first call or a state does to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import pyro
from pyro.nn import PyroModule

# The guide that last ran under a name: Pyro's store is by name, and would mix up two of them.
_OWNERS: WeakValueDictionary[str, PyroModule] = WeakValueDictionary()


def claim_name(guide: PyroModule) -> bool:
    """Take a guide's name; return whether another guide, or none, had it.

    Raises:
        ValueError: another guide of this name has its parameters in Pyro's store.
    """
    name, other = guide._pyro_name, _OWNERS.get(guide._pyro_name)
    if other is guide:
        return False
    if other is not None:
        theirs = {id(p) for p in other.parameters()} - {id(p) for p in guide.parameters()}
        for stored, parameter in pyro.get_param_store().named_parameters():
            if id(parameter) in theirs and stored.startswith(f"{name}."):
                raise ValueError(f"Another guide named '{name}' is in Pyro's store. Give name=.")
    _OWNERS[name] = guide
    return True


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


def note_loaded(guide: Any, keys: Any) -> None:
    """Prefer the loaded state to Pyro's store in the next call: a hook of torch."""
    guide.is_loaded = True
