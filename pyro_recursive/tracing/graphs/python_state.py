"""The Python values that a program can read, to find graphs that are stale.

A graph holds numbers, flags and functions as they were when it was made. What model, guide and
handlers can reach is recorded with it, and compared before it is used: closures, globals that their
code names, defaults, attributes of modules, classes and objects, entries of lists and dictionaries.
What is outside of Python's values, as files and clocks, is not compared.
Values of tensors are no part of it: a graph is given the tensors themselves.
"""

import io
import random
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyro_recursive.tracing.graphs.library_objects import (
    BY_SYNTAX,
    hidden_of,
    names_for,
    set_by_libraries,
    without_own,
)
from pyro_recursive.tracing.graphs.references import (
    CONTAINERS,
    GENERATORS,
    MISSING,
    OPEN,
    SCALARS,
    Entry,
    Part,
    codes_of,
    is_library,
    parts_of,
    read_copy,
    read_item,
    read_length,
    read_property,
    read_random,
)
from pyro_recursive.tracing.graphs.unsupported import Unsupported

MAX_ENTRIES = 20_000


class PythonState:
    """All values within reach of some roots, at the time that it is made.

    Of an object that has a model or a guide as a method, such as one that trains, attributes count
    that code within reach names. Raises Unsupported where values are too many to be compared.
    """

    def __init__(self, roots: dict[str, Any]) -> None:
        self.entries = list[Entry]()
        self.modules = list[Module]()
        # By id; held, so that no other object gets it.
        self._seen: dict[int, Any] = {id(root): root for root in roots.values()}
        self._waiting = [(root, name, False) for name, root in roots.items()]
        self._keys = dict[int, set[Any]]()  # of dictionaries, by id
        self._names = set(BY_SYNTAX)  # that code names
        self._owners = set[int]()  # whose attributes count where code names them
        for root in roots.values():
            owner = root.__self__ if isinstance(root, types.MethodType) else None
            if not (isinstance(owner, OPEN) or is_library(type(owner).__module__)):
                self._owners |= {id(owner), id(type(owner))}
        # By owner and attribute: with the names in code with which it is read.
        self._hidden: dict[tuple[int, str], tuple[Part, str, frozenset[str]]] = {}
        self._random = list[Entry]()  # states, which only runs of the program must not change
        for generator in (random.getstate.__self__, np.random.mtrand._rand):  # type: ignore
            self._walk(generator, f"the state of {type(generator).__module__}", True)
        store = vars(pyro.get_param_store())
        self._store = {key: dict(each) for key, each in store.items() if isinstance(each, dict)}
        self._add(
            (read_item, store, "_params", store["_params"], ""), "Pyro's parameter store", True
        )
        while self._waiting:
            self._walk(*self._waiting.pop())
            if not self._waiting:
                named = [k for k, v in self._hidden.items() if not self._names.isdisjoint(v[2])]
                for part, name, _ in map(self._hidden.pop, named):
                    if part[0] is read_property:
                        part = *part[:3], read_property(*part[1:3]), part[4]
                    self._add(part, name, False)
        self._sort()

    def changed(self) -> str | None:
        """Return the name of a value that is another one now, if there is one."""
        for container, key, value in self._quick:
            if container.get(key, MISSING) is not value:
                break
        else:
            for container, _, length in self._lengths:
                if len(container) != length:
                    return self.changing()[0].name
            for entry in self._slow:
                if not entry.is_same:
                    return entry.name
            return None
        changing = self.changing()
        return changing[0].name if changing else None

    def changing(self) -> list[Entry]:
        """Return all entries whose value is another one now."""
        return [entry for entry in self.entries if not entry.is_same]

    def settle(self) -> list[Entry]:
        """Drop and return entries that changed while tracing; restore all but library caches."""
        changing = self.changing()
        gone = {id(entry) for entry in changing}
        changing += [entry for entry in self._random if not entry.is_same]
        store = vars(pyro.get_param_store())
        replaced = [e for e in changing if e.container is store["_params"] and e.read is read_item]
        if replaced:
            for key, each in self._store.items():
                store[key].clear()
                store[key].update(each)
            changing += [entry._replace(is_private=False) for entry in replaced]
        for entry in changing:
            if not entry.is_private:
                entry.restore(self._keys.get(id(entry.container), ()))
        self.entries = [entry for entry in self.entries if id(entry) not in gone]
        self._sort()
        return changing

    def _sort(self) -> None:
        """Sort the entries by how they are compared."""
        self._quick = [each[1:4] for each in self.entries if each.read is read_item]
        self._lengths = [each[1:4] for each in self.entries if each.read is read_length]
        self._slow = [each for each in self.entries if each.read not in (read_item, read_length)]

    def parameters(self) -> list[Tensor]:
        """Return the parameters of all modules and in Pyro's store."""
        found = list(vars(pyro.get_param_store())["_params"].values())
        for module in self.modules:
            found += module.parameters(recurse=False)
        return found

    def movable(self) -> list[Tensor]:
        """Return what runs may change in place: parameters, and buffers in training, each once."""
        found = self.parameters()
        for module in self.modules:
            found += module.buffers(recurse=False) if module.training else ()
        return list({id(each): each for each in found}.values())

    def _add(self, part: Part, name: str, is_private: bool) -> None:
        read, container, key, value, label = part
        if read is not None:
            self.entries.append(Entry(read, container, key, value, name + label, is_private))
        if read is read_length and isinstance(container, dict):
            self._keys[id(container)] = set(container)
        if len(self.entries) > MAX_ENTRIES:
            raise Unsupported(f"{name} leads to more than {MAX_ENTRIES} Python values")
        if read is read_copy or isinstance(value, (*SCALARS, Tensor)):
            return
        if id(value) not in self._seen:
            self._seen[id(value)] = value
            self._waiting.append((value, name + label, is_private))

    def _walk(self, value: Any, name: str, is_private: bool) -> None:
        """Add what a value refers to; what a container holds is its owner's."""
        if isinstance(value, Module):
            self.modules.append(value)
        if isinstance(value, types.FunctionType):
            is_private = is_library(value.__module__)
        else:
            is_data = isinstance(value, CONTAINERS) or hasattr(type(value), "__array__")
            is_closed = is_private or not is_data
            is_private = is_closed and is_library(type(value).__module__)
        if isinstance(value, GENERATORS):
            state = read_random(value, None)
            self._random.append(Entry(read_random, value, None, state, name, False))
        if is_private and isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            raise Unsupported(f"{name} is an iterator, of which the next value is not known")
        if isinstance(value, types.FunctionType) and not is_library(value.__module__):
            self._names.update(*(code.co_names for code in codes_of(value.__code__)))
        kind: Any = type(value)
        own, inherited = getattr(value, "__dict__", None), set_by_libraries(kind)
        parts, hidden = list(parts_of(value)), list(hidden_of(value))
        if id(value) in self._owners:
            is_class = isinstance(value, type)
            hidden += [] if is_class else without_own(value)
            hidden += [part for part in parts if not _counts(part, is_class)]
            parts = [part for part in parts if _counts(part, is_class)]
        for part in parts:
            is_inherited = part[1] is own and part[2] in inherited
            self._add(part, name, is_private or is_inherited)
        for part in hidden:
            attribute = str(part[2])
            self._hidden[id(part[1]), attribute] = part, name, names_for(value, attribute)


def _counts(part: Part, is_class: bool) -> bool:
    """Whether a part counts if no code names it: methods that Python calls, how many of a class."""
    read, _, key, *_ = part
    is_called = str(key).startswith("__") and key not in ("__init__", "__post_init__")
    return read is None or is_called or (is_class and read is read_length)


class UndoneWrites(TorchDispatchMode):
    """Gives all tensors that a block writes to their values from before, at its end."""

    def __init__(self) -> None:
        super().__init__()
        self._before: list[tuple[Tensor, Tensor]] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, value in reversed(self._before):
                tensor.copy_(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            named = func._schema.arguments
            given = [*zip(named, args, strict=False), *((n, kwargs.get(n.name)) for n in named)]
            for argument, value in given:
                if argument.is_write:
                    self._keep(*(value if isinstance(value, list | tuple) else (value,)))
        return func(*args, **kwargs)

    def reaches(self, tensor: Tensor) -> bool:
        """Whether the block has written to the memory of a tensor."""
        place = tensor.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == place for each, _ in self._before)

    def _keep(self, *values: Any) -> None:
        with _disable_current_modes(), torch.no_grad():
            for tensor in values:
                if isinstance(tensor, Tensor):
                    self._before.append((tensor.detach(), tensor.detach().clone()))


@contextmanager
def undone_runs(state: PythonState) -> Iterator[UndoneWrites]:
    """Undo what runs of a program in the block change; yield what they write to tensors.

    Raises Unsupported where a Python value changes in each run.
    """
    try:
        with restored(state.movable()), UndoneWrites() as writes:
            yield writes
    finally:
        changed = state.settle()
    for entry in changed:
        if not entry.is_private:
            raise Unsupported(f"{entry.name} changes in each run of model or guide")


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors their values back after the block, in place, where these have changed."""
    before = [each.detach().clone() for each in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for each, old in zip(tensors, before, strict=True):
                if not torch.equal(each, old):
                    each.copy_(old)
