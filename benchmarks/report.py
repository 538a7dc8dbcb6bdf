"""What every benchmark shares: where it ran, tables, JSON files."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """Return what a reader needs to judge a timing."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": version("pyro-ppl"),
    }


def _processor() -> str:
    """Return the processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, aligned to be read in a terminal as well."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_line(header, widths), _line(["-" * width for width in widths], widths)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(width) if place == 0 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join([first, *rest]) + " |"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one piece: an interrupted run leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def spread(values: torch.Tensor, sign: bool = False, digits: int = 2) -> str:
    """Return mean ± standard deviation over seeds, ``[seeds]``; the mean alone of one seed."""
    if not len(values):
        return ""
    mean = f"{values.mean().item():{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std().item():.{digits}f}"


def color(place: int) -> str:
    """Return the colour of a method in all plots of a benchmark."""
    return f"C{place % 10}"


def name_rows(axes: Any, names: Iterable[str]) -> None:
    """Put names beside horizontal bars, the first on top."""
    names = list(names)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
