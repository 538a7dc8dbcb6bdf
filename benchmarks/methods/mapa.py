"""The methods of the MAPA benchmarks, on curves and on images, and the loop that trains them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MAPA_ELBO, MAPAGuide
from pyro_recursive.bounds.estimators import EstimatorName
from pyro_recursive.mapa import Plan, Table

WARM_UP = 0.1  # of the epochs, in which MAPA is an autoencoder; not counted in decoder passes


@dataclass(frozen=True)
class Method:
    """A VAE or IWAE with some ``particles``, or MAPA with the ``options`` of its guide."""

    particles: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    table: Callable[[Any], Table] | None = None  # from the data, in place of the kernel's
    estimator: EstimatorName = "pathwise"  # of an IWAE's gradient


def independent(samples: int, top: int = 1, **more: Any) -> Method:
    """Return the paper's bound: independent draws, each row for itself."""
    options = {"top": top, "samples": samples, "share": "shared", "replace": True}
    return Method(options=options, **more)


def pooled(samples: float, top: int = 1) -> Method:
    """Return the bound whose draws are shared among the rows of a minibatch."""
    return Method(options={"top": top, "samples": samples, "share": "pooled", "replace": False})


AUTOENCODER = Method(options={"top": 1, "samples": 0, "share": "shared"})


class Learner:
    """A VAE, or an IWAE, with the posterior of an encoder; `Empirical` is the same for MAPA.

    ``data`` has the training rows, ``train``, and makes networks of them with a plain model and
    guide, ``vae(empirical)``, whose encoder returns codes where ``empirical``.
    """

    guide: Any
    loss: ELBO

    def __init__(self, data: Any, method: Method) -> None:
        self.data, self.method = data, method
        self.vae = data.vae(empirical=not method.particles)
        self.decoder, self.encoder = self.vae.decoder, self.vae.encoder
        if method.particles:
            self.guide = lambda x, rows=None: self.vae.guide(x)
            iwae = IWAE_ELBO(method.particles, estimator=method.estimator)
            self.loss = Trace_ELBO() if method.particles == 1 else iwae
            self.loss.max_plate_nesting = 1

    def model(self, x: Tensor, rows: Tensor | None = None) -> None:
        """p(z) p(x | z) for a minibatch."""
        self.vae.model(x)

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters, those of the decoder first."""
        return [*self.decoder.parameters(), *self.encoder.parameters()]

    def passes(self) -> float:
        """Return the decoder passes for each row of the last step."""
        return float(self.method.particles)

    def codes(self) -> Tensor:
        """Return the posterior means of the training data, ``[N, D]``."""
        return self.encoder(self.data.train).chunk(2, -1)[0]


class Empirical(Learner):
    """A decoder of codes of the training data, trained by MAPA."""

    def __init__(self, data: Any, method: Method, neighbours: int) -> None:
        super().__init__(data, method)
        self.loss = MAPA_ELBO(max_plate_nesting=1)
        self.guide = MAPAGuide(
            self.model,
            self.encoder,
            data.train,
            table=method.table(data) if method.table else data.table,
            neighbours=neighbours,
            rows=lambda x, rows: rows,
            **method.options,
        )
        self.plan = self.guide.plan

    def start(self, batch_size: int) -> None:
        """Build the table from distances, if there is no other, and note how long that took."""
        start = time.perf_counter()
        self.guide.prepare(self.data.train[:batch_size], torch.arange(batch_size))
        if self.data.shares_table and self.data.table is None:
            self.data.table = self.guide.table
            self.data.table_seconds = time.perf_counter() - start

    def passes(self) -> float:
        """Return the different codes of the last step for each of its rows."""
        return self.guide.passes.codes / self.guide.passes.rows

    def codes(self) -> Tensor:
        """Return the codes of the training data, ``[N, D]``."""
        return self.encoder(self.data.train)

    @torch.no_grad()
    def points(self) -> Tensor:
        """Return the decoded codes."""
        return self.decoder(self.codes())


def build(method: Method, data: Any, seed: int, neighbours: int) -> Learner:
    """Return a method with the initial networks of a seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    if method.particles:
        return Learner(data, method)
    return Empirical(data, method, neighbours)


class Diverged(ArithmeticError):
    """A run that ended in numbers that are not finite: a result, too."""


def train(
    learner: Learner, seed: int, epochs: int, batch_size: int, rate: float
) -> dict[str, float]:
    """Train with Adam, on minibatches that depend on the seed alone; the rate falls to 0.

    Returns the seconds, the processor seconds and the decoder passes per row, the mean over steps.
    Raises Diverged where the loss is not finite at the end of an epoch.
    """
    x, passes = learner.data.train, []
    order = torch.Generator().manual_seed(seed)
    if isinstance(learner, Empirical):
        learner.start(batch_size)
    optimizer = torch.optim.Adam(learner.parameters(), lr=rate, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    start, processor = time.perf_counter(), time.process_time()
    for epoch in range(epochs):
        warming = epoch < WARM_UP * epochs
        if isinstance(learner, Empirical):  # sums have small gradients at a constant decoder
            learner.guide.plan = Plan(1, 0, "shared") if warming else learner.plan
        for rows in torch.randperm(len(x), generator=order).split(batch_size):
            optimizer.zero_grad()
            loss = learner.loss.differentiable_loss(learner.model, learner.guide, x[rows], rows)
            loss.backward()
            optimizer.step()
            if not warming:
                passes.append(learner.passes())
        scheduler.step()
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss is {loss.item()} after epoch {epoch + 1}")
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
        "passes": sum(passes) / len(passes),
    }
