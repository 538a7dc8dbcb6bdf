"""Passes over chunks of samples, all of one size: eager ones, or one compiled graph of them.

The first pass is eager: it finds the structure of the program. The second is traced, compiled, and
compared with an eager one from the same random state; the others run the compiled graph. They draw
the random numbers of eager passes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyro_recursive.tracing.graphs.calls import Call
from pyro_recursive.tracing.graphs.kernels import compile_graph
from pyro_recursive.tracing.graphs.python_state import PythonState, restored, undone_runs
from pyro_recursive.tracing.graphs.run_graph import recorded, trace_run
from pyro_recursive.tracing.graphs.unsupported import LastSite, Unsupported, as_unsupported
from pyro_recursive.tracing.isolation import random_state, restored_random_state
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.user_warnings import warn_user

# Relative to the largest entry of a result, and absolute, as large terms may cancel in a sum of
# them; by the least precise of the tensors.
TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-6, 1e-5)}
COARSE = 1e-3, 1e-3  # of other dtypes


class Passes:
    """Calls ``run(passes, count, *tensors)`` for chunks of samples, under `torch.no_grad`.

    There are ``total`` samples, ``size`` in each chunk but the last. `run` returns a tensor, or
    tuples and dictionaries of tensors. It is given these passes, as a reference of its own would
    keep all that it knows until the garbage collector runs.
    """

    def __init__(
        self, run: Callable[..., Any], program: Program, size: int, total: int, *, compile: bool
    ) -> None:
        self.run, self.program, self.size = run, program, size
        self.wants_compile, self.left = compile, total // size
        self.is_first, self.is_traced = True, False
        self.compiled: CompiledPass | None = None

    def __call__(self, count: int, *inputs: Tensor) -> Any:
        if count == self.size:
            self.left -= 1
            if self.compiled is not None:
                return self.compiled(*inputs)
            is_second, self.is_first = self.wants_compile and not self.is_first, False
            if is_second and self.left:
                return self._compile(partial(self.run, self, count), inputs)
        return self.run(self, count, *inputs)

    def loops(self, count: int) -> None:
        """Note that a run is a loop over ``count`` samples: a graph would hold each of them."""
        if count > 1:
            self._refuse("they run one by one")

    def _refuse(self, cause: str) -> None:
        if self.wants_compile:
            self.wants_compile = False
            warn_user(f"Samples are drawn and weighed eagerly: {cause}.")

    def _compile(self, run: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """Take an eager pass; let a compiled one take its place where it does the same."""
        try:
            self.is_traced = True
            compiled = CompiledPass(run, self.program, inputs)
            found = compiled.outcome(*inputs)
        except Unsupported as error:
            self._refuse(str(error))
            return run(*inputs)
        finally:
            self.is_traced = False
        results = run(*inputs)
        expected = [*tree_leaves(results), *compiled.changed, *random_state()]
        if _are_close(found, expected, compiled.tolerance):
            self.compiled = compiled
        else:
            self._refuse("a compiled pass differs from an eager one")
        return results


class CompiledPass:
    """A function of tensors as machine code. Raises Unsupported."""

    def __init__(self, run: Callable[..., Any], program: Program, inputs: Sequence[Tensor]) -> None:
        site, specs = LastSite(), list[Any]()

        def traced() -> list[Tensor]:
            with site:
                tensors, spec = tree_flatten(run(*inputs))
            specs.append(spec)
            return tensors

        call = Call(program.args, program.kwargs)
        call.check()
        state = PythonState({"model": program.model, "guide": program.guide} | call.roots)
        with as_unsupported(site):
            with undone_runs(state) as writes:
                recorder, _ = recorded(traced)
                graph = trace_run(traced, recorder, inputs, len(inputs), lambda: site.name)
            self.spec = specs[-1]
            # Batch norm's operator does not declare that it writes to its buffers.
            modules = [module for module in state.modules if module.training]
            buffers = {_place(each) for module in modules for each in module.buffers(False)}
            self.changed = [
                each for each in graph.constants if writes.reaches(each) or _place(each) in buffers
            ]
            pools = graph.plan.empty(1)
            self.fills = [draw.filling(out) for draw, out in graph.plan.slices(pools)]
            self.own = [*(each[0] for each in pools), *(c.detach() for c in graph.constants)]
            kinds = {each.dtype for each in (*inputs, *self.own) if each.is_floating_point()}
            self.tolerance = max(TOLERANCES.get(kind, COARSE) for kind in {torch.float64, *kinds})
            self.function = compile_graph(graph.graph, [*inputs, *self.own])

    def __call__(self, *inputs: Tensor) -> Any:
        for fill in self.fills:
            fill()
        found = self.function(*inputs, *self.own)
        # A result may be a tensor that the next pass writes into.
        return tree_unflatten([each.clone() for each in found], self.spec)

    def outcome(self, *inputs: Tensor) -> list[Tensor]:
        """Return results, changed constants and random state after a pass, and undo it."""
        with as_unsupported(), restored_random_state(), restored(self.changed):
            results = tree_leaves(self(*inputs))
            return [*results, *(each.clone() for each in self.changed), *random_state()]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _are_close(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: tuple[float, float]
) -> bool:
    if len(found) != len(expected):
        return False
    relative, absolute = tolerance
    for new, old in zip(found, expected, strict=True):
        finite = old[old.isfinite()] if old.is_floating_point() else old.new_zeros(0)
        bound = relative * finite.abs().amax().item() + absolute if finite.numel() else 0.0
        is_close = new.shape == old.shape and new.dtype == old.dtype
        if not (is_close and torch.allclose(new, old, rtol=0.0, atol=bound, equal_nan=True)):
            return False
    return True
