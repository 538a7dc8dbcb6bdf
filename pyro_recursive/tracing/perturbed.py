"""Other values of a program's parameters and data: what is exactly zero now need not stay so."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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
    data = {id(tensor): tensor for tensor in _data((*program.args, program.kwargs))}
    others = {key: _other(tensor) for key, tensor in data.items()}
    if _runs(changed := _given(program, others)) or not others:
        return changed
    possible = {k: each for k, each in others.items() if _runs(_given(program, {k: each}))}
    return changed if _runs(changed := _given(program, possible)) else program


def _data(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.layout is torch.strided:
            yield value
    elif type(value) in (tuple, list, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _data(each)


def _other(tensor: Tensor) -> Tensor:
    """Return values of the same sign, positive ones for zeros: supports are often half-lines."""
    factor = 1 + SIZE * (2 * torch.rand(tensor.shape).to(tensor) - 1)
    return tensor.detach().masked_fill(tensor == 0, SIZE) * factor


def _given(program: Program, others: dict[int, Tensor]) -> Program:
    def given(value: Any) -> Any:
        if type(value) is dict:
            return {name: given(each) for name, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(map(given, value))
        return others.get(id(value), value)

    return replace(program, args=given(tuple(program.args)), kwargs=given(program.kwargs))


@torch.no_grad()
def _runs(program: Program) -> bool:
    try:
        return all(bool(log_prob.isfinite().all()) for log_prob in _log_probs(program))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
