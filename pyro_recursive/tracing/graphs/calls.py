"""Arguments of one call: tensors passed to its graph, and the cache key."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.substitute_messenger import SubstituteMessenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_recursive.tracing.graphs.references import SCALARS
from pyro_recursive.tracing.graphs.unsupported import Unsupported
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.tracing.minibatch import MinibatchRows, minibatch_rows

# Handlers around a step that have no effect but on the program inside.
TRANSPARENT_HANDLERS: tuple[type[Messenger], ...] = (
    *(BlockMessenger, ConditionMessenger, KLWarmup, MaskMessenger, ScaleMessenger),
    *(SubstituteMessenger, UnconditionMessenger),
)


class _Identity:
    """An object in a key, equal to itself alone; held, so that no other object gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Call:
    """The arguments of one call: its tensors, and all else that a graph depends on.

    With ``columns`` and a ``table`` of numbers of their rows, ``[steps, rows]``, a graph takes the
    rows of each step by itself; the arguments are those of the first.
    """

    def __init__(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        columns: tuple[Tensor, ...] = (),
        table: Tensor | None = None,
    ) -> None:
        self.args, self.kwargs, self.columns, self.table = args, kwargs, columns, table
        self.leaves: Sequence[Any] = args
        self.spec: Any = None
        self.others: dict[int, Any] = {}  # by their place, which also tells where tensors are
        self.inputs = list(args)
        if kwargs or not all(type(each) is Tensor for each in args):
            self.leaves, self.spec = tree_flatten((args, kwargs))
            self.others = {n: v for n, v in enumerate(self.leaves) if not isinstance(v, Tensor)}
            self.inputs = [each for each in self.leaves if isinstance(each, Tensor)]
        self.rows, self.handlers = minibatch_rows(), list(poutine.runtime._PYRO_STACK)
        self.weights = [h for h in self.handlers if type(h) is KLWarmup]
        if self.rows is not None and self.rows.index is not None:
            self.inputs.append(self.rows.index)

    @property
    def key(self) -> Any:
        """What a graph is known by: the form of the tensors, the values of all else."""
        forms = [(t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in self.inputs]
        rows = self.rows and (self.rows.index is None, self.rows.total)
        handlers = tuple(
            (type(h), None if type(h) is KLWarmup else _content(vars(h))) for h in self.handlers
        )
        modes: list[Any] = [torch.get_default_dtype(), torch.is_grad_enabled()]
        for kind in ("cpu", "cuda"):
            modes.append(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind))
        given = self.spec, _content(self.others), tuple(forms)
        return *given, rows, handlers, self.table is not None, tuple(modes)

    def check(self) -> None:
        """Raise Unsupported where a step does more than train on its arguments."""
        for handler in self.handlers:
            if type(handler) not in TRANSPARENT_HANDLERS:
                raise Unsupported(f"{type(handler).__name__} around a step may see its sites")
        if any(each.requires_grad for each in self.inputs):
            raise Unsupported("an argument requires a gradient")
        if any(each.layout is not torch.strided for each in self.inputs):
            raise Unsupported("an argument is sparse")

    @property
    def roots(self) -> dict[str, Any]:
        """What else its Python values are reached from."""
        found = {f"argument {n}": each for n, each in self.others.items()}
        around = [each for each in self.handlers if each not in self.weights]
        return found | {f"{type(each).__name__} {n}": each for n, each in enumerate(around)}

    @contextmanager
    def given(self, inputs: list[Tensor], weights: list[Tensor]) -> Iterator[tuple[tuple, dict]]:
        """Yield the arguments with `inputs` as tensors; set minibatch rows and KL weights."""
        tensors = iter(inputs)
        leaves = [next(tensors) if isinstance(each, Tensor) else each for each in self.leaves]
        rows: AbstractContextManager = nullcontext()
        if self.rows is not None and self.rows.index is not None:
            rows = MinibatchRows(next(tensors), self.rows.total)
        before = [handler.weight for handler in self.weights]
        try:
            for handler, weight in zip(self.weights, weights, strict=True):
                handler.weight = weight  # type: ignore[assignment]
            with rows:
                yield (tuple(leaves), {}) if self.spec is None else _unflatten(leaves, self.spec)
        finally:
            for handler, value in zip(self.weights, before, strict=True):
                handler.weight = value


def _content(value: Any) -> Any:
    """Return what tells a value from another one: numbers and their containers by what they are."""
    if isinstance(value, SCALARS):
        return type(value), value
    if isinstance(value, dict):
        return tuple((key, _content(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_content, value))
    if isinstance(value, partial):
        return _content((value.func, value.args, value.keywords))
    return _Identity(value)


def _unflatten(leaves: list[Any], spec: Any) -> tuple[tuple, dict[str, Any]]:
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs
