"""Where a new component with free parameters starts: where the mixture so far is missing."""

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.layout import Layout, layout_of
from pyro_recursive.log_weights import densities
from pyro_recursive.program import Program
from pyro_recursive.recursion import log_mixture
from pyro_recursive.sites import PARTICLE_PLATE
from pyro_recursive.strata import Strata
from pyro_recursive.traces import Draw, Particles, draw

__all__ = ["propose"]

CANDIDATES = 200  # half from the mixture, widened, half from the prior
WIDENING = 3.0
NARROWING = 0.5  # of the mixture's scale, for the new component


@torch.no_grad()
def propose(program: Program, mixture: Any, m: int, *, vectorize: bool = True) -> None:
    """Put component ``m`` on the candidate where ``log p - log Q`` is largest.

    Only for Gaussians with parameters of their own: an encoder starts where its weights say. Among
    candidates far below the best in ``log p`` the ratio would grow without bound in the tails of Q;
    they do not count.
    """
    component = mixture.free_component(m)
    if component is None or len(mixture.groups) != 1:
        return
    (latents,) = mixture.groups
    half = CANDIDATES // 2
    particles, runs = draw(program, 1, half, vectorize=vectorize)
    own = torch.cat([_packed(run.guide, latents) for run in runs])
    prior = torch.cat([_packed(t, latents) for t in _prior(program, particles)])
    centre = own.mean(0, keepdim=True)
    candidates = torch.cat([centre + WIDENING * (own - centre), prior])
    strata = Strata(
        (0,) * CANDIDATES, log_mixture, points=candidates, members=tuple(mixture.members)
    )
    particles, runs = draw(program, 1, CANDIDATES, vectorize=vectorize, strata=strata)
    layout = layout_of(particles, runs)
    best = _best(runs, layout, latents.size)
    rows = [frame.size for frame in latents.rows]
    points = candidates.reshape(CANDIDATES, *rows, latents.size)
    index = best.reshape(1, *rows, 1).expand(1, *rows, latents.size)
    scale = own.std(0).reshape(*rows, latents.size)
    component.restart(latents, points.gather(0, index)[0], NARROWING * scale)


def _best(runs: list[Draw], layout: Layout, size: int) -> Tensor:
    """Return the number of the best candidate for each row, ``[*plates]``."""
    found = densities(runs, layout)
    log_p = found.log_weights.new_zeros(()) if found.model is None else found.model[0]
    log_p = log_p.expand(found.log_weights[0].shape)
    far = log_p < log_p.amax(0) - (5.0 + size / 2)
    return found.log_weights[0].masked_fill(far, -torch.inf).argmax(0)


def _prior(program: Program, particles: Particles) -> list[poutine.Trace]:
    """Run the model on its prior, in one pass or one by one."""
    if particles.dim is None:
        return [_traced(program) for _ in range(particles.total)]
    with pyro.plate(PARTICLE_PLATE, particles.total, dim=particles.dim):
        return [_traced(program)]


def _traced(program: Program) -> poutine.Trace:
    return poutine.trace(program.model).get_trace(*program.args, **program.kwargs)


def _packed(trace: poutine.Trace, latents: Any) -> Tensor:
    """Return the packed latents of a trace, ``[particles, *batch, D]``."""
    values = {slot.name: trace.nodes[slot.name]["value"] for slot in latents.slots}
    u = latents.pack(values)
    rows = [frame.size for frame in latents.rows]
    return u.reshape(-1, *rows, latents.size)
