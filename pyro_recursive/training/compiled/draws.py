"""Random draws of a traced step, taken out of its graph: the graph is given them as inputs.

A draw whose arguments are numbers, such as ``torch.randn(3)`` or ``x.uniform_(0, 1)``, can be made
before the step, for many steps at once. One whose arguments are tensors, such as a Gamma sample,
stays in the graph as a call of the same ATen operator, which draws anew each time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_recursive.tracing.isolation import random_state


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
        """Draw into a tensor of this shape, in place; in any shape where each entry is alone."""
        given = (out,) if self.is_in_place or self.is_like else ()
        drawn = self.operator(*given, *self.arguments, **dict(self.options))
        if drawn is not out:
            out.copy_(drawn)


class DrawRecorder(TorchDispatchMode):
    """Records the draws of a run, and which of them have the same random state: the same value.

    Two runs of a guide with the same noise, as estimators need that cut paths, set the random state
    back; in a graph, their draws have to be one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self.order: list[int] = []  # of each call of a random operator, which draw it is
        self._known: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        state = b"".join(each.numpy().tobytes() for each in random_state())
        result = func(*args, **kwargs)
        draw = _describe(func, args, kwargs, _first(result))
        own = len(self.order) if kwargs.get("generator") is not None else None
        key = (state, func, draw.shape, draw.dtype, own)
        if key not in self._known:
            self._known[key] = len(self.draws)
            self.draws.append(draw)
        self.order.append(self._known[key])
        return result


class ReplacedDraws(TorchDispatchMode):
    """Gives the draws of a run recorded before: those made outside, and repeated ones."""

    def __init__(self, recorder: DrawRecorder, outside: dict[int, Tensor]) -> None:
        super().__init__()
        self.recorder, self.outside = recorder, outside
        self._inside: dict[int, Any] = {}
        self._calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        number = self._number(func)
        draw = self.recorder.draws[number]
        if number in self.outside:
            value = self.outside[number].view(draw.shape)
            return args[0].copy_(value) if draw.is_in_place else value.clone()
        if number not in self._inside:
            self._inside[number] = _copy(result := func(*args, **kwargs))
            return result
        repeated = self._inside[number]
        return args[0].copy_(repeated) if draw.is_in_place else _copy(repeated)

    def _number(self, func: Any) -> int:
        order, draws = self.recorder.order, self.recorder.draws
        if self._calls >= len(order) or draws[order[self._calls]].operator is not func:
            raise NotImplementedError("The random draws of two runs differ.")
        self._calls += 1
        return order[self._calls - 1]


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
        self.recorder, self.pools = recorder, list[Pool]()
        self.is_outside = all(draw.is_outside for draw in recorder.draws)
        pools: dict[Any, Pool] = {}
        for number, draw in enumerate(recorder.draws if self.is_outside else ()):
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

    def slices(self, buffers: Sequence[Tensor], step: int = 0) -> list[tuple[Draw, Tensor]]:
        """Return each draw of a step and where it goes, in the order of an eager step.

        Filled in this order they are the random numbers of an eager step.
        """
        rows: dict[int, Tensor] = {}
        for pool, buffer in zip(self.pools, buffers, strict=True):
            rows |= pool.split(buffer[step])
        draws = self.recorder.draws
        return [(draws[number], rows[number].view(draws[number].shape)) for number in sorted(rows)]

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


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _copy(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.clone()
    return type(result)(each.clone() for each in result)
