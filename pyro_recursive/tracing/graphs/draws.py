"""Random draws of a traced step, taken out of its graph: the graph is given them as inputs.

A draw whose arguments are numbers, such as ``torch.randn(3)`` or ``x.uniform_(0, 1)``, can be made
before the step, for many steps at once. One whose arguments are tensors, such as a Gamma sample,
stays in the graph as a call of the same ATen operator, which draws anew each time.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyro_recursive.tracing.graphs.unsupported import Unsupported
from pyro_recursive.tracing.isolation import IS_ISOLATED, random_state


class Draw(NamedTuple):
    """One call of a random operator; ``is_outside`` if its arguments are numbers."""

    operator: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    is_outside: bool

    @property
    def is_in_place(self) -> bool:
        """Whether the operator fills a tensor that it is given."""
        return self.operator._schema.name.endswith("_")

    @property
    def is_like(self) -> bool:
        """Whether the operator is given a tensor for its shape alone."""
        return self.operator._schema.name.endswith("_like")

    def fill(self, out: Tensor) -> None:
        """Draw into a tensor of this shape, in place; elementwise samplers accept any shape."""
        given = (out,) if self.is_in_place or self.is_like else ()
        drawn = self.operator(*given, *self.arguments, **dict(self.options))
        if drawn is not out:
            out.copy_(drawn)

    def filling(self, out: Tensor) -> Callable[[], Any]:
        """Return a function that fills a tensor, by its own method where that does the same."""
        if not self.is_in_place:
            return partial(self.fill, out)
        method = getattr(out, self.operator._schema.name.rpartition(":")[2])
        return partial(method, *self.arguments, **dict(self.options))


class DrawRecorder(TorchDispatchMode):
    """Records the draws of a run, and which of them have the same random state: the same value.

    Two runs of a guide with the same noise, as estimators need that cut paths, set the random state
    back; in a graph, their draws have to be one. ``path`` are the draws that lead from the state at
    the start to that at the end, in their order. Others are made aside, by runs that restore the
    state, or are the same in each step, from a generator that the run seeds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self.order: list[int | None] = []  # of each call of a random operator, which draw it is
        self.path: list[int] = []
        self.seeded: set[int] = set()
        self._known: dict[Any, int] = {}
        self._before: dict[bytes, tuple[int, bytes]] = {}  # by the state after it: draw, state
        self._generators: dict[torch.Generator, bool] = {}  # whether the run has seeded it
        self._start = _state(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        before = _state(generator)
        is_seeded = generator is not None and self._is_seeded(generator, before)
        result = func(*args, **kwargs)
        after = _state(generator)
        if after == before:  # nothing is drawn
            self.order.append(None)
            return result
        draw = _describe(func, args, kwargs, _first(result))
        key = (before, func, draw.shape, draw.dtype, generator)
        if key not in self._known:
            self._known[key] = len(self.draws)
            self.draws.append(draw)
        number = self._known[key]
        self.order.append(number)
        if generator is None and IS_ISOLATED.get():
            return result
        if generator is None:
            self._before[after] = number, before
        elif is_seeded:
            self.seeded.add(number)
        else:
            self.path.append(number)
        return result

    def finish(self) -> None:
        """Find the draws that have led to the random state now."""
        state, path = _state(None), list[int]()
        while state != self._start:
            if state not in self._before or len(path) > len(self.draws):
                raise Unsupported("the seed of the random numbers is set in each step")
            number, state = self._before[state]
            path.insert(0, number)
        self.path += path

    def _is_seeded(self, generator: torch.Generator, state: bytes) -> bool:
        if generator not in self._generators:
            new = torch.Generator(generator.device).manual_seed(generator.initial_seed())
            self._generators[generator] = _state(new) == state
        return self._generators[generator]


class ReplacedDraws(TorchDispatchMode):
    """Gives the draws of a run recorded before: those made outside, and repeated ones.

    ``aside`` are the values of draws made aside, which must not affect the outputs.
    """

    def __init__(self, recorder: DrawRecorder, outside: dict[int, Tensor]) -> None:
        super().__init__()
        self.recorder, self.outside = recorder, outside
        self.aside: list[Tensor] = []
        self._known: dict[int, Any] = {}
        self._calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        number = self._number()
        if number is None:
            return func(*args, **kwargs)
        draw = self.recorder.draws[number]
        if draw.operator is not func:
            raise Unsupported("the random draws of two runs differ")
        if number in self.outside:
            value = self.outside[number].view(draw.shape)
        elif number in self._known:
            value = self._known[number]
        elif number in self.recorder.path:
            self._known[number] = _copy(result := func(*args, **kwargs))
            return result
        else:
            value = self._known[number] = self._constant(number, func, args, kwargs)
        return args[0].copy_(value) if draw.is_in_place else _copy(value)

    def _number(self) -> int | None:
        if self._calls >= len(self.recorder.order):
            raise Unsupported("the random draws of two runs differ")
        self._calls += 1
        return self.recorder.order[self._calls - 1]

    def _constant(self, number: int, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Draw outside of the graph, which has the values as constants."""
        with _disable_current_modes():
            if self.recorder.draws[number].is_in_place:
                args = (torch.empty_like(args[0]), *args[1:])
            value = func(*args, **kwargs)
        if number not in self.recorder.seeded:
            self.aside += [value] if isinstance(value, Tensor) else list(value)
        return value


class Pool(NamedTuple):
    """Draws outside that one call can make: their numbers, and where each lies in a row."""

    draws: list[Draw]
    numbers: list[int]
    ends: list[int]

    @property
    def size(self) -> int:
        return self.ends[-1]

    def empty(self, steps: int) -> Tensor:
        """Return an empty buffer ``[steps, size]``."""
        first = self.draws[0]
        return torch.empty(steps, self.size, dtype=first.dtype, device=first.device)

    def fill(self, buffer: Tensor) -> None:
        """Draw all steps: in one call where the entries are drawn one by one."""
        if self.draws[0].is_in_place:
            self.draws[0].fill(buffer)
        else:
            for row in buffer:
                self.draws[0].fill(row.view(self.draws[0].shape))

    def split(self, row: Tensor) -> dict[int, Tensor]:
        """Return the draws in a row, by their number."""
        starts = [0, *self.ends[:-1]]
        return {
            number: row[start:end]
            for number, start, end in zip(self.numbers, starts, self.ends, strict=True)
        }


class DrawPlan:
    """The draws of one step that are made outside, in pools.

    If a draw has to stay in the graph, all do: their order, and so the random numbers of a step,
    are those of an eager step.
    """

    def __init__(self, recorder: DrawRecorder) -> None:
        self.recorder = recorder
        draws = recorder.draws
        self.is_outside = all(draws[number].is_outside for number in recorder.path)
        pools: dict[Any, Pool] = {}
        for number in recorder.path if self.is_outside else ():
            draw = draws[number]
            kind: Any = number
            if draw.is_in_place:
                kind = (draw.operator, draw.arguments, draw.options, draw.dtype, draw.device)
            pool = pools.setdefault(kind, Pool([], [], []))
            pool.draws.append(draw)
            pool.numbers.append(number)
            pool.ends.append((pool.ends or [0])[-1] + math.prod(draw.shape))
        self.pools = list(pools.values())

    @property
    def bytes(self) -> int:
        """The memory of one step's draws."""
        return sum(pool.size * pool.draws[0].dtype.itemsize for pool in self.pools)

    def empty(self, steps: int) -> list[Tensor]:
        """Return a buffer ``[steps, size]`` for each pool."""
        return [pool.empty(steps) for pool in self.pools]

    def fill(self, buffers: Sequence[Tensor], count: int) -> None:
        """Draw for the first steps: the same law as step by step, in another order."""
        for pool, buffer in zip(self.pools, buffers, strict=True):
            pool.fill(buffer[:count])

    def slices(self, buffers: Sequence[Tensor]) -> list[tuple[Draw, Tensor]]:
        """Return each draw of the first step and where it goes, in the order of an eager step.

        Filled in this order they are the random numbers of an eager step.
        """
        rows: dict[int, Tensor] = {}
        for pool, buffer in zip(self.pools, buffers, strict=True):
            rows |= pool.split(buffer[0])
        draws, path = self.recorder.draws, self.recorder.path if rows else ()
        return [(draws[number], rows[number].view(draws[number].shape)) for number in path]

    def replaced(self, rows: Sequence[Tensor]) -> ReplacedDraws:
        """Return the mode that gives a run the draws of one step, ``[size]`` for each pool."""
        outside: dict[int, Tensor] = {}
        for pool, row in zip(self.pools, rows, strict=True):
            outside |= pool.split(row)
        return ReplacedDraws(self.recorder, outside)


def is_random(operator: Any) -> bool:
    """Whether an ATen operator draws from a generator."""
    return torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ())


def _describe(operator: Any, args: Any, kwargs: dict[str, Any], result: Tensor) -> Draw:
    arguments = tuple(args)
    if operator._schema.name.endswith(("_", "_like")):
        arguments = arguments[1:]
    outside = not any(isinstance(each, Tensor) for each in (*arguments, *kwargs.values()))
    return Draw(
        operator,
        arguments if outside else (),
        tuple(kwargs.items()) if outside else (),
        result.shape,
        result.dtype,
        result.device,
        outside,
    )


def _state(generator: torch.Generator | None) -> bytes:
    states = random_state() if generator is None else [generator.get_state()]
    return b"".join(each.numpy().tobytes() for each in states)


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _copy(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.clone()
    return type(result)(each.clone() for each in result)
