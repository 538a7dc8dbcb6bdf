"""Several processes: one process with the whole batch is the oracle.

Two processes run all of the programs below, one after the other, and leave what they found in
files; the tests read these.
"""

import datetime
import functools
import itertools
import math
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_recursive import (
    IWAE_ELBO,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    log_marginal,
)
from pyro_recursive.evaluation.parallel import ProcessGroup, evaluate_in_parallel
from pyro_recursive.training import Aggressive, CheckpointError, fit
from tests.oracles import training as ordinary
from tests.oracles.bitwise import same
from tests.oracles.training import (
    factor_of_rows,
    few_rows,
    known_size,
    loop_over_rows,
    prior_factor,
)

WORLD = 2
PATIENCE = 60  # seconds that a process waits for the others before it fails
Program = dict[str, Any]  # arguments of fit
sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.5)


# --- Programs without noise: the whole batch's gradient is known


class Given(dist.Normal):
    """Draws with given noise, ``[rows, K]``, for losses of K samples."""

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor) -> None:
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Given":
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return Given(loc, scale, self.noise)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if len(self.batch_shape) == 1:
            return self.loc + self.scale * self.noise[:, 0]
        # In other numbers where programs are compared.
        numbers = torch.arange(self.batch_shape[0]) % self.noise.shape[1]
        return self.loc + self.scale * self.noise.T[numbers]


class VAE(nn.Module):
    """A decoder, an encoder; K samples of each row from noise that is data."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, 2), nn.Linear(1, 1)

    def model(self, x: Tensor, noise: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", 7, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = self.decoder(z.unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(mean, 0.5), obs=x)

    def guide(self, x: Tensor, noise: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", 7, subsample=x):
            loc, scale = self.encoder(x[:, None]).unbind(-1)
            pyro.sample("z", Given(loc, scale.exp(), noise))


def vae_with_noise() -> Program:
    torch.manual_seed(3)
    vae, noise = VAE(), torch.randn(7, 5)
    program = {"model": vae.model, "guide": vae.guide, "data": (few_rows(), noise)}
    return {**program, "loss": IWAE_ELBO(5)}


def point(model: Callable) -> Program:
    guide = AutoDelta(model, init_loc_fn=lambda site: torch.full(site["fn"].shape(), 0.3))
    return {"model": model, "guide": guide, "data": few_rows(), "loss": Trace_ELBO()}


NOISELESS: dict[str, Callable[[], Program]] = {
    "full batch": lambda: {**point(prior_factor), "batch_size": None},
    "loop": lambda: point(loop_over_rows),
    "constant scale": lambda: point(poutine.scale(known_size, 0.1)),
    "idle in the last batch": lambda: {**vae_with_noise(), "batch_size": 6},
    "in order": lambda: {**point(known_size), "shuffle": False, "batch_size": 3},
    "clipped": lambda: {**vae_with_noise(), "clip_norm": 0.1},
    "warm-up": lambda: {**vae_with_noise(), "kl_warmup": 3},
    "early": lambda: {**point(known_size), "validation": few_rows(5) + 1, "patience": 1},
}


def run(program: Callable[[], Program], **changes: Any) -> dict[str, Any]:
    """Fit a program as a new process would; return what it leaves."""
    pyro.clear_param_store()
    defaults = {"batch_size": 5, "epochs": 4, "seed": 1, "progress": False, "optimizer": sgd}
    arguments = {**defaults, **program(), **changes}
    record = asdict(fit(**arguments))
    owners = [getattr(each, "__self__", each) for each in (arguments["model"], arguments["guide"])]
    buffers = [dict(each.named_buffers()) for each in owners if isinstance(each, nn.Module)]
    return {"history": record, "parameters": ordinary.store(), "buffers": buffers}


# --- Programs with noise: all processes must stay the same


class Noisy(ordinary.VAE):
    """Batch norm and dropout, with initial parameters that differ between the processes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.randn(()))

    def plate(self, x: Tensor) -> Any:
        return pyro.plate("data", 13, subsample=x)

    def mean(self, z: Tensor) -> Tensor:
        return super().mean(z) + self.offset


def noisy_vae() -> Program:
    torch.manual_seed(50 + ProcessGroup.joined().rank)
    vae, x = Noisy(), torch.linspace(-2, 2, 26).sin().reshape(13, 2)
    return {
        "model": vae.model,
        "guide": vae.guide,
        "data": x,
        "loss": TraceMeanField_ELBO(),
        "optimizer": partial(torch.optim.Adam, lr=0.01),
        "transform": ordinary.noisy,
        "batch_size": 8,
        "validation": x[:5],
        "kl_warmup": 2,
    }


def sampler_of(x: Tensor) -> DataLoader:
    dataset = TensorDataset(x)
    return DataLoader(dataset, 4, sampler=DistributedSampler(dataset, seed=3))


def loader() -> Program:
    arguments = noisy_vae()
    sampled = {"data": sampler_of(arguments["data"]), "validation": sampler_of(torch.ones(6, 2))}
    return {**arguments, **sampled, "batch_size": None}


def aggressive() -> Program:
    return {**noisy_vae(), "aggressive": Aggressive(max_steps=4, check_every=2, rows=5)}


def two_modes(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 5.0))
    with pyro.plate("data", 4, subsample=x):
        pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)


def recursive() -> Program:
    schedule = Schedule(first=20, propose=5, refine=15)
    guide = RecursiveMixtureGuide(two_modes, 2, schedule=schedule)
    program = {"model": two_modes, "guide": guide, "data": torch.tensor([3.7, 4.4, 4.1, 4.0])}
    loss, adam = RecursiveMixture_ELBO(4), partial(torch.optim.Adam, lr=0.05)
    return {**program, "loss": loss, "optimizer": adam, "batch_size": None, "epochs": 45}


LATE = 3  # the step in which a parameter is new, not counting the first run of the guide


def late_and_different() -> Program:
    """A parameter that is new in the last step, with another value in each process; no noise."""
    runs: list[int] = []

    def guide(x: Tensor) -> None:
        runs.extend([0] * torch.is_grad_enabled())
        start = torch.tensor(0.3 + ProcessGroup.joined().rank)
        pyro.sample("mean", dist.Delta(pyro.param(f"loc_{int(len(runs) > LATE)}", start)))

    full = {"batch_size": None, "shuffle": False, "epochs": LATE, "optimizer": sgd}
    return {**point(known_size), "guide": guide, **full}


SAME: dict[str, Callable[[], Program]] = {
    "batch norm, dropout": noisy_vae,
    "DataLoader": loader,
    "aggressive": aggressive,
    "recursive mixture": recursive,
    "late and different": late_and_different,
}


# --- Programs that go wrong in one of the processes


def nan_row() -> Program:
    x = few_rows()
    x[3] = torch.nan  # of the first batch in order, 5 rows, the last but one
    return {**point(known_size), "data": x, "shuffle": False}


def bug() -> Program:
    def transform(x: Tensor) -> Tensor:
        if ProcessGroup.joined().rank == 1:
            raise LookupError("a bug")
        return x

    return {**point(known_size), "transform": transform}


def one_sided_parameter() -> Program:
    def guide(x: Tensor) -> None:
        loc = pyro.param(f"loc_{int(x[0] < 0)}", torch.tensor(0.1))
        pyro.sample("mean", dist.Normal(loc, 0.5))

    x = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    return {**point(known_size), "guide": guide, "data": x, "shuffle": False, "batch_size": 2}


def whole_loader() -> Program:
    return {**loader(), "data": DataLoader(TensorDataset(torch.ones(6, 2)), 2)}


def uneven_loaders() -> Program:
    class Own(DistributedSampler):
        def __iter__(self) -> Any:
            return iter(list(super().__iter__())[: 4 - 2 * ProcessGroup.joined().rank])

    dataset = TensorDataset(torch.ones(8, 2))
    return {**loader(), "data": DataLoader(dataset, 2, sampler=Own(dataset))}


WRONG: dict[str, tuple[Callable[[], Program], list[str]]] = {
    "nan": (nan_row, ["Process 1 failed: NonFiniteError.*data tensor '0'; model site 'x'",
                      "NonFiniteError.*data tensor '0'; model site 'x'"]),
    "bug": (bug, ["ProcessError.*Process 1 failed: LookupError: a bug", "LookupError.*a bug"]),
    "parameter": (one_sided_parameter, ["ValueError.*Process 1 has other.*'loc_1'"] * 2),
    "density of rows": (lambda: point(factor_of_rows),
                        ["ValueError.*site 'all', in no plate", "Process 0 failed: ValueError"]),
    "whole loader": (whole_loader, ["ValueError.*the same rows to each.*DistributedSampler"] * 2),
    "uneven": (uneven_loaders, ["ProcessError.*0 at step 2 .*, 1 at the end of an epoch"] * 2),
    "few rows": (lambda: {**point(known_size), "batch_size": 1},
                 ["ValueError.*has 1 rows for 2 processes"] * 2),
    "disk": (lambda: {**point(known_size), "checkpoint": "/dev/null/no folder/run.pt"},
             ["NotADirectoryError", "Process 0 failed: NotADirectoryError"]),
    "unvalidated nan": (nan_row, ["NonFiniteError.*process 1: data tensor '0'; process 1: model "
                                  "site 'x'"] * 2),
}  # fmt: skip


def raised(function: Callable[[], Any], validated: bool = True) -> str:
    try:
        with pyro.validation_enabled(validated):
            function()
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        return "; ".join([f"{type(error).__name__}: {error}", *notes]).replace("\n", " ")
    return "nothing"


# --- Evaluation and checkpoints


def normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def posterior(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def fails_for_the_last(x: Tensor) -> Tensor:
    if x[-1] == 6:
        raise LookupError("a bug")
    return x


def evaluations() -> dict[str, Any]:
    x = torch.arange(7.0)
    evidence = partial(log_marginal, normal, posterior, num_particles=4, diagnostics=True)
    return {
        "tensor": evaluate_in_parallel(lambda x, y: x * y[:, 0], x, torch.ones(7, 2)),
        "batches": evaluate_in_parallel(lambda x: {"n": x * 0 + len(x), "of": 7}, x, batch_size=2),
        "evidence": evaluate_in_parallel(evidence, x),
        "one row": evaluate_in_parallel(lambda x: (x + 1, None), x[:1]),
        "shape": raised(lambda: evaluate_in_parallel(torch.sum, x)),
        "bug": raised(lambda: evaluate_in_parallel(fails_for_the_last, x)),
    }


def checkpoints(folder: Path) -> dict[str, Any]:
    path, cut = folder / "whole.pt", folder / "cut.pt"
    found = {"whole": run(noisy_vae, checkpoint=path, patience=math.inf)}
    options = {"checkpoint": cut, "resume": True, "patience": math.inf}
    run(noisy_vae, **{**options, "epochs": 2})
    found["resumed"] = run(noisy_vae, **options)
    return {**found, "draw": torch.rand(())}


def interrupted(folder: Path) -> dict[str, Any]:
    """Ctrl-C in process 1 alone, in the second epoch; then the run is resumed."""
    path, calls = folder / "interrupted.pt", itertools.count(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else the shell's

    @functools.wraps(ordinary.noisy)
    def transform(*batch: Tensor) -> tuple[Tensor, ...]:
        if next(calls) == 3 and ProcessGroup.joined().rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return ordinary.noisy(*batch)

    cut = run(noisy_vae, checkpoint=path, transform=transform)
    return {"cut": cut, "resumed": run(noisy_vae, checkpoint=path, resume=True)}


def work(rank: int, folder: Path) -> None:
    """Run all parts in one process, and time them."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    programs = NOISELESS | SAME
    parts: dict[str, Callable[[], Any]] = {name: partial(run, programs[name]) for name in programs}
    for name, (program, _) in WRONG.items():
        parts[name] = partial(raised, partial(run, program), name != "unvalidated nan")
    parts |= {"evaluations": evaluations, "checkpoints": partial(checkpoints, folder)}
    parts["interrupted"] = partial(interrupted, folder)
    found = {}
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            found[name] = part()
        except Exception as error:  # only the test of this part fails
            found[name] = repr(error)
        found[f"{name} seconds"] = time.perf_counter() - start
    torch.save(found, folder / f"found_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), WORLD)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found_{n}.pt", weights_only=False) for n in range(WORLD)]


# --- Two processes


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISELESS)
def test_two_processes_are_one_with_the_whole_batch(name: str, found: Any) -> None:
    alone, (first, second) = run(NOISELESS[name]), (each[name] for each in found)
    assert same(first, second)
    torch.testing.assert_close(first["parameters"], alone["parameters"], rtol=1e-9, atol=1e-11)
    for key in ("loss", "validation", "rows", "steps", "epoch", "stopped_early"):
        expected, value = alone["history"][key], first["history"][key]
        numbers = isinstance(expected, list) and None not in expected
        assert value == (pytest.approx(expected, rel=1e-9) if numbers else expected), key


@pytest.mark.slow
def test_processes_stay_the_same_bit_for_bit(found: Any) -> None:
    for name in SAME:
        assert same(*(each[name] for each in found)), name
    histories = {name: found[0][name]["history"] for name in SAME}
    assert histories["batch norm, dropout"]["rows"] == [6.5] * 4
    assert histories["DataLoader"]["rows"] == [7.0] * 4  # the sampler repeats a row
    assert histories["DataLoader"]["validation_rows"] == 6
    assert histories["aggressive"]["guide_steps"][-1] > 0
    progress = found[0]["recursive mixture"]["buffers"][0]["progress"]
    assert progress[3:].tolist() == [1, 1]


@pytest.mark.slow
def test_a_step_with_a_new_parameter_is_the_first_process_s(found: Any) -> None:
    """Loss and gradient are the first process's: 4 of 7 rows at 0.3; the other has 3 at 1.3."""
    x, start = few_rows()[:4], torch.tensor(0.3)
    prior, likelihood = dist.Normal(0.0, 0.5), dist.Normal(start, 1.0)
    loss = -prior.log_prob(start) - 7 / 4 * likelihood.log_prob(x).sum()
    gradient = start / 0.25 + 7 / 4 * (start - x).sum()
    for each in (each["late and different"] for each in found):
        assert each["history"]["loss"][-1] == pytest.approx(loss.item(), rel=1e-9)
        moved = each["parameters"]["loc_1"] - start
        torch.testing.assert_close(moved, -0.01 * gradient, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_it_resumes_bit_for_bit(found: Any, folder: Path) -> None:
    for each in found:
        assert same(each["checkpoints"]["whole"], each["checkpoints"]["resumed"])
    assert found[0]["checkpoints"]["draw"] != found[1]["checkpoints"]["draw"]
    with pytest.raises(CheckpointError, match="processes is 2 in the file, 1 here"):
        run(noisy_vae, checkpoint=folder / "cut.pt", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_fails_in_one_ends_all(name: str, found: Any) -> None:
    for each, message in zip(found, WRONG[name][1], strict=True):
        assert re.search(message, each[name])
        assert each[f"{name} seconds"] < PATIENCE / 2  # nobody waited for the others


@pytest.mark.slow
def test_an_interrupt_in_one_process_ends_all(found: Any) -> None:
    for each in found:
        cut, seconds = each["interrupted"]["cut"]["history"], each["interrupted seconds"]
        assert cut["interrupted"] and cut["epoch"] == [1] and seconds < PATIENCE / 2
    resumed = [each["interrupted"]["resumed"] for each in found]
    assert same(*resumed) and same(resumed[0], found[0]["batch norm, dropout"])


@pytest.mark.slow
def test_evaluation_in_parallel(found: Any) -> None:
    x = torch.arange(7.0)
    for each in (each["evaluations"] for each in found):
        assert same(each["tensor"], x)
        sizes = torch.tensor([2.0, 2, 2, 2, 2, 2, 1])
        assert same(each["batches"], {"n": sizes, "of": 7})
        exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        torch.testing.assert_close(each["evidence"].log_marginal, exact)
        assert each["evidence"].ess.tolist() == pytest.approx([4] * 7)
        assert same(each["one row"], (torch.ones(1), None))
        assert "Return a value for each row" in each["shape"]
        assert "a bug" in each["bug"]
    assert "Process 1 failed: LookupError" in found[0]["evaluations"]["bug"]


# --- One process


def test_shares_are_all_rows_in_order() -> None:
    for count, rows in itertools.product(range(1, 6), range(12)):
        parts = [range(rows)[ProcessGroup(rank, count).share(rows)] for rank in range(count)]
        assert [row for part in parts for row in part] == list(range(rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_evaluation_by_one_process() -> None:
    x = torch.arange(5.0)
    assert same(evaluate_in_parallel(lambda x: x + 1, x, batch_size=2), x + 1)
    for rows in ((x[:0],), (x, x[:2])):
        with pytest.raises(ValueError, match=r"one length, got \[[05]"):
            evaluate_in_parallel(torch.exp, *rows)
    with pytest.raises(ValueError, match="differ between the rows"):
        evaluate_in_parallel(lambda x: (x, x[0].item()), x, batch_size=2)
    for wrong in (lambda x: torch.ones(3 if len(x) > 1 else 0), torch.sum):
        with pytest.raises(ValueError, match="Return a value for each row"):
            evaluate_in_parallel(wrong, x[:4], batch_size=3)
