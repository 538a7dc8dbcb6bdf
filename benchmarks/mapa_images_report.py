"""The benchmark of MAPA on images as tables, one for each number of latents, and as a picture."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.mapa_methods import BASELINE
from benchmarks.report import spread, table

HEADER = [
    "method",
    "test log p, codes",
    "vs VAE",
    "continuous",
    "vs VAE",
    "sampled",
    "ESS",
    "train log p",
    "passes/image",
    "seconds",
    "processor",
    "ms/step",
]
TRAIN = ("train_codes", "train_continuous", "train_sampled")  # the first that there is
LARGEST_GRID_ERROR = 0.05  # nats, that are not worth telling
Runs = dict[str, dict[str, Any]]  # of a method, by seed


def report(results: dict[str, Any]) -> str:
    """Return a table for each number of latents: nats per image, ± a standard error over images.

    Numbers are means over seeds; differences to the VAE are of the same images and seeds, and in
    brackets is their standard deviation over seeds. "train log p" is that of the codes, of the VAE
    and IWAE that of the continuous prior. ESS: the median over images, of so many draws.
    """
    parts = [
        _of_latents(int(latents), methods, results["settings"]["dataset"])
        for latents, methods in results["runs"].items()
    ]
    seconds = results.get("table_seconds")
    if seconds is not None:
        parts.append(f"The table of neighbours took {seconds:.1f} s, once for all.")
    return "\n\n".join(parts)


def _of_latents(latents: int, methods: dict[str, Runs], dataset: str) -> str:
    seeds = max(len(runs) for runs in methods.values())
    rows = [_row(name, methods) for name in methods]
    lines = [f"{dataset}, {latents} latents, {seeds} seeds", table(HEADER, rows)]
    for name, runs in methods.items():
        for seed, run in runs.items():
            if "failure" in run:
                lines.append(f"{name}, seed {seed}: {run['failure']}")
            if run.get("grid_error", 0) > LARGEST_GRID_ERROR:
                error = run["grid_error"]
                lines.append(f"{name}, seed {seed}: half the grid is off by up to {error:.2f} nats")
    return "\n".join(lines)


def _row(name: str, methods: dict[str, Runs]) -> list[str]:
    runs, base = methods[name], methods.get(BASELINE, {})
    train = next((key for key in TRAIN if numbers(runs, key).numel()), TRAIN[0])
    return [
        name,
        _mean(scores(runs, "codes")),
        "" if name == BASELINE else versus(runs, base, "codes"),
        _mean(best(runs)),
        "" if name == BASELINE else versus(runs, base, "continuous"),
        _mean(scores(runs, "sampled")),
        _ess(runs),
        spread(numbers(runs, train)),
        *(
            spread(numbers(runs, key), digits=digits)
            for key, digits in (
                ("passes", 2),
                ("seconds", 1),
                ("processor_seconds", 1),
                ("ms_per_step", 1),
            )
        ),
    ]


def scores(runs: Runs, key: str) -> dict[str, Tensor]:
    """Return log p(x) of each test image ``[rows]`` by seed, where it was measured."""
    found = {seed: run.get(key) for seed, run in runs.items()}
    return {seed: torch.tensor(v, dtype=torch.float64) for seed, v in found.items() if v}


def best(runs: Runs) -> dict[str, Tensor]:
    """Return the scores under a continuous prior: by quadrature where that is possible."""
    return scores(runs, "continuous") or scores(runs, "sampled")


def numbers(runs: Runs, key: str) -> Tensor:
    """Return a number of each seed that has it, ``[seeds]``."""
    found = [run[key] for run in runs.values() if key in run]
    return torch.tensor(found, dtype=torch.float64)


def versus(runs: Runs, base: Runs, key: str) -> str:
    """Return the mean difference to the VAE, its error over images, and its spread over seeds."""
    own, other = best(runs) if key == "continuous" else scores(runs, key), best(base)
    pairs = [own[seed] - other[seed] for seed in own if seed in other]
    if not pairs:
        return ""
    differences = torch.stack(pairs)
    text = _with_error(differences.mean(0), sign=True)
    return f"{text} ({differences.mean(1).std().item():.2f})" if len(pairs) > 1 else text


def _ess(runs: Runs) -> str:
    found, samples = numbers(runs, "ess"), numbers(runs, "samples")
    return f"{found.mean():.0f} of {samples.max():.0f}" if len(found) else ""


def _mean(found: dict[str, Tensor]) -> str:
    return _with_error(torch.stack(list(found.values())).mean(0)) if found else ""


def _with_error(values: Tensor, sign: bool = False) -> str:
    """Return mean ± standard error over images, ``[rows]``."""
    error = values.std().item() / math.sqrt(len(values))
    return f"{values.mean().item():{'+' if sign else ''}.2f} ± {error:.2f}"


def picture_path(folder: Path, method: str, latents: int, seed: int) -> Path:
    """Return where that is kept which is to be drawn of a run."""
    return folder / "pictures" / f"{method.replace(' ', '-')}-{latents}-{seed}.pt"


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw codes by class and samples, of two latents and the first seed, if there are such."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = results["runs"].get("2", {})
    known = {name: picture_path(folder, name, 2, min(map(int, r))) for name, r in methods.items()}
    shown = {name: torch.load(p, weights_only=True) for name, p in known.items() if p.exists()}
    if not shown:
        return []
    size = (2.6 * len(shown), 5.2)
    figure, axes = plt.subplots(2, len(shown), figsize=size, squeeze=False, layout="constrained")
    for (above, below), (name, kept) in zip(axes.T, shown.items(), strict=True):
        x, y = kept["codes"].T.numpy()
        above.scatter(x, y, c=kept["labels"].numpy(), cmap="tab10", s=2, linewidths=0)
        above.set_title(name)
        below.imshow(_tiled(kept["samples"]).numpy(), cmap="Greys", vmin=0, vmax=1)
        below.set_axis_off()
    axes[0][0].set_ylabel("codes of training images")
    path = folder / "codes.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return [path]


def _tiled(images: Tensor) -> Tensor:
    """Return images ``[n * n, side * side]`` as one, ``[n * side, n * side]``."""
    count, side = math.isqrt(len(images)), math.isqrt(images.shape[1])
    tiles = images.reshape(count, count, side, side)
    return tiles.transpose(1, 2).reshape(count * side, count * side)
