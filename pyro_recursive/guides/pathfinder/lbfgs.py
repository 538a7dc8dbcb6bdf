"""L-BFGS from many starts at once: each evaluation of the objective is one call for all paths."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Points ``[n, D]`` to values ``[n]`` and gradients ``[n, D]``.
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]

MEMORY = 6  # pairs of steps and changes of the gradient
ITERATIONS = 700
TRIALS = 30  # of the length of a step
DECREASE, CURVATURE = 1e-4, 0.9  # of Wolfe's conditions
SMALL_DECREASE, SMALL_GRADIENT = 1e-12, 1e-5  # at which a path ends; the first is relative
STEEP = 1e3  # times the gradient at the start, at least 1, at which a path has no end
FURTHER = 50  # iterations at least, where most paths have ended
CURVED = 1e-12  # least s'z / z'z of a pair that is kept


@dataclass(frozen=True)
class Paths:
    """The points of I paths, a minimiser's, at each of L + 1 iterations; 0 is the start.

    A path that has ended stays where it is: ``moved``, ``[L + 1, I]``, says where it went on, and
    ``kept`` where its step is one of the pairs. ``diagonal`` is the diagonal of a first estimate of
    the inverse Hessian. ``values`` are ``[L + 1, I]``, the others ``[L + 1, I, D]``.
    """

    points: Tensor
    values: Tensor
    gradients: Tensor
    diagonal: Tensor
    moved: Tensor
    kept: Tensor
    memory: int


def minimise(
    objective: Objective,
    starts: Tensor,
    *,
    memory: int = MEMORY,
    iterations: int = ITERATIONS,
) -> Paths:
    """Minimise a function from each of the starts ``[I, D]``.

    Values that are not finite count as infinite. A path ends where decrease or gradient are small,
    where no step lowers the value, or where the gradient is 1,000 times that at the start (and
    above 1,000), as on the way to a point where the value has no bound (a funnel). Once three
    quarters of the paths that started at a finite value have ended, the others go on for as many
    iterations as that took, up to the 50th at least.
    """
    x, count = starts, len(starts)
    value, grad = objective(x)
    steps = x.new_zeros(memory, count, x.shape[-1])
    changes = torch.zeros_like(steps)
    diagonal, unit = torch.ones_like(x), torch.ones_like(value)
    still = torch.zeros(count, dtype=torch.bool, device=x.device)
    record = [(x, value, grad, diagonal, still, still)]
    running = value.isfinite() & grad.isfinite().all(-1)
    started = int(running.sum())
    steepest = STEEP * grad.abs().amax(-1).clamp(min=1.0)
    last = iterations
    for iteration in range(1, iterations + 1):
        left = int(running.sum())
        if not left or iteration > last:
            break
        if left <= started // 4:
            last = min(last, max(2 * iteration, FURTHER))
        direction = -_inverse_hessian_times(grad, steps, changes, unit)
        is_descent = (direction * grad).sum(-1) < 0
        direction = torch.where(is_descent[:, None], direction, -grad)
        length = torch.ones_like(value)
        if iteration == 1:
            length = (1 / grad.norm(dim=-1)).clamp(max=1.0)
        new, moved = _step(objective, (x, value, grad), direction, length, running)
        s, z = new[0] - x, new[2] - grad
        along, change = (s * z).sum(-1), z.square().sum(-1)
        kept = moved & (along > CURVED * change)
        steps, changes = (
            torch.where(kept[:, None], torch.cat([pairs[1:], pair[None]]), pairs)
            for pairs, pair in ((steps, s), (changes, z))
        )
        unit = torch.where(kept, along / change, unit)
        diagonal = torch.where(kept[:, None], _diagonal(diagonal, s, z), diagonal)
        size = torch.maximum(value.abs(), new[1].abs()).clamp(min=1.0)
        slope = new[2].abs().amax(-1)
        has_ended = (value - new[1] <= SMALL_DECREASE * size) | (slope <= SMALL_GRADIENT)
        running = running & moved & ~has_ended & (slope <= steepest)
        x, value, grad = new
        record.append((x, value, grad, diagonal, moved, kept))
    points, values, gradients, diagonals, moved_at, kept_at = zip(*record, strict=True)
    return Paths(
        points=torch.stack(points),
        values=torch.stack(values),
        gradients=torch.stack(gradients),
        diagonal=torch.stack(diagonals),
        moved=torch.stack(moved_at),
        kept=torch.stack(kept_at),
        memory=memory,
    )


def _inverse_hessian_times(g: Tensor, steps: Tensor, changes: Tensor, unit: Tensor) -> Tensor:
    """Return H g by the two-loop recursion; ``[J, I, D]`` pairs, the last ones newest.

    Pairs of zeros have no effect. The first estimate of H is ``unit`` times the identity.
    """
    along = (steps * changes).sum(-1)
    rho = torch.where(along > 0, 1 / along, 0.0)
    shares = []
    for s, z, r in zip(steps.flip(0), changes.flip(0), rho.flip(0), strict=True):
        shares.append(r * (s * g).sum(-1))
        g = g - shares[-1][:, None] * z
    g = unit[:, None] * g
    for s, z, r, share in zip(steps, changes, rho, reversed(shares), strict=True):
        g = g + (share - r * (z * g).sum(-1))[:, None] * s
    return g


def _diagonal(old: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """Return a diagonal inverse Hessian after a pair; the old one where it is not positive."""
    a = (old * z.square()).sum(-1, keepdim=True)
    b = (s * z).sum(-1, keepdim=True)
    c = (s.square() / old).sum(-1, keepdim=True)
    inverse = a / (b * old) + z.square() / b - a * s.square() / (b * c * old.square())
    is_positive = ((inverse > 0) & inverse.isfinite()).all(-1, keepdim=True)
    return torch.where(is_positive, 1 / inverse, old)


def _step(
    objective: Objective,
    here: tuple[Tensor, Tensor, Tensor],
    direction: Tensor,
    length: Tensor,
    running: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return where the running paths go, and which of them moved.

    Lengths of steps are doubled and bisected until Wolfe's weak conditions hold; where they do not,
    the last point with a sufficient decrease counts.
    """
    x, value, grad = here
    slope = (direction * grad).sum(-1)
    there = x.clone(), value.clone(), grad.clone()
    moved, active = torch.zeros_like(running), running.clone()
    low, high = torch.zeros_like(length), torch.full_like(length, math.inf)
    for _ in range(TRIALS):
        rows = active.nonzero().squeeze(-1)
        if not len(rows):
            break
        t = length[rows]
        point = x[rows] + t[:, None] * direction[rows]
        new_value, new_grad = objective(point)
        is_lower = new_value <= value[rows] + DECREASE * t * slope[rows]
        is_lower &= new_grad.isfinite().all(-1)
        is_flat = (new_grad * direction[rows]).sum(-1) >= CURVATURE * slope[rows]
        taken = rows[is_lower]
        for old, new in zip(there, (point, new_value, new_grad), strict=True):
            old[taken] = new[is_lower]
        moved[taken] = True
        low[rows] = torch.where(is_lower, t, low[rows])
        high[rows] = torch.where(is_lower, high[rows], t)
        middle = (low[rows] + high[rows]) / 2
        length[rows] = torch.where(high[rows].isinf(), 2 * t, middle)
        active[rows] = ~(is_lower & is_flat)
    return there, moved
