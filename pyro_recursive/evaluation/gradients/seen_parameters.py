"""Which parameters a loss moves, in groups; and what to do so that it leaves no trace on them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_recursive.tracing.isolation import Unnoticed
from pyro_recursive.tracing.program import Program

__all__ = ["Groups", "KeptTensors", "SeenParameters", "by_program"]

# Prefixes of parameters' names, or a function from a name to its group (None leaves it out).
Groups = Sequence[str] | Callable[[str], str | None]


def by_program(program: Program, runs: Unnoticed) -> Callable[[str], str]:
    """Run both programs once; return which of them has a parameter."""

    def look() -> tuple[set[str], set[str]]:
        with torch.no_grad(), poutine.trace(param_only=True) as of_guide:
            trace = program.run_guide()
        with torch.no_grad(), poutine.trace(param_only=True) as of_model:
            program.run_model(trace)
        return set(of_guide.trace.nodes), set(of_model.trace.nodes)

    of_guide, of_model = runs(look)
    if isinstance(poutine.unwrap(program.guide), Messenger):
        of_guide -= of_model  # it runs the model, too

    def group_of(name: str) -> str:
        if name in of_guide:
            return "shared" if name in of_model else "guide"
        return "model" if name in of_model else "loss"

    return group_of


class SeenParameters(Messenger):
    """The parameters that Pyro sees, in groups; it takes away their ``grad`` until `restore`."""

    def __init__(self, of_program: Callable[[str], str], groups: Groups | None) -> None:
        super().__init__()
        self.of_program, self.groups = of_program, groups
        self.parameters: dict[int, Tensor] = {}
        self.names: list[str] = []
        self.grads: list[Tensor | None] = []
        self.members: dict[str, list[Tensor]] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        parameter = msg["value"].unconstrained()
        if id(parameter) in self.parameters or not parameter.requires_grad:
            return
        self.parameters[id(parameter)] = parameter
        self.names.append(msg["name"])
        self.grads.append(parameter.grad)
        parameter.grad = None  # before the backward pass of this very run
        group = self._group_of(msg["name"])
        if group is not None:
            self.members.setdefault(group, []).append(parameter)

    def _group_of(self, name: str) -> str | None:
        if self.groups is None:
            return self.of_program(name)
        if callable(self.groups):
            return self.groups(name)
        return max((p for p in self.groups if name.startswith(p)), key=len, default=None)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of each group, ``[D]``, and forget it."""
        found = {group: torch.cat(list(_flat(own))) for group, own in self.members.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        return found

    def restore(self) -> None:
        """Give the parameters back what was in their ``grad``."""
        for parameter, grad in zip(self.parameters.values(), self.grads, strict=True):
            parameter.grad = grad

    def check(self) -> None:
        """Raise where nothing was seen, or a group has no parameter."""
        known = ", ".join(self.names) or "none"
        if not self.members:
            raise ValueError(f"No parameter to measure the gradient of: Pyro saw {known}.")
        if self.groups is not None and not callable(self.groups):
            for prefix in self.groups:
                if prefix not in self.members:
                    raise ValueError(f"No parameter is in group '{prefix}': Pyro saw {known}.")


def _flat(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    for parameter in parameters:
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        yield grad.to_dense().flatten() if grad.is_sparse else grad.flatten()


class KeptTensors:
    """The parameters and buffers of programs that are modules, to go back to: losses may step."""

    def __init__(self, *programs: Callable) -> None:
        modules = [m for m in map(poutine.unwrap, programs) if isinstance(m, nn.Module)]
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        self.kept = [(t, t.detach().clone()) for t in tensors]
        self.versions = [t._version for t in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what was done to them in place."""
        for place, (tensor, value) in enumerate(self.kept):
            if tensor._version != self.versions[place]:
                tensor.copy_(value)
                self.versions[place] = tensor._version
