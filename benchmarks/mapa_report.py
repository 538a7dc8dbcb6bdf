"""The benchmark of MAPA as tables, one for each data set, and as verdicts on the paper's claims."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.mapa_methods import BASELINE, METHODS
from benchmarks.report import spread, table

HEADER = [
    "method",
    "test KL",
    "median",
    "vs VAE",
    "KL of codes",
    "passes/point",
    "seconds",
    "processor",
]
HEADER += ["gap"]
SIZES = (5, 10, 20)
ERRORS = 2.0  # standard errors that count as a difference
LEAST = 2  # draws: one has no standard error, and would agree with everything
Runs = dict[str, dict[str, Any]]  # of the methods of one draw

TRUE_POSTERIOR = "MAPA true 5"  # the paper's MAPA-GT, as we read it


def report(results: dict[str, Any]) -> str:
    """Return a table for each data set, and the verdicts. All in nats per point but the costs.

    KL, gap: mean ± standard deviation over draws; "vs VAE": mean of the differences within a draw ±
    its standard error.
    """
    parts = [_of_data(name, draws) for name, draws in results["draws"].items() if draws]
    return "\n\n".join([*parts, verdicts(results)])


def _of_data(name: str, draws: dict[str, Runs]) -> str:
    methods = [method for method in METHODS if any(method in runs for runs in draws.values())]
    rows = [_row(method, draws) for method in methods]
    lines = [f"{name}, {len(draws)} draws", table(HEADER, rows)]
    failed = [
        f"{method}, draw {draw}: {failure}"
        for draw, runs in draws.items()
        for method in methods
        for failure in runs.get(method, {}).get("failures", [])
    ]
    return "\n".join([*lines, *failed])


def _row(method: str, draws: dict[str, Runs]) -> list[str]:
    versus = difference(draws, method, BASELINE)
    return [
        method,
        spread(values(draws, method, "kl"), digits=3),
        spread(_median(values(draws, method, "kl")), digits=3),
        "" if method == BASELINE or not len(versus) else _with_error(versus),
        spread(values(draws, method, "kl_of_codes"), digits=3),
        spread(_mean(values(draws, method, "passes"))),
        spread(_mean(values(draws, method, "seconds")), digits=1),
        spread(_mean(values(draws, method, "processor_seconds")), digits=1),
        spread(values(draws, method, "gap"), digits=3),
    ]


def _mean(found: Tensor) -> Tensor:
    """Return the mean, ``[1]``, or none."""
    return found.mean(0, keepdim=True) if len(found) else found


def _median(found: Tensor) -> Tensor:
    """Return the median, ``[1]``, which a run that stayed on a plateau does not move; or none."""
    return found.quantile(0.5)[None] if len(found) else found


def values(draws: dict[str, Runs], method: str, key: str) -> Tensor:
    """Return the numbers of a method, one for each draw that has one: ``[draws]``."""
    found = (runs.get(method, {}).get(key) for runs in draws.values())
    return torch.tensor([x for x in found if x is not None], dtype=torch.float64)


def difference(draws: dict[str, Runs], first: str, second: str) -> Tensor:
    """Return the first method's test KL less the second's, for each draw that has both."""
    pairs = ([runs.get(name, {}).get("kl") for name in (first, second)] for runs in draws.values())
    both = [a - b for a, b in pairs if a is not None and b is not None]
    return torch.tensor(both, dtype=torch.float64)


def standard_error(differences: Tensor) -> float:
    """Return the standard error of the mean; infinite for a single draw."""
    if len(differences) < LEAST:
        return torch.inf
    return differences.std().item() / len(differences) ** 0.5


def _with_error(differences: Tensor) -> str:
    mean = f"{differences.mean().item():+.3f}"
    return mean if len(differences) < LEAST else f"{mean} ± {standard_error(differences):.3f}"


def verdicts(results: dict[str, Any]) -> str:
    """Return what the draws say of the paper's four claims, with the numbers that say so."""
    draws = {name: found for name, found in results["draws"].items() if found}
    claims: list[Callable[[dict[str, dict[str, Runs]]], str]] = [_wins, _like_gt, _poor, _cheap]
    lines = [f"{place}. {claim(draws)}" for place, claim in enumerate(claims, 1)]
    return "\n".join([f"Claims of the paper (differences beyond {ERRORS:g} errors count):", *lines])


def _wins(draws: dict[str, dict[str, Runs]]) -> str:
    text = "MAPA below VAE and IWAE for every S, on 4 of 5 sets and not on the clusters:"
    pairs = [("MAPA 1", BASELINE), *((f"MAPA {s}", BASELINE) for s in SIZES)]
    pairs += [(f"MAPA {s}", f"IWAE {s}") for s in SIZES]
    measured = {name: found for name, found in draws.items() if _have(found, pairs)}
    if not measured:
        return f"{text} not measured in {LEAST} draws."
    signs = {name: [_sign(found, *pair) for pair in pairs] for name, found in measured.items()}
    means = {
        name: [difference(found, *pair).mean().item() for pair in pairs]
        for name, found in measured.items()
    }
    below = [name for name in measured if max(means[name]) < 0]
    clearly = [name for name in measured if set(signs[name]) == {-1}]
    counts = "; ".join(
        f"{name}: below in {signs[name].count(-1)}, above in {signs[name].count(1)}"
        for name in measured
    )
    return (
        f"{text} in all means on {_of(below, measured)}; in all beyond errors on "
        f"{_of(clearly, measured)}. Of {len(pairs)} comparisons each, beyond errors: {counts}."
    )


def _like_gt(draws: dict[str, dict[str, Runs]]) -> str:
    return _two(
        "MAPA is close to MAPA-GT:",
        draws,
        "MAPA 5",
        TRUE_POSTERIOR,
        0,
        "no difference beyond errors",
    )


def _poor(draws: dict[str, dict[str, Runs]]) -> str:
    return _two("Uniform proposals are poor:", draws, "uniform 5", "MAPA 5", 1, "uniform worse")


def _two(
    text: str, draws: dict[str, dict[str, Runs]], first: str, second: str, sign: int, name: str
) -> str:
    """Compare two methods: on which data sets the difference is as claimed."""
    measured = {data: found for data, found in draws.items() if _have(found, [(first, second)])}
    if not measured:
        return f"{text} not measured in {LEAST} draws."
    agree = [data for data, found in measured.items() if _sign(found, first, second) == sign]
    each = "; ".join(
        f"{data} {_with_error(difference(found, first, second))}"
        for data, found in measured.items()
    )
    return f"{text} {name} on {_of(agree, measured)}. {first} less {second}: {each}."


def _cheap(draws: dict[str, dict[str, Runs]]) -> str:
    text = "Decoder passes at a large S are about an IWAE's at a small S:"
    runs = [found for of_data in draws.values() for found in of_data.values()]
    passes = {
        name: [run[name]["passes"] for run in runs if "passes" in run.get(name, {})]
        for name in ("MAPA 1", "MAPA 5", "MAPA 20", "exact sum")
    }
    if not all(passes.values()):
        return f"{text} not measured."
    mean = {name: sum(found) / len(found) for name, found in passes.items()}
    return (
        f"{text} MAPA 1, 5, 20 take {mean['MAPA 1']:.2f}, {mean['MAPA 5']:.2f} and "
        f"{mean['MAPA 20']:.2f} per point, IWAE 5 and 20 take 5 and 20. The limit, all codes, is "
        f"{mean['exact sum']:.2f}: it is what bounds them, and grows with the number of data."
    )


def _have(draws: dict[str, Runs], pairs: Iterable[tuple[str, str]]) -> bool:
    return all(len(difference(draws, *pair)) >= LEAST for pair in pairs)


def _sign(draws: dict[str, Runs], first: str, second: str) -> int:
    """Return -1 or 1 where the first method is better or worse beyond errors, else 0."""
    differences = difference(draws, first, second)
    mean = differences.mean().item()
    if abs(mean) <= ERRORS * standard_error(differences):
        return 0
    return 1 if mean > 0 else -1


def _of(names: Iterable[str], total: Iterable[str]) -> str:
    names = list(names)
    listed = f" ({', '.join(names)})" if names else ""
    return f"{len(names)} of {len(list(total))} sets{listed}"
