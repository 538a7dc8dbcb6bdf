"""One experiment: methods trained and evaluated, with files to resume from at any moment."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import Results, check_machine, finish, hardware, write_json
from benchmarks.run import (
    OPTIMIZER,
    Method,
    Methods,
    Task,
    costs_of,
    grow,
    time_inference,
)
from pyro_recursive import IWAE_ELBO, fit
from pyro_recursive.evaluation import importance_weights
from pyro_recursive.tracing.tensor_files import read_whole, write_whole
from pyro_recursive.training import CheckpointError, History, NonFiniteError
from pyro_recursive.training.checkpoint import fingerprint, forked_rng

TRAINED = {
    "history",
    "processor_seconds",
    "epoch_processor_seconds",
}  # what a run has before it is evaluated
WRITE_SECONDS = 30.0  # between two writes of what a run has so far
Evaluate = Callable[[Method, Task, Any], dict[str, Any]]


class Experiment:
    """Trains, evaluates and times every method with every seed; stores each result at once.

    The first of the methods is the baseline. ``results["runs"][method][seed]`` has the history and
    the processor time of training, and what the evaluation returned,
    ``results["diverged"][method][seed]`` the error of a run that ended in numbers that are not
    finite, and ``results["unfinished"]`` what there is of other runs. Each run has a file of its
    own in the folder ``runs``. ``training`` are further arguments of `fit`, as ``patience`` is.
    ``epoch_processor_seconds`` of a run lacks the epochs that a killed process had not written.
    """

    def __init__(
        self,
        settings: Any,
        task: Task,
        methods: Methods,
        options: argparse.Namespace,
        validation_particles: int = 16,
        patience: int | None = None,
        **training: Any,
    ) -> None:
        self.settings, self.task, self.methods, self.options = settings, task, methods, options
        self.validation_loss, self.training = IWAE_ELBO(validation_particles), training
        self.patience = patience
        self.baseline = next(iter(methods))
        self.folder = Path(options.output)
        self.path = self.folder / "results.json"
        if not options.resume:
            for pattern in ("*.pt", "runs/*.json", "runs/*.pt"):
                for old in self.folder.glob(pattern):
                    old.unlink()
        self.results: Results = {"settings": settings.as_json(), "hardware": hardware()}
        self.collect()
        self.is_compiled = bool(training.get("compile"))
        self.batch = task.train[: settings.batch_size]  # to time steps and inference on
        if task.transform is not None:
            with forked_rng(0):  # the same batch for all, and no draw of the runs' own
                self.batch = task.transform(self.batch.cpu()).to(self.batch)

    def build(self, name: str, prefix: str = "") -> Method:
        """Return a method with new networks; ``prefix`` tells its parameters from another's."""
        return self.methods[name](self.task.make_vae(prefix), self.task, self.settings)

    def file(self, name: str, seed: int) -> Path:
        """Return the file of a run; its checkpoint has the same name with ``.pt``."""
        slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
        return self.folder / "runs" / f"{slug}-{seed}.json"

    def collect(self) -> None:
        """Take from the files what runs there are; exit for those of other settings."""
        kinds: dict[str, dict[str, Any]] = {"runs": {}, "diverged": {}, "unfinished": {}}
        stored = [self._stored(path) for path in sorted((self.folder / "runs").glob("*.json"))]
        for name in self.methods:
            for each in (each for each in stored if each["method"] == name):
                kind = "diverged" if "diverged" in each else "runs"
                if kind == "runs" and not each["run"].keys() - TRAINED:
                    kind = "unfinished"
                found = each["diverged" if kind == "diverged" else "run"]
                kinds[kind].setdefault(name, {})[str(each["seed"])] = found
        self.results |= kinds

    def _stored(self, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["settings"] != self.results["settings"]:
            raise SystemExit(
                f"{path} is of a run with {found['settings']}, not {self.results['settings']}: "
                "give the same options to resume it, or another --output"
            )
        check_machine(found["hardware"], path)
        return found

    def is_done(self, name: str, seed: int) -> bool:
        """Whether a run is complete: evaluated, or diverged."""
        return any(str(seed) in self.results[k].get(name, {}) for k in ("runs", "diverged"))

    def run(self, evaluate: Evaluate) -> None:
        """Run what is missing, all methods of a seed before the next seed."""
        self.build(self.baseline).step(self.batch)()  # the first step of a process is slow
        for seed, name in tqdm(
            list(product(self.options.seeds, self.options.methods)), desc="runs"
        ):
            self.complete(name, seed, evaluate)
            self.collect()
            write_json(self.path, self.results)

    def complete(self, name: str, seed: int, evaluate: Evaluate) -> None:
        """Train and evaluate a method with a seed, or what is left of it to do.

        Several processes may complete different runs at once: this writes files of the run alone.
        """
        if self.is_done(name, seed):
            return
        path = self.file(name, seed)
        known = self.results["unfinished"].get(name, {}).get(str(seed), {})
        stored = {"method": name, "seed": seed, "settings": self.results["settings"]}
        stored |= {"hardware": self.results["hardware"], "run": known}
        try:
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            kept = path.with_suffix(".scores.pt")
            method = replace(self.build(name), evaluated=kept, compiled=self.is_compiled)
            self._train(method, path, seed, stored)
            write_json(path, stored)
            known |= evaluate(method, self.task, self.settings)
        except NonFiniteError as error:  # a result, too
            stored["diverged"] = str(error)
        write_json(path, stored)

    def _train(self, method: Method, path: Path, seed: int, stored: dict[str, Any]) -> None:
        """Train one method; add its history and processor time to its run."""
        known: dict[str, Any] = stored["run"]
        if isinstance(method.guide, nn.Module):
            prepare: Any = method.guide.prepare
            prepare(self.task.validation[:2])  # creates what a checkpoint restores
        epochs = round(method.share * self.settings.epochs)
        if not epochs:
            known["history"] = asdict(History())
            return
        checkpoint, written = path.with_suffix(".pt"), time.monotonic()
        continues, start = self.options.resume and checkpoint.exists(), time.process_time()
        if not continues:
            known.clear()  # of a run whose checkpoint is gone
        last, each = start, known.setdefault("epoch_processor_seconds", [])

        def note(epoch: int, history: History) -> None:
            nonlocal written, last
            now = time.process_time()
            each.append(round(now - last, 4))
            last = now
            if time.monotonic() - written > WRITE_SECONDS:
                known["history"] = asdict(history)
                write_json(path, stored)
                written = time.monotonic()

        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        history = fit(
            method.vae.model,
            method.guide,
            self.task.train,
            loss=method.loss,
            epochs=epochs,
            optimizer=OPTIMIZER,
            batch_size=self.settings.batch_size,
            transform=self.task.transform,
            validation=self.task.validation,
            validation_loss=self.validation_loss,
            aggressive=method.aggressive,
            patience=self.patience,
            checkpoint=checkpoint,
            checkpoint_seconds=WRITE_SECONDS,
            resume=self.options.resume,
            seed=seed,
            on_epoch=note,
            **self.training,
        )
        if history.interrupted:
            raise KeyboardInterrupt
        known["history"] = asdict(history)
        if not continues:  # else the time before the interrupt is not known
            known["processor_seconds"] = time.process_time() - start

    def costs(self, name: str, evaluate: Evaluate, steps: int) -> dict[str, float]:
        """Return the processor seconds of an epoch with validation, and of evaluation.

        From some steps and rows.
        """
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        method = self.build(name)
        rows, times = self.task.train[: steps * self.settings.batch_size], list[float]()
        if isinstance(method.guide, nn.Module):
            grow(method.guide, self.batch)
        fit(
            method.vae.model,
            method.guide,
            rows,
            loss=method.loss,
            epochs=2,  # the first one compiles
            optimizer=OPTIMIZER,
            batch_size=self.settings.batch_size,
            transform=self.task.transform,
            progress=False,
            on_epoch=lambda *_: times.append(time.process_time()),
            **self.training,
        )
        start = time.process_time()
        with torch.no_grad():
            for batch in self.task.validation.split(self.settings.batch_size):
                self.validation_loss.loss(method.vae.model, method.guide, batch)
        validation = time.process_time() - start
        epoch = (times[1] - times[0]) / len(rows) * len(self.task.train) + validation
        few, points = self.task.test[:50], len(self.task.test) + len(self.task.train_sample)
        task, start = replace(self.task, test=few, train_sample=few[:1]), time.process_time()
        evaluate(replace(method, compiled=self.is_compiled), task, self.settings)
        evaluation = (time.process_time() - start) / (len(few) + 1) * points
        return {"epoch": epoch, "evaluation": evaluation}

    def time(self) -> None:
        """Time a training step and inference of the baseline and of the methods that have runs.

        Interleaved; the step of a recursive mixture is one of all components.
        """
        pyro.clear_param_store()
        names = dict.fromkeys([self.baseline, *self.results["runs"]])
        methods = {name: self.build(name, name) for name in names}
        for method in methods.values():
            if isinstance(method.guide, nn.Module):
                grow(method.guide, self.batch)
        repeats, base = self.options.timing_repeats, self.baseline
        steps = {name: method.step(self.batch) for name, method in methods.items()}
        self.results["steps"] = costs_of(steps, repeats, 2, base)
        guides = {name: method.guide for name, method in methods.items()}
        self.results["inference"] = time_inference(guides, self.batch, repeats, base, "methods")

    def finish(
        self, report: Callable[[Results], str], plot: Callable[[Results, Path], None]
    ) -> None:
        """Draw the figure, write the results and print the report."""
        picture = self.folder / "results.png"
        plot(self.results, picture)
        finish(self.results, self.path, report(self.results), [picture])


def evidence(
    method: Method, rows: Tensor, samples: int, few: int | None = None, seed: int = 64
) -> dict[str, Any]:
    """Return log p(x) and the ELBO of each row in nats, and the mean effective sample size.

    With ``few`` also the mean of the bounds of groups of so many of the samples, and their mean
    effective sample size.
    """
    found = list(_scored(method, rows, samples, few, seed))
    scores = {key: torch.cat([part[key] for part in found]).cpu() for key in found[0]}
    return {
        key: v.mean().item() if key.startswith("ess") else [round(x, 4) for x in v.tolist()]
        for key, v in scores.items()
    }


def _scored(
    method: Method, rows: Tensor, samples: int, few: int | None, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the scores of 100 rows after another; those that a file has are taken from it."""
    done, keep = kept_scores(method, f"{samples}, {few}, {seed}, {fingerprint((rows,))}", [])
    for number, batch in enumerate(tqdm(rows.split(100), desc="log p(x)", leave=False)):
        if number == len(done):
            pyro.set_rng_seed(seed + number)
            found = importance_weights(
                method.vae.model,
                method.guide,
                batch,
                num_particles=samples,
                compile=method.compiled,
            )
            weights = found.log_weights
            scores = {"log_p": found.log_marginal, "elbo": weights.mean(0), "ess": found.ess}
            if few is not None:
                groups = weights[: samples // few * few].unflatten(0, (-1, few))
                scores[f"iwae_{few}"] = (groups.logsumexp(1) - math.log(few)).mean(0)
                scores[f"ess_{few}"] = (1 / groups.softmax(1).square().sum(1)).mean(0)
            done.append(scores)
            keep()
        yield done[number]


def kept_scores(method: Method, options: str, empty: Any) -> tuple[Any, Callable[[], None]]:
    """Return the scores kept so far, to which the caller adds, and a function to save them.

    That function writes no more often than every ``WRITE_SECONDS``. The scores are ``empty`` where
    the file has none of these options and of the method's parameters: a run that is trained again
    has others.
    """
    path, kept, written = method.evaluated, dict[str, Any](), time.monotonic()
    if path is not None and path.exists():
        kept = read_whole(path, CheckpointError, f"'{path}' cannot be read: {{}}. Delete it.")
    weights = fingerprint([parameter.detach().flatten() for parameter in method.parameters()])
    found = kept.setdefault(f"{options}, {weights}", empty)

    def keep() -> None:
        nonlocal written
        if path is not None and time.monotonic() - written > WRITE_SECONDS:
            write_whole(path, kept)
            written = time.monotonic()

    return found, keep
