"""`fit`: epochs over minibatches, and what is recorded, kept and resumed between them.

History, early stopping, minibatches, schedules, KL warm-up, checkpoints that resume bit for bit,
and an error that names the site where a NaN arises. Model, guide and loss are used as they are.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from torch.nn import Module
from tqdm import tqdm

from pyro_recursive.evaluation.parallel import ProcessError, ProcessGroup
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.training import checkpoint as checkpoints
from pyro_recursive.training.aggressive import Aggressive, Phase
from pyro_recursive.training.arguments import (
    check_combination,
    check_loss,
    check_optimizer,
)
from pyro_recursive.training.held_out import HeldOut
from pyro_recursive.training.history import History
from pyro_recursive.training.learner import Learner, MakeOptimizer, MakeScheduler, Weights
from pyro_recursive.training.minibatches import Data, Minibatches
from pyro_recursive.training.non_finite import NonFiniteError
from pyro_recursive.training.progress import progress_bar, show_losses
from pyro_recursive.training.settings import check_settings, settings_of

__all__ = ["History", "fit"]


def fit(
    model: Callable,
    guide: Callable,
    data: Data,
    *,
    loss: ELBO,
    epochs: int,
    optimizer: MakeOptimizer = partial(torch.optim.Adam, lr=1e-3),  # noqa: B008
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
    resume: bool = False,
    modules: Iterable[Module] = (),
    seed: int | None = None,
    check_every: int | None = None,
    progress: bool = True,
) -> History:
    """Minimise a loss over the parameters of model and guide, which are called on each batch.

    Parameters are found as `pyro.infer.SVI` finds them, whenever they first appear, and share one
    torch optimiser. On an accelerator the loop itself never waits for the device within an epoch,
    but for its checks and what ``aggressive`` compares (`Trace_ELBO` does, at each sample site).

    :param model: called as ``model(*batch)``, like the guide
    :param guide: any Pyro guide that the loss accepts
    :param data: a tensor, a tuple of tensors whose rows go together, or a torch DataLoader
    :param loss: any `pyro.infer.ELBO`; its ``differentiable_loss``, else its ``loss_and_grads``
    :param epochs: how many passes over the data, at least 1; a resumed run counts all its epochs
    :param optimizer: makes a torch optimiser from the list of (unconstrained) parameters, e.g.
        ``partial(torch.optim.Adam, lr=1e-3, fused=True)``
    :param scheduler: makes a torch learning-rate schedule from that optimiser, e.g.
        `burda_schedule`; stepped after each epoch
    :param clip_norm: gradients with a larger norm, over all parameters, are scaled down to it
    :param batch_size: rows per batch, the last may have fewer; None is the full batch
    :param shuffle: whether the rows of tensors are put in a new order for each epoch
    :param transform: maps the tensors of each training batch to a tensor or a tuple, e.g. a dynamic
        binarisation with the global random state
    :param kl_warmup: in epoch e = 1, 2, ... all latents' log-densities are weighted by
        ``min(1, e / kl_warmup)``, see `KLWarmup`; 0 is no warm-up
    :param aggressive: against posterior collapse, the guide takes many steps alone before each step
        of the model, as long as that helps: see `Aggressive`. Needs ``validation``
    :param validation: held-out data in any form of ``data``; neither shuffled nor transformed, and
        evaluated with modules in eval mode, no gradients and the same random draws each time
    :param validation_loss: the loss for validation; the training loss if None
    :param validate_every: epochs from one validation to the next
    :param patience: stop after as many epochs without a better validation loss, and put the best
        parameters and buffers back; ``math.inf`` never stops but puts the best back; None only
        records
    :param checkpoint: a file, written at the end of each epoch and over what was there before
    :param resume: go on from that file, if it exists, bit for bit as if there had been no stop.
        ``epochs``, ``patience``, ``validate_every``, ``check_every`` and ``progress`` may be
        others, all else must be what it was: the numbers, the options of loss and optimiser and
        the rows of the data are compared, functions and the values of the data cannot be
    :param modules: modules with buffers (batch norm), or with a behaviour in eval mode, that cannot
        be seen from here, as those in `pyro.module` calls; known are model, guide and loss where
        they are modules or bound methods of one
    :param seed: sets all global random states at the start; None leaves them as they are
    :param check_every: steps from one check for NaN to the next; None is each step on a CPU and
        every 100 steps, and each epoch's end, on an accelerator, which each check makes wait
    :param progress: whether to show a bar with the last epoch's losses, in nats, in a terminal or a
        notebook; a log file never has one
    :return: the record of all epochs, those before a resume included
    :raises NonFiniteError: the loss or its gradient is NaN or infinite; names the sample site,
        parameter or data tensor where that arises. With ``check_every=1`` no parameter has changed
    :raises CheckpointError: ``resume`` from a damaged file, or one of another program or with other
        settings
    :raises TypeError: an optimiser of Pyro (take `SVI` for those), data that are not tensors
    :raises ValueError: arguments out of range, empty data, or nothing to train

    Warns where a batch is taken for all data: a plate has as many rows as the first batch, the data
    have more, and a latent is outside of that plate; and where training ends before the schedule of
    a guide that grows.

    Where `torch.distributed` is initialised, as in ``torchrun --nproc-per-node=2 train.py``, all
    processes train one model, each on its share of the rows of each batch: ``batch_size`` is that
    of all together. All must call `fit` with the same arguments, and afterwards have the same
    parameters, buffers and record. They start from process 0's, and it alone writes the file and
    shows the bar; process r draws with ``seed + r``. Loss and gradient are those of the whole
    batch, as far as its loss is a sum over rows: each process's estimate of it, weighted by rows,
    where a plate of the rows, ``pyro.plate("data", len(x))``, counts for the whole batch's. What
    mixes rows sees those of one process: the statistics of a batch norm (their running means are
    process 0's), the codes that a `MAPA_ELBO` draws from. A density that depends on the rows and
    is in no plate of them raises, a `pyro.factor` too. A DataLoader is each process's own: it
    needs a torch `DistributedSampler`, told of each epoch, and ``batch_size / processes`` as its
    batch size. An error in one process ends all. A run is resumed with as many processes. Use gloo
    for CPUs, nccl for GPUs.

    Other runs must not share a checkpoint. DataLoader workers that persist, or random numbers
    drawn by a data set from generators of its own, are beyond what a checkpoint can hold.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", 100, subsample=x):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    >>> pyro.clear_param_store()
    >>> history = fit(model, AutoNormal(model), torch.randn(100) + 3, loss=Trace_ELBO(), epochs=3,
    ...               batch_size=20, seed=0, progress=False)
    >>> history.steps
    [5, 10, 15]
    """
    check_loss(loss, validation_loss)
    check_optimizer(optimizer)
    check_at_least(1, epochs=epochs, validate_every=validate_every, check_every=check_every)
    check_combination(kl_warmup, patience, validation, resume, checkpoint, aggressive)
    with _same_errors(), ProcessGroup.joined() as processes:
        processes.seed(seed)
        batches = Minibatches(data, batch_size, shuffle, transform, processes=processes)
        held_out = None if validation is None else HeldOut(validation, batch_size, processes)
        learner = Learner(
            model, guide, loss, optimizer, scheduler, clip_norm, check_every, modules, processes
        )
        phase = None
        if aggressive is not None and aggressive.max_steps and held_out is not None:
            phase = Phase(aggressive, learner, batches, held_out)
        run = _Run(learner, batches, phase, Path(checkpoint) if checkpoint is not None else None)
        begun = phase.options if phase is not None else None
        numbers = {"clip_norm": clip_norm, "kl_warmup": kl_warmup, "seed": seed}
        run.settings = settings_of(batches, loss, begun, **numbers)
        if resume:
            run.resume()
        steps = None if batches.count is None else epochs * batches.count
        with progress_bar(steps, learner.steps, progress and processes.is_first) as bar:
            while run.num_epochs < epochs and not run.history.out_of_patience(patience):
                weight = min(1.0, (run.num_epochs + 1) / max(kl_warmup, 1))
                validates = held_out is not None and (run.num_epochs + 1) % validate_every == 0
                run.epoch(weight, held_out if validates else None, validation_loss or loss, bar)
                run.end_epoch(keep_best=patience is not None)
        run.history.stopped_early = run.num_epochs < epochs
        if patience is not None and run.best is not None:
            learner.set_weights(run.best)
        if processes.is_first:
            _warn_if_unfinished(guide)
        return run.history


def _warn_if_unfinished(guide: Any) -> None:
    """Warn where a guide that grows by a schedule has not come to its end."""
    left = getattr(guide, "steps_left", 0)
    if isinstance(left, int) and left > 0:
        warnings.warn(
            f"The training of {type(guide).__name__} has ended before its schedule: "
            f"{len(guide.members)} of {len(guide.components)} components are in it, and "
            f"{left} steps are left. Give fit more epochs, or the guide a shorter schedule.",
            stacklevel=3,
        )


@contextmanager
def _same_errors() -> Iterator[None]:
    """Raise what `fit` promises to raise also where it has come up in another process."""
    promised = {kind.__name__: kind for kind in (NonFiniteError, checkpoints.CheckpointError)}
    try:
        yield
    except ProcessError as error:
        if error.kind not in promised:
            raise
        raise promised[error.kind](str(error)) from error


class _Run:
    """A run in progress; all of it but the data is in its checkpoint."""

    def __init__(
        self, learner: Learner, batches: Minibatches, phase: Phase | None, path: Path | None
    ) -> None:
        self.learner, self.batches, self.phase, self.path = learner, batches, phase, path
        self.processes = learner.team.processes
        self.generators = [*batches.generators, *(phase.generators if phase is not None else [])]
        self.history = History()
        self.best: Weights | None = None  # parameters and buffers of the best epoch
        self.settings: dict[str, Any] = {}

    @property
    def num_epochs(self) -> int:
        """The epochs done."""
        return len(self.history.epoch)

    def epoch(
        self, weight: float, held_out: HeldOut | None, validation_loss: ELBO, bar: tqdm
    ) -> None:
        """Train for one epoch, validate, and record both."""
        start, history = time.perf_counter(), self.history
        phase = self.phase
        if phase is not None and not phase.options.goes_on(history.mutual_information):
            phase = None
        loss, rows = self._train(weight, phase, bar)
        validation = information = None
        if held_out is not None:
            validation, history.validation_rows = held_out.loss(self.learner, validation_loss)
        if phase is not None:
            information = self.processes.mean(phase.measure(), "mutual information")
        history.epoch.append(self.num_epochs + 1)
        history.loss.append(loss)
        history.validation.append(validation)
        history.rows.append(rows)
        history.learning_rate.append(self.learner.learning_rate)
        seconds = time.perf_counter() - start
        history.seconds.append(self.processes.from_first(seconds, f"epoch {self.num_epochs}"))
        history.steps.append(self.learner.steps)
        history.aggressive.append(phase is not None)
        history.guide_steps.append(self.learner.guide_steps)
        history.mutual_information.append(information)
        show_losses(bar, loss=loss, validation=validation, mutual_information=information)

    def end_epoch(self, keep_best: bool) -> None:
        """Step the schedule, keep the best weights, write the checkpoint."""
        validated = [value for value in self.history.validation if value is not None]
        self.learner.end_epoch(validated[-1] if validated else self.history.loss[-1])
        if keep_best and self.history.best_epoch == self.num_epochs:
            self.best = self.learner.weights()
        if self.path is not None:
            state = self._state()
            if self.processes.is_first:
                checkpoints.save(self.path, state)
            self.processes.barrier_at("a checkpoint")

    def resume(self) -> None:
        """Go back to the checkpoint, if there is one.

        :raises CheckpointError: it is damaged or another program's; nothing has changed
        """
        path, first = self.path, self.processes.is_first
        state = checkpoints.load(path) if first and path is not None and path.exists() else None
        state = self.processes.from_first(state, "a checkpoint to resume from")
        if path is None or state is None:
            return
        checkpoints.check_processes(path, state, self.processes.count)
        check_settings(path, state.get("settings"), self.settings)
        checkpoints.check_generators(path, state["random"], self.generators)
        self.learner.set_state(path, state["learner"], self.batches)
        self.history, self.best = History.restored(state["history"]), state["best"]
        random = [state["random"], *state.get("other processes", ())][self.processes.rank]
        checkpoints.set_random_state(random, self.generators)
        self.settings |= state.get("settings", {})

    def _state(self) -> dict[str, Any]:
        own = checkpoints.random_state(self.generators)
        random, *others = self.processes.gather(own, "random states")
        return {
            "settings": self.settings,
            "learner": self.learner.state(),
            "history": asdict(self.history),
            "best": self.best,
            "random": random,
            **({"other processes": others} if others else {}),
        }

    def _train(self, weight: float, phase: Phase | None, bar: tqdm) -> tuple[float, float]:
        """Return the mean loss in nats and the mean rows of one pass over the batches."""
        step = self.learner.step if phase is None else phase.stepper()
        total, count, rows = torch.zeros(()), 0, 0  # on the device: to read it is to wait
        warmup: AbstractContextManager = KLWarmup(weight) if weight < 1 else nullcontext()
        self.batches.set_epoch(self.num_epochs + 1)
        with warmup:
            for batch in self.batches:
                loss = step(batch, self.num_epochs + 1)
                self._warn_of_counts()
                total, count = total.to(loss) + loss, count + 1
                rows += self.learner.team.rows
                bar.update()
            if not count:
                raise ValueError("The DataLoader gave no batches. Check its data set.")
            self.learner.check(batch, self.num_epochs + 1)
            self.learner.end_pass()
        return total.item() / count, rows / count

    def _warn_of_counts(self) -> None:
        """After the first step, tell what it has shown."""
        counts, self.learner.counts = self.learner.counts, None
        rows, total = self.learner.team.rows, self.batches.rows if counts else None
        if counts is not None and total is not None and self.processes.is_first:
            counts.warn(rows, total, stacklevel=5)
