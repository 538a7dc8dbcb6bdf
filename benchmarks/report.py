"""What the reports of all benchmarks share: tables, figures, statistics over seeds, JSON files."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib.metadata import version
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Any]
Runs = dict[str, Any]  # of one method, by seed
Column = Callable[[str, Results], str]  # a method's name and all results to the cell of a table
BASELINE = "VAE"


def hardware() -> dict[str, Any]:
    """Return what a reader needs to judge a timing."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": version("pyro-ppl"),
    }


def check_machine(known: dict[str, Any], path: Path) -> None:
    """Exit where results in a file are of another machine: their times would not compare."""
    here = hardware()
    for key in ("processor", "cores", "gpu", "torch"):
        if known[key] != here[key]:
            raise SystemExit(
                f"{path} was measured with {key} {known[key]}, and this is {here[key]}: give "
                "another --output"
            )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: an interrupted run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # of this process alone
    text = json.dumps(content, indent=1) + "\n"
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def finish(results: Results, path: Path, report: str, pictures: Iterable[Path] = ()) -> None:
    """Write the results and print the report and the names of the files."""
    write_json(path, results)
    print(f"\n{report}\n\nWrote {', '.join(map(str, [path, *pictures]))}")


# Tables.


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_line(header, widths), _line(["-" * width for width in widths], widths)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([cells[0].ljust(widths[0]), *padded]) + " |"


def method_table(title: str, columns: Mapping[str, Column], results: Results) -> str:
    """Return a row for each method, the seeds above, and the runs that diverged below."""
    rows = [[name, *(cell(name, results) for cell in columns.values())] for name in results["runs"]]
    seeds = sorted({seed for runs in results["runs"].values() for seed in runs}, key=int)
    diverged = [
        f"{name}, seeds {', '.join(runs)}: diverged. {next(iter(runs.values())).split('. ')[0]}."
        for name, runs in results.get("diverged", {}).items()
    ]
    unfinished = [
        f"{name}, seed {seed}: in epoch {len(run['history']['epoch']) + 1}, not evaluated."
        for name, runs in results.get("unfinished", {}).items()
        for seed, run in runs.items()
        if "history" in run
    ]
    parts = [f"seeds {', '.join(seeds)}", table([title, *columns], rows), *diverged, *unfinished]
    return "\n\n".join(parts)


def spread(values: Tensor, sign: bool = False, digits: int = 2) -> str:
    """Return mean ± standard deviation over seeds ``[seeds]``; the mean alone for one seed."""
    if not len(values):
        return ""
    mean = f"{values.mean().item():{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std().item():.{digits}f}"


def with_error(values: Tensor, sign: bool = False, digits: int = 2) -> str:
    """Return mean ± standard error of values ``[rows]``; the mean alone of one value."""
    mean = f"{values.mean().item():{'+' if sign else ''}.{digits}f}"
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean if math.isnan(error) else f"{mean} ± {error:.{digits}f}"


# Statistics of stored results.


def means(runs: Runs, *keys: str) -> Tensor:
    """Return an entry for each seed ``[seeds]``; of a list over rows, its mean."""
    found = [reduce(getitem, keys, run) for run in runs.values()]
    return torch.tensor([sum(v) / len(v) if isinstance(v, list) else v for v in found])


def paired(name: str, results: Results, *keys: str) -> tuple[Tensor, Tensor]:
    """Return an entry of a method and of the VAE, for each seed in which both have it."""
    both = [results["runs"][name], results["runs"].get(BASELINE, {})]
    seeds = [seed for seed in both[0] if all(keys[0] in runs.get(seed, {}) for runs in both)]
    mine, base = (means({seed: runs[seed] for seed in seeds}, *keys) for runs in both)
    return mine, base


def versus(name: str, results: Results, *keys: str) -> Tensor:
    """Return the differences to the VAE's means, one for each seed that both have."""
    mine, base = paired(name, results, *keys)
    return mine - base


def training_ratio(name: str, results: Results) -> float:
    """Return the processor time of training over the VAE's, NaN where it is not known."""
    mine, base = paired(name, results, "processor_seconds")
    return (mine.sum() / base.sum()).item()


# Figures.


@contextmanager
def figure(path: Path, rows: int, columns: int, dpi: int = 110, **options: Any) -> Iterator[Any]:
    """Give a figure and its axes ``[rows, columns]``, and write it to a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
    yield drawn, axes
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=dpi)
    plt.close(drawn)


def color(number: int) -> str:
    """Return the colour of a method in all plots of a benchmark."""
    return f"C{number % 10}"


def name_rows(axes: Any, names: Iterable[str]) -> None:
    """Put names beside horizontal bars, the first on top."""
    names = list(names)
    axes.set_yticks(range(len(names)), names)
    axes.yaxis.set_inverted(True)


def draw_values(axes: Any, results: Results, marked: Mapping[str, tuple[str, ...]]) -> None:
    """Draw entries of every run, one line a method; ``marked`` has the entry of each marker."""
    for number, runs in enumerate(results["runs"].values()):
        for marker, keys in marked.items():
            values = means(runs, *keys)
            axes.plot(values, [number] * len(values), marker, color=color(number), alpha=0.7)
    name_rows(axes, results["runs"])


def draw_learning(axes: Any, results: Results, label: str) -> None:
    """Draw the validation bound in nats per row, its mean over seeds, against epochs."""
    lowest = []
    for number, (name, runs) in enumerate(results["runs"].items()):
        histories = [run["history"] for run in runs.values()]
        count = min(len(h["epoch"]) for h in histories)  # of runs in progress, those of all seeds
        curves = torch.tensor(
            [[-v / h["validation_rows"] for v in h["validation"][:count]] for h in histories]
        )
        mean, style = curves.mean(0), "-" if number < 10 else "--"
        axes.plot(histories[0]["epoch"][:count], mean, f".{style}", color=color(number), label=name)
        lowest.append(mean[len(mean) // 5 :].min().item())
    axes.set_ylim(bottom=min(lowest))
    axes.set(xlabel="epoch", ylabel=f"validation {label} (nats per row)", title="learning")
    axes.legend(fontsize=7, ncols=2)


def draw_bars(axes: Any, kinds: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a bar of each kind for every method; ``kinds`` maps labels to a value of each."""
    height = 0.8 / len(kinds)
    for number, (label, values) in enumerate(kinds.items()):
        offset = height * (number - (len(kinds) - 1) / 2)
        places = [index + offset for index in range(len(values))]
        axes.barh(places, list(values.values()), height=0.9 * height, label=label)
        name_rows(axes, values)
    axes.legend(fontsize=8)


def draw_costs(axes: Any, results: Results, baseline: str, **more: Mapping[str, float]) -> None:
    """Draw the time of a step, and other times, as ratios to the baseline's."""
    kinds = {"a step": results["steps"]["ratio"], **more}
    draw_bars(axes, {k: {name: v[name] for name in results["runs"]} for k, v in kinds.items()})
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel=f"time / {baseline}", title="cost, equal samples")
