"""What the models of the table share: `Row`, `Refusal`, data, and short forms of Pyro's calls."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

Programs = tuple[Callable, Callable]
Context = Callable[[], AbstractContextManager]
INDEX = (0, 2)  # a minibatch


def data() -> Tensor:
    return torch.tensor([1.1, -0.4, 0.7, 2.0])


def table() -> Tensor:
    return torch.tensor([[1.1, -0.4, 0.7], [2.0, 0.3, -1.0]])


def mask() -> Tensor:
    return torch.tensor([True, False, True, True])


@dataclass(frozen=True)
class Row:
    """A model with a guide: what they are called with, and what is true of them.

    ``build`` makes both afresh. ``shared`` names the plates that enclose every site, in the order
    of the log-weights' dims, and ``plates`` their sizes. ``sites`` is the kind of the guide's
    sites: "smooth" (all reparameterised), "discrete" (at least one is not) or "delta" (at least
    one is computed from parameters). ``joint`` marks rows that warn that one weight covers all
    data, ``shared_parameter`` a parameter of both programs. ``other_args`` are a second call's, of
    another size or structure. Where the guide is the posterior, ``evidence`` returns log p(x),
    ``[*plates]``, of the arguments.
    """

    name: str
    build: Callable[[], Programs]
    args: Callable[[], tuple] = lambda: (data(),)
    shared: tuple[str, ...] = ("data",)
    plates: tuple[int, ...] = (4,)
    sites: str = "smooth"
    joint: bool = False
    shared_parameter: str | None = None
    other_args: Callable[[], tuple] | None = None
    evidence: Callable[..., Tensor] | None = None

    def refusal(self, loss: str, estimator: str) -> tuple[type[Exception], str] | None:
        """Return the error that a loss with an estimator must raise here, and its message."""
        if self.sites == "discrete" and estimator in ("pathwise", "stl", "dreg", "rws-dreg"):
            return NotImplementedError, r"Guide site 'k\w*' is not reparam.*'vimco'"
        if self.sites == "delta" and estimator.startswith("rws"):
            return NotImplementedError, r"Guide site '\w+' is computed from.*estimator='dreg'"
        split = loss == "PIWAE_ELBO" or estimator.startswith("rws")
        if self.shared_parameter and split:
            return ValueError, f"Parameter '{self.shared_parameter}' belongs to model and guide"
        return None


# Options of rows: where their weights lie, and on which data.
ALONE: dict[str, Any] = {"shared": (), "plates": ()}
JOINT: dict[str, Any] = {**ALONE, "joint": True}
TABLE: dict[str, Any] = {"args": lambda: (table(),)}
GROUPS: dict[str, Any] = {**TABLE, "shared": ("group",), "plates": (2,)}
ITEMS: dict[str, Any] = {**TABLE, "shared": ("group", "item"), "plates": (2, 3)}
GRID: dict[str, Any] = {**TABLE, "shared": ("row", "column"), "plates": (2, 3)}
TRANSPOSED: dict[str, Any] = {**TABLE, "shared": ("column", "row"), "plates": (3, 2)}


class Refusal(NamedTuple):
    """Programs that a loss with these options must refuse for K > 1."""

    name: str
    model: Callable
    guide: Callable
    message: str
    options: dict[str, Any] = {}  # noqa: RUF012


def pair(model: Callable, guide: Callable, **options: Any) -> Callable[[], Programs]:
    """Return the `build` of a row: the programs as they are, or each with keyword arguments."""
    if not options:
        return lambda: (model, guide)
    return lambda: (partial(model, **options), partial(guide, **options))


def guided(model: Callable, make: Callable, **options: Any) -> Callable[[], Programs]:
    """The same with one of Pyro's guides, made of the model."""
    return lambda: (model, make(model, **options))


def handled(handler: Callable, model: Callable, guide: Callable, **options: Any) -> Callable:
    """The same with both programs inside a handler of Pyro's."""
    return lambda: (handler(model, **options), handler(guide, **options))


def real(name: str, value: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(value))


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(value), constraint=constraints.positive)


def normal(name: str, loc: Any, scale: Any, **options: Any) -> Tensor:
    return pyro.sample(name, dist.Normal(loc, scale), **options)


def observe(loc: Tensor, value: Tensor, name: str = "x") -> None:
    pyro.sample(name, dist.Normal(loc, 1.0), obs=value)
