"""`fit`: epochs over minibatches, and what is recorded, kept and resumed between them.

History, early stopping, minibatches, schedules, KL warm-up, checkpoints that resume bit for bit,
and an error that names the site where a NaN arises. Model, guide and loss are used as they are.
"""

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch.nn import Module
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyro_recursive.training import checkpoint as checkpoints
from pyro_recursive.training.checkpoint import forked_rng
from pyro_recursive.training.learner import Learner, MakeOptimizer, MakeScheduler, Weights
from pyro_recursive.training.minibatches import Data, Minibatches, rows_of
from pyro_recursive.warmup import KLWarmup

__all__ = ["History", "fit"]

VALIDATION_SEED = 0  # the same draws in each validation, so that differences are the guide's


@dataclass
class History:
    """What `fit` recorded: lists with one entry per epoch, ``json.dumps(asdict(history))`` works.

    ``loss`` is the mean over the epoch's batches of what the loss returned before each step, in
    nats: of the full data where the model's plate knows their size (``pyro.plate("data", size,
    subsample=batch)``), of the batch where it does not. During KL warm-up it is the weighted loss.
    ``validation`` is the same mean over the validation batches, never weighted, None in an epoch
    without validation. ``rows`` and ``validation_rows`` are the mean rows of a batch: where the
    plate is the batch, ``loss / rows`` is per datum. ``learning_rate`` is the first parameter
    group's in that epoch; ``seconds`` the epoch's duration; ``steps`` the steps since the start.

    >>> history = History(epoch=[1, 2], loss=[3.0, 2.0], validation=[4.0, 5.0])
    >>> history.best_epoch
    1
    """

    epoch: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation: list[float | None] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    validation_rows: float | None = None
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    stopped_early: bool = False

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the lowest validation loss; None without validation."""
        values = [math.inf if v is None or math.isnan(v) else v for v in self.validation]
        best = min(values, default=math.inf)
        return self.epoch[values.index(best)] if best < math.inf else None

    def out_of_patience(self, patience: float | None) -> bool:
        """Whether ``patience`` epochs, up to a validation just done, brought no better one."""
        if patience is None or not self.validation or self.validation[-1] is None:
            return False
        return len(self.epoch) - (self.best_epoch or 0) >= patience


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
    but for its checks (`Trace_ELBO` does, at each sample site).

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
    :param validation: held-out data in any form of ``data``; neither shuffled nor transformed, and
        evaluated with modules in eval mode, no gradients and the same random draws each time
    :param validation_loss: the loss for validation; the training loss if None
    :param validate_every: epochs from one validation to the next
    :param patience: stop after as many epochs without a better validation loss, and put the best
        parameters and buffers back; ``math.inf`` never stops but puts the best back; None only
        records
    :param checkpoint: a file, written at the end of each epoch and over what was there before
    :param resume: go on from that file, if it exists, bit for bit as if there had been no stop; all
        other arguments must be those of the run that wrote it, but for a larger ``epochs``
    :param modules: modules with buffers (batch norm), or with a behaviour in eval mode, that cannot
        be seen from here, as those in `pyro.module` calls; known are model, guide and loss where
        they are modules or bound methods of one
    :param seed: sets all global random states at the start; None leaves them as they are
    :param check_every: steps from one check for NaN to the next; None is each step on a CPU and
        every 100 steps, and each epoch's end, on an accelerator, which each check makes wait
    :param progress: whether to show a bar with the last epoch's losses, in nats
    :return: the record of all epochs, those before a resume included
    :raises NonFiniteError: the loss or its gradient is NaN or infinite; names the sample site,
        parameter or data tensor where that arises. With ``check_every=1`` no parameter has changed
    :raises CheckpointError: ``resume`` from a damaged file or one of another program
    :raises TypeError: an optimiser of Pyro (take `SVI` for those), data that are not tensors
    :raises ValueError: arguments out of range, empty data, or nothing to train

    Two processes must not share a checkpoint. DataLoader workers that persist, or random numbers
    drawn by a data set from generators of its own, are beyond what a checkpoint can hold.

    >>> import pyro.distributions as dist
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
    _check_loss(loss, validation_loss)
    _check_optimizer(optimizer)
    _check_at_least_one(epochs=epochs, validate_every=validate_every, check_every=check_every)
    _check_combination(kl_warmup, patience, validation, resume, checkpoint)
    if seed is not None:
        pyro.set_rng_seed(seed)
    batches = Minibatches(data, batch_size, shuffle, transform)
    held_out = _held_out(validation, batch_size)
    learner = Learner(
        model, guide, loss, optimizer, scheduler, clip_norm, check_every, modules=modules
    )
    run = _Run(learner, batches, Path(checkpoint) if checkpoint is not None else None)
    if resume:
        run.resume()
    with run.progress_bar(epochs, disable=not progress) as bar:
        while run.num_epochs < epochs and not run.history.out_of_patience(patience):
            weight = min(1.0, (run.num_epochs + 1) / max(kl_warmup, 1))
            validates = held_out is not None and (run.num_epochs + 1) % validate_every == 0
            run.epoch(weight, held_out if validates else None, validation_loss or loss, bar)
            run.end_epoch(keep_best=patience is not None)
    run.history.stopped_early = run.num_epochs < epochs
    if patience is not None and run.best is not None:
        learner.set_weights(run.best)
    return run.history


class _Run:
    """A run in progress; all of it but the data is in its checkpoint."""

    def __init__(self, learner: Learner, batches: Minibatches, path: Path | None) -> None:
        self.learner, self.batches, self.path = learner, batches, path
        self.history = History()
        self.best: Weights | None = None  # parameters and buffers of the best epoch

    @property
    def num_epochs(self) -> int:
        """The epochs done."""
        return len(self.history.epoch)

    def progress_bar(self, epochs: int, disable: bool) -> tqdm:
        """Return a bar over all steps, those before a resume included."""
        count = self.batches.count
        total = None if count is None else epochs * count
        return tqdm(total=total, initial=self.learner.steps, unit="step", disable=disable)

    def epoch(
        self, weight: float, held_out: Minibatches | None, validation_loss: ELBO, bar: tqdm
    ) -> None:
        """Train for one epoch, validate, and record both."""
        start, history = time.perf_counter(), self.history
        loss, rows = self._train(weight, bar)
        validation = None
        if held_out is not None:
            validation, history.validation_rows = self._validate(held_out, validation_loss)
        history.epoch.append(self.num_epochs + 1)
        history.loss.append(loss)
        history.validation.append(validation)
        history.rows.append(rows)
        history.learning_rate.append(self.learner.learning_rate)
        history.seconds.append(time.perf_counter() - start)
        history.steps.append(self.learner.steps)
        shown = {"loss": loss} if validation is None else {"loss": loss, "validation": validation}
        bar.set_postfix(shown)

    def end_epoch(self, keep_best: bool) -> None:
        """Step the schedule, keep the best weights, write the checkpoint."""
        validated = [value for value in self.history.validation if value is not None]
        self.learner.end_epoch(validated[-1] if validated else self.history.loss[-1])
        if keep_best and self.history.best_epoch == self.num_epochs:
            self.best = self.learner.weights()
        if self.path is not None:
            checkpoints.save(self.path, self._state())

    def resume(self) -> None:
        """Go back to the checkpoint, if there is one.

        :raises CheckpointError: it is damaged or another program's; nothing has changed
        """
        if self.path is None or not self.path.exists():
            return
        state, generators = checkpoints.load(self.path), self.batches.generators
        checkpoints.check_generators(self.path, state["random"], generators)
        self.learner.set_state(self.path, state["learner"], self.batches)
        self.history, self.best = History(**state["history"]), state["best"]
        checkpoints.set_random_state(state["random"], generators)

    def _state(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state(),
            "history": asdict(self.history),
            "best": self.best,
            "random": checkpoints.random_state(self.batches.generators),
        }

    def _train(self, weight: float, bar: tqdm) -> tuple[float, float]:
        """Return the mean loss in nats and the mean rows of one pass over the batches."""
        total, count, rows = torch.zeros(()), 0, 0  # on the device: to read it is to wait
        warmup: AbstractContextManager = KLWarmup(weight) if weight < 1 else nullcontext()
        with warmup:
            for batch in self.batches:
                loss = self.learner.step(batch, self.num_epochs + 1)
                total, count, rows = total.to(loss) + loss, count + 1, rows + rows_of(batch)
                bar.update()
            if not count:
                raise ValueError("The DataLoader gave no batches. Check its data set.")
            self.learner.check(batch, self.num_epochs + 1)
        return total.item() / count, rows / count

    def _validate(self, held_out: Minibatches, loss: ELBO) -> tuple[float, float]:
        """Return mean loss in nats and mean rows of the validation batches; leave no trace."""
        learner = self.learner
        with learner.evaluating(), forked_rng(VALIDATION_SEED, held_out.generators):
            pairs = [
                (loss.loss(learner.model, learner.guide, *batch), rows_of(batch))
                for batch in held_out
            ]
        value, rows = torch.as_tensor(pairs, dtype=torch.float64).mean(0).tolist()
        return value, rows


def _held_out(validation: Data | None, batch_size: int | None) -> Minibatches | None:
    if validation is None:
        return None
    size = None if isinstance(validation, DataLoader) else batch_size
    return Minibatches(validation, size, shuffle=False, name="validation")


def _check_loss(*losses: ELBO | None) -> None:
    for loss in losses:
        if loss is not None and not isinstance(loss, ELBO):
            raise TypeError(
                f"loss must be a pyro.infer.ELBO, got {loss!r}. Pass an instance such as "
                "Trace_ELBO()."
            )


def _check_optimizer(optimizer: Any) -> None:
    of_pyro = str(getattr(optimizer, "__module__", None)).startswith("pyro.optim")
    if of_pyro or isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise TypeError(
            f"optimizer must make a torch optimiser from a list of parameters, got a "
            f"{type(optimizer).__name__}. Pass e.g. functools.partial(torch.optim.Adam, lr=1e-3); "
            "pyro.optim optimisers belong in a loop of SVI.step."
        )


def _check_at_least_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")


def _check_combination(
    kl_warmup: int,
    patience: float | None,
    validation: Data | None,
    resume: bool,
    checkpoint: str | os.PathLike | None,
) -> None:
    if kl_warmup < 0:
        raise ValueError(f"kl_warmup must be 0 (none) or a number of epochs, got {kl_warmup}.")
    if patience is not None and not patience >= 1:
        raise ValueError(f"patience must be at least 1 epoch, or None, got {patience}.")
    if patience is not None and validation is None:
        raise ValueError(f"patience={patience} needs a validation loss. Pass validation data.")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs a file to resume from. Pass it as checkpoint.")
