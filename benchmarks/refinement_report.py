"""The benchmark of refinement as a table and a plot: means and standard deviations over seeds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.guide_report import training_ratio
from benchmarks.refinement_methods import BASELINE
from benchmarks.report import color, name_rows, spread, table

HEADER = ["method", "test log p", "vs VAE", "ELBO", "approximation gap", "amortisation gap"]
HEADER += ["closed", "KL", "mutual information", "active units"]
HEADER += ["training", "step", "inference, us a row of a batch", "us alone"]


def report(results: dict[str, Any]) -> str:
    """Return the table, in nats per row: mean ± standard deviation over seeds.

    Training (processor time) and step are ratios to the VAE's; "closed" is the share of the
    amortisation gap that refinement closes.
    """
    rows = [_row(name, results) for name in results["runs"]]
    seeds = sorted({seed for runs in results["runs"].values() for seed in runs})
    failed = [
        f"{name}, seeds {', '.join(runs)}: diverged. {next(iter(runs.values())).split('. ')[0]}."
        for name, runs in results.get("diverged", {}).items()
    ]
    lines = [f"seeds {', '.join(seeds)}", table(HEADER, rows), *failed]
    if "true model" in results:
        lines.append(f"The true model's log p(x): {results['true model']:.2f} nats per row.")
    return "\n\n".join(lines)


def _row(name: str, results: dict[str, Any]) -> list[str]:
    runs = results["runs"][name]
    approximation, amortization, closed = (_gap(runs, kind) for kind in GAPS)
    number = results["settings"]["batch_size"]
    batch, alone = (costs["ms"][name] * 1e3 for costs in results["inference"].values())
    return [
        name,
        spread(_means(runs, "log_p")),
        spread(_versus(name, results), sign=True),
        spread(_means(runs, "elbo")),
        spread(approximation),
        spread(amortization),
        "" if closed.isnan().all() else f"{100 * closed.mean().item():.0f} %",
        spread(_numbers(runs, "kl")),
        spread(_numbers(runs, "mutual_information")),
        ", ".join(str(run["active_units"]) for run in runs.values()),
        f"{training_ratio(name, results):.2f}",
        f"{results['steps']['ratio'][name]:.2f}",
        f"{batch / number:.1f}",
        f"{alone:.0f}",
    ]


GAPS = {
    "approximation": lambda g: g["log_marginal"] - g["best"],
    "amortization": lambda g: g["best"] - g["elbo"],
    "closed": lambda g: (g["elbo"] - g["start"]) / (g["best"] - g["start"]),
}


def _gap(runs: dict[str, Any], kind: str) -> Tensor:
    """Return a gap for each seed, of the means over rows; NaN where it has no meaning."""
    found = []
    for run in runs.values():
        means = {name: torch.tensor(v).mean() for name, v in run["gaps"].items()}
        known = kind != "closed" or "start" in means
        found.append(GAPS[kind](means) if known else torch.tensor(torch.nan))
    return torch.stack(found)


def _means(runs: dict[str, Any], key: str) -> Tensor:
    """Return the mean over rows for each seed."""
    return torch.tensor([sum(run[key]) / len(run[key]) for run in runs.values()])


def _numbers(runs: dict[str, Any], key: str) -> Tensor:
    return torch.tensor([run[key] for run in runs.values()])


def _versus(name: str, results: dict[str, Any]) -> Tensor:
    """Return the differences to the VAE's test log p(x), one for each seed that both have."""
    base, runs = results["runs"].get(BASELINE, {}), results["runs"][name]
    both = [seed for seed in runs if seed in base]
    mine, theirs = ({seed: which[seed] for seed in both} for which in (runs, base))
    return _means(mine, "log_p") - _means(theirs, "log_p")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw log p(x), the gaps, what the latents carry, and cost against gain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    _draw_evidence(axes[0, 0], results)
    _draw_gaps(axes[0, 1], results)
    _draw_rate(axes[1, 0], results)
    _draw_costs(axes[1, 1], results)
    settings = results["settings"]
    figure.suptitle(
        f"{settings['dataset']}, {settings['epochs']} epochs, {settings['refinements']} refinements"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_evidence(axes: Any, results: dict[str, Any]) -> None:
    for place, runs in enumerate(results["runs"].values()):
        for key, marker in (("log_p", "o"), ("elbo", "|")):
            values = _means(runs, key)
            axes.plot(values, [place] * len(values), marker, color=color(place), alpha=0.7)
    if "true model" in results:
        axes.axvline(results["true model"], color="black", linewidth=0.8)
    name_rows(axes, results["runs"])
    samples = results["settings"]["eval_samples"]
    axes.set(xlabel="nats per test row", title=f"IWAE-{samples} (dots) and ELBO (bars), by seed")


def _draw_gaps(axes: Any, results: dict[str, Any]) -> None:
    for place, runs in enumerate(results["runs"].values()):
        inner = _gap(runs, "approximation").mean().item()
        outer = _gap(runs, "amortization").mean().item()
        axes.barh(place, inner, color="C0", label="approximation" if place == 0 else None)
        axes.barh(
            place, outer, left=inner, color="C1", label="amortisation" if place == 0 else None
        )
    name_rows(axes, results["runs"])
    axes.legend()
    axes.set(xlabel="nats per test row", title="log p(x) - ELBO, in its two parts")


def _draw_rate(axes: Any, results: dict[str, Any]) -> None:
    for place, runs in enumerate(results["runs"].values()):
        kl, information = (
            _numbers(runs, key).mean().item() for key in ("kl", "mutual_information")
        )
        axes.barh(place - 0.2, kl, height=0.38, color="C2", label=None if place else "KL")
        axes.barh(
            place + 0.2,
            information,
            height=0.38,
            color="C3",
            label=None if place else "mutual inf.",
        )
    name_rows(axes, results["runs"])
    axes.legend()
    axes.set(xlabel="nats per test row", title="what the latents carry")


def _draw_costs(axes: Any, results: dict[str, Any]) -> None:
    for place, name in enumerate(results["runs"]):
        gain = _versus(name, results)
        if len(gain):
            cost = training_ratio(name, results)
            axes.plot(cost, gain.mean().item(), "o", color=color(place))
            axes.annotate(
                name, (cost, gain.mean().item()), xytext=(4, 4), textcoords="offset points"
            )
    axes.set(xlabel="training time / VAE", ylabel="log p(x) - VAE's", title="gain and cost")
    axes.set_xscale("log")
