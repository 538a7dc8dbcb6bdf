"""Samples of a guide, recorded and played back, and log-weights added up from Pyro's own traces.

Two ways of computing the same thing (in one pass or in a loop, on all data or on minibatches, by
the package or by hand) then see the same noise and must agree to rounding, gradients included.
"""

import itertools
import math
from collections import Counter
from typing import Any

import torch
from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import is_delta
from tests.models import Programs, Row

M, K = 2, 3


class Pinned(Messenger):
    """Plays back recorded guide samples, ``[P, ...]`` by site, in one pass or one by one.

    It acts on the first run of a guide only: whatever replays that run comes with its own values.
    """

    def __init__(self, values: dict[str, Tensor], fixed: dict[str, Tensor], total: int = 0) -> None:
        super().__init__()
        self.values, self.fixed, self.total = values, fixed, total
        self.visits: Counter[str] = Counter()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["done"] or msg["is_observed"] or name not in self.values | self.fixed:
            return
        msg["done"] = True
        if name in self.fixed:
            msg["value"] = self.fixed[name]
            return
        index = slice(None) if self.total == 0 else self.visits[name] % self.total
        value = self.values[name][index]
        while self.total and value.dim() > len(msg["fn"].shape()):  # as in a run of one sample
            value = value.squeeze(0)
        msg["value"] = value
        self.visits[name] += 1


class Recorded(Messenger):
    """Keeps the first value of every latent site that passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            self.values.setdefault(msg["name"], msg["value"].detach())


Recording = tuple[dict[str, Tensor], dict[str, Tensor]]


def record(programs: Programs, args: tuple, num_estimates: int = M, size: int = K) -> Recording:
    """Draw once; return the sampled values with their graph, and the minibatch."""
    _, (run,) = run_particles(Program(*programs, args), num_estimates, size)
    values = {
        name: site["value"]
        for name, site in run.guide.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not is_delta(site)
    }
    fixed = {name: site["value"] for name, site in run.model.nodes.items() if _subsample(site)}
    values = {name: value for name, value in values.items() if name not in fixed}
    return values, fixed


def _subsample(site: Any) -> bool:
    return site["type"] == "sample" and site_is_subsample(site)


def weights_by_hand(row: Row, programs: Programs, args: tuple, recording: Recording) -> Tensor:
    """Return ``[M * K, *plates]`` log-weights entry by entry, from Pyro's own traces."""
    rows = []
    with Pinned(*recording, total=M * K):
        for _ in range(M * K):
            traces = get_importance_trace("flat", math.inf, *programs, args, {})
            rows.append(_add_up(row, traces))
    return torch.stack(rows)


def _add_up(row: Row, traces: tuple[poutine.Trace, poutine.Trace]) -> Tensor:
    cells: Counter[tuple[int, ...]] = Counter()
    sizes: dict[str, int] = {}
    for trace, sign in zip(traces, (1, -1), strict=True):
        for site in trace.nodes.values():
            if site["type"] != "sample" or site["infer"].get("_deterministic"):
                continue
            frames = {frame.name: frame for frame in site["cond_indep_stack"]}
            shared = [frames[name] for name in row.shared]
            sizes |= {f.name: f.size for f in shared if f.size != -1}
            sizes |= {f.name: site["log_prob"].shape[f.dim] for f in shared if f.size == -1}
            scale = math.prod(frame.full_size / frame.size for frame in shared)
            log_prob = site["log_prob"] / scale
            for index in itertools.product(*map(range, log_prob.shape)):
                cell = (
                    index[frame.dim] if frame.vectorized else (frame.counter - 1) % frame.size
                    for frame in shared
                )
                cells[tuple(cell)] += sign * log_prob[index]
    shape = tuple(sizes[name] for name in row.shared)
    return torch.stack([cells[cell] for cell in itertools.product(*map(range, shape))]).reshape(
        shape
    )


def scale_of(row: Row, programs: Programs, args: tuple) -> float:
    """Return the subsample scale of a row's shared plates."""
    trace = poutine.trace(programs[0]).get_trace(*args)
    site = next(s for s in trace.nodes.values() if s["type"] == "sample" and s["is_observed"])
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    return math.prod(frames[name].full_size / frames[name].size for name in row.shared)
