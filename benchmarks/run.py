"""What benchmarks share: settings, tasks, methods, timing, the command line, stored results."""

import argparse
import json
import re
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import Results, check_machine, hardware, write_json
from pyro_recursive.training import Aggressive

OPTIMIZER = partial(torch.optim.Adam, lr=1e-3, fused=True)
Steps = Mapping[str, Callable[[], object]]
Costs = dict[str, dict[str, float]]
SMOKE = {"epochs": 1, "eval_points": 20, "eval_samples": 100, "timing_repeats": 1}


@dataclass(frozen=True)
class Settings:
    """What determines a result, beside method and seed; a run is resumed only with the same."""

    dataset: str
    epochs: int
    batch_size: int
    hidden: int
    latent: int
    eval_points: int
    eval_samples: int
    likelihood: str = field(default="bernoulli", kw_only=True)
    decoder: str = field(default="mlp", kw_only=True)

    def as_json(self) -> dict[str, Any]:
        """Return what is stored: without the fields above that have their defaults."""
        defaults = {each.name: each.default for each in fields(Settings)}
        return {k: v for k, v in asdict(self).items() if k not in defaults or v != defaults[k]}

    @classmethod
    def of(cls, options: argparse.Namespace, **more: Any) -> Self:
        """Take the settings from the options of the command line, and from others."""
        known, names = vars(options) | more, (field.name for field in fields(cls))
        return cls(**{name: known[name] for name in names if name in known})

    def steps(self, rows: int) -> int:
        """Return the number of training steps on so many rows, over all epochs."""
        return self.epochs * -(-rows // self.batch_size)


@dataclass(frozen=True)
class Task:
    """Rows to train on and to evaluate on, and how a VAE for them is made, with a name."""

    train: Tensor
    validation: Tensor
    test: Tensor
    make_vae: Callable[[str], Any]
    transform: Callable | None = None  # of a minibatch
    train_sample: Any = None  # training rows to evaluate on
    exact: Callable[[], Tensor] | None = None  # log p(x) of the test rows under the true model
    repeats: int = 1  # how often ``train`` has each row


@dataclass(frozen=True)
class Method:
    """A model, a guide and a loss, as `fit` takes them.

    ``share`` is the part of the epochs that it is trained for; `Experiment` sets the rest: a file
    of what is evaluated so far, and whether evaluation is compiled.
    """

    vae: Any
    guide: Any
    loss: ELBO
    aggressive: Aggressive | None = None
    share: float = 1.0
    evaluated: Path | None = None
    compiled: bool = False

    def modules(self) -> list[nn.Module]:
        """Return the modules that are trained."""
        guide = self.guide if isinstance(self.guide, nn.Module) else self.vae.encoder
        prior = getattr(self.vae, "prior", None)
        return [guide, self.vae.decoder, *([] if prior is None else [prior])]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained, each once."""
        every = (p for module in self.modules() for p in module.parameters())
        return list({id(p): p for p in every if p.requires_grad}.values())

    def step(self, batch: Tensor) -> Callable[[], None]:
        """Return one training step on a batch, to be timed."""
        optimizer = OPTIMIZER(self.parameters())

        def step() -> None:
            optimizer.zero_grad()
            self.loss.loss_and_grads(self.vae.model, self.guide, batch)
            optimizer.step()

        return step


Methods = Mapping[str, Callable[[Any, Task, Any], Method]]  # of a new VAE, a task and settings


def count(*modules: nn.Module) -> int:
    """Return the number of parameters, those that are shared counted once."""
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


# Timing.


def costs_of(steps: Steps, repeats: int, calls: int, baseline: str) -> Costs:
    """Return each variant's median milliseconds a call, and median ratio to the baseline.

    Every variant runs in each repeat, in an order that is rotated, because caches depend on what
    ran before; ratios are within a repeat.
    """
    timings: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repeat in tqdm(range(repeats), desc="timing", leave=False):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            steps[name]()
            start = time.perf_counter()
            for _ in range(calls):
                steps[name]()
            timings[name].append((time.perf_counter() - start) / calls * 1e3)
    base = timings[baseline]
    return {
        "ms": {name: median(values) for name, values in timings.items()},
        "ratio": {
            name: median(mine / other for mine, other in zip(values, base, strict=True))
            for name, values in timings.items()
        },
    }


@torch.no_grad()
def time_inference(
    guides: Mapping[str, Callable], batch: Tensor, repeats: int, baseline: str, title: str
) -> dict[str, Costs]:
    """Time a draw from q(z | x), for a batch and for one row of it."""
    found = {}
    for rows in (len(batch), 1):
        calls = {name: partial(guide, batch[:rows]) for name, guide in guides.items()}
        found[f"{title}, batch {rows}"] = costs_of(calls, repeats, 10, baseline)
    return found


def grow(guide: Any, batch: Tensor) -> None:
    """Prepare a guide; give a recursive mixture all its components."""
    guide.prepare(batch)
    while getattr(guide, "stage", None) is not None and guide.stage.kind != "joint":
        guide.end_stage()


def peak_megabytes() -> float:
    """Return the highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # a new process counts from its own start there
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# The command line.


def base_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    parser.add_argument("--output", help=f"folder; default: runs/{name}")
    parser.add_argument("--smoke", action="store_true", help="seconds: does everything run?")
    return parser


def training_parser(
    name: str, description: str | None, methods: Iterable[str], more_data: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """Return a parser of the options of all benchmarks that train on a data set."""
    parser = base_parser(name, description)
    choices, names = ["digits", "mnist", "fashion_mnist", "omniglot", *more_data], list(methods)
    parser.add_argument("--dataset", default="digits", choices=choices)
    parser.add_argument("--download", action="store_true", help="fetch a data set that is missing")
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, help="default: 60 on digits, fewer elsewhere")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--eval-points", type=int, default=300, help="rows to evaluate on")
    parser.add_argument("--eval-samples", type=int, default=5000)
    parser.add_argument("--timing-repeats", type=int, default=9)
    parser.add_argument("--resume", action="store_true", help="go on after an interrupt")
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: list[str], **smoke: Any
) -> argparse.Namespace:
    """Return the options, with the values of a smoke run where it is asked for."""
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update({k: v for k, v in SMOKE.items() if hasattr(options, k)} | smoke)
    name = parser.prog.split()[-1] + "-smoke" * options.smoke
    dataset = f"-{options.dataset}" if hasattr(options, "dataset") else ""
    options.output = options.output or f"runs/{name}{dataset}"
    return options


# Stored results.


def stored(folder: Path, settings: dict[str, Any], resume: bool, key: str) -> Results:
    """Return the results of an interrupted run, or none; exit for other settings or machines."""
    path = folder / "results.json"
    if resume and path.exists():
        results: Results = json.loads(path.read_text())
        if results["settings"] != settings:
            raise SystemExit(
                f"{path} holds a run with {results['settings']}, not {settings}: "
                "give the same options to resume it, or another --output"
            )
        check_machine(results["hardware"], path)
        return results
    for checkpoint in folder.glob("*.pt"):  # of a run that is not to be resumed
        checkpoint.unlink()
    fresh: Results = {"settings": settings, "hardware": hardware(), key: {}}
    write_json(path, fresh)  # from here on there is something to resume
    return fresh
