"""Small programs for `fit`, and all that a run of one changes."""

import functools
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from pyro_recursive import (
    AmortizedGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    Stratified_ELBO,
)
from pyro_recursive.training import Aggressive, History, checkpoint, fit
from tests.models.small import square_rows

ROWS = 12
sgd = partial(torch.optim.SGD, lr=1e-3)
quiet = pytest.mark.filterwarnings("ignore:Encountered")  # Pyro's own warning about a NaN loss


def normal_model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", ROWS, subsample=x):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def normal_data() -> Tensor:
    return torch.linspace(-1.0, 3.0, ROWS)


class VAE(nn.Module):
    """Batch norm and dropout: buffers, and draws that are no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.decoder = nn.Linear(1, 2)

    def plate(self, x: Tensor) -> Any:
        return pyro.plate("data", ROWS, subsample=x)

    def mean(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with self.plate(x):
            loc, scale = self.encoder(x).view(-1, 2, 2).mean(-1, keepdim=True).unbind(1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def noisy(*batch: Tensor) -> tuple[Tensor, ...]:
    """Draw from every global generator."""
    shift = 0.01 * (random.random() + np.random.rand())  # noqa: NPY002
    return tuple(column + 0.01 * torch.randn_like(column) + shift for column in batch)


# --- Programs: each returns the arguments of fit, all objects new


def auto_normal() -> dict[str, Any]:
    return {
        "model": normal_model,
        "guide": AutoNormal(normal_model),
        "data": normal_data(),
        "loss": Trace_ELBO(),
    }


def vae() -> dict[str, Any]:
    torch.manual_seed(3)
    program = VAE()
    x = torch.randn(ROWS, 2)
    return {
        "model": program.model,
        "guide": program.guide,
        "data": (x,),
        "loss": TraceMeanField_ELBO(),
    }


def vae_loader(generator: bool) -> dict[str, Any]:
    own = torch.Generator().manual_seed(4) if generator else None
    arguments = vae()
    loader = DataLoader(TensorDataset(*arguments["data"]), 4, shuffle=True, generator=own)
    return {**arguments, "data": loader, "batch_size": None}


def hidden_vae() -> dict[str, Any]:
    arguments = vae()
    program = arguments["model"].__self__
    hidden = {"model": lambda x: program.model(x), "guide": lambda x: program.guide(x)}
    return {**arguments, **hidden, "modules": [program]}


def scheduled() -> dict[str, Any]:
    step = partial(MultiStepLR, milestones=[1, 3], gamma=0.3)
    return {**auto_normal(), "scheduler": step, "optimizer": partial(sgd, momentum=0.9)}


def plateau() -> dict[str, Any]:
    make = partial(ReduceLROnPlateau, patience=0, factor=0.5, threshold=0.5)
    return {**auto_normal(), "scheduler": make, "validation": normal_data() + 1.0}


def early(patience: float) -> dict[str, Any]:
    return {**vae(), "validation": torch.ones(5, 2), "patience": patience, "kl_warmup": 3}


def aggressive(loader: bool) -> dict[str, Any]:
    options = Aggressive(max_steps=3, check_every=1)
    program = vae_loader(generator=True) if loader else vae()
    return {**program, "validation": torch.ones(7, 2).cumsum(0), "aggressive": options}


def growing() -> dict[str, Any]:
    """A mixture that keeps all that gains: stages, trials and members are part of its state."""
    torch.manual_seed(3)
    model, x = partial(square_rows, prior=1.5), torch.randn(ROWS, 2).abs() + 1
    components = [AmortizedGuide(model, nn.Linear(2, 2)) for _ in range(3)]
    schedule = Schedule(first=2, propose=2, refine=3, joint=2, confidence=0.0, draws=64)
    guide = RecursiveMixtureGuide(model, components, schedule=schedule)
    loss = RecursiveMixture_ELBO(2)
    return {"model": model, "guide": guide, "data": (x,), "loss": loss, "epochs": 7}


def whitened() -> dict[str, Any]:
    guide = MixtureGuide(normal_model, 2, whiten=True)
    options = {"batch_size": ROWS, "optimizer": partial(torch.optim.Adam, lr=0.05)}
    return {**auto_normal(), "guide": guide, "loss": Stratified_ELBO(1), **options}


def late_parameters() -> dict[str, Any]:
    def guide(x: Tensor) -> None:
        loc = pyro.param(f"loc_{int(x[0] > 1)}", torch.tensor(0.1))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        pyro.sample("mean", dist.Normal(loc, scale))

    return {
        **auto_normal(),
        "guide": guide,
        "shuffle": False,
        "scheduler": partial(LambdaLR, lr_lambda=lambda epoch: 0.5**epoch),
        "optimizer": partial(torch.optim.Adam, lr=0.1),
    }


class LocalModel(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(1, 1)
        self.width = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z[..., None])[..., 0], self.width), obs=x)


class LocalGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc * x, 0.5))


def pyro_modules() -> dict[str, Any]:
    torch.manual_seed(3)
    loss = RenyiELBO(alpha=0.5, num_particles=2)
    return {"model": LocalModel(), "guide": LocalGuide(), "data": normal_data(), "loss": loss}


class LossWithModule(Trace_ELBO):
    """A loss with a parameter of its own, such as a learned weight of two bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(1, 1)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any) -> float:
        weight = pyro.module("own", self.weight)(torch.ones(1)).exp().sum()
        loss = weight * self.differentiable_loss(model, guide, *args)
        loss.backward()
        return loss.item()


def own_loss() -> dict[str, Any]:
    torch.manual_seed(5)
    return {**auto_normal(), "loss": LossWithModule(), "validation_loss": Trace_ELBO()}


PROGRAMS: dict[str, Callable[[], dict[str, Any]]] = {
    "auto_normal": auto_normal,
    "vae": vae,
    "loader with a generator": partial(vae_loader, generator=True),
    "loader without": partial(vae_loader, generator=False),
    "hidden modules": hidden_vae,
    "schedule": scheduled,
    "plateau": plateau,
    "best kept": partial(early, patience=float("inf")),
    "stopped early": partial(early, patience=1),
    "aggressive": partial(aggressive, loader=False),
    "aggressive, loader": partial(aggressive, loader=True),
    "growing mixture": growing,
    "whitened mixture": whitened,
    "late parameters": late_parameters,
    "PyroModule, RenyiELBO": pyro_modules,
    "loss with parameters": own_loss,
}


def run(program: Callable[[], dict[str, Any]], **changes: Any) -> History:
    """Fit a program with new objects and an empty parameter store, as in a new process."""
    pyro.clear_param_store()
    defaults = {"batch_size": 4, "epochs": 4, "transform": noisy, "progress": False, "seed": 1}
    return fit(**{**defaults, **program(), **changes})


def store() -> dict[str, Tensor]:
    params = pyro.get_param_store()
    return {name: params[name].unconstrained().detach().clone() for name in params}


def outcome(history: History, path: Path) -> dict[str, Any]:
    """Return the record, the parameters, the random states and the file of a run."""
    return {
        "history": asdict(history),
        "store": store(),
        "random": checkpoint.random_states(),
        "file": checkpoint.load(path),
    }


class Noting(TraceMeanField_ELBO):
    """A loss that keeps the batches of its calls, and the scales of the latent in the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []
        self.scales: list[float] = []

    def loss_and_grads(self, model: Callable, guide: Callable, x: Tensor) -> float:
        self.batches.append(x)
        self.scales.append(poutine.trace(guide).get_trace(x).nodes["z"]["scale"])
        return super().loss_and_grads(model, guide, x)


class Counted(torch.optim.Adam):
    """An optimiser whose class counts the steps of all its instances."""

    steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        Counted.steps += 1


class Scripted(Trace_ELBO):
    """A loss for validation with given values; it keeps the parameters at each call."""

    def __init__(self, values: Iterable[float]) -> None:
        super().__init__()
        self.values, self.seen = iter(values), list[dict[str, Tensor]]()

    def loss(self, *args: Any, **kwargs: Any) -> float:
        self.seen.append(store())
        return next(self.values)


def interrupt_at(call: int) -> Callable:
    """Return a transform like `noisy` that is interrupted at its n-th call."""
    calls = iter(range(call))

    @functools.wraps(noisy)  # a run is resumed with a transform of the same name
    def transform(*batch: Tensor) -> tuple[Tensor, ...]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return noisy(*batch)

    return transform


# --- Models whose plates state the size of the data, or of a batch


def few_rows(rows: int = 7) -> Tensor:
    return torch.linspace(-1.0, 3.0, rows).cos() * 2


def known_size(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 0.5))
    with pyro.plate("data", 7, subsample=x):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def loop_over_rows(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 0.5))
    for i in pyro.plate("data", 7, subsample=torch.arange(len(x))):
        pyro.sample(f"x{i}", dist.Normal(mean, 1.0), obs=x[i])


def prior_factor(x: Tensor) -> None:
    """Densities outside of the plate of the rows, which each process has whole."""
    known_size(x)
    with pyro.plate("four", 4):  # as large as a share of a batch
        pyro.sample("w", dist.Normal(1.0, 1.0))
    pyro.factor("prior", -(pyro.sample("slope", dist.Normal(1.0, 2.0)) ** 2))


def factor_of_rows(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.factor("all", dist.Normal(mean, 1.0).log_prob(x).sum())
