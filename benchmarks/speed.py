"""Cost of a training step beside hand-written PyTorch, Pyro and NumPyro; growth, memory, compiling.

All methods take the same steps: one model, one bound, Adam, float32. Before they are timed, their
values are checked: compiled steps against eager ones from the same seed in float64, and the loss at
the start of what has another random stream within 5 standard errors. Methods are timed alternately
in one process; factors are medians of those within a repeat. Without the packages of extra
`numpyro` its rows are left out.

A run adds its models to the results in the output folder, so that all may be measured in parts on
one machine: other --groups, --models or --threads. --groups without a name only writes the report.
"""

import json
import multiprocessing
import os
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI
from tqdm import tqdm

from benchmarks.methods.steps import (
    COMPILED,
    METHODS,
    OURS,
    PYRO,
    NotApplicable,
    Setting,
    Steps,
    make,
)
from benchmarks.report import (
    Results,
    check_machine,
    figure,
    finish,
    hardware,
    name_rows,
    table,
    write_json,
)
from benchmarks.run import base_parser, parse, peak_megabytes
from benchmarks.tasks.timed import GROUPS, GROWTH, MAIN, MANY, Timed
from pyro_recursive import CompiledSVI, log_marginal

COSTS = {
    "classical": list(GROUPS["classical"]),
    "VAE": ["20 x 1", "20 x 8", "100 x 8"],
    "enumerated": list(GROUPS["enumerated"]),
}
SHORT = {"classical": ["eight schools", "logistic", "30 sites"], "VAE": ["20 x 1", "100 x 8"]}
SUMMARY = [PYRO, "CompiledSVI.step", "CompiledSVI.run", "NumPyro scan", "hand-written, compiled"]
EVALUATION = {  # columns of the table of costs, by their titles
    "log p(x), MB": "log_marginal megabytes",
    "log p(x), s": "log_marginal seconds",
    "log p(x), compiled, s": "log_marginal seconds, compiled",
}
SECONDS = 0.1  # that each method runs in a repeat, at least
KINDS = "step", "run", "start"  # of checks
CHECKED, DRAWS = 20, 400  # steps, and draws of a loss


def main(arguments: list[str]) -> None:
    """Check and time what is asked for; print tables; write JSON, tables and plots."""
    parser = base_parser("speed", __doc__)
    names = [name for group in GROUPS.values() for name in group]
    groups = [*GROUPS, "costs"]
    parser.add_argument("--groups", nargs="*", default=groups, choices=groups)
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="MODEL")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--engine", default="auto", help="of CompiledSVI")
    parser.add_argument("--device", default="cpu")
    options = parse(parser, arguments, engine="graph", repeats=1)
    if options.smoke:  # one model, and nothing compiled
        options.groups, options.models = ["classical"], ["eight schools"]
        compiling = {"hand-written, compiled", "NumPyro update", "NumPyro scan"}
        options.methods = [each for each in options.methods if each not in compiling]
    if not find_spec("numpyro"):
        options.methods = [each for each in options.methods if "NumPyro" not in each]
        print("The rows of NumPyro are left out: pip install '.[numpyro]'")
    path = Path(options.output) / "results.json"
    results: Results = json.loads(path.read_text()) if path.exists() else {}
    parts = [(group, name) for group in options.groups for name in _names(group, options)]
    with prepared(options.threads, options.device):
        for group, name in tqdm(parts):
            known = results.setdefault(str(options.threads), {"hardware": hardware()})
            check_machine(known["hardware"], path)
            found = known.setdefault(group, {})
            found[name] = costs(name) if group == "costs" else timed(group, name, options)
            write_json(path, results)
    text, folder = report(results), path.parent
    (folder / "tables.md").write_text(f"{text}\n")
    finish(results, path, text, list(plots(results, folder)))


def _names(group: str, options: Namespace) -> list[str]:
    if group == "costs":
        return [f"{g}: {n}" for g, names in COSTS.items() for n in names if n in options.models]
    return [name for name in GROUPS[group] if name in options.models]


@contextmanager
def prepared(threads: int, device: str = "cpu") -> Iterator[None]:
    """Use some cores only, and check no arguments, inside the block."""
    cores, before = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(cores)[:threads])  # jax reads it
    torch.set_num_threads(threads)
    # A default device slows every call from Python: none for the CPU.
    on_device: Any = nullcontext() if device == "cpu" else torch.device(device)
    try:
        with warnings.catch_warnings(), pyro.validation_enabled(False), on_device:
            warnings.simplefilter("ignore")
            yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)


# Values, then times.


def timed(group: str, name: str, options: Namespace) -> dict[str, Any]:
    """Return milliseconds of every method in each repeat, and why others have none."""
    methods = [each for each in options.methods if group in MAIN or each in OURS]
    engine, failed = options.engine, dict[str, str]()
    checks = {} if group in GROWTH else same_seed(GROUPS[group][name], engine, group in MAIN)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    task, ready = GROUPS[group][name](), dict[str, Steps]()
    expected = start_loss(PYRO, task) if group in MAIN else (0.0, 1.0)
    for method in methods:
        try:
            if group in MAIN and method in ("hand-written", "NumPyro update"):
                checks[f"{method}, start"] = _distance(start_loss(method, task), expected)
            ready[method] = make(method, task, Setting(f"{name} {method}", engine=engine))
            for _ in range(3):  # an eager step, what compiles, a step
                ready[method].call()
        except NotApplicable:
            continue
        except Exception as error:  # a result, too
            failed[method] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            ready.pop(method, None)
    return {"checks": checks, "failed": failed} | time_all(ready, options.repeats)


def same_seed(make_task: Callable[[], Timed], engine: Any, is_compiled: bool) -> dict[str, Any]:
    """Return the largest relative difference between eager and compiled losses in float64."""
    torch.set_default_dtype(torch.float64)

    def losses(kind: Callable[..., Any], **options: Any) -> tuple[torch.Tensor, ...]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        task = make_task()
        optimizer = pyro.optim.Adam({"lr": 0.01})
        svi = kind(*task.programs("checked"), optimizer, task.loss(), **options)
        number = min(CHECKED, task.many)
        found = torch.tensor([svi.step(*task.args) for _ in range(number)])
        many = svi.run(number, *task.args) if kind is CompiledSVI and is_compiled else found
        return found, many

    try:
        used = COMPILED[0] if engine == "auto" else engine
        used = used if is_compiled else "graph"
        own = losses(CompiledSVI, engine=used, strict=True)
        plain = losses(CompiledSVI, engine="graph") if is_compiled and used != "graph" else own
        eager = losses(SVI)[0]
        pairs = {"step": (own[0], eager), "run": (own[1], plain[1])}
        return {k: ((a - b).abs() / (1 + b.abs())).max().item() for k, (a, b) in pairs.items()}
    except Exception as error:  # what cannot be compiled
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        torch.set_default_dtype(torch.float32)


def start_loss(method: str, task: Timed) -> tuple[float, float]:
    """Return the mean loss before training, and its standard error."""
    call = make(method, task, Setting(f"start {method}", lr=0.0)).call
    losses = [float(call()) for _ in range(max(8, DRAWS * task.many // MANY))]
    return mean(losses), stdev(losses) / len(losses) ** 0.5


def _distance(found: tuple[float, float], expected: tuple[float, float]) -> float:
    """Return how many standard errors two losses are apart; raise where these are too many."""
    errors = abs(found[0] - expected[0]) / (found[1] ** 2 + expected[1] ** 2) ** 0.5
    if errors > 5:
        raise ValueError(f"loss {found[0]:.4f}, not {expected[0]:.4f}: {errors:.0f} errors apart")
    return errors


def time_all(ready: dict[str, Steps], repeats: int) -> dict[str, Any]:
    """Return milliseconds a step, by the wall's clock and by the processor's, in each repeat.

    Every method runs in each repeat, in an order that is rotated.
    """
    for steps in ready.values():  # graphs are made anew where the others have new parameters
        steps.call()
    calls = {name: _calls(steps) for name, steps in ready.items()}
    names, clocks = list(ready), ("wall", "processor")
    found = {name: {clock: list[float]() for clock in clocks} for name in names}
    for repeat in range(repeats):
        first = repeat % max(1, len(names))
        for name in names[first:] + names[:first]:
            steps = ready[name]
            if calls[name] > 1:
                steps.call()
            _synchronize()
            starts = time.perf_counter(), time.process_time()
            for _ in range(calls[name]):
                steps.call()
            _synchronize()
            ends = time.perf_counter(), time.process_time()
            for clock, start, end in zip(clocks, starts, ends, strict=True):
                found[name][clock].append((end - start) / (calls[name] * steps.number) * 1e3)
    return {"ms": found}


def _calls(steps: Steps) -> int:
    """Return how many calls take long enough to be timed."""
    start = time.perf_counter()
    steps.call()
    _synchronize()
    return max(1, round(SECONDS / (time.perf_counter() - start)))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# What compiling costs, and memory: each in a process of its own.


def costs(name: str) -> dict[str, Any]:
    """Return the seconds until compiled steps run, cold and warm, and megabytes of memory."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (_alone(threads, name, "CompiledSVI.run", folder) for _ in range(2))
        eager, own = (_alone(threads, name, each, folder) for each in (PYRO, "eager, SVI"))
    return {"cold": cold, "warm": warm, "eager": eager, "own": own}


def _alone(threads: int, *args: str) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_cost, threads, *args).result()


def _cost(threads: int, name: str, method: str, cache: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:  # of torch: what is known is in the cache alone
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        with prepared(threads):
            return _cost_here(name, method, cache)


def _cost_here(name: str, method: str, cache: str | None = None) -> dict[str, float]:
    group, _, model = name.partition(": ")
    task = GROUPS[group][model]()
    before, start = peak_megabytes(), time.perf_counter()
    steps = make(method, task, Setting("alone", cache=cache))
    if steps.number == 1:
        steps.call()
    seconds = time.perf_counter() - start
    for _ in range(1 if steps.number > 1 else 20):
        steps.call()
    found = {"seconds": seconds, "megabytes": peak_megabytes() - before}
    if method == PYRO and group == "VAE":
        found |= _evaluation_costs(task)
    return found


def _evaluation_costs(task: Timed) -> dict[str, float]:
    """Return the megabytes of log p(x) with 5,000 samples, and its seconds, eager and compiled."""
    programs = task.programs("new")

    def seconds(compile: bool) -> float:
        start = time.perf_counter()
        log_marginal(*programs, *task.args, num_particles=5000, compile=compile)
        return time.perf_counter() - start

    before = peak_megabytes()
    seconds(compile=False)
    found = {"log_marginal megabytes": peak_megabytes() - before}
    seconds(compile=True)  # compiles
    times = [(seconds(compile=False), seconds(compile=True)) for _ in range(3)]
    eager, compiled = map(median, zip(*times, strict=True))
    return {**found, "log_marginal seconds": eager, "log_marginal seconds, compiled": compiled}


# The report.


def factor(cells: dict[str, Any], method: str, base: str, clock: str = "wall") -> float:
    """Return how many times faster a method is than another, the median over repeats."""
    pairs = zip(cells[base][clock], cells[method][clock], strict=True)
    return median(other / mine for other, mine in pairs)


def report(results: Results) -> str:
    """Return all tables: for each number of threads, the main ones, growth and costs."""
    return "\n\n".join(part for threads in results for part in _of_threads(threads, results))


def _of_threads(threads: str, results: Results) -> Iterator[str]:
    found = results[threads]
    yield f"## {threads} thread{'s' * (threads != '1')}"
    yield ", ".join(f"{key} {value}" for key, value in found["hardware"].items())
    if short := _cells(found, SHORT):
        yield "In short, ms a step (times faster than Pyro's SVI):"
        yield _table("model", SUMMARY, short, PYRO)
    for group in (*MAIN, "guides"):
        if group in found:
            yield f"{group}: ms a step (times faster)"
            base = PYRO if group in MAIN else "eager, SVI"
            methods = METHODS if group in MAIN else OURS
            yield _table(group, list(methods), _cells(found, {group: list(found[group])}), base)
            yield from _notes(found[group])
    if curves := {group: found[group] for group in GROWTH if group in found}:
        yield "Growth: ms a step, and the exponent of a power law through the upper half"
        yield table(["", "method", "from", "to", "ms", "exponent"], list(_growth(curves)))
    if "costs" in found:
        yield "Compiling and memory"
        memory = ["compiled, MB", "eager, MB", "Pyro, MB"]
        header = ["model", "cold, s", "warm, s", *memory, *EVALUATION]
        yield table(header, [_cost_row(*each) for each in found["costs"].items()])


def _cells(found: Results, wanted: dict[str, list[str]]) -> dict[str, Any]:
    every = ((n, found.get(g, {}).get(n)) for g, names in wanted.items() for n in names)
    return {name: each["ms"] for name, each in every if each}


def _table(title: str, methods: Sequence[str], models: dict[str, Any], base: str) -> str:
    known = [method for method in methods if any(method in cells for cells in models.values())]
    if len(known) > len(models):  # the longer side downwards
        rows = [[m, *(_cell(cells, m, base) for cells in models.values())] for m in known]
        return table([title, *models], rows)
    rows = [[name, *(_cell(cells, m, base) for m in known)] for name, cells in models.items()]
    return table([title, *known], rows)


def _cell(cells: dict[str, Any], method: str, base: str) -> str:
    if method not in cells:
        return "-"
    ms = f"{median(cells[method]['wall']):.3g}"
    return (
        ms if method == base or base not in cells else f"{ms} ({factor(cells, method, base):.3g})"
    )


def _notes(group: dict[str, Any]) -> Iterator[str]:
    """Yield what the checks found, and what failed."""
    checks = [item for each in group.values() for item in each["checks"].items()]
    worst = {kind: max((v for k, v in checks if kind in k), default=0.0) for kind in KINDS}
    yield (
        f"Checked: float64 losses of up to {CHECKED} steps from the same seed differ from eager "
        f"ones by at most {worst['step']:.1g}; as many further ones of `run` from those of the "
        f"traced graph by {worst['run']:.1g}; losses before training by {worst['start']:.1f} "
        "standard errors."
    )
    for name, each in group.items():
        reasons = {reason: method for method, reason in each["failed"].items()}
        reasons |= {each["checks"][k]: "check" for k in ("failed",) if k in each["checks"]}
        for reason, method in reasons.items():
            yield f"- {name}, {method}: {reason}"


def _growth(curves: dict[str, Any]) -> Iterator[list[str]]:
    for group, points in curves.items():
        for method in OURS:
            sizes, times = _curve(points, method)
            if len(sizes) > 1:
                span = f"{times[0]:.3g} to {times[-1]:.3g}"
                ends = [str(sizes[0]), str(sizes[-1])]
                yield [group, method, *ends, span, f"{exponent(sizes, times):.2f}"]


def _curve(points: dict[str, Any], method: str) -> tuple[list[int], list[float]]:
    known = {int(size): each["ms"][method] for size, each in points.items() if method in each["ms"]}
    return list(known), [median(each["wall"]) for each in known.values()]


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Return the slope of log time in log size over the larger half of the sizes."""
    half = len(sizes) // 2 - (len(sizes) < 4)
    return float(np.polyfit(np.log(sizes[half:]), np.log(times[half:]), 1)[0])


def _cost_row(name: str, found: dict[str, Any]) -> list[str]:
    cold, warm, eager = (found[key] for key in ("cold", "warm", "eager"))
    runs = [found.get(key) for key in ("warm", "own", "eager")]
    memory = [f"{each['megabytes']:.0f}" if each else "-" for each in runs]
    evaluation = [f"{eager[key]:.3g}" if key in eager else "-" for key in EVALUATION.values()]
    return [name, f"{cold['seconds']:.1f}", f"{warm['seconds']:.1f}", *memory, *evaluation]


# Plots.


def plots(results: Results, folder: Path) -> Iterator[Path]:
    """Draw the steps of the main groups and the growth curves."""
    panels = [(t, g) for t in results for g in MAIN if results[t].get(g)]
    if panels:
        path = folder / "steps.png"
        size = (14, 4.5 * len(panels))
        with figure(path, len(panels), 1, figsize=size) as (_, axes):
            for (threads, group), panel in zip(panels, axes[:, 0], strict=True):
                _draw_steps(panel, results[threads][group], f"{group}, threads: {threads}")
        yield path
    curves = [(t, g) for t in results for g in GROWTH if results[t].get(g)]
    if curves:
        path = folder / "growth.png"
        with figure(path, 1, len(curves), figsize=(4 * len(curves), 4.2)) as (_, axes):
            for (threads, group), panel in zip(curves, axes[0], strict=True):
                _draw_growth(panel, results[threads][group], group, threads)
        yield path


def _draw_steps(panel: Any, group: dict[str, Any], title: str) -> None:
    known = [m for m in METHODS if any(m in each["ms"] for each in group.values())]
    for number, (name, each) in enumerate(group.items()):
        times = {m: median(each["ms"][m]["wall"]) for m in known if m in each["ms"]}
        places = [known.index(method) for method in times]
        panel.semilogx(list(times.values()), places, "o", color=f"C{number}", label=name)
    name_rows(panel, known)
    panel.set(xlabel="ms a step", title=title)
    panel.grid(axis="both", alpha=0.3)
    panel.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")


def _draw_growth(panel: Any, points: dict[str, Any], title: str, threads: str) -> None:
    for method in OURS:
        sizes, times = _curve(points, method)
        if sizes:
            slope = f", slope {exponent(sizes, times):.2f}" if len(sizes) > 1 else ""
            panel.loglog(sizes, times, "o-", label=f"{method}{slope}")
    panel.set(xlabel=title, ylabel="ms a step", title=f"threads: {threads}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0.0, -0.2))
