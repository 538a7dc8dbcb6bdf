"""One experiment: methods trained, evaluated and timed, with results to resume from."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import Results, finish, hardware, write_json
from benchmarks.timing import Costs, costs_of, grow
from pyro_recursive import IWAE_ELBO, fit, log_marginal
from pyro_recursive.training import Aggressive, NonFiniteError

OPTIMIZER = partial(torch.optim.Adam, lr=1e-3, fused=True)


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

    @classmethod
    def of(cls, options: argparse.Namespace, **more: Any) -> Self:
        """Take the settings from the options of the command line, and from others."""
        given: dict[str, Any] = {f.name: getattr(options, f.name, None) for f in fields(cls)}
        return cls(**given | more)

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
    train_sample: Tensor | None = None  # training rows to evaluate on
    exact: Tensor | None = None  # log p(x) of the test rows under the true model, where known


@dataclass(frozen=True)
class Method:
    """A model, a guide and a loss, as `fit` takes them."""

    vae: Any
    guide: Any
    loss: ELBO
    aggressive: Aggressive | None = None

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


class Experiment:
    """Trains and evaluates every method with every seed, and stores each result at once.

    ``results["runs"][method][seed]`` has the history and the processor time of training, and what
    the evaluation returned; ``results["diverged"][method][seed]`` the error of a run that ended in
    numbers that are not finite. ``evaluated`` is an entry that only evaluated runs have.
    """

    def __init__(
        self, settings: Settings, task: Task, options: argparse.Namespace, evaluated: str = "test"
    ) -> None:
        self.settings, self.task, self.evaluated = settings, task, evaluated
        self.folder, self.resume = Path(options.output), options.resume
        self.path = self.folder / "results.json"
        self.results = stored(self.folder, asdict(settings), options.resume, "runs")

    def run(
        self,
        build: Callable[[str], Method],
        evaluate: Callable[[Method], dict[str, Any]],
        names: Iterable[str],
        seeds: Iterable[int],
        validation_particles: int = 16,
    ) -> Results:
        """Run what is missing, draws of a seed together; ``build`` is called after seeding."""
        names = list(names)
        for name, seed in tqdm([(n, s) for s in seeds for n in names], desc="runs"):
            runs = self.results["runs"].setdefault(name, {})
            failures = self.results.setdefault("diverged", {}).setdefault(name, {})
            if self.evaluated in runs.get(str(seed), {}) or str(seed) in failures:
                continue
            known = runs.setdefault(str(seed), {})
            try:
                pyro.clear_param_store()
                pyro.set_rng_seed(seed)
                method = build(name)
                self._train(method, name, seed, known, validation_particles)
                write_json(self.path, self.results)
                known.update(evaluate(method))
            except NonFiniteError as error:  # a result, too
                failures[str(seed)] = str(error)
                del runs[str(seed)]
            write_json(self.path, self.results)
        return self.results

    def _train(
        self, method: Method, name: str, seed: int, known: dict[str, Any], particles: int
    ) -> None:
        """Train one method, and note how that went."""
        if isinstance(method.guide, nn.Module):
            prepare: Any = method.guide.prepare
            prepare(self.task.validation[:2])  # creates what a checkpoint restores
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = self.folder / f"{_slug(name)}-{seed}.pt"
        continues, start = self.resume and checkpoint.exists(), time.process_time()
        history = fit(
            method.vae.model,
            method.guide,
            self.task.train,
            loss=method.loss,
            epochs=self.settings.epochs,
            optimizer=OPTIMIZER,
            batch_size=self.settings.batch_size,
            transform=self.task.transform,
            validation=self.task.validation,
            validation_loss=IWAE_ELBO(particles),
            aggressive=method.aggressive,
            checkpoint=checkpoint,
            resume=self.resume,
            seed=seed,
        )
        known["history"] = asdict(history)
        if not continues:  # else the time before the interrupt is not known
            known["processor_seconds"] = time.process_time() - start

    def merge(self, paths: Iterable[str]) -> None:
        """Take in the runs of other files with the same settings."""
        for path in paths:
            other = json.loads(Path(path).read_text())
            check_settings(Path(path), other["settings"], self.results["settings"])
            for key in ("runs", "diverged"):
                known = self.results.setdefault(key, {})
                for name, runs in other.get(key, {}).items():
                    known[name] = runs | known.get(name, {})

    def sort(self, names: Iterable[str]) -> None:
        """Put the methods that have runs into an order."""
        for key in ("runs", "diverged"):
            found = self.results.get(key, {})
            self.results[key] = {name: found[name] for name in names if found.get(name)}
        self.results["hardware"] = hardware()

    def finish(
        self, report: Callable[[Results], str], plot: Callable[[Results, Path], None]
    ) -> None:
        """Draw the figure, write the results and print the report."""
        picture = self.folder / "results.png"
        plot(self.results, picture)
        finish(self.results, self.path, report(self.results), [picture])


def time_steps(
    methods: Mapping[str, Method], batch: Tensor, repeats: int, baseline: str, calls: int = 3
) -> Costs:
    """Time a training step of every method, interleaved; of recursive mixtures a joint one."""
    for method in methods.values():
        if isinstance(method.guide, nn.Module):
            grow(method.guide, batch)
    steps = {name: method.step(batch) for name, method in methods.items()}
    return costs_of(steps, repeats, calls, baseline)


def evidence(
    model: Callable, guide: Callable, rows: Tensor, samples: int
) -> tuple[list[float], Tensor]:
    """Return log p(x) of each row in nats, and effective sample sizes ``[rows]``."""
    found = [
        log_marginal(model, guide, batch, num_particles=samples, diagnostics=True)
        for batch in tqdm(rows.split(100), desc="log p(x)", leave=False)
    ]
    log_p = torch.cat([one.log_marginal for one in found])
    return log_p.tolist(), torch.cat([one.ess for one in found])


def elbo_of(model: Callable, guide: Callable, rows: Tensor, draws: int) -> list[float]:
    """Return the mean over draws of log p(x, z) - log q(z | x), for each row, in nats."""
    copies = min(draws, 20)
    runs, parts = -(-draws // copies), []
    for batch in rows.split(100):
        repeated = batch.repeat(copies, *[1] * (batch.dim() - 1))
        each = [log_marginal(model, guide, repeated, num_particles=1) for _ in range(runs)]
        parts.append(torch.stack(each).double().mean(0).reshape(copies, -1).mean(0))
    return torch.cat(parts).tolist()


def count(*modules: nn.Module) -> int:
    """Return the number of parameters, those that are shared counted once."""
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


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
        vars(options).update(smoke)
    name = parser.prog.split()[-1] + "-smoke" * options.smoke
    dataset = f"-{options.dataset}" if hasattr(options, "dataset") else ""
    options.output = options.output or f"runs/{name}{dataset}"
    return options


# Stored results.


def stored(folder: Path, settings: dict[str, Any], resume: bool, key: str) -> Results:
    """Return the results of an interrupted run, if they are of these settings, or none."""
    path = folder / "results.json"
    if resume and path.exists():
        results: Results = json.loads(path.read_text())
        check_settings(path, results["settings"], settings)
        return results
    for checkpoint in folder.glob("*.pt"):  # of a run that is not to be resumed
        checkpoint.unlink()
    fresh: Results = {"settings": settings, key: {}}
    write_json(path, fresh)  # from here on there is something to resume
    return fresh


def check_settings(path: Path, found: dict[str, Any], given: dict[str, Any]) -> None:
    """Exit where stored results have other settings."""
    if found != given:
        raise SystemExit(
            f"{path} holds a run with {found}, not {given}: "
            "give the same options to resume it, or another --output"
        )


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
