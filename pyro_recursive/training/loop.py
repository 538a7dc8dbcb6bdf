"""`fit`: epochs over minibatches, or steps, and the arguments for them."""

import math
import operator
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch.nn import Module
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.guides.mixture.recursive import RecursiveMixtureGuide
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.terminal import stderr_is_watched
from pyro_recursive.tracing.user_warnings import warn_user
from pyro_recursive.training import checkpoint as checkpoints
from pyro_recursive.training.aggressive import Aggressive, Phase
from pyro_recursive.training.compiled.engines import EngineName, check_engine
from pyro_recursive.training.data import Data, Minibatches
from pyro_recursive.training.history import History
from pyro_recursive.training.learner import Learner, MakeOptimizer, MakeScheduler
from pyro_recursive.training.run import Length, OnEpoch, OnStep, Run
from pyro_recursive.training.stopping import MAX_STEPS, TOLERANCE


def fit(
    model: Callable,
    guide: Callable,
    data: Data,
    *,
    loss: ELBO,
    epochs: int | None = None,
    steps: int | Literal["auto"] | None = None,
    max_steps: int = MAX_STEPS,
    tolerance: float = TOLERANCE,
    average: bool = False,
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
        data: a tensor, a tuple of tensors whose rows go together, a torch DataLoader, or ``()``.
        loss, validation_loss: any `pyro.infer.ELBO`; for validation by default the training loss.
        epochs, steps: passes over the data, or steps in blocks of 50, those before a resume too;
            ``"auto"`` halves the learning rate by stages and stops at an excess of ``tolerance``
            nats (training.md), or after ``max_steps``. A block counts as an epoch elsewhere.
        average: whether to end with the mean of the parameters over the last half of the epochs.
        optimizer, scheduler: make a torch optimiser of the parameters; its schedule, by epochs.
        clip_norm: the largest norm of the gradient over all parameters.
        batch_size, shuffle: rows per batch, of all processes (None: all); a new order each epoch.
        transform: maps the tensors of each training batch to a tensor or a tuple.
        kl_warmup: latents have weight ``min(1, epoch / kl_warmup)``, see `KLWarmup`; 0 is none.
        aggressive: steps of the guide alone before each of the model; needs ``validation``.
        validation, validate_every: held-out data, evaluated after so many epochs, in eval mode;
            after ``patience`` epochs without a better one training stops, with the best weights.
        checkpoint, resume: a file, written after each epoch; whether to go on from one, if any.
        checkpoint_seconds: also within epochs of tensors (one process, not aggressive).
        modules: those with buffers or an eval mode that model and guide do not show.
        seed: of all global random states at the start; process r takes ``seed + r``.
        check_every: steps between checks for NaN; None is 1 on a CPU, 100 on an accelerator.
        validate_args, progress: whether Pyro's validation stays on after the first epoch; a bar.
        on_step, on_epoch: of the first process, ``(step, loss tensor)`` and ``(epoch, history)``.
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
    length = _length(epochs, steps, max_steps, tolerance, average)
    if length.tolerance is not None and scheduler is not None:
        raise ValueError("steps='auto' sets the learning rate. Leave out scheduler.")
    if patience is not None and (length.tolerance is not None or average):
        raise ValueError("patience ends with the best parameters. Leave out average, steps='auto'.")
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
            average or length.tolerance is not None,
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
        run = Run(learner, batches, length, phase, path, settings, on_step, validate_args)
        if processes.count == 1 and not isinstance(data, DataLoader) and epochs is not None:
            run.checkpoint_seconds = checkpoint_seconds
        if resume:
            run.resume()
        bar = _progress_bar(batches, length, learner.steps, progress and processes.is_first)
        with bar, learner.interrupts as interrupts:
            try:
                while run.is_unfinished and not run.history.out_of_patience(patience):
                    weight = min(1.0, (run.num_epochs + 1) / max(kl_warmup, 1))
                    validates = held_out is not None and (run.num_epochs + 1) % validate_every == 0
                    run.epoch(weight, held_out if validates else None, validation_loss or loss, bar)
                    run.end_epoch(held_out is not None, keep_best=patience is not None)
                    run.report(on_epoch)
                interrupts.check()
            except KeyboardInterrupt as error:
                run.interrupt(error)
        if patience is None:
            run.best = None
        run.finish()
        if processes.is_first:
            _warn_if_unfinished(guide, run.history)
        return run.history


def _length(
    epochs: int | None,
    steps: int | str | None,
    max_steps: int,
    tolerance: float,
    average: bool,
) -> Length:
    """Return how long to train, by the arguments of `fit`."""
    if (epochs is None) == (steps is None):
        raise ValueError(f"Give either epochs or steps, got epochs={epochs}, steps={steps}.")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}.")
    check_at_least(1, max_steps=max_steps)
    if steps == "auto":
        return Length(None, max_steps, tolerance, average)
    if isinstance(steps, str):
        raise ValueError(f"steps must be a number or 'auto', got {steps!r}.")
    check_at_least(1, steps=steps)
    if (max_steps, tolerance) != (MAX_STEPS, TOLERANCE):
        raise ValueError("max_steps and tolerance have no effect without steps='auto'.")
    return Length(epochs, steps, None, average)


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
            f"and {guide.steps_left} steps left. Train longer with RecursiveMixture_ELBO, or "
            "shorten the guide's schedule."
        )


def _progress_bar(batches: Minibatches, length: Length, done: int, wanted: bool) -> tqdm:
    """Return a bar over steps; it is silent if errors go to neither a terminal nor a notebook."""
    total = length.steps
    if length.epochs is not None:
        total = None if batches.count is None else length.epochs * batches.count
    is_shown = wanted and stderr_is_watched()
    return tqdm(total=total, initial=done, unit="step", disable=not is_shown)
