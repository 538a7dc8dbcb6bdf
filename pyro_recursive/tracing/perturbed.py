"""Other values of a program's parameters: what is exactly zero now need not stay so."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyro_recursive.tracing.graph_leaves import graph_leaves
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
    leaves = [leaf for leaf in graph_leaves(log_probs) if leaf.is_floating_point()]
    before = [(leaf, leaf.detach().clone()) for leaf in leaves]
    try:
        for leaf, value in before:
            noise = torch.randn(value.shape).to(value)
            leaf.data.add_(SIZE * noise * value.abs().clamp_min(1.0))
        yield
    finally:
        for leaf, value in before:
            leaf.data.copy_(value)
