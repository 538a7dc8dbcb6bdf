"""What calls of the evaluation share: wrong arguments are named, and looking changes nothing.

All functions leave the buffers of modules as they were; those that measure the random state, too.
Their noise depends on that state and on the data: minibatches have noise of their own, and the same
call gives the same result. Functions that return draws move the state, as Pyro's own do.
"""

import difflib
import html
import inspect
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.tracing.isolation import same_buffers

Function = TypeVar("Function", bound=Callable)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
COUNTS = ("num_draws", "num_particles", "num_samples")  # of other functions, and of Pyro's
NEAR = 0.87  # of two names: a misspelling of one of them
KINDS: dict[Any, str] = {Callable: "a callable", LatentGuide: "a guide like AmortizedGuide"}


def shown_as_html(result: object) -> str:
    """Return what ``print`` shows of a result, for notebooks."""
    return f"<pre>{html.escape(str(result))}</pre>"


def measurement(of: str = "model") -> Callable[[Function], Function]:
    """Make a function one that measures; other keywords go to the program that is called ``of``."""
    return _call_of(of, _own_noise)


def sampling(of: str = "model") -> Callable[[Function], Function]:
    """Make a function one that draws; other keywords go to the program that is called ``of``."""
    return _call_of(of, lambda arguments: nullcontext())


def checked(function: Function) -> Function:
    """Make a function raise TypeError where a positional argument is of another type."""
    parameters = inspect.signature(function).parameters.items()
    needed = {name: _kinds(p.annotation) for name, p in parameters if p.default is p.empty}

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for (name, kinds), value in zip(needed.items(), args, strict=False):
            if kinds and not isinstance(value, kinds):
                wanted = " or ".join(KINDS.get(kind, kind.__name__) for kind in kinds)
                got = type(value).__name__
                raise TypeError(f"{function.__name__} got {got} as {name}, and needs {wanted}.")
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _kinds(annotation: Any) -> tuple[type, ...]:
    """Return the classes of an annotation; none where these are not known, or numbers."""
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kinds = tuple(get_origin(part) or part for part in parts)
    is_known = all(isinstance(kind, type) and kind not in (Any, int) for kind in kinds)
    return kinds if is_known else ()


def _call_of(of: str, surroundings: Callable) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        signature, run = inspect.signature(function), checked(function)
        own = {n: p.kind for n, p in signature.parameters.items() if p.kind in NAMED}

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            known = signature.bind_partial(*args, **kwargs).arguments
            others = [name for name in kwargs if name not in own]
            if others and of in known:
                programs = [known[name] for name in (of, "guide") if name in known]
                _check_keywords(function.__name__, own, programs, others)
            arguments = [*args, {name: kwargs[name] for name in others}]
            with surroundings(arguments), same_buffers():
                return run(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _check_keywords(
    function: str, own: dict[str, Any], programs: list[Any], keywords: list[str]
) -> None:
    """Raise TypeError for a keyword that neither the function nor the first program names.

    Where the program takes any, for one that is or nearly is an option, and no program names.
    """
    named, takes_any = _names(programs[0])
    also_named = [name for program in programs[1:] for name in _names(program)[0]]
    options = [*(name for name, kind in own.items() if kind is NAMED[1]), *COUNTS]
    for name in keywords:
        if name in named or (takes_any and name in also_named):
            continue
        if not takes_any or difflib.get_close_matches(name, options, 1, NEAR):
            near = difflib.get_close_matches(name, [*own, *named], 1)
            hint = f"Did you mean '{near[0]}'?" if near else f"It has {', '.join(own)}."
            verb = "name" if takes_any else "take"
            raise TypeError(f"{function} got '{name}', which the program does not {verb}. {hint}")


def _names(program: Any) -> tuple[list[str], bool]:
    """Return the names of a program's arguments, and whether it takes any other keyword."""
    program = poutine.unwrap(program)
    if isinstance(program, LatentGuide):
        return _names(program.own_model())
    if isinstance(program, AutoGuide):
        return _names(program.model)
    try:
        found = inspect.signature(program.forward if isinstance(program, nn.Module) else program)
    except (TypeError, ValueError):
        return [], True
    kinds = {name: p.kind for name, p in found.parameters.items()}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds.values()
    return [name for name, kind in kinds.items() if kind in NAMED], takes_any


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
