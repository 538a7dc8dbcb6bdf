"""The benchmark of MAPA as tables, one for each data set, and as verdicts on the paper's claims."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods.curves import METHODS
from benchmarks.methods.mapa import BASELINE
from benchmarks.report import Results, spread, table, with_error

SIZES = (5, 10, 20)
ERRORS = 2.0  # standard errors that count as a difference
LEAST = 2  # draws: one has no standard error, and would agree with everything
Draws = dict[str, dict[str, Any]]  # of one data set: draw to method to scores

TRUE_POSTERIOR = "MAPA true 5"  # the paper's MAPA-GT, as we read it


def report(results: Results) -> str:
    """Return a table for each data set, and the verdicts. All in nats per point but the costs.

    KL, gap: mean ± standard deviation over draws; "vs VAE": mean of the differences within a draw ±
    its standard error.
    """
    parts = [_of_data(name, draws) for name, draws in results["draws"].items() if draws]
    return "\n\n".join([*parts, verdicts(results)])


def _of_data(name: str, draws: Draws) -> str:
    methods = [method for method in METHODS if any(method in runs for runs in draws.values())]
    rows = [[method, *(cell(draws, method) for cell in COLUMNS.values())] for method in methods]
    failed = [
        f"{method}, draw {draw}: {failure}"
        for draw, runs in draws.items()
        for method in methods
        for failure in runs.get(method, {}).get("failures", [])
    ]
    return "\n".join([f"{name}, {len(draws)} draws", table(["method", *COLUMNS], rows), *failed])


def _versus(draws: Draws, method: str) -> str:
    found = difference(draws, method, BASELINE)
    return "" if method == BASELINE or not len(found) else with_error(found, sign=True, digits=3)


def _all(draws: Draws, method: str, key: str) -> str:
    return spread(values(draws, method, key), digits=3)


def _mean(draws: Draws, method: str, key: str, digits: int) -> str:
    found = values(draws, method, key)
    return spread(found.mean(0, keepdim=True), digits=digits) if len(found) else ""


def _median(draws: Draws, method: str) -> str:
    """Return the median, which a run that stayed on a plateau does not move."""
    found = values(draws, method, "kl")
    return spread(found.quantile(0.5)[None], digits=3) if len(found) else ""


COLUMNS: dict[str, Callable[[Draws, str], str]] = {
    "test KL": partial(_all, key="kl"),
    "median": _median,
    "vs VAE": _versus,
    "KL of codes": partial(_all, key="kl_of_codes"),
    "passes/point": partial(_mean, key="passes", digits=2),
    "seconds": partial(_mean, key="seconds", digits=1),
    "processor": partial(_mean, key="processor_seconds", digits=1),
    "gap": partial(_all, key="gap"),
}


def values(draws: Draws, method: str, key: str) -> Tensor:
    """Return the numbers of a method, one for each draw that has one: ``[draws]``."""
    found = (runs.get(method, {}).get(key) for runs in draws.values())
    return torch.tensor([x for x in found if x is not None], dtype=torch.float64)


def difference(draws: Draws, first: str, second: str) -> Tensor:
    """Return the first method's test KL less the second's, for each draw that has both."""
    pairs = ([runs.get(name, {}).get("kl") for name in (first, second)] for runs in draws.values())
    both = [a - b for a, b in pairs if a is not None and b is not None]
    return torch.tensor(both, dtype=torch.float64)


def standard_error(differences: Tensor) -> float:
    """Return the standard error of the mean; infinite for a single draw."""
    if len(differences) < LEAST:
        return torch.inf
    return differences.std().item() / len(differences) ** 0.5


# The claims.


def verdicts(results: Results) -> str:
    """Return what the draws say of the paper's four claims, with the numbers."""
    draws = {name: found for name, found in results["draws"].items() if found}
    lines = [
        _wins(draws),
        _compare(
            "MAPA is close to MAPA-GT:",
            draws,
            ("MAPA 5", TRUE_POSTERIOR),
            0,
            "no difference beyond errors",
        ),
        _compare("Uniform proposals are poor:", draws, ("uniform 5", "MAPA 5"), 1, "uniform worse"),
        _cheap(draws),
    ]
    title = f"Claims of the paper (differences beyond {ERRORS:g} errors count):"
    return "\n".join([title, *(f"{number}. {line}" for number, line in enumerate(lines, 1))])


def _wins(draws: dict[str, Draws]) -> str:
    text = "MAPA below VAE and IWAE for every S, on 4 of 5 sets and not on the clusters:"
    pairs = [("MAPA 1", BASELINE), *((f"MAPA {s}", BASELINE) for s in SIZES)]
    pairs += [(f"MAPA {s}", f"IWAE {s}") for s in SIZES]
    measured = _measured(draws, pairs)
    if not measured:
        return f"{text} not measured in {LEAST} draws."
    signs = {name: [_sign(found, *pair) for pair in pairs] for name, found in measured.items()}
    below = [
        name
        for name, found in measured.items()
        if all(difference(found, *pair).mean() < 0 for pair in pairs)
    ]
    clearly = [name for name in measured if set(signs[name]) == {-1}]
    counts = "; ".join(
        f"{name}: below in {found.count(-1)}, above in {found.count(1)}"
        for name, found in signs.items()
    )
    return (
        f"{text} in all means on {_of(below, measured)}; in all beyond errors on "
        f"{_of(clearly, measured)}. Of {len(pairs)} comparisons each, beyond errors: {counts}."
    )


def _compare(
    text: str, draws: dict[str, Draws], pair: tuple[str, str], sign: int, name: str
) -> str:
    """Compare two methods: on which data sets the difference is as claimed."""
    measured = _measured(draws, [pair])
    if not measured:
        return f"{text} not measured in {LEAST} draws."
    agree = [data for data, found in measured.items() if _sign(found, *pair) == sign]
    each = "; ".join(
        f"{data} {with_error(difference(found, *pair), sign=True, digits=3)}"
        for data, found in measured.items()
    )
    return f"{text} {name} on {_of(agree, measured)}. {pair[0]} less {pair[1]}: {each}."


def _cheap(draws: dict[str, Draws]) -> str:
    text = "Decoder passes at a large S are about an IWAE's at a small S:"
    runs = {f"{name} {draw}": run for name, found in draws.items() for draw, run in found.items()}
    names = ("MAPA 1", "MAPA 5", "MAPA 20", "exact sum")
    passes = [values(runs, name, "passes") for name in names]
    if not all(len(found) for found in passes):
        return f"{text} not measured."
    one, five, twenty, every = (found.mean().item() for found in passes)
    return (
        f"{text} MAPA 1, 5, 20 take {one:.2f}, {five:.2f} and {twenty:.2f} per point, IWAE 5 and "
        f"20 take 5 and 20. The limit, all codes, is {every:.2f} and grows with the number of data."
    )


def _measured(draws: dict[str, Draws], pairs: Iterable[tuple[str, str]]) -> dict[str, Draws]:
    """Return the data sets on which all pairs of methods can be compared."""
    pairs = list(pairs)
    return {
        name: found
        for name, found in draws.items()
        if all(len(difference(found, *pair)) >= LEAST for pair in pairs)
    }


def _sign(draws: Draws, first: str, second: str) -> int:
    """Return -1 or 1 where the first method is better or worse beyond errors, else 0."""
    differences = difference(draws, first, second)
    mean = differences.mean().item()
    if abs(mean) <= ERRORS * standard_error(differences):
        return 0
    return 1 if mean > 0 else -1


def _of(names: list[str], total: Iterable[str]) -> str:
    listed = f" ({', '.join(names)})" if names else ""
    return f"{len(names)} of {len(list(total))} sets{listed}"
