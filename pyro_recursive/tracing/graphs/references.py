"""What Python values refer to, how that is read, and whether it is another value now."""

import argparse
import contextlib
import dis
import pickle
import random
import sys
import types
import weakref
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from scipy.sparse import sparray, spmatrix
from torch.distributions import Distribution, Transform
from torch.nn import Module

SCALARS = (
    *(int, float, complex, str, bytes, type(None), np.generic),
    *(torch.dtype, torch.device, torch.Size),
)
# Modules whose functions and objects keep their state to themselves.
LIBRARIES = sys.stdlib_module_names - {"__main__"}
LIBRARIES |= {"torch", "pyro", "pyro_recursive", "numpy", "scipy", "sklearn", "pandas", "zuko"}
LIBRARIES |= {"jax", "numpyro", "matplotlib", "torchvision", "tqdm", "IPython", "_pytest", "pytest"}
OPEN = (  # library classes whose attributes are compared all the same
    *(Module, Messenger, ELBO, Distribution, Transform, sparray, spmatrix),
    *(types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap),
)
GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")  # operations on names of a module
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CONTENTS = ("_parameters", "_buffers", "_modules", *HOOKS)
CONTAINERS = (  # of a program, unlike other objects of libraries
    *(dict, list, tuple, set, frozenset, deque, types.SimpleNamespace, argparse.Namespace),
    *(UserDict, UserList, ChainMap, array, bytearray, weakref.ref, types.MappingProxyType),
    *(types.FunctionType, types.MethodType, partial, ContextVar, type, property),
)
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)
MISSING = object()
Read = Callable[[Any, Any], Any]
# How a value is read (None where it cannot be another one), from what, by which key, the value, and
# what its name ends in.
Part = tuple[Read | None, Any, Any, Any, str]


class Entry(NamedTuple):
    """A value, where it is from: ``read(container, key)``, and its name."""

    read: Read
    container: Any
    key: Any
    value: Any
    name: str
    is_private: bool  # of an object of a library, or set by it in an object of a derived class

    @property
    def is_same(self) -> bool:
        old = self.value
        if self.read is read_copy and self.key is None:
            now = self.container
        elif self.read is read_array:
            now = np.asarray(self.container)
        else:
            now = self.read(self.container, self.key)
        if now is old:
            return True
        if type(now) is not type(old):
            return False
        if isinstance(now, np.ndarray):
            is_copy = self.read in (read_copy, read_array)
            return is_copy and np.array_equal(now, old, equal_nan=now.dtype.kind in "fc")
        return (self.read is read_copy or isinstance(now, SCALARS)) and bool(now == old)

    def restore(self, keys: Collection[Any]) -> None:
        """Write the value back, where that can be done; a dictionary had ``keys``."""
        owner = self.container
        if self.value is MISSING and isinstance(owner, dict):
            owner.pop(self.key, None)
        elif self.read is read_random:
            write_random(owner, self.value)
        elif self.read is read_copy:
            _write_copy(owner, self.value)
        elif self.read is _cell:
            owner.cell_contents = self.value
        elif self.read is _attribute:
            setattr(owner, self.key, self.value)
        elif self.read is read_property and self.value is not MISSING:
            with contextlib.suppress(AttributeError):  # it may be for reading only
                setattr(owner, self.key, self.value)
        elif self.read is read_length and isinstance(owner, dict):
            for key in [key for key in owner if key not in keys]:
                del owner[key]
        elif self.read is read_length and isinstance(owner, list | deque):
            while len(owner) > self.value:
                owner.pop()
        elif self.read is _element and self.key == len(owner):
            # Entries are restored in order, so this one is next.
            owner.append(self.value)
        elif self.read is _element or isinstance(owner, dict):
            owner[self.key] = self.value


def read_item(container: Any, key: Any) -> Any:
    """Return an entry of a dictionary."""
    return container.get(key, MISSING)


def _cell(cell: Any, key: None) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return MISSING


def _element(container: Any, index: int) -> Any:
    return container[index] if index < len(container) else MISSING


def _default(function: Any, number: int) -> Any:
    return _element(function.__defaults__ or (), number)


def read_length(container: Any, key: None) -> int:
    """Return how many entries there are."""
    return len(container)


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, name, MISSING)


def read_property(owner: Any, name: str) -> Any:
    """Return an attribute that is computed, if it is a number (not NaN), a string or the like."""
    with contextlib.suppress(Exception):
        value = getattr(owner, name)
        if isinstance(value, SCALARS) and value == value:
            return value
    return MISSING


def read_copy(container: Any, kind: Any) -> Any:
    """Return a copy of numbers, to be compared by what they are."""
    return container.copy() if kind is None else kind(container)


def _write_copy(container: Any, value: Any) -> None:
    if isinstance(container, set):
        container.clear()
        container.update(value)
    elif isinstance(container, array):
        container[:] = array(container.typecode, value)
    elif not isinstance(container, np.ndarray):
        container[:] = value
    elif container.shape == value.shape:
        container[...] = value


def _in_context(variable: Any, key: None) -> Any:
    return variable.get(MISSING)


def read_array(container: Any, key: None) -> Any:
    """Return a copy of an object that can be an array, as a data frame of pandas."""
    return np.array(container)


def read_random(generator: Any, key: None) -> bytes:
    """Return the state of a generator of Python or NumPy."""
    if isinstance(generator, np.random.Generator):
        return pickle.dumps(generator.bit_generator.state)
    read = generator.get_state if hasattr(generator, "get_state") else generator.getstate
    state = read()
    return pickle.dumps(state.numpy() if isinstance(state, torch.Tensor) else state)


def write_random(generator: Any, state: bytes) -> None:
    """Set the state of a generator of Python or NumPy."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.from_numpy(pickle.loads(state)))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = pickle.loads(state)
    else:
        write = generator.set_state if hasattr(generator, "set_state") else generator.setstate
        write(pickle.loads(state))


def parts_of(value: Any) -> Iterator[Part]:
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
        yield read_copy, value, None, value.copy(), ""
    elif isinstance(value, set):
        yield read_copy, value, frozenset, frozenset(value), ""
        yield from (_fixed(each) for each in value)
    elif isinstance(value, ContextVar):
        yield _in_context, value, None, _in_context(value, None), ""
    elif isinstance(value, bytearray | array):
        yield read_copy, value, bytes, bytes(value), ""
    elif isinstance(value, weakref.ref):
        yield _fixed(value())
    elif isinstance(value, dict | list | deque | tuple | frozenset | types.MappingProxyType):
        yield from _of_container(value)
    elif isinstance(value, type):
        yield from _of_class(value)
    elif isinstance(value, types.BuiltinMethodType | types.MethodWrapperType):
        yield _fixed(value.__self__)
    elif is_library(type(value).__module__) and hasattr(type(value), "__array__"):
        yield read_array, value, None, read_array(value, None), ""
    elif not isinstance(value, types.ModuleType):
        if "__wrapped__" in getattr(value, "__dict__", ()):
            yield _fixed(value.__wrapped__)
        yield from _of_object(value)


def _fixed(value: Any, label: str = "") -> Part:
    return None, None, None, value, label


def _of_container(value: Any) -> Iterator[Part]:
    if isinstance(value, tuple | frozenset):
        yield from (_fixed(each, f"[{index}]") for index, each in enumerate(value))
        return
    if isinstance(value, list) and len(value) > 64 and all(type(v) in SCALARS for v in value):
        yield read_copy, value, None, list(value), ""
        return
    yield read_length, value, None, len(value), ""
    if isinstance(value, dict | types.MappingProxyType):
        yield from ((read_item, value, key, each, f"[{key!r}]") for key, each in value.items())
    else:
        yield from ((_element, value, i, each, f"[{i}]") for i, each in enumerate(value))


def _of_function(function: types.FunctionType) -> Iterator[Part]:
    if is_library(function.__module__):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if (found := _cell(cell, None)) is not MISSING:
            yield _cell, cell, None, found, f" -> {name}"
    yield from _named(function)
    for key, each in vars(function).items():
        yield read_item, vars(function), key, each, f".{key}"
    for number, each in enumerate(function.__defaults__ or ()):
        yield _default, function, number, each, f" default {number}"
    yield from _of_container(function.__kwdefaults__ or {})


def _named(function: types.FunctionType) -> Iterator[Part]:
    """Yield the globals that a function names, and what it names of modules among them."""
    own, codes = function.__globals__, list(codes_of(function.__code__))
    names = {name for code in codes for name in code.co_names}
    lines = (line for code in codes for line in dis.get_instructions(code))
    first = {line.argval for line in lines if line.opname in GLOBAL}
    if "globals" in names:
        first |= {each for code in codes for each in code.co_consts if isinstance(each, str)}
    waiting, seen = [(own, first)], {id(own)}
    while waiting:
        owner, wanted = waiting.pop()
        for name in sorted(wanted):
            holder, key = owner, name
            if owner is own and name not in own:  # a module that the function itself imports
                holder = sys.modules
                key = name if name in holder else f"{own.get('__package__')}.{name}"
            if key not in holder or name.startswith("__"):
                continue
            found = holder[key]
            yield read_item, holder, key, found, f" -> {name}"
            is_module = isinstance(found, types.ModuleType) and not is_library(found.__name__)
            if is_module and id(vars(found)) not in seen:
                seen.add(id(vars(found)))
                waiting.append((vars(found), names))


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of functions inside it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from codes_of(each)


def _of_class(owner: type) -> Iterator[Part]:
    for each in owner.__mro__:
        if is_library(each.__module__):
            continue
        yield read_length, vars(each), None, len(vars(each)), ""
        for name, value in vars(each).items():
            is_code = isinstance(value, types.FunctionType)
            if is_code or not (name.startswith("__") or isinstance(value, DESCRIPTORS)):
                yield read_item, vars(each), name, value, f".{name}"


def _of_object(owner: Any) -> Iterator[Part]:
    is_private = is_library(type(owner).__module__)
    if is_private and not isinstance(owner, OPEN):
        return
    yield _fixed(type(owner))
    for each in type(owner).__mro__:
        for name in _slots(each):
            if hasattr(owner, name):
                yield _attribute, owner, name, getattr(owner, name), f".{name}"
    own = getattr(owner, "__dict__", {})
    yield read_length, own, None, len(own), ""  # a new one may hide that of the class
    for name, each in list(own.items()):
        if isinstance(owner, Module) and name in CONTENTS:
            yield from ((*part[:4], f".{part[2]}") for part in _of_container(each))
        elif not (name.startswith("_") and (is_private or isinstance(owner, Module))):
            yield read_item, vars(owner), name, each, f".{name}"


def _slots(owner: type) -> tuple[str, ...]:
    if is_library(owner.__module__):
        return ()
    found = vars(owner).get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def is_library(module: str | None) -> bool:
    """Whether a module is a library, whose internal state is not compared."""
    return str(module or "").partition(".")[0] in LIBRARIES
