"""The Python values that a program can read, so that a graph made from them is never stale.

A graph holds numbers, flags and functions as they were when it was made. What model, guide and
handlers can reach is recorded with it, and compared before it is used: closures, globals that their
code names, defaults, attributes of modules, classes and objects, entries of lists and dictionaries.
Values of tensors are no part of it: a graph is given the tensors themselves.
"""

import argparse
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn import Module

from pyro_recursive.tracing.graphs.unsupported import Unsupported

SCALARS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# Modules whose functions and objects keep their state to themselves.
LIBRARIES = sys.stdlib_module_names - {"__main__"}
LIBRARIES |= {"torch", "pyro", "pyro_recursive", "numpy", "scipy", "sklearn", "pandas", "zuko"}
LIBRARIES |= {"jax", "numpyro", "matplotlib", "torchvision", "tqdm", "IPython", "_pytest", "pytest"}
OPEN = (Module, Messenger, ELBO, types.SimpleNamespace, argparse.Namespace)  # but for these
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
CONTENTS = ("_parameters", "_buffers", "_modules", *HOOKS)
DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)
MAX_ENTRIES = 20_000
_MISSING = object()
Read = Callable[[Any, Any], Any]


class Entry(NamedTuple):
    """A value, where it is from: ``read(container, key)``, and its name."""

    read: Read
    container: Any
    key: Any
    value: Any
    name: str
    is_private: bool  # of an object of a library

    @property
    def is_same(self) -> bool:
        now, old = self.read(self.container, self.key), self.value
        if now is old:
            return True
        if type(now) is not type(old):
            return False
        if isinstance(now, np.ndarray):
            return self.read is _copy and np.array_equal(now, old)
        return (self.read is _copy or isinstance(now, SCALARS)) and bool(now == old)


class PythonState:
    """All values within reach of some roots, at the time that it is made.

    Raises Unsupported where these are too many to be compared in each step.
    """

    def __init__(self, roots: dict[str, Any]) -> None:
        self.entries = list[Entry]()
        self.modules = list[Module]()
        self._seen: dict[int, Any] = {}  # by id; held, so that no other object gets it
        self._waiting = [(root, name) for name, root in roots.items()]
        store = vars(pyro.get_param_store())
        self._add((_item, store, "_params", store["_params"], ""), "Pyro's parameter store", True)
        while self._waiting:
            self._walk(*self._waiting.pop())

    def changed(self) -> str | None:
        """Return the name of a value that is another one now, if there is one."""
        for container, key, value in self._quick:
            if container.get(key) is not value:
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
        """Leave out what has changed since, as caches do in each run, and return it."""
        changing = self.changing()
        gone = {id(entry) for entry in changing}
        self.entries = [entry for entry in self.entries if id(entry) not in gone]
        self._quick = [each[1:4] for each in self.entries if each.read is _item]
        self._lengths = [each[1:4] for each in self.entries if each.read is _length]
        self._slow = [each for each in self.entries if each.read not in (_item, _length)]
        return changing

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

    def _add(self, part: "Part", name: str, is_private: bool) -> None:
        read, container, key, value, label = part
        if read is not None:
            self.entries.append(Entry(read, container, key, value, name + label, is_private))
        if len(self.entries) > MAX_ENTRIES:
            raise Unsupported(f"{name} leads to more than {MAX_ENTRIES} Python values")
        if not isinstance(value, (*SCALARS, Tensor)) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._waiting.append((value, name + label))

    def _walk(self, value: Any, name: str) -> None:
        if isinstance(value, Module):
            self.modules.append(value)
        is_private = _is_library(type(value).__module__)
        for part in _parts(value):
            self._add(part, name, is_private)


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


# How a value is read (None where it cannot be another one), from what, by which key, the value, and
# what its name ends in.
Part = tuple[Read | None, Any, Any, Any, str]


def _item(container: Any, key: Any) -> Any:
    return container.get(key, _MISSING)


def _cell(cell: Any, key: None) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return _MISSING


def _element(container: Any, index: int) -> Any:
    return container[index] if index < len(container) else _MISSING


def _default(function: Any, number: int) -> Any:
    return _element(function.__defaults__ or (), number)


def _length(container: Any, key: None) -> int:
    return len(container)


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, name, _MISSING)


def _copy(container: Any, kind: Any) -> Any:
    return container.copy() if kind is None else kind(container)


def _parts(value: Any) -> Iterator[Part]:
    """Yield what a value refers to."""
    if isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType):
        yield from (_fixed(each) for each in (value.__self__, value.__func__))
    elif isinstance(value, partial):
        yield from (_fixed(each) for each in (value.func, *value.args, value.keywords))
    elif isinstance(value, staticmethod | classmethod):
        yield _fixed(value.__func__)
    elif isinstance(value, property):
        yield from (_fixed(each) for each in (value.fget,) if each is not None)
    elif isinstance(value, np.ndarray):
        yield _copy, value, None, value.copy(), ""
    elif isinstance(value, set):
        yield _copy, value, frozenset, frozenset(value), ""
    elif isinstance(value, dict | list | deque | tuple | frozenset):
        yield from _of_container(value)
    elif isinstance(value, type):
        yield from _of_class(value)
    elif not isinstance(value, types.ModuleType):
        if hasattr(value, "__wrapped__"):
            yield _fixed(value.__wrapped__)
        yield from _of_object(value)


def _fixed(value: Any, label: str = "") -> Part:
    return None, None, None, value, label


def _of_container(value: Any) -> Iterator[Part]:
    if isinstance(value, tuple | frozenset):
        yield from (_fixed(each, f"[{index}]") for index, each in enumerate(value))
        return
    if isinstance(value, list) and len(value) > 64 and all(type(v) in SCALARS for v in value):
        yield _copy, value, None, list(value), ""
        return
    yield _length, value, None, len(value), ""
    if isinstance(value, dict):
        yield from ((_item, value, key, each, f"[{key!r}]") for key, each in value.items())
    else:
        yield from ((_element, value, i, each, f"[{i}]") for i, each in enumerate(value))


def _of_function(function: types.FunctionType) -> Iterator[Part]:
    if _is_library(function.__module__):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if (found := _cell(cell, None)) is not _MISSING:
            yield _cell, cell, None, found, f" -> {name}"
    names = sorted(_names(function.__code__))
    yield from _named(function.__globals__, names, {id(function.__globals__)})
    for key, each in vars(function).items():
        yield _item, vars(function), key, each, f".{key}"
    for number, each in enumerate(function.__defaults__ or ()):
        yield _default, function, number, each, f" default {number}"
    yield from _of_container(function.__kwdefaults__ or {})


def _named(owner: dict[str, Any], names: list[str], seen: set[int]) -> Iterator[Part]:
    """Yield the globals of these names, and attributes of these names of modules among them."""
    for name in names:
        if name not in owner or name.startswith("__"):
            continue
        found = owner[name]
        yield _item, owner, name, found, f" -> {name}"
        is_module = isinstance(found, types.ModuleType) and not _is_library(found.__name__)
        if is_module and id(found) not in seen:
            seen.add(id(found))
            yield from _named(vars(found), names, seen)


def _names(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return {*code.co_names, *(name for each in inner for name in _names(each))}


def _of_class(owner: type) -> Iterator[Part]:
    for each in owner.__mro__:
        if _is_library(each.__module__):
            continue
        for name, value in vars(each).items():
            is_code = isinstance(value, types.FunctionType)
            if is_code or not (name.startswith("__") or isinstance(value, DESCRIPTORS)):
                yield _item, vars(each), name, value, f".{name}"


def _of_object(owner: Any) -> Iterator[Part]:
    is_private = _is_library(type(owner).__module__)
    if is_private and not isinstance(owner, OPEN):
        return
    yield _fixed(type(owner))
    for each in type(owner).__mro__:
        for name in _slots(each):
            if hasattr(owner, name):
                yield _attribute, owner, name, getattr(owner, name), f".{name}"
    for name, each in list(getattr(owner, "__dict__", {}).items()):
        if isinstance(owner, Module) and name in CONTENTS:
            yield from ((*part[:4], f".{part[2]}") for part in _of_container(each))
        elif not (name.startswith("_") and (is_private or isinstance(owner, Module))):
            yield _item, vars(owner), name, each, f".{name}"


def _slots(owner: type) -> tuple[str, ...]:
    if _is_library(owner.__module__):
        return ()
    found = vars(owner).get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES
