"""The benchmark of guides as a table and a plot: means and standard deviations over seeds."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.guide_methods import BASELINE
from benchmarks.report import color, name_rows, spread, table

PIXELS = {"digits": 64}  # 784 elsewhere

HEADER = ["guide", "test log p", "vs VAE", "bits/dim", "ELBO", "ELBO - log p", "train log p", "ESS"]
HEADER += ["guide, model parameters", "members", "training", "step", "inference of 100", "of 1"]


def report(results: dict[str, Any]) -> str:
    """Return the tables: of all methods, and of inference in mixtures of 1 to 4 components.

    In nats per image, mean ± standard deviation over seeds; costs are ratios to the VAE.
    """
    rows = [_row(name, results) for name in results["runs"]]
    seeds = sorted({seed for runs in results["runs"].values() for seed in runs})
    mixtures = {k: v for k, v in results["inference"].items() if k.startswith("mixtures")}
    names = list(next(iter(mixtures.values()))["ms"])
    latency = [
        [n, *(f"{t['ms'][n]:.2f} ({t['ratio'][n]:.2f})" for t in mixtures.values())] for n in names
    ]
    failed = [
        f"{name}, seeds {', '.join(runs)}: diverged. {next(iter(runs.values())).split('. ')[0]}."
        for name, runs in results.get("diverged", {}).items()
    ]
    parts = [f"seeds {', '.join(seeds)}", table(HEADER, rows), *failed]
    return "\n\n".join([*parts, table(["inference: ms (ratio)", *mixtures], latency)])


def _row(name: str, results: dict[str, Any]) -> list[str]:
    runs = results["runs"][name]
    test, train = means(runs, "test", "log_p"), means(runs, "train", "log_p")
    elbo = means(runs, "test", "elbo")
    pixels, first = PIXELS.get(results["settings"]["dataset"], 784), next(iter(runs.values()))
    members = [str(run["members"]) for run in runs.values() if "members" in run]
    inference = [t["ratio"][name] for k, t in results["inference"].items() if "methods" in k]
    return [
        name,
        spread(test),
        spread(paired(name, results), sign=True),
        f"{-test.mean().item() / (pixels * math.log(2)):.4f}",
        spread(elbo),
        spread(elbo - test, sign=True),
        spread(train),
        f"{sum(run['test']['ess'] for run in runs.values()) / len(runs):.0f}",
        f"{first['guide_parameters']:,}, {first['model_parameters']:,}",
        ", ".join(members),
        _ratio(training_ratio(name, results)),
        f"{results['steps']['ratio'][name]:.2f}",
        *(f"{ratio:.2f}" for ratio in inference),
    ]


def means(runs: dict[str, Any], split: str, key: str) -> Tensor:
    """Return the mean over images for each seed."""
    return torch.tensor([sum(run[split][key]) / len(run[split][key]) for run in runs.values()])


def paired(name: str, results: dict[str, Any]) -> Tensor:
    """Return the differences to the VAE's test log p(x), one for each seed that both have."""
    base, runs = results["runs"].get(BASELINE, {}), results["runs"][name]
    both = [seed for seed in runs if seed in base]
    mine = means({seed: runs[seed] for seed in both}, "test", "log_p")
    return mine - means({seed: base[seed] for seed in both}, "test", "log_p")


def training_ratio(name: str, results: dict[str, Any]) -> float:
    """Return the processor time of training, stages of all kinds together, over the VAE's."""
    base, runs = results["runs"].get(BASELINE, {}), results["runs"][name]
    key = "processor_seconds"
    both = [s for s in runs if s in base and key in runs[s] and key in base[s]]
    if not both:
        return math.nan
    mine, theirs = (sum(which[seed][key] for seed in both) for which in (runs, base))
    return mine / theirs


def _ratio(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw log p(x) and ELBO of every seed, the gap between them, learning curves, and cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(15, 11), layout="constrained")
    _draw_bounds(axes[0, 0], results)
    _draw_gaps(axes[0, 1], results)
    _draw_curves(axes[1, 0], results)
    _draw_costs(axes[1, 1], results)
    settings = results["settings"]
    figure.suptitle(f"{settings['dataset']}, {settings['epochs']} epochs, 4 samples per image")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bounds(axes: Any, results: dict[str, Any]) -> None:
    for place, runs in enumerate(results["runs"].values()):
        for key, marker in (("log_p", "o"), ("elbo", "|")):
            values = means(runs, "test", key)
            axes.plot(values, [place] * len(values), marker, color=color(place), alpha=0.7)
    name_rows(axes, results["runs"])
    samples = results["settings"]["eval_samples"]
    axes.set(xlabel="nats per test image", title=f"IWAE-{samples} (dots) and ELBO (bars), by seed")


def _draw_gaps(axes: Any, results: dict[str, Any]) -> None:
    for place, runs in enumerate(results["runs"].values()):
        gap = means(runs, "test", "log_p") - means(runs, "test", "elbo")
        error = gap.std().item() if len(gap) > 1 else 0.0
        axes.barh(place, gap.mean().item(), xerr=error, color=color(place))
    name_rows(axes, results["runs"])
    axes.set(xlabel="nats per test image", title="log p(x) - ELBO: what the guide misses")


def _draw_curves(axes: Any, results: dict[str, Any]) -> None:
    last = []
    for place, (name, runs) in enumerate(results["runs"].items()):
        histories = [run["history"] for run in runs.values()]
        curves = torch.tensor(
            [[-v / h["validation_rows"] for v in h["validation"]] for h in histories]
        )
        mean, style = curves.mean(0), "-" if place < 10 else "--"
        axes.plot(histories[0]["epoch"], mean, f".{style}", color=color(place), label=name)
        last.append(mean[len(mean) // 5 :].min().item())
    axes.set_ylim(bottom=min(last))
    axes.set(xlabel="epoch", ylabel="validation IWAE-16 (nats per image)", title="learning")
    axes.legend(fontsize=7, ncols=2)


def _draw_costs(axes: Any, results: dict[str, Any]) -> None:
    names = list(results["runs"])
    latency = next(t["ratio"] for k, t in results["inference"].items() if "methods" in k)
    kinds = [("a step of all components", results["steps"]["ratio"]), ("inference", latency)]
    kinds.insert(0, ("training", {name: training_ratio(name, results) for name in names}))
    for shift, (label, ratios) in enumerate(kinds):
        places = [place + 0.27 * (shift - 1) for place in range(len(names))]
        axes.barh(places, [ratios[name] for name in names], height=0.25, label=label)
    name_rows(axes, results["runs"])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="time / VAE", title="cost, equal samples")
    axes.legend(fontsize=8)
