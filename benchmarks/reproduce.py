"""Published experiments at a length of choice: python -m benchmarks reproduce NAME --epochs N.

Each run (a data set, the sizes of the networks, a method, a seed) is a process of one thread, and
--jobs of them run at once. Any of them may be killed at any moment: the same command goes on from
files that are written at least once a minute. The tables and plots are of the runs that there are;
--report makes them without training. A folder for each data set, networks and number of epochs
has results.json, report.md, results.png, and in runs a JSON file for each run.

"mapa" and "mapa-images" are the benchmarks of that name with --resume, with options (no --jobs or
--report) and folders of their own: see reproduce mapa --help.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from benchmarks import mapa, mapa_images
from benchmarks.experiment import Experiment
from benchmarks.report import hardware, table
from benchmarks.run import Task, base_parser, parse
from benchmarks.studies import (
    beta,
    bounds,
    convergence,
    reconstruction,
    recursive,
    semi_amortized,
    snr,
)
from benchmarks.studies.study import Study
from benchmarks.tasks.images import DECODERS
from benchmarks.tasks.likelihoods import LIKELIHOODS
from pyro_recursive.training import burda_schedule

STUDIES: dict[str, Study] = {
    "bounds": bounds.STUDY,
    "snr": snr.STUDY,
    "beta": beta.STUDY,
    "reconstruction": reconstruction.STUDY,
    "recursive": recursive.STUDY,
    "convergence": convergence.STUDY,
    "semi-amortized": semi_amortized.STUDY,
}
PLAIN = {"bernoulli", "mlp"}  # likelihood and decoder, by default
OWN = {"mapa": mapa, "mapa-images": mapa_images}
SMOKE = {"datasets": ["digits"], "networks": ["20-5"], "seeds": [0], "epochs": 2, "jobs": 1}


class Run(NamedTuple):
    """One run of a study."""

    seed: int
    dataset: str
    networks: str
    method: str


def main(arguments: list[str]) -> None:
    """Run what is missing; write tables and plots of what there is."""
    if arguments and arguments[0] in OWN:
        OWN[arguments[0]].main([*arguments[1:], "--resume"])
        return
    options = _options(arguments)
    study = STUDIES[options.study]
    torch.set_num_threads(1)
    groups = [(d, n) for d in options.datasets for n in options.networks or study.sizes(d)]
    runs = [
        Run(seed, dataset, networks, method)
        for seed, (dataset, networks), method in product(options.seeds, groups, options.methods)
    ]
    resume = not options.smoke
    experiments = {group: experiment(options, *group, resume=resume) for group in groups}
    if options.costs:
        print(_costs(options, experiments))
        return
    failed = 0
    if not options.report:
        missing = [
            run
            for run in runs
            if not experiments[run.dataset, run.networks].is_done(run.method, run.seed)
        ]
        failed = _run_all(options, missing)
    for each in experiments.values():
        each.collect()
        if any(each.results[kind] for kind in ("runs", "unfinished")):
            each.finish(study.report, study.plot)
            text = f"{_facts(each)}\n\n{study.report(each.results)}\n"
            (each.folder / "report.md").write_text(text)
    if failed:
        sys.exit(f"{failed} runs failed: the same command tries them again")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = base_parser("reproduce", __doc__)
    parser.add_argument("study", choices=STUDIES, metavar="NAME", help=", ".join([*STUDIES, *OWN]))
    parser.add_argument("--datasets", nargs="+", help="default: those of the study")
    parser.add_argument("--download", action="store_true", help="fetch a data set that is missing")
    parser.add_argument("--networks", nargs="+", help="hidden-latent; default: the study's")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, help="default: 3280, or the study's")
    parser.add_argument("--batch-size", type=int, help="default: 20, or the study's")
    parser.add_argument("--eval-points", type=int, help="test images; default: 10,000, or fewer")
    parser.add_argument("--eval-samples", type=int, default=5000)
    parser.add_argument("--likelihood", default="bernoulli", choices=LIKELIHOODS)
    parser.add_argument("--decoder", default="mlp", choices=DECODERS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; default: 1")
    parser.add_argument("--device", default="cpu", help="of model and data; default: cpu")
    parser.add_argument("--eager", action="store_true", help="no compiled steps: seeds repeat")
    parser.add_argument("--report", action="store_true", help="of the runs that there are")
    parser.add_argument("--costs", action="store_true", help="of each run, from 100 steps of it")
    options = parse(parser, arguments, **SMOKE)
    study = STUDIES[options.study]
    for name in ("datasets", "methods", "epochs", "batch_size", "eval_points"):
        default = getattr(study, name)
        if getattr(options, name) is None:
            vars(options)[name] = default if isinstance(default, int) else list(default)
    if options.smoke:
        options.methods = options.methods[:2]
    unknown = set(options.methods) - study.methods.keys()
    if unknown:
        parser.error(f"unknown methods {sorted(unknown)}: choose from {', '.join(study.methods)}")
    kinds = _kinds(options)
    if options.study == "reconstruction" and kinds:
        parser.error("reconstruction has binary pixels and the mlp decoder only")
    if len(kinds) > 1:
        parser.error(f"{' and '.join(sorted(kinds))} pixels are not here: leave one out")
    if "--output" not in arguments:
        options.output = options.output.replace("reproduce", f"reproduce-{options.study}")
    options.command = shlex.join(["python", "-m", "benchmarks", "reproduce", *arguments])
    return options


def _kinds(options: argparse.Namespace) -> set[str]:
    """Return the likelihood or decoder that is not the default one."""
    return {options.likelihood, options.decoder} - PLAIN


def experiment(
    options: argparse.Namespace, dataset: str, networks: str, resume: bool = True
) -> Experiment:
    """Return the experiment of a data set and networks, with the results that its files have."""
    study = STUDIES[options.study]
    hidden, latent = map(int, networks.split("-"))
    name = "-".join([dataset, networks, str(options.epochs), "epochs", *_kinds(options)])
    folder = f"{options.output}/{name}"
    burda = partial(burda_schedule, num_epochs=options.epochs)
    own = argparse.Namespace(**vars(options))
    vars(own).update(dataset=dataset, output=folder, resume=resume)
    settings = study.settings.of(own, hidden=hidden, latent=latent)
    task = study.task(settings, own, min(study.train_points, settings.eval_points))
    repeats = max(1, round(study.epoch_steps * settings.batch_size / len(task.train)))
    task = replace(task, train=task.train.repeat(repeats, 1), repeats=repeats)
    return Experiment(
        settings,
        _on_device(task, options.device),
        study.methods,
        own,
        study.validation_particles,
        study.patience,
        scheduler=burda if study.scheduler == "burda" else study.scheduler,
        compile=False if options.eager else "replay",
        compile_cache=None if options.eager else f"{options.output}/graphs",
    )


def _on_device(task: Task, device: str) -> Task:
    names = ("train", "validation", "test", "train_sample")
    moved: dict[str, Any] = {name: getattr(task, name).to(device) for name in names}
    return replace(task, **moved, make_vae=lambda name: task.make_vae(name).to(device))


def _run_all(options: argparse.Namespace, runs: list[Run]) -> int:
    """Complete all runs, in several processes if there are jobs; return how many failed there."""
    if options.jobs == 1:
        for run in runs:
            _complete(options, run)
        return 0
    failed = 0
    os.environ["TQDM_DISABLE"] = "1"  # bars of several processes would overwrite each other
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.jobs, context, _end_with_parent, max_tasks_per_child=1)
    futures = {pool.submit(_complete, options, run): run for run in runs}
    try:
        for number, future in enumerate(as_completed(futures), 1):
            error = future.exception()  # the other runs go on
            failed += error is not None
            text = "done" if error is None else f"failed, {type(error).__name__}: {error}"
            print(f"{number} of {len(runs)}: {futures[future]}: {text}", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failed


def _end_with_parent() -> None:
    """End this process when its parent ends, in any way: another may go on with its files."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _complete(options: argparse.Namespace, run: Run) -> None:
    torch.set_num_threads(1)
    study = STUDIES[options.study]
    experiment(options, run.dataset, run.networks).complete(run.method, run.seed, study.evaluate)


def _costs(options: argparse.Namespace, experiments: dict[Any, Experiment]) -> str:
    """Return a table of what each run will take: processor time."""
    rows = []
    for (dataset, networks), each in experiments.items():
        for method in options.methods:
            found = each.costs(method, STUDIES[options.study].evaluate, steps=100)
            epoch, evaluation = found["epoch"], found["evaluation"]
            hours = (epoch * options.epochs + evaluation) / 3600
            numbers = f"{epoch:.1f}", f"{evaluation / 60:.1f}", f"{hours:.2f}"
            rows.append([f"{dataset} {networks}", method, *numbers])
    header = ["run", "method", "seconds/epoch", "evaluation, minutes"]
    header.append(f"hours for {options.epochs} epochs")
    return table(header, rows)


def _facts(each: Experiment) -> str:
    """Return command, hardware and hours."""
    found, here = each.results, hardware()
    kinds = found["runs"], found["unfinished"]
    done = [run for kind in kinds for runs in kind.values() for run in runs.values()]
    seconds = sum(sum(run["history"]["seconds"]) for run in done if "history" in run)
    machine = f"{here['processor']}, GPU: {here['gpu']}, torch {here['torch']}, Pyro {here['pyro']}"
    return (
        f"`{each.options.command}`\n\n{each.settings}; {len(done)} runs, one thread each, "
        f"{seconds / 3600:.2f} hours of training in all; {machine}."
    )
