"""What calls of the evaluation share: unknown keywords are named, and looking changes nothing.

Functions that measure leave the random state as it was. Their noise depends on that state and on
the data: minibatches have noise of their own, and the same call gives the same result. Functions
that return draws move the state, as Pyro's own do.
"""

import difflib
import html
import inspect
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_recursive.guides.base import LatentGuide

Function = TypeVar("Function", bound=Callable)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def shown_as_html(result: object) -> str:
    """Return what ``print`` shows of a result, for notebooks."""
    return f"<pre>{html.escape(str(result))}</pre>"


def measurement(of: str = "model") -> Callable[[Function], Function]:
    """Make a function one that measures; other keywords go to the program that is called ``of``."""
    return _call_of(of, _own_noise)


def sampling(of: str = "model") -> Callable[[Function], Function]:
    """Make a function one that draws; other keywords go to the program that is called ``of``."""
    return _call_of(of, lambda arguments: nullcontext())


def _call_of(of: str, surroundings: Callable) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [name for name, p in signature.parameters.items() if p.kind in NAMED]

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            known = signature.bind_partial(*args, **kwargs).arguments
            others = [name for name in kwargs if name not in own]
            if others and of in known:
                _check_keywords(function.__name__, own, known[of], others)
            with surroundings([*args, {name: kwargs[name] for name in others}]):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _check_keywords(function: str, own: list[str], program: Any, keywords: list[str]) -> None:
    """Raise TypeError for a keyword that neither the function nor the program names."""
    named = _names(program)
    for name in keywords:
        if named is not None and name not in named:
            near = difflib.get_close_matches(name, [*own, *named], 1)
            hint = f"Did you mean '{near[0]}'?" if near else f"It has {', '.join(own)}."
            raise TypeError(f"{function} got '{name}', which the program does not take. {hint}")


def _names(program: Any) -> list[str] | None:
    """Return the names of a program's arguments; None where it takes any keyword."""
    program = poutine.unwrap(program)
    if isinstance(program, LatentGuide):
        return _names(program.own_model())
    if isinstance(program, AutoGuide):
        return _names(program.model)
    try:
        found = inspect.signature(program.forward if isinstance(program, nn.Module) else program)
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.parameters.values()):
        return None
    return [name for name, p in found.parameters.items() if p.kind in NAMED]


@contextmanager
def _own_noise(arguments: Any) -> Iterator[None]:
    """Seed all generators by their state and the arguments; go back to their state at the end."""
    state = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        seed = int(torch.randint(2**62, (), device="cpu"))
        torch.manual_seed(seed ^ _checksum(arguments))
        yield
    finally:
        torch.set_rng_state(state)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _checksum(argument: Any) -> int:
    """Return a number that depends on the values of tensors, strings and numbers in arguments."""
    if isinstance(argument, Tensor) and argument.layout is torch.strided:
        flat = argument.detach().reshape(-1).contiguous().cpu()
        return zlib.crc32(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else 0
    if isinstance(argument, dict):
        argument = list(argument.items())
    if isinstance(argument, list | tuple):
        found = 0
        for each in argument:
            found = zlib.crc32(str(_checksum(each)).encode(), found)
        return found
    return zlib.crc32(repr(argument).encode()) if isinstance(argument, int | float | str) else 0
