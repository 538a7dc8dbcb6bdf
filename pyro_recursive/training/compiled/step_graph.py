"""One training step as one graph over flat buffers, and what it needs to run many times."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_recursive.training.compiled.flat import FlatGroup
from pyro_recursive.training.compiled.gradients import GradientGraph

MAX_BLOCK = 64  # steps
MAX_DRAWS = 2**25  # bytes of draws for one block


class StepGraph:
    """A graph that takes a step in place: ``graph(*tensors)``.

    `tensors` are those of the flat groups, the number of the step in its block ``index`` ``[1]``,
    the ``losses`` of the block ``[block]``, the draws of its steps ``[block, size]`` for each pool,
    the inputs of the loss and the constants.
    """

    def __init__(
        self, gradients: GradientGraph, groups: Sequence[FlatGroup], inputs: Sequence[Tensor]
    ) -> None:
        self.gradients, self.groups = gradients, list(groups)
        size = max(gradients.plan.bytes, 1)
        self.block = max(1, min(MAX_BLOCK, MAX_DRAWS // size))
        device = groups[0].values.device
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(self.block, dtype=torch.float64, device=device)
        self.draws = gradients.plan.empty(self.block)
        self.inputs = list(inputs)
        self.module: GraphModule = self._trace()

    @property
    def tensors(self) -> list[Tensor]:
        own = [each for group in self.groups for each in group.tensors]
        return [*own, self.index, self.losses, *self.draws, *self.inputs, *self.gradients.constants]

    @property
    def changed(self) -> list[Tensor]:
        """The tensors that each step changes."""
        own = [t for g in self.groups for t in (g.values, *g.slots.values(), g.steps)]
        return [*own, self.index, self.losses]

    def _trace(self) -> GraphModule:
        with torch.no_grad():
            module = make_fx(self._step, tracing_mode="fake")(*self.tensors)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def _step(self, *tensors: Tensor) -> list[Tensor]:
        remaining = iter(tensors)

        def take(count: int) -> list[Tensor]:
            return [next(remaining) for _ in range(count)]

        owned = [take(len(group.tensors)) for group in self.groups]
        index, losses = take(2)
        rows = [buffer.index_select(0, index).view(-1) for buffer in take(len(self.draws))]
        inputs, constants = take(len(self.inputs)), list(remaining)
        views: dict[int, Tensor] = {}
        for group, (values, *_) in zip(self.groups, owned, strict=True):
            views |= {id(m.parameter): m.view(values) for m in group.members}
        parameters = self.gradients.parameters
        loss, found = self.gradients([views[id(p)] for p in parameters], inputs, rows, constants)
        by_id: dict[int, Any] = dict(zip(map(id, parameters), found, strict=True))
        for group, own in zip(self.groups, owned, strict=True):
            group.update(own, [by_id[id(m.parameter)] for m in group.members], index)
        here = torch.arange(self.block, device=index.device) == index
        losses.copy_(torch.where(here, loss.to(losses.dtype), losses))
        index.copy_(index + 1)
        return []
