"""One training step as one graph over flat buffers, and what it needs to run many times."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_recursive.tracing.graphs.gradients import GradientGraph
from pyro_recursive.tracing.graphs.lowering import DECOMPOSITIONS, lower
from pyro_recursive.training.compiled.capture import on_device, without_checks
from pyro_recursive.training.compiled.flat import FlatGroup
from pyro_recursive.training.compiled.loop_graph import changed_inputs

MAX_BLOCK = 64  # steps
MAX_DRAWS = 2**25  # bytes of draws for one block


@dataclass(frozen=True)
class MinibatchTable:
    """The first ``columns`` inputs are data, of which step n takes the rows ``index[n]``.

    ``index`` is ``[block, rows]``; with ``is_numbered`` the loss has it as one more input.
    """

    index: Tensor
    columns: int
    is_numbered: bool

    def minibatch(self, rows: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        """Return the inputs of the loss in a step with these rows."""
        data, rest = inputs[: self.columns], inputs[self.columns :]
        batch = [column.index_select(0, rows.to(column.device)) for column in data]
        return [*batch, *([rows.to(data[0].device)] if self.is_numbered else []), *rest]


class StepGraph:
    """A graph that takes a step in place: ``graph(*tensors)``.

    `tensors` are those of the flat groups, the number of the step in its block ``index`` ``[1]``,
    the ``losses`` of the block ``[block]``, the draws of its steps ``[block, size]`` for each pool,
    the index of a ``table``, the inputs of the loss and the constants; with ``is_guarded`` also
    their ``health``, a sum of all losses and norms of gradients, and a step changes nothing once
    that is not finite.
    """

    def __init__(
        self,
        gradients: GradientGraph,
        groups: Sequence[FlatGroup],
        inputs: Sequence[Tensor],
        *,
        table: MinibatchTable | None = None,
        clip_norm: float | None = None,
        is_guarded: bool = False,
    ) -> None:
        self.gradients, self.groups = gradients, list(groups)
        size = max(gradients.plan.bytes, 1)
        self.block = max(1, min(MAX_BLOCK, MAX_DRAWS // size))
        device = groups[0].values.device
        self._placed = gradients if device.type == "cpu" else on_device(gradients, device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(self.block, dtype=torch.float64, device=device)
        self.draws = gradients.plan.empty(self.block)
        # Beside the step's number, where the data may be elsewhere.
        self.table = table and replace(table, index=table.index.to(device))
        self.inputs, self.clip_norm = list(inputs), clip_norm
        zero = torch.zeros(1, dtype=torch.float64, device=device)
        self.health = [zero] if is_guarded else []
        self.module: GraphModule = self._trace()
        self._changed = changed_inputs(self.module)

    @property
    def tensors(self) -> list[Tensor]:
        own = [each for group in self.groups for each in group.tensors]
        index = [] if self.table is None else [self.table.index]
        given = [*self.draws, *index, *self.inputs, *self._placed.constants]
        return [*own, self.index, self.losses, *self.health, *given]

    @property
    def changed(self) -> list[Tensor]:
        """The tensors that a step changes, constants that the model or guide change among them."""
        tensors = self.tensors
        return [tensors[number] for number in self._changed]

    def _trace(self) -> GraphModule:
        tracer = make_fx(self._step, DECOMPOSITIONS, tracing_mode="fake")
        with torch.no_grad():
            try:
                module = tracer(*self.tensors)
            except RuntimeError:  # some tensors have to stay on the CPU
                if self._placed is self.gradients:
                    raise
                self._placed = self.gradients
                module = tracer(*self.tensors)
        without_checks(module)
        lower(module)
        return module

    def _step(self, *tensors: Tensor) -> list[Tensor]:
        remaining = iter(tensors)

        def take(count: int) -> list[Tensor]:
            return [next(remaining) for _ in range(count)]

        owned = [take(len(group.tensors)) for group in self.groups]
        (index, losses), health = take(2), take(len(self.health))
        rows = [buffer.index_select(0, index).view(-1) for buffer in take(len(self.draws))]
        table = take(0 if self.table is None else 1)
        inputs, constants = take(len(self.inputs)), list(remaining)
        if self.table is not None:
            inputs = self.table.minibatch(table[0].index_select(0, index).view(-1), inputs)
        views: dict[int, Tensor] = {}
        for group, (values, *_) in zip(self.groups, owned, strict=True):
            views |= {id(m.parameter): m.view(values) for m in group.members}
        parameters = self.gradients.parameters
        loss, found = self._placed([views[id(p)] for p in parameters], inputs, rows, constants)
        gradients, is_finite = self._checked(loss, found, health)
        by_id: dict[int, Any] = dict(zip(map(id, parameters), gradients, strict=True))
        for group, own in zip(self.groups, owned, strict=True):
            group.update(own, [by_id[id(m.parameter)] for m in group.members], index, is_finite)
        if is_finite is not None:  # the block shows where its steps have stopped
            loss = torch.where(is_finite, loss.to(losses), math.nan)
        here = torch.arange(self.block, device=index.device) == index
        losses.copy_(torch.where(here, loss.to(losses.dtype), losses))
        index.copy_(index + 1)
        return []

    def _checked(
        self, loss: Tensor, gradients: Sequence[Tensor], health: list[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return the gradients, clipped, and whether all was finite so far where this matters."""
        if self.clip_norm is None and not health:
            return gradients, None
        first = gradients[0]
        norms = [g.norm().to(first.device, torch.float64) for g in gradients]
        norm = torch.stack(norms).norm()
        if self.clip_norm is not None and self.clip_norm < math.inf:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = [g * factor.to(g) for g in gradients]
        if not health:
            return gradients, None
        health[0].copy_(health[0] + loss.to(health[0]) + norm.to(health[0]))
        return gradients, health[0].isfinite()
