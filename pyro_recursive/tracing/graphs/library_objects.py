"""Attributes of libraries' objects: which the code of a program reads, and which libraries set."""

import dis
import inspect
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

from pyro.nn import PyroModule
from torch.nn import Module

from pyro_recursive.tracing.graphs.references import (
    CONTAINERS,
    DESCRIPTORS,
    MISSING,
    OPEN,
    SCALARS,
    Part,
    codes_of,
    is_library,
    read_item,
    read_property,
)

# Libraries whose objects have more methods and caches than a program depends on: of these count
# only attributes that the program's own code names.
VAST = {"torch", "pyro", "_thread"}
CLOSED = {"pyro_recursive", "logging"}  # whose objects hold nothing that a program depends on
# Methods that Python calls where code does not name them; what these read counts.
BY_SYNTAX = {"__bool__", "__call__", "__contains__", "__float__", "__getitem__", "__len__"}
OWN = vars(PyroModule()).keys()  # attributes of modules that are not their author's
DYNAMIC = {"getattr", "hasattr", "vars", "__dict__"}  # with these, names do not show what is read


def without_own(owner: Any) -> Iterator[Part]:
    """Yield the attributes that an object has from its class, and may get of its own."""
    own = getattr(owner, "__dict__", {})
    names = {name for each in type(owner).__mro__ for name in vars(each)} - own.keys()
    yield from ((read_item, own, name, MISSING, f".{name}") for name in names)


def hidden_of(owner: Any) -> Iterator[Part]:
    """Yield attributes that are read where code names them: private ones, of libraries' objects.

    Properties are among them, with a value that is yet to be read.
    """
    if isinstance(owner, types.FunctionType | types.ModuleType | type):
        return
    is_private = is_library(type(owner).__module__)
    is_closed = is_private and not isinstance(owner, OPEN)
    is_small = _is_small(owner)
    if is_closed and not (is_small or _library(owner) in VAST):
        return
    for name, each in list(getattr(owner, "__dict__", {}).items()):
        is_left = name.startswith("_") and (is_private or isinstance(owner, Module))
        if name not in OWN and (is_closed or is_left):
            yield read_item, vars(owner), name, each, f".{name}"
    kind: Any = type(owner)
    if is_small:
        for name in _properties(kind):
            yield read_property, owner, name, MISSING, f".{name}"


def names_for(owner: Any, attribute: str) -> frozenset[str]:
    """Return the names in a program's code with which it may read an attribute of an object."""
    kind: Any = type(owner)
    if _is_small(owner):
        return _read_by(kind, attribute)
    return frozenset((attribute, *DYNAMIC))


def _library(owner: Any) -> str:
    return type(owner).__module__.partition(".")[0]


def _is_small(owner: Any) -> bool:
    """Whether an object is one of a library that is neither vast nor compared in another way."""
    kind: Any = type(owner)
    is_data = isinstance(owner, (*OPEN, *CONTAINERS, *SCALARS)) or hasattr(kind, "__array__")
    is_other = _library(owner) not in VAST | CLOSED
    return is_library(kind.__module__) and is_other and not is_data


@cache
def _properties(kind: type) -> tuple[str, ...]:
    found = {name: each for base in reversed(kind.__mro__) for name, each in vars(base).items()}
    kinds = (property, *DESCRIPTORS)
    return tuple(n for n, v in found.items() if isinstance(v, kinds) and not n.startswith("__"))


@cache
def _read_by(kind: type, attribute: str) -> frozenset[str]:
    """Return an attribute and the methods and properties of its class that may read it."""
    found, waiting, named = {attribute}, [attribute], _named_by_methods(kind)
    while waiting:
        readers = named.get(waiting.pop(), set()) - found
        found |= readers
        waiting += readers
    return frozenset(found)


@cache
def _named_by_methods(kind: type) -> dict[str, set[str]]:
    """Return for each name the methods and properties of a class whose code has it."""
    found: dict[str, set[str]] = {}
    for method in {name for base in kind.__mro__ for name in vars(base)}:
        for base in kind.__mro__:
            each = vars(base).get(method)
            function: Any = each.fget if isinstance(each, property) else each
            if isinstance(function, types.FunctionType):
                own = getattr(inspect.unwrap(function), "__code__", function.__code__)
                for code in codes_of(own):
                    for name in code.co_names:
                        found.setdefault(name, set()).add(method)
    return found


@cache
def set_by_libraries(kind: type) -> frozenset[str]:
    """Return the attributes that code of the libraries' classes among its bases sets alone."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for base in set(kind.__mro__) - {Module}:  # whose modes are the user's
        codes = [each.__code__ for each in vars(base).values() if hasattr(each, "__code__")]
        found[is_library(base.__module__)] |= {name for code in codes for name in _stored(code)}
    return frozenset(found[True] - found[False])


def _stored(code: types.CodeType) -> set[str]:
    return {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR"}
