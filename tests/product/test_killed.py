"""Training killed by SIGKILL at random moments, and resumed: bit for bit the run that never was.

The file is its own script. A parent that has imported everything, and run nothing, forks a child
for each life of a run. The child tells by a pipe what it is about to do; the parent waits for one
such moment, chosen at random, and kills it shortly after.
"""

import importlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from pyro_recursive import (
    AmortizedGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    fit,
)
from pyro_recursive.training import checkpoint as checkpoints
from tests.models.small import square_rows
from tests.oracles.bitwise import same

KILLS, ENOUGH = 50, 45
ROWS = 12
# What a child is about to do: to start or resume, to step, to validate, to write, to rename.
MOMENTS = "stvwr"
SECONDS = 60.0  # the longest a child may be silent

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """An encoder with a state beside its parameters, and draws beside the sites."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def amortised() -> dict[str, Any]:
    """Batch norm, dropout, a schedule, KL warm-up, and the best epoch kept."""
    decoder = nn.Linear(1, 2)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    return {
        "model": model,
        "guide": AmortizedGuide(model, Net()),
        "loss": TraceMeanField_ELBO(),
        "scheduler": partial(MultiStepLR, milestones=[2, 5], gamma=0.3),
        "kl_warmup": 3,
        "patience": 3,
        "epochs": 16,
    }


def growing() -> dict[str, Any]:
    """A mixture that grows: its stages, trials and members are part of the state."""
    model = partial(square_rows, prior=1.5)
    schedule = Schedule(first=5, propose=4, refine=6, joint=5, confidence=0.0, draws=100)
    components = [AmortizedGuide(model, Net()) for _ in range(3)]
    return {
        "model": model,
        "guide": RecursiveMixtureGuide(model, components, schedule=schedule),
        "loss": RecursiveMixture_ELBO(4),
        "patience": float("inf"),
        "epochs": 14,
    }


PROGRAMS: dict[str, Callable[[], dict[str, Any]]] = {"amortised": amortised, "growing": growing}


class Told(Trace_ELBO):
    """A validation loss that says when it is asked."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def loss(self, *args: Any, **kwargs: Any) -> float:
        self.tell("v")
        return super().loss(*args, **kwargs)


def live(name: str, path: Path, tell: Callable[[str], None]) -> None:
    """Run a program to its end, from where its file is, and write what it leaves behind."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.set_rng_seed(5)
    program = PROGRAMS[name]()
    x = torch.randn(ROWS, 2)

    def transform(batch: Tensor) -> Tensor:
        tell("t")
        return batch + 0.1 * torch.randn_like(batch)

    save, rename = checkpoints.save, Path.replace

    def told_save(*args: Any) -> None:
        tell("w")
        save(*args)

    def told_rename(*args: Any) -> Path:
        tell("r")
        return rename(*args)

    checkpoints.save, Path.replace = told_save, told_rename  # type: ignore[assignment]
    tell("s")
    options = {"validation": x[:5].clone(), "validation_loss": Told(tell), "transform": transform}
    history = fit(
        data=x,
        batch_size=4,
        optimizer=partial(torch.optim.Adam, lr=0.02),
        checkpoint=path,
        resume=True,
        seed=6,
        progress=False,
        **program,
        **options,
    )
    store = pyro.get_param_store()
    left = {
        "history": {k: v for k, v in asdict(history).items() if k != "seconds"},
        "store": {key: store[key].unconstrained().detach() for key in store},
        "guide": dict(program["guide"].state_dict()),
        "random": checkpoints.random_states(),
    }
    torch.save(left, path.with_suffix(".left"))


def fork(name: str, path: Path) -> tuple[int, int]:
    """Start a child; return its id and the reading end of its pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        live(name, path, lambda moment: os.write(writing, moment.encode()) and None)
        status = 0
    finally:
        os._exit(status)


def wait_for(reading: int, moment: str, count: int) -> bool:
    """Read until the child has announced a moment so many times; False where it ends before."""
    while count:
        if not select.select([reading], [], [], SECONDS)[0]:
            raise TimeoutError(f"the child was silent for {SECONDS} s")
        said = os.read(reading, 1).decode()
        if not said:
            return False
        count -= said == moment
    return True


def run(name: str, path: Path, dice: random.Random, kills: int) -> Counter[str]:
    """Run a program to its end, killed up to so many times; return the moments of real kills."""
    hits: Counter[str] = Counter()
    for life in range(kills + 1):
        child, reading = fork(name, path)
        moment = dice.choice(MOMENTS)
        last = life == kills
        alive = not last and wait_for(reading, moment, 1 if moment == "s" else dice.randint(1, 4))
        if alive:
            time.sleep(dice.choice([0.0, 0.001, 0.01]) * dice.random())
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reading)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            written = path.with_name(f"{path.name}.tmp").exists()
            hits["half a file" if written else moment] += 1
            continue
        assert status == 0, f"{name} failed when it was resumed"
        break
    return hits


def main(folder: Path) -> None:
    """Kill runs until there were enough kills, and compare each with one that was left alone."""
    importlib.import_module("torch._dynamo")  # optimisers import it late: once for all children
    dice, hits = random.Random(7), Counter[str]()
    wholes = {}
    for name in PROGRAMS:
        run(name, folder / f"{name}-whole", dice, 0)
        wholes[name] = torch.load(folder / f"{name}-whole.left", weights_only=True)
    number = 0
    while hits.total() < KILLS:
        name = list(PROGRAMS)[number % len(PROGRAMS)]
        path = folder / f"{name}-{number}"
        hits += run(name, path, dice, min(7, KILLS - hits.total()))
        left = torch.load(path.with_suffix(".left"), weights_only=True)
        assert same(left, wholes[name]), f"run {number}, {name}, differs after {dict(hits)}"
        number += 1
    print(f"{hits.total()} kills in {number} runs: {dict(hits)}")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.product.test_killed", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = int(done.stdout.split()[0])
    assert kills >= ENOUGH, done.stdout
    print(done.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
