"""Time and memory of the nearest neighbours of all data, beside scikit-learn's.

Each method runs in a process of its own, on all cores, from the same float32 file: wall-clock of
the search alone, and the highest resident memory of the process above what the data take.
scikit-learn's is `NearestNeighbors(algorithm="brute", n_jobs=-1)`. Agreement is the share of our
exact neighbours that a method finds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import Results, finish, hardware, table, write_json
from benchmarks.run import base_parser, parse, peak_megabytes
from pyro_recursive.datasets import load
from pyro_recursive.mapa.kernels import Gaussian
from pyro_recursive.mapa.table import neighbours

SCALE = 0.3  # of the Gaussian kernel: it does not change the order of neighbours


def ours(x: Tensor, k: int) -> Tensor:
    """Return the indices of the neighbours of all rows, ``[N, k]``."""
    return neighbours(x, Gaussian(SCALE), k).index


def by_sklearn(x: Tensor, k: int) -> Tensor:
    """Return scikit-learn's, ``[N, k]``."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=-1).fit(x.numpy())
    return torch.from_numpy(search.kneighbors(x.numpy(), return_distance=False))


OURS = "pyro_recursive exact"
METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    OURS: ours,
    "scikit-learn brute force": by_sklearn,
}


def main(arguments: list[str]) -> None:
    """Run each method in a fresh process, print the table, write JSON."""
    parser = base_parser("neighbours", __doc__)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--neighbours", type=int, default=64)
    parser.add_argument("--method", help=argparse.SUPPRESS)  # in the child processes
    options = parse(parser, arguments, dataset="digits", rows=500, neighbours=8)
    folder = Path(options.output)
    if options.method is not None:
        run_one(options.method, folder, options.neighbours)
    else:
        results = measure(options)
        finish(results, folder / "results.json", report(results))


def measure(options: argparse.Namespace) -> Results:
    """Return what each method took, and how far it agrees with ours."""
    x = load(options.dataset).train[: options.rows].contiguous()
    results: Results = {
        "settings": {key: value for key, value in vars(options).items() if key != "method"},
        "hardware": hardware(),
        "data": {"shape": list(x.shape), "megabytes": x.nbytes / 2**20},
        "methods": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save(x, f"{folder}/data.pt")
        for method in METHODS:
            print(f"{method} ...", flush=True)
            command = [sys.executable, "-m", "benchmarks", "neighbours", "--method", method]
            command += ["--output", folder, "--neighbours", str(options.neighbours)]
            subprocess.run(command, check=True)  # the highest memory is then the method's own
            found = json.loads(Path(f"{folder}/{method}.json").read_text())
            expected, index = (
                torch.load(f"{folder}/{name}.pt", weights_only=True) for name in (OURS, method)
            )
            results["methods"][method] = {**found, "agreement": agreement(expected, index)}
    return results


def run_one(method: str, folder: Path, k: int) -> None:
    """Time one method, and write the indices and the measurements beside the data."""
    x = torch.load(folder / "data.pt", weights_only=True)
    search = METHODS[method]
    search(x[:1000], min(k, 10))  # loads libraries and starts threads
    before = peak_megabytes()
    start, processor = time.perf_counter(), time.process_time()
    index = search(x, k)
    measured = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
        "peak_megabytes": peak_megabytes(),
        "above_data_megabytes": peak_megabytes() - before,
    }
    torch.save(index, folder / f"{method}.pt")
    write_json(folder / f"{method}.json", measured)


def agreement(expected: Tensor, found: Tensor) -> float:
    """Return the share of expected neighbours that were found, in any order."""
    pairs = zip(expected.split(1000), found.split(1000), strict=True)
    total = sum((rows[:, :, None] == others[:, None]).sum().item() for rows, others in pairs)
    return total / expected.numel()


def report(results: Results) -> str:
    """Return seconds, memory and agreement as a table."""
    first = results["methods"][OURS]["seconds"]
    rows = [
        [
            name,
            f"{found['seconds']:.1f}",
            f"{found['seconds'] / first:.2f}",
            f"{found['processor_seconds']:.1f}",
            f"{found['peak_megabytes']:.0f}",
            f"{found['above_data_megabytes']:.0f}",
            f"{found['agreement']:.4f}",
        ]
        for name, found in results["methods"].items()
    ]
    header = ["neighbours", "s", "ratio", "cpu s", "peak MB", "MB above data", "agreement"]
    data = results["data"]
    sizes = f"{data['shape'][0]} x {data['shape'][1]}, {data['megabytes']:.0f} MB of data"
    return f"{sizes}, k = {results['settings']['neighbours']}\n\n{table(header, rows)}"
