"""Interleaved timing: every variant in each repeat, ratios within a repeat, medians over all."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from tqdm import tqdm

Timings = dict[str, list[float]]


def interleaved(
    steps: Mapping[str, Callable[[], object]], repeats: int, calls: int, title: str = "timing"
) -> Timings:
    """Return the milliseconds of a call for each variant and repeat."""
    timings: Timings = {name: [] for name in steps}
    names = list(steps)
    for repeat in tqdm(range(repeats), desc=title, leave=False):
        # Each takes each place in turn: what ran before leaves its caches behind.
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            step = steps[name]
            step()
            _synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                step()
            _synchronize()
            timings[name].append((time.perf_counter() - start) / calls * 1e3)
    return timings


def ratios(timings: Timings, baseline: str) -> dict[str, float]:
    """Return each variant's median of per-repeat ratios to the baseline."""
    base = timings[baseline]
    return {
        name: median(mine / theirs for mine, theirs in zip(values, base, strict=True))
        for name, values in timings.items()
    }


def medians(timings: Timings) -> dict[str, float]:
    """Return each variant's median milliseconds."""
    return {name: median(values) for name, values in timings.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
