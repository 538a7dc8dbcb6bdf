"""The Python values that a program can read, so that a graph made from them is never stale.

A graph holds numbers, flags and functions as they were when it was made. What model, guide and
handlers can reach is recorded with it, and compared before it is used: closures, globals that their
code names, attributes of modules and objects, entries of lists and dictionaries.
"""

import types
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn import Module

SCALARS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
LIBRARIES = ("torch", "pyro", "numpy", "zuko", "pyro_recursive")  # their state is theirs
MAX_ENTRIES = 20_000
MAX_DEPTH = 12
_MISSING = object()


class Entry(NamedTuple):
    """A value, the dictionary, list or closure cell that refers to it, and its name."""

    container: Any
    key: Any
    value: Any
    name: str
    is_private: bool  # of an object of a library

    @property
    def is_same(self) -> bool:
        container, key, old = self.container, self.key, self.value
        if isinstance(container, dict):
            now = container.get(key, _MISSING)
        elif isinstance(container, types.CellType):
            now = container.cell_contents
        else:
            now = container[key] if key < len(container) else _MISSING
        return now is old or (
            type(now) is type(old) and isinstance(now, SCALARS) and bool(now == old)
        )


class PythonState:
    """All values within reach of some roots, at the time that it is made."""

    def __init__(self, roots: dict[str, Any]) -> None:
        self.entries = list[Entry]()
        self.modules = list[Module]()
        self._seen: set[int] = set()
        self._roots = roots  # kept, so that no other object gets their addresses
        for name, root in roots.items():
            self._walk(root, name, 0)
        store = vars(pyro.get_param_store())
        self._add(store, "_params", store["_params"], "Pyro's parameter store", True, 0)

    def changed(self) -> str | None:
        """Return the name of a value that is another one now, if there is one."""
        for container, key, value in self._quick:
            if container.get(key) is not value:
                break
        else:
            if all(entry.is_same for entry in self._slow):
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
        quick = [isinstance(entry.container, dict) for entry in self.entries]
        self._quick = [e[:3] for e, is_quick in zip(self.entries, quick, strict=True) if is_quick]
        self._slow = [e for e, is_quick in zip(self.entries, quick, strict=True) if not is_quick]
        return changing

    def _add(
        self, container: Any, key: Any, value: Any, name: str, is_private: bool, depth: int
    ) -> None:
        if len(self.entries) < MAX_ENTRIES:
            self.entries.append(Entry(container, key, value, name, is_private))
            self._walk(value, name, depth + 1)

    def _walk(self, value: Any, name: str, depth: int) -> None:
        if isinstance(value, (*SCALARS, Tensor)) or id(value) in self._seen or depth > MAX_DEPTH:
            return
        self._seen.add(id(value))
        if isinstance(value, Module):
            self.modules.append(value)
        is_private = _is_library(type(value).__module__)
        for container, key, found, label in _parts(value):
            self._add(container, key, found, f"{name}{label}", is_private, depth)


Part = tuple[Any, Any, Any, str]


def _parts(value: Any) -> Iterator[Part]:
    """Yield what a value refers to: where, under which key, what, and what its name ends in."""
    if isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType):
        yield from _of_list([value.__self__, value.__func__], labels=("", ""))
    elif isinstance(value, partial):
        yield from _of_list([value.func, value.args, value.keywords], labels=("", "", ""))
    elif isinstance(value, dict):
        for key, each in value.items():
            yield value, key, each, f"[{key!r}]"
    elif isinstance(value, list | tuple):
        yield from _of_list(value)
    elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType | type):
        yield from _of_object(value)


def _of_function(function: types.FunctionType) -> Iterator[Part]:
    if _is_library(function.__module__):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield cell, None, cell.cell_contents, f" -> {name}"
        except ValueError:  # not yet assigned
            continue
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__ and not name.startswith("__"):
            yield function.__globals__, name, function.__globals__[name], f" -> {name}"
    yield from _of_list(function.__defaults__ or ())


def _names(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return {*code.co_names, *(name for each in inner for name in _names(each))}


def _of_list(values: Any, labels: tuple[str, ...] | None = None) -> Iterator[Part]:
    for index, each in enumerate(values):
        yield values, index, each, labels[index] if labels else f"[{index}]"


def _of_object(owner: Any) -> Iterator[Part]:
    is_private = _is_library(type(owner).__module__)
    if is_private and not isinstance(owner, Module | Messenger | ELBO):
        return
    for name, each in list(vars(owner).items()):
        if isinstance(owner, Module) and name in ("_parameters", "_buffers", "_modules"):
            for key, part in each.items():
                yield each, key, part, f".{key}"
        elif not (name.startswith("_") and (is_private or isinstance(owner, Module))):
            yield vars(owner), name, each, f".{name}"


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES
