"""The parameters that a loss reaches, the buffers of modules, and whose they are."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Generator, Tensor
from torch.nn import Module

from pyro_recursive.tracing.param_store import parameters_in
from pyro_recursive.training import checkpoint

Owner = Literal["guide", "model"]
Weights = dict[str, dict[str, Tensor]]  # "parameter" (unconstrained) and "buffer", by name


class TrainedParameters:
    """The parameters seen in runs of a loss so far, and the buffers of the modules of some owners.

    ``by_name`` are the parameters, unconstrained, in order of appearance. ``of_guide`` names those
    of the guide, among the first ``num_sorted``; shared ones are the guide's.
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        self.modules = _modules(owners)
        self.by_name: dict[str, Tensor] = {}
        self.of_guide: set[str] = set()
        self.num_sorted = 0

    def add(self, trace: poutine.Trace) -> list[Tensor]:
        """Add the parameters of a trace that are new, under their first name; return them."""
        known = {id(parameter) for parameter in self.by_name.values()}
        new = list[Tensor]()
        for name, parameter in parameters_in(trace).items():
            if id(parameter) not in known:
                known.add(id(parameter))
                new.append(parameter)
                self.by_name[name] = parameter
        return new

    def sort(self, guide: poutine.Trace) -> None:
        """Find the guide's parameters: those of a trace of the guide, also if shared."""
        seen = set(map(id, parameters_in(guide).values()))
        self.of_guide |= {name for name, tensor in self.by_name.items() if id(tensor) in seen}
        self.num_sorted = len(self.by_name)
        if not self.of_guide or len(self.of_guide) == len(self.by_name):
            owner, other = ("model", "guide") if self.of_guide else ("guide", "model")
            names = ", ".join(self.by_name)
            raise ValueError(
                f"The {owner} has no parameters of its own: all are the {other}'s ({names})."
            )

    def others(self, owner: Owner | None) -> list[Tensor]:
        """Return the parameters that are known to be the other owner's."""
        known = list(self.by_name.items())[: self.num_sorted if owner else 0]
        return [p for name, p in known if (name in self.of_guide) == (owner == "model")]

    def zero_gradients(self) -> None:
        """Leave no gradients in the parameters."""
        for parameter in self.by_name.values():
            parameter.grad = None

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the modules, collected anew: a module may replace the tensor of one."""
        return {
            f"{number}.{name}": buffer
            for number, module in enumerate(self.modules)
            for name, buffer in module.named_buffers()
        }

    @property
    def weights(self) -> Weights:
        """All parameters and buffers."""
        return {"parameter": self.by_name, "buffer": self.buffers}

    def copied(self) -> Weights:
        """Return copies of all parameters and buffers."""
        return {kind: _copied(tensors) for kind, tensors in self.weights.items()}

    def load(self, weights: Weights) -> None:
        """Copy parameters and buffers in place."""
        for kind, tensors in self.weights.items():
            _load(tensors, weights[kind])

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let parameters have other values in the block, in float64."""
        own = {name: self.by_name[name].data for name in values}
        try:
            for name, value in values.items():
                self.by_name[name].data = value.double()
            yield
        finally:
            for name, value in own.items():
                self.by_name[name].data = value

    @contextmanager
    def restoring(self, generators: Iterable[Generator] = ()) -> Iterator[None]:
        """Restore random states and buffers after the block."""
        buffers = _copied(self.buffers)
        try:
            with checkpoint.forked_rng(generators=generators):
                yield
        finally:
            _load(self.buffers, buffers)


class IterateSum:
    """The sum of unconstrained parameters over steps, in double precision on their devices."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], count: int = 1) -> None:
        """Add the values of a step, or the sums of several; new ones count as if they had been."""
        for name, value in values.items():
            if name in self.sums:
                self.sums[name] += value
            else:
                self.sums[name] = _doubled(value) * ((self.count + count) / count)
        self.count += count

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over the steps."""
        return {name: value / self.count for name, value in self.sums.items()}

    def set_state(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Take over ``vars`` of another, on the devices of parameters."""
        self.count = state["count"]
        sums = state["sums"].items()
        self.sums = {name: _doubled(own).to(like[name].device) for name, own in sums}


def _modules(owners: Iterable[Any]) -> list[Module]:
    """Return the modules among callables, under partials and bound methods, each once."""
    found: dict[int, Module] = {}
    for owner in owners:
        while isinstance(owner, partial):
            owner = owner.func
        owner = poutine.unwrap(getattr(owner, "__self__", owner))
        if isinstance(owner, Module):
            found[id(owner)] = owner
    return list(found.values())


def _doubled(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float64))  # complex128 if complex


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _load(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in saved.items():
        live[name].copy_(tensor)
