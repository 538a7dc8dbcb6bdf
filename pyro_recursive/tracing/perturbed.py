"""Other values of a program's parameters: what is exactly zero now need not stay so."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.sites import sites

SIZE = 0.1  # of a parameter's change, or of its part where the parameter is larger than 1


@contextmanager
def perturbed(program: Program) -> Iterator[None]:
    """Change all parameters that the densities depend on, and restore them at the end.

    A term with a weight of zero, as of a layer that was initialised so, shows nothing of how a
    program treats samples and rows. Call it inside `isolated`.
    """
    with torch.enable_grad():
        guide = program.run_guide()
        traces = guide, program.run_model(guide)
        log_probs = [
            site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            for site in sites(*traces)
        ]
    before = [(leaf, leaf.detach().clone()) for leaf in _leaves(log_probs)]
    try:
        for leaf, value in before:
            noise = torch.randn(value.shape).to(value)
            leaf.data.add_(SIZE * noise * value.abs().clamp_min(1.0))
        yield
    finally:
        for leaf, value in before:
            leaf.data.copy_(value)


def _leaves(outputs: list[Tensor]) -> list[Tensor]:
    """Return the floating-point leaves that tensors depend on."""
    moving = [out for out in outputs if out.requires_grad]
    pending, seen, found = [get_gradient_edge(out).node for out in moving], set(), []
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        pending.extend(following for following, _ in node.next_functions if following is not None)
    return [leaf for leaf in found if leaf.is_floating_point()]
