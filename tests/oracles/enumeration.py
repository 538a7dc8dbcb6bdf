"""Exact expectations over every outcome of a guide whose sites are all discrete.

The value of a bound and its gradient are sums over all outcomes of all samples, with the guide's
probabilities; an estimator's mean is the sum of its gradients, one call of the loss for each.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.bounds import Bound

Programs = tuple[Callable, Callable]


class Given(Messenger):
    """Gives the guide's sites their values, in a vectorised pass or one particle after another."""

    def __init__(self, values: list[dict[str, Tensor]], dim: int | None = None) -> None:
        super().__init__()
        self.values, self.dim = values, dim
        self.visits: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["done"] or msg["is_observed"] or site_is_subsample(msg):
            return
        if self.dim is None:
            particle = self.visits.get(name, 0)
            self.visits[name] = particle + 1
            msg["value"] = self.values[particle % len(self.values)][name]
        else:
            rows = torch.stack([each[name] for each in self.values])
            msg["value"] = rows.reshape(len(rows), *[1] * (-self.dim - rows.dim()), *rows.shape[1:])
        msg["done"] = True


class Table(NamedTuple):
    """Every outcome of a guide, and log p(x, z) and log q(z) of each, ``[outcomes]``."""

    outcomes: list[dict[str, Tensor]]
    log_p: Tensor
    log_q: Tensor


def enumerate_outcomes(programs: Programs, x: Tensor) -> Table:
    """Run model and guide on every outcome of the guide's sites, whose entries are 0 or 1."""
    model, guide = programs
    found, log_p, log_q = _outcomes(guide, x), [], []
    for values in found:
        with Given([values]):
            guided = poutine.trace(guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(model, trace=guided)).get_trace(x)
        log_p.append(replayed.log_prob_sum())
        log_q.append(guided.log_prob_sum())
    return Table(found, torch.stack(log_p), torch.stack(log_q))


def _outcomes(guide: Callable, x: Tensor) -> list[dict[str, Tensor]]:
    trace = poutine.trace(guide).get_trace(x)
    sizes = {
        name: site["value"].shape
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }
    total = sum(shape.numel() for shape in sizes.values())
    found = []
    for bits in itertools.product((0.0, 1.0), repeat=total):
        row, values = torch.tensor(bits), {}
        for name, shape in sizes.items():
            values[name], row = row[: shape.numel()].reshape(shape), row[shape.numel() :]
        found.append(values)
    return found


def exact_value(table: Table, bound: Bound, size: int) -> Tensor:
    """Return the expectation of a bound of joint weights, with its graph."""
    index = _tuples(len(table.outcomes), size)
    values = bound((table.log_p - table.log_q)[index].unsqueeze(0))
    return (table.log_q[index].sum(0).exp() * values).sum()


def mean_gradient(
    loss: ELBO, programs: Programs, x: Tensor, table: Table, size: int, depth: int
) -> Tensor:
    """Return minus the mean of the gradients that a loss gives at every outcome of K samples."""
    index = _tuples(len(table.outcomes), size)
    weights = table.log_q.detach()[index].sum(0).exp()
    samples = [[table.outcomes[k] for k in row] for row in index.T]
    return mean_over(samples, weights, loss, programs, x, depth)


def mean_over(
    samples: list[list[dict[str, Tensor]]],
    weights: Tensor,
    loss: ELBO,
    programs: Programs,
    x: Tensor,
    depth: int,
) -> Tensor:
    """Return minus the weighted mean of the gradients at samples of K particles.

    ``depth`` is the number of dims of the program's plates.
    """
    is_plate = loss.vectorize_particles and len(samples[0]) > 1
    total = torch.zeros(())
    for values, weight in zip(samples, weights, strict=True):
        with Given(values, -depth - 1 if is_plate else None):
            total = total - weight * gradients(loss.differentiable_loss(*programs, x))
    return total


def gradients(scalar: Tensor) -> Tensor:
    """Return the gradient in all parameters, in the order of their names."""
    leaves = [leaf for _, leaf in sorted(pyro.get_param_store().named_parameters())]
    found = torch.autograd.grad(
        scalar, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([each.flatten() for each in found])


def _tuples(count: int, size: int) -> Tensor:
    """Return all choices of ``size`` outcomes, ``[size, choices]``."""
    return torch.tensor(list(itertools.product(range(count), repeat=size))).T
