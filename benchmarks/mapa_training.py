"""The one loop that trains all methods of the MAPA benchmark."""

import math
import time
from dataclasses import dataclass
from functools import partial

import pyro
import torch

from benchmarks.mapa_methods import Learner

WARM_UP = 0.1  # of the epochs, in which MAPA is an autoencoder; counted in no decoder passes
REFRESH = 10  # epochs between the tables of the current model's posterior


class Diverged(ArithmeticError):
    """A run that ended in numbers that are not finite: a result, too."""


@dataclass(frozen=True)
class Training:
    """What all methods share: the same steps of the same optimiser on the same minibatches."""

    epochs: int
    batch_size: int
    rate: float
    hidden: int


@dataclass(frozen=True)
class Cost:
    """What a training took, and decoder passes per point, the mean over its steps.

    Processor time is that of the one thread, and does not grow with what else runs on a machine.
    """

    seconds: float
    processor_seconds: float
    passes: float


def train(learner: Learner, training: Training, seed: int) -> Cost:
    """Climb with Adam, on minibatches that depend on the seed alone; the rate falls to 0.

    Raises Diverged where the loss is not finite at the end of an epoch.
    """
    x, passes, steps = learner.data.train, 0.0, 0
    order = torch.Generator().manual_seed(seed)
    learner.start(training.batch_size)
    optimizer = torch.optim.Adam(learner.parameters(), lr=training.rate, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs)
    start, processor = time.perf_counter(), time.process_time()
    for epoch in range(training.epochs):
        warming = epoch < WARM_UP * training.epochs
        learner.begin(warming)
        if epoch % REFRESH == 0:
            learner.refresh()
        for rows in torch.randperm(len(x), generator=order).split(training.batch_size):
            optimizer.zero_grad()
            loss = learner.loss.differentiable_loss(learner.model, learner.guide, x[rows], rows)
            loss.backward()
            optimizer.step()
            if not warming:
                passes, steps = passes + learner.passes(), steps + 1
        scheduler.step()
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss is {loss.item()} after epoch {epoch + 1}")
    seconds = time.perf_counter() - start
    return Cost(seconds, time.process_time() - processor, passes / steps)


@torch.no_grad()
def bound(learner: Learner, batch_size: int, repeats: int) -> float:
    """Return the bound of the training points, in nats per point: the mean over fresh draws."""
    pyro.clear_param_store()  # of another restart
    x, total = learner.data.train, 0.0
    value = partial(learner.loss.loss, learner.model, learner.guide)
    for _ in range(repeats):
        for rows in torch.randperm(len(x)).split(batch_size):
            total -= value(x[rows], rows)
    return total / (repeats * len(x))
