"""The benchmark of MAPA on images as tables, one for each number of latents, and as a picture."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.methods.mapa import BASELINE
from benchmarks.report import Results, Runs, figure, spread, table, with_error

TRAIN = ("train_codes", "train_continuous", "train_sampled")  # the first that there is
LARGEST_GRID_ERROR = 0.05  # nats, that are not worth telling


def report(results: Results) -> str:
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
        parts.append(f"The table of neighbours took {seconds:.1f} s, once for all methods.")
    return "\n\n".join(parts)


def _of_latents(latents: int, methods: dict[str, Runs], dataset: str) -> str:
    seeds = max(len(runs) for runs in methods.values())
    rows = [[name, *(cell(name, methods) for _, cell in COLUMNS)] for name in methods]
    header = ["method", *(title for title, _ in COLUMNS)]
    lines = [f"{dataset}, {latents} latents, {seeds} seeds", table(header, rows)]
    for name, runs in methods.items():
        for seed, run in runs.items():
            if "failure" in run:
                lines.append(f"{name}, seed {seed}: {run['failure']}")
            if run.get("grid_error", 0) > LARGEST_GRID_ERROR:
                error = run["grid_error"]
                lines.append(f"{name}, seed {seed}: half the grid is off by up to {error:.2f} nats")
    return "\n".join(lines)


def _mean(name: str, methods: dict[str, Runs], of: Callable[[Runs], dict[str, Tensor]]) -> str:
    """Return a score, the mean over seeds, ± one standard error over images."""
    found = of(methods[name])
    return with_error(torch.stack(list(found.values())).mean(0)) if found else ""


def _number(name: str, methods: dict[str, Runs], key: str, digits: int = 1) -> str:
    return spread(numbers(methods[name], key), digits=digits)


def _train(name: str, methods: dict[str, Runs]) -> str:
    key = next((key for key in TRAIN if len(numbers(methods[name], key))), TRAIN[0])
    return _number(name, methods, key, 2)


def _versus(name: str, methods: dict[str, Runs], key: str) -> str:
    """Return the mean difference to the VAE, its error over images, and its spread over seeds."""
    runs, base = methods[name], best(methods.get(BASELINE, {}))
    own = best(runs) if key == "continuous" else scores(runs, key)
    pairs = [own[seed] - base[seed] for seed in own if seed in base]
    if name == BASELINE or not pairs:
        return ""
    differences = torch.stack(pairs)
    text = with_error(differences.mean(0), sign=True)
    return f"{text} ({differences.mean(1).std().item():.2f})" if len(pairs) > 1 else text


def _ess(name: str, methods: dict[str, Runs]) -> str:
    found, samples = (numbers(methods[name], key) for key in ("ess", "samples"))
    return f"{found.mean():.0f} of {samples.max():.0f}" if len(found) else ""


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


COLUMNS: list[tuple[str, Callable[[str, dict[str, Runs]], str]]] = [
    ("test log p, codes", partial(_mean, of=partial(scores, key="codes"))),
    ("vs VAE", partial(_versus, key="codes")),
    ("continuous", partial(_mean, of=best)),
    ("vs VAE", partial(_versus, key="continuous")),
    ("sampled", partial(_mean, of=partial(scores, key="sampled"))),
    ("ESS", _ess),
    ("train log p", _train),
    ("passes/image", partial(_number, key="passes", digits=2)),
    ("seconds", partial(_number, key="seconds")),
    ("processor", partial(_number, key="processor_seconds")),
    ("ms/step", partial(_number, key="ms_per_step")),
]


def picture_path(folder: Path, method: str, latents: int, seed: int) -> Path:
    """Return where the codes and samples of a run are kept."""
    return folder / "pictures" / f"{method.replace(' ', '-')}-{latents}-{seed}.pt"


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw codes by class and samples, of two latents and the first seed, if there are such."""
    methods = results["runs"].get("2", {})
    known = {name: picture_path(folder, name, 2, min(map(int, r))) for name, r in methods.items()}
    shown = {name: torch.load(p, weights_only=True) for name, p in known.items() if p.exists()}
    if not shown:
        return []
    path = folder / "codes.png"
    with figure(path, 2, len(shown), 90, figsize=(2.6 * len(shown), 5.2)) as (_, axes):
        for (above, below), (name, kept) in zip(axes.T, shown.items(), strict=True):
            x, y = kept["codes"].T.numpy()
            above.scatter(x, y, c=kept["labels"].numpy(), cmap="tab10", s=2, linewidths=0)
            above.set_title(name)
            below.imshow(_tiled(kept["samples"]).numpy(), cmap="Greys", vmin=0, vmax=1)
            below.set_axis_off()
        axes[0][0].set_ylabel("codes of training images")
    return [path]


def _tiled(images: Tensor) -> Tensor:
    """Return images ``[n * n, side * side]`` as one, ``[n * side, n * side]``."""
    count, side = math.isqrt(len(images)), math.isqrt(images.shape[1])
    tiles = images.reshape(count, count, side, side)
    return tiles.transpose(1, 2).reshape(count * side, count * side)
