"""`fit`: epochs over minibatches, and what is recorded, kept and resumed between them."""

import math
import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro import validation_enabled
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.guides.mixture.recursive import RecursiveMixtureGuide
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.tracing.terminal import stderr_is_watched
from pyro_recursive.tracing.user_warnings import warn_user
from pyro_recursive.training import checkpoint as checkpoints
from pyro_recursive.training.aggressive import Aggressive, Phase
from pyro_recursive.training.compiled.engines import EngineName, check_engine
from pyro_recursive.training.compiled.step_graph import MAX_BLOCK
from pyro_recursive.training.data import Batch, Data, Minibatches, Table, rows_of
from pyro_recursive.training.history import History
from pyro_recursive.training.learner import Learner, MakeOptimizer, MakeScheduler
from pyro_recursive.training.parameters import Weights

OnStep = Callable[[int, Tensor], Any]
OnEpoch = Callable[[int, History], Any]


def fit(
    model: Callable,
    guide: Callable,
    data: Data,
    *,
    loss: ELBO,
    epochs: int,
    optimizer: MakeOptimizer = partial(torch.optim.Adam, lr=1e-3, fused=True),  # noqa: B008
    scheduler: MakeScheduler | None = None,
    clip_norm: float = math.inf,
    batch_size: int | None = None,
    shuffle: bool = True,
    transform: Callable | None = None,
    kl_warmup: int = 0,
    aggressive: Aggressive | None = None,
    validation: Data | None = None,
    validation_loss: ELBO | None = None,
    validate_every: int = 1,
    patience: float | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = math.inf,
    resume: bool = False,
    modules: Iterable[Module] = (),
    seed: int | None = None,
    check_every: int | None = None,
    validate_args: bool = False,
    progress: bool = True,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    compile: bool | EngineName = False,
    compile_cache: str | os.PathLike | None = None,
) -> History:
    """Minimise a loss over the parameters of model and guide; eager runs resume bit for bit.

    Args:
        model, guide: called as ``model(*batch)``.
        data: a tensor, a tuple of tensors whose rows go together, or a torch DataLoader.
        loss, validation_loss: any `pyro.infer.ELBO`; for validation by default the training loss.
        epochs: passes over the data, those before a resume included.
        optimizer: makes a torch optimiser from the list of (unconstrained) parameters.
        scheduler: makes a torch schedule from that optimiser; stepped after each epoch.
        clip_norm: the largest norm of the gradient over all parameters.
        batch_size: rows per batch of tensors, of all processes; None is the full batch.
        shuffle: whether each epoch has the rows of tensors in a new order.
        transform: maps the tensors of each training batch to a tensor or a tuple.
        kl_warmup: latents have weight ``min(1, epoch / kl_warmup)``, see `KLWarmup`; 0 is none.
        aggressive: steps of the guide alone before each of the model; needs ``validation``.
        validation, validate_every: held-out data, evaluated after so many epochs, in eval mode.
        patience: epochs without a better validation before training stops with the best weights.
        checkpoint, resume: a file, written after each epoch; whether to go on from one, if any.
        checkpoint_seconds: also write it within epochs (one process, tensors, not aggressive).
        modules: those with buffers or an eval mode that model and guide do not show.
        seed: of all global random states at the start; process r takes ``seed + r``.
        check_every: steps between checks for NaN; None is 1 on a CPU, 100 on an accelerator.
        validate_args: whether Pyro's validation, if enabled, stays on after the first epoch.
        progress: whether to show a bar, in a terminal or a notebook.
        on_step: called as ``on_step(step, loss)`` after each step, with a tensor on the device.
        on_epoch: called as ``on_epoch(epoch, history)``, as `on_step` in the first process only.
        compile, compile_cache: True or an engine, and ``cache``, of `CompiledSVI` (compiled.md).

    Raises:
        NonFiniteError: the loss or its gradient is NaN or infinite; names the site.
        CheckpointError: the file is damaged or does not fit this call.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", 100, subsample=x):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    >>> guide, loss = pyro.infer.autoguide.AutoNormal(model), pyro.infer.Trace_ELBO()
    >>> fit(model, guide, torch.randn(100), loss=loss, epochs=2, batch_size=20).steps
    [5, 10]
    """
    check_at_least(1, epochs=epochs, validate_every=validate_every, check_every=check_every)
    check_at_least(0, kl_warmup=kl_warmup)
    engine = "auto" if compile is True else compile or None
    if engine is not None:
        check_engine(compile=engine)
    if validation is None and (patience is not None or aggressive is not None):
        raise ValueError("patience and aggressive need a validation loss. Pass validation data.")
    if not (clip_norm > 0 and (patience is None or patience >= 1)):
        raise ValueError(f"clip_norm={clip_norm} must be above 0, patience={patience} at least 1.")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs a file to resume from. Pass it as checkpoint.")
    with ProcessGroup.joined() as processes:
        processes.seed(seed)
        batches = Minibatches(data, batch_size, shuffle, transform, processes=processes)
        held_out = phase = None
        if validation is not None:
            size = None if isinstance(validation, DataLoader) else batch_size
            held_out = Minibatches(
                validation,
                size,
                False,
                None,
                "validation",
                False,
                processes,
                _is_same(data, validation),
            )
        learner = Learner(
            model,
            guide,
            loss,
            optimizer,
            scheduler,
            clip_norm,
            check_every,
            modules,
            processes,
            engine,
            compile_cache,
            progress and processes.is_first,
        )
        if aggressive is not None and aggressive.max_steps and held_out is not None:
            phase = Phase(aggressive, learner, batches, held_out)
        settings: dict[str, Any] = {"clip_norm": clip_norm, "kl_warmup": kl_warmup, "seed": seed}
        path = Path(checkpoint) if checkpoint is not None else None
        if path is not None:  # a run is resumed with the same; each process may have own data
            hashes = [each and checkpoints.fingerprint(each.data) for each in (batches, held_out)]
            hashes = processes.from_first(hashes, "the contents of the data")
            settings["contents of data"], settings["contents of validation"] = hashes
            settings["transform"] = transform
        run = _Run(learner, batches, epochs, phase, path, settings, on_step, validate_args)
        if processes.count == 1 and not isinstance(data, DataLoader):
            run.checkpoint_seconds = checkpoint_seconds
        if resume:
            run.resume()
        bar = _progress_bar(batches, epochs, learner.steps, progress and processes.is_first)
        with bar, learner.interrupts as interrupts:
            try:
                while run.num_epochs < epochs and not run.history.out_of_patience(patience):
                    weight = min(1.0, (run.num_epochs + 1) / max(kl_warmup, 1))
                    validates = held_out is not None and (run.num_epochs + 1) % validate_every == 0
                    run.epoch(weight, held_out if validates else None, validation_loss or loss, bar)
                    run.end_epoch(keep_best=patience is not None)
                    run.report(on_epoch)
                interrupts.check()
            except KeyboardInterrupt as error:
                run.interrupt(error)
        run.history.stopped_early = run.num_epochs < epochs and not run.history.interrupted
        if patience is not None and run.best is not None:
            learner.parameters.load(run.best)
        if processes.is_first:
            _warn_if_unfinished(guide, run.history)
        return run.history


def _is_same(data: Data, validation: Data) -> bool:
    """Whether the validation data are the training data, the same objects."""
    one, other = (each if isinstance(each, tuple | list) else [each] for each in (data, validation))
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _warn_if_unfinished(guide: Any, history: History) -> None:
    if history.interrupted:
        warn_user(
            f"Training was interrupted in epoch {len(history.epoch) + 1}. With a checkpoint, "
            "resume=True continues from there."
        )
    elif isinstance(guide, RecursiveMixtureGuide) and guide.steps_left:
        warn_user(
            f"Training has ended with {len(guide.members)} of {len(guide.components)} components "
            f"and {guide.steps_left} steps left. Train longer, or shorten the guide's schedule."
        )


def _progress_bar(batches: Minibatches, epochs: int, done: int, wanted: bool) -> tqdm:
    """Return a bar over steps; it is silent if errors go to neither a terminal nor a notebook."""
    total = None if batches.count is None else epochs * batches.count
    is_shown = wanted and stderr_is_watched()
    return tqdm(total=total, initial=done, unit="step", disable=not is_shown)


class _Run:
    """A run in progress; all of it but the data is in its checkpoint."""

    def __init__(
        self,
        learner: Learner,
        batches: Minibatches,
        epochs: int,
        phase: Phase | None,
        path: Path | None,
        settings: dict[str, Any],
        on_step: OnStep | None,
        validate_args: bool,
    ) -> None:
        self.learner, self.batches, self.phase, self.path = learner, batches, phase, path
        self.epochs = epochs
        self.processes = learner.group.processes
        self.on_step = on_step if self.processes.is_first else None
        self.validates = True  # the first epoch, which sees all data
        self.validate_args = validate_args
        self.generators = [*batches.generators, *(phase.generators if phase is not None else [])]
        self.history = History()
        self.best: Weights | None = None  # parameters and buffers of the best epoch
        self.begun: dict[str, float] | None = None  # what is done of an epoch that is resumed
        self.checkpoint_seconds, self.last_checkpoint = math.inf, time.monotonic()
        options = checkpoints.options_of(learner.loss)
        settings = {  # what must not change when a run is resumed
            **settings,
            "number of processes": self.processes.count,
            "number of data generators": len(self.generators),
            "rows of data": batches.rows,
            "batch_size": batches.size,
            "shuffle": batches.order is not None,
            "loss": type(learner.loss).__qualname__,
            **{f"loss.{name}": value for name, value in options.items()},
            "aggressive": None if phase is None else phase.options,
        }
        self.settings = {name: checkpoints.plain(value) for name, value in settings.items()}

    @property
    def num_epochs(self) -> int:
        """The number of epochs done."""
        return len(self.history.epoch)

    def epoch(
        self, weight: float, held_out: Minibatches | None, validation_loss: ELBO, bar: tqdm
    ) -> None:
        """Train for one epoch, validate, and record both."""
        begun = self.begun or dict.fromkeys(("batches", "loss", "rows", "seconds"), 0)
        start, history, phase = time.perf_counter() - begun["seconds"], self.history, self.phase
        if phase is not None and not phase.options.goes_on(history.mutual_information):
            phase = None
        loss, rows = self._train(weight, phase, bar, begun, start)
        validation = information = None
        if held_out is not None:
            validation, history.validation_rows = self.learner.validate(validation_loss, held_out)
        if phase is not None:
            information = self.processes.mean(phase.measure(), "mutual information")
        seconds = time.perf_counter() - start
        history.seconds.append(self.processes.from_first(seconds, f"epoch {self.num_epochs}"))
        history.epoch.append(self.num_epochs + 1)
        history.loss.append(loss)
        history.validation.append(validation)
        history.rows.append(rows)
        history.learning_rate.append(float(self.learner.optimizer.param_groups[0]["lr"]))
        history.steps.append(self.learner.steps)
        history.aggressive.append(phase is not None)
        history.guide_steps.append(self.learner.guide_steps)
        history.mutual_information.append(information)
        shown = {"loss": loss, "validation": validation, "mutual_information": information}
        bar.set_postfix({name: f"{v:.2f}" for name, v in shown.items() if v is not None})

    def _train(
        self,
        weight: float,
        phase: Phase | None,
        bar: tqdm,
        begun: dict[str, float],
        start: float,
    ) -> tuple[float, float]:
        """Return the mean loss in nats and the mean rows of one pass over the batches."""
        learner, epoch = self.learner, self.num_epochs + 1
        count, rows = int(begun["batches"]), begun["rows"]
        # On the device, which is not waited for.
        total = torch.tensor(begun["loss"], dtype=torch.float64)
        order = [generator.get_state() for generator in self.batches.generators]
        # One graph serves all weights.
        is_weighted = weight < 1 or (learner.compiled is not None and self.settings["kl_warmup"])
        warmup: AbstractContextManager = KLWarmup(weight) if is_weighted else nullcontext()
        self.batches.set_epoch(epoch)
        learner.begin_pass()
        with warmup, validation_enabled(is_validation_enabled() and self.validates):
            for losses, batch in self._steps(phase, epoch, count):
                sizes, learner.sizes = learner.sizes, None
                if sizes and self.batches.rows is not None and learner.group.is_alone:
                    sizes.warn(learner.model, batch, self.batches.rows, stacklevel=4)
                total, count = total.to(losses) + losses.sum(), count + len(losses)
                rows += learner.group.rows * len(losses)
                bar.update(len(losses))
                if self.on_step is not None:
                    for number, loss in enumerate(losses, learner.steps - len(losses) + 1):
                        self.on_step(number, loss)
                is_due = time.monotonic() - self.last_checkpoint >= self.checkpoint_seconds
                if is_due and phase is None and count < (self.batches.count or 0):
                    learner.check(batch, epoch)
                    seconds = time.perf_counter() - start
                    done = {"batches": count, "loss": total.item(), "rows": rows}
                    self.write({**done, "seconds": seconds}, order)
            learner.check(batch, epoch)
            learner.end_pass()
            learner.show_weights()
        self.validates, self.begun = self.validate_args, None
        return total.item() / count, rows / count

    def _steps(self, phase: Phase | None, epoch: int, first: int) -> Iterator[tuple[Tensor, Batch]]:
        """Take the steps of an epoch from a batch on; yield losses ``[steps]`` and the batch."""
        learner = self.learner
        if learner.compiled is not None and phase is None:
            passes, count = self.epochs - self.num_epochs, self.batches.count or 1
            most = MAX_BLOCK if self.on_step is None else 1  # it may change what the next step uses
            for piece in self.batches.pieces(first):
                batch = piece.batch(-1) if isinstance(piece, Table) else piece
                alike = count  # batches of an epoch
                if isinstance(piece, Table):
                    alike = len(piece.index)
                elif rows_of(batch) != self.batches.size:  # the last one
                    alike = 1
                for losses in learner.take(piece, epoch, passes * alike, most):
                    learner.group.rows = rows_of(batch)
                    yield losses, batch
            return
        step = learner.step if phase is None else phase.stepper()
        for batch in self.batches.starting_at(first):
            yield step(batch, epoch).reshape(1), batch

    def end_epoch(self, keep_best: bool) -> None:
        """Step the schedule, keep the best weights, write the checkpoint."""
        validated = [value for value in self.history.validation if value is not None]
        self.learner.end_epoch(validated[-1] if validated else self.history.loss[-1])
        if keep_best and self.history.best_epoch == self.num_epochs:
            self.best = self.learner.parameters.copied()
        self.write()

    def write(self, begun: dict[str, float] | None = None, order: Sequence[Tensor] = ()) -> None:
        """Write the checkpoint; within an epoch, with the states that its order is drawn from."""
        if self.path is not None:
            own = checkpoints.random_states(self.generators)
            own["generators"][: len(order)] = order
            state = {
                "settings": self.settings,
                "learner": self.learner.state(),
                "history": asdict(self.history),
                "best": self.best,
                "begun": begun,
                "random": self.processes.gather(own, "random states"),
            }
            if self.processes.is_first:
                checkpoints.save(self.path, state)
            self.processes.barrier_at("a checkpoint")
            self.last_checkpoint = time.monotonic()

    def report(self, on_epoch: OnEpoch | None) -> None:
        """Call a user's function, whose random draws are not those of the run."""
        if on_epoch is not None and self.processes.is_first:
            with checkpoints.forked_rng(generators=self.generators):
                on_epoch(self.num_epochs, self.history)

    def interrupt(self, error: KeyboardInterrupt) -> None:
        """Leave a consistent state after an interrupt, and end the other processes."""
        self.processes.send_error(error)
        self.history.interrupted = True
        self.learner.parameters.zero_gradients()
        self.learner.show_weights()

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        A CheckpointError comes before anything has changed.
        """
        path, first = self.path, self.processes.is_first
        state = checkpoints.load(path) if first and path is not None and path.exists() else None
        state = self.processes.from_first(state, "a checkpoint to resume from")
        if path is None or state is None:
            return
        if self.settings["seed"] is None:  # the file has the random states
            self.settings["seed"] = state["settings"]["seed"]
        # Files of earlier versions do not say these.
        new = ("transform", "contents of data", "contents of validation")
        saved = {name: self.settings[name] for name in new} | state["settings"]
        checkpoints.check_same(path, saved, self.settings)
        self.learner.set_state(path, state["learner"], self.batches)
        self.history, self.best = History(**state["history"]), state["best"]
        self.begun = state.get("begun")
        checkpoints.set_random_states(state["random"][self.processes.rank], self.generators)
