"""A guide whose first call fails is as new: what it learned from bad data would stay wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
from torch import nn

__all__ = ["rollback_first_call"]


@contextmanager
def rollback_first_call(guide: nn.Module, name: str) -> Iterator[None]:
    """Take back what the block added to a guide and its modules, where it raises.

    That is attributes, parameters and buffers, and what stands under ``name`` in Pyro's store; not
    what was done in place to tensors.
    """
    before = [
        (module, {key: _copy(value) for key, value in vars(module).items()})
        for module in guide.modules()
    ]
    store = pyro.get_param_store()
    stored = set(store.keys())
    try:
        yield
    except BaseException:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for added in set(store.keys()) - stored:
            if added.startswith(f"{name}."):
                del store[added]
        raise


def _copy(value: object) -> object:
    """Copy what a module may add to, such as the table of its parameters; not what is in it."""
    return value.copy() if isinstance(value, dict | list | set) else value
