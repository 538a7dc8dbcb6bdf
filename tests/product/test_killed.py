"""Training killed by SIGKILL at random times, and resumed: bit for bit the run that never was.

The file is its own script: a parent that has imported everything, and run nothing, forks a child
for each life of a run.
"""

import importlib
import os
import random
import subprocess
import sys
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
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from pyro_recursive import (
    SIWAE_ELBO,
    AmortizedGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    fit,
)
from pyro_recursive.training import checkpoint as checkpoints
from tests.models.small import square_rows
from tests.oracles.bitwise import same
from tests.oracles.kills import count_kills

KILLS, ROWS = 50, 12
ROOT = Path(__file__).parents[2]


def net() -> nn.Module:
    """An encoder with a state beside its parameters, and draws beside the sites."""
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))


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
        "guide": AmortizedGuide(model, net()),
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
    components = [AmortizedGuide(model, net()) for _ in range(3)]
    return {
        "model": model,
        "guide": RecursiveMixtureGuide(model, components, schedule=schedule),
        "loss": RecursiveMixture_ELBO(4, joint=SIWAE_ELBO(4)),
        "patience": float("inf"),
        "epochs": 14,
    }


PROGRAMS: dict[str, Callable[[], dict[str, Any]]] = {"amortised": amortised, "growing": growing}


def live(name: str, path: Path) -> None:
    """Run a program to its end, from where its file is, and write what it leaves behind."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.set_rng_seed(5)
    program = PROGRAMS[name]()
    x = torch.randn(ROWS, 2)
    history = fit(
        data=x,
        batch_size=4,
        optimizer=partial(torch.optim.Adam, lr=0.02),
        validation=x[:5].clone(),
        transform=lambda batch: batch + 0.1 * torch.randn_like(batch),
        checkpoint=path,
        checkpoint_seconds=0.0,
        resume=True,
        seed=6,
        progress=False,
        **program,
    )
    store = pyro.get_param_store()
    left = {
        "history": {k: v for k, v in asdict(history).items() if k != "seconds"},
        "store": {key: store[key].unconstrained().detach() for key in store},
        "guide": dict(program["guide"].state_dict()),
        "random": checkpoints.random_states(),
    }
    torch.save(left, path.with_suffix(".left"))


def main(folder: Path) -> None:
    """Kill runs until there were enough kills, and compare each with one that was left alone."""
    importlib.import_module("torch._dynamo")  # optimisers import it late: once for all children
    dice, kills, number = random.Random(7), 0, 0
    wholes, seconds = {}, {}
    for name in PROGRAMS:
        start = time.monotonic()
        count_kills(live, (name, folder / f"{name}-whole"), [])
        seconds[name] = time.monotonic() - start
        wholes[name] = torch.load(folder / f"{name}-whole.left", weights_only=True)
    while kills < KILLS:
        name = list(PROGRAMS)[number % len(PROGRAMS)]
        path = folder / f"{name}-{number}"
        times = [dice.uniform(0.0, seconds[name] / 2) for _ in range(7)]
        kills += count_kills(live, (name, path), times)
        left = torch.load(path.with_suffix(".left"), weights_only=True)
        assert same(left, wholes[name]), f"run {number}, {name}, differs after {kills} kills"
        number += 1
    print(kills)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.product.test_killed", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= KILLS


if __name__ == "__main__":
    main(Path(sys.argv[1]))
