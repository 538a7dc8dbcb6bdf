"""Interleaved timing: every variant in each repeat, ratios within a repeat, medians over all."""

import resource
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

Costs = dict[str, dict[str, float]]


def costs_of(
    steps: Mapping[str, Callable[[], object]],
    repeats: int,
    calls: int,
    baseline: str,
    title: str = "timing",
) -> Costs:
    """Return each variant's median milliseconds a call, and median ratio to the baseline.

    In each repeat the order is rotated, because caches depend on what ran before.
    """
    timings: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repeat in tqdm(range(repeats), desc=title, leave=False):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            timings[name].append(_milliseconds(steps[name], calls))
    base = timings[baseline]
    return {
        "ms": {name: median(values) for name, values in timings.items()},
        "ratio": {
            name: median(mine / other for mine, other in zip(values, base, strict=True))
            for name, values in timings.items()
        },
    }


def _milliseconds(step: Callable[[], object], calls: int) -> float:
    step()
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    _synchronize()
    return (time.perf_counter() - start) / calls * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_inference(
    guides: Mapping[str, Callable], batch: Tensor, repeats: int, baseline: str, title: str
) -> dict[str, Costs]:
    """Time a draw from q(z | x), for a batch and for one row of it."""
    found = {}
    for rows in (len(batch), 1):
        calls = {name: partial(infer, guide, batch[:rows]) for name, guide in guides.items()}
        found[f"{title}, batch {rows}"] = costs_of(calls, repeats, 10, baseline)
    return found


@torch.no_grad()
def infer(guide: Callable, x: Tensor) -> object:
    """Return what a guide samples."""
    return guide(x)


def grow(guide: Any, batch: Tensor) -> None:
    """Prepare a guide; give a recursive mixture all its components."""
    guide.prepare(batch)
    while getattr(guide, "stage", None) is not None and guide.stage.kind != "joint":
        guide.end_stage()


def peak_megabytes() -> float:
    """Return the highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
