"""Engines: how the steps of a graph run, from the fastest to the one that always can."""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from pyro_recursive.tracing.graphs.kernels import (
    Compiled,
    KernelCalls,
    NotRecordable,
    compile_graph,
)
from pyro_recursive.training.compiled.step_graph import StepGraph

EngineName = Literal["auto", "replay", "flat", "graph", "eager"]


class Engine(Protocol):
    """Takes a number of steps in place, from the number ``step.index`` of the block on."""

    name: str

    def run(self, count: int) -> None: ...

    def rebind(self) -> None:
        """Work on the tensors that the step has now; may change what steps change."""
        ...


class CallEngine:
    """Calls a function of the step's tensors once a step: compiled code, or the graph itself."""

    def __init__(self, step: StepGraph, function: Compiled, name: str) -> None:
        self.step, self.function, self.name = step, function, name
        self.rebind()

    def rebind(self) -> None:
        self.tensors = self.step.tensors

    def run(self, count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                self.function(*self.tensors)


class ReplayEngine:
    """Repeats the kernel calls of one compiled step; on a GPU, a CUDA graph of them."""

    name = "replay"

    def __init__(self, step: StepGraph, compiled: Compiled) -> None:
        self.step, self.compiled = step, compiled
        self.rebind()

    def rebind(self) -> None:
        tensors = self.step.tensors
        if self.step.index.is_cuda:
            self._repeat: Callable[[int], None] = _captured(self.compiled, tensors)
            return
        calls = KernelCalls(self.compiled, tensors)
        known = calls.pointers()
        if any(each.data_ptr() not in known for each in self.step.changed):
            raise NotRecordable("the compiled step works on a copy of its state")
        self._repeat = calls.repeat

    def run(self, count: int) -> None:
        self._repeat(count)


def _captured(compiled: Compiled, tensors: list[Tensor]) -> Callable[[int], None]:
    """Return a function that repeats a step on a GPU, as a captured CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        compiled(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        compiled(*tensors)

    def repeat(count: int) -> None:
        for _ in range(count):
            graph.replay()

    return repeat


def make_engine(step: StepGraph, wanted: EngineName = "auto") -> Engine:
    """Return the engine asked for, or the fastest that can run a step."""
    if wanted == "graph":
        return CallEngine(step, step.module, "graph")
    compiled = compile_graph(step.module, step.tensors)
    if wanted in ("auto", "replay"):
        try:
            return ReplayEngine(step, compiled)
        except NotRecordable:
            if wanted == "replay":
                raise
    return CallEngine(step, compiled, "flat")
