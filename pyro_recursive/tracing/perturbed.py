"""Other values of a program's parameters and data: what is exactly zero now need not stay so."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyro_recursive.tracing.graph_leaves import graph_leaves
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.sites import sites

SIZE = 0.1  # of a change, or of its part of the value; of a parameter only where it is above 1


@contextmanager
def perturbed(program: Program) -> Iterator[Program]:
    """Change all parameters that the densities depend on, and restore them at the end.

    Yields the program with other floating tensors in its arguments, where it runs on these. A term
    with a weight of zero, as of a layer that was initialised so, or of covariates of zero, shows
    nothing of how a program treats samples and rows. Call it inside `isolated`.
    """
    with torch.enable_grad():
        log_probs = _log_probs(program)
    leaves = [leaf for leaf in graph_leaves(log_probs) if leaf.is_floating_point()]
    before = [(leaf, leaf.detach().clone()) for leaf in leaves]
    try:
        for leaf, value in before:
            noise = torch.randn(value.shape).to(value)
            leaf.data.add_(SIZE * noise * value.abs().clamp_min(1.0))
        yield _with_other_data(program)
    finally:
        for leaf, value in before:
            leaf.data.copy_(value)


def _log_probs(program: Program) -> list[Tensor]:
    guide = program.run_guide()
    traces = guide, program.run_model(guide)
    return [
        site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        for site in sites(*traces)
    ]


def _with_other_data(program: Program) -> Program:
    """Return the program with other data; without those that have no other values, as counts."""
    given = tree_leaves((program.args, program.kwargs))
    tensors = [each for each in given if isinstance(each, Tensor) and each.is_floating_point()]
    data = {id(tensor): tensor for tensor in tensors if tensor.layout is torch.strided}
    others = {key: _other(tensor) for key, tensor in data.items()}
    if not others:
        return program
    if _runs(changed := _given(program, others)):
        return changed
    possible = {k: each for k, each in others.items() if _runs(_given(program, {k: each}))}
    return changed if _runs(changed := _given(program, possible)) else program


def _other(tensor: Tensor) -> Tensor:
    """Return values of the same sign, positive ones for zeros: supports are often half-lines."""
    factor = 1 + SIZE * (2 * torch.rand(tensor.shape).to(tensor) - 1)
    return tensor.detach().masked_fill(tensor == 0, SIZE) * factor


def _given(program: Program, others: dict[int, Tensor]) -> Program:
    arguments = tuple(program.args), program.kwargs
    args, kwargs = tree_map(lambda each: others.get(id(each), each), arguments)
    return replace(program, args=args, kwargs=kwargs)


@torch.no_grad()
def _runs(program: Program) -> bool:
    try:
        return all(bool(log_prob.isfinite().all()) for log_prob in _log_probs(program))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
