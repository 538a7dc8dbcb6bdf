"""The training loop: hand-written loops, interrupted runs and broken programs are its oracles."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
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
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_recursive import IWAE_ELBO
from pyro_recursive.training import (
    Aggressive,
    CheckpointError,
    History,
    KLWarmup,
    NonFiniteError,
    burda_schedule,
    fit,
)
from pyro_recursive.training import checkpoint as checkpoints
from pyro_recursive.training.nan_search import FirstNonFiniteSite
from tests.oracles.bitwise import same
from tests.oracles.training import (
    PROGRAMS,
    ROWS,
    auto_normal,
    early,
    interrupt_at,
    late_parameters,
    noisy,
    normal_data,
    normal_model,
    outcome,
    quiet,
    run,
    sgd,
    store,
    vae,
    vae_loader,
)

# --- What is learned


@pytest.mark.slow
def test_conjugate_model_reaches_the_posterior() -> None:
    x = normal_data()
    optimizer = partial(torch.optim.Adam, lr=0.05)
    decay = partial(LambdaLR, lr_lambda=lambda epoch: 0.99**epoch)
    arguments = {**auto_normal(), "optimizer": optimizer, "scheduler": decay}
    arguments["loss"] = Trace_ELBO(num_particles=20, vectorize_particles=True)
    fit(**arguments, epochs=500, progress=False)
    precision = 1 / 2.0**2 + ROWS
    posterior = arguments["guide"].quantiles([0.5, 0.8413447], x)["mean"]
    assert posterior[0].item() == pytest.approx(x.sum().item() / precision, abs=0.02)
    assert (posterior[1] - posterior[0]).item() == pytest.approx(precision**-0.5, rel=0.05)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_equals_a_loop_by_hand_bit_for_bit(batch_size: int | None) -> None:
    def by_hand() -> list[float]:
        pyro.set_rng_seed(7)
        x, guide, elbo = normal_data(), AutoNormal(normal_model), Trace_ELBO()
        order = torch.Generator()
        if batch_size:
            order.manual_seed(int(torch.randint(2**62, ())))
        optimizer, losses = None, []
        for _ in range(3):
            rows = torch.randperm(ROWS, generator=order) if batch_size else torch.arange(ROWS)
            total = 0.0
            for part in rows.split(batch_size or ROWS):
                loss = elbo.differentiable_loss(normal_model, guide, x[part])
                if optimizer is None:
                    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
            losses.append(total / -(-ROWS // (batch_size or ROWS)))
        return losses

    expected, parameters = by_hand(), store()
    pyro.clear_param_store()
    history = fit(
        **auto_normal(),
        epochs=3,
        batch_size=batch_size,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        seed=7,
        progress=False,
    )
    assert history.loss == expected
    assert same(store(), parameters)


@pytest.mark.parametrize("loss", [Trace_ELBO(), RenyiELBO(alpha=0.5, num_particles=2)])
def test_equals_svi(loss: Any) -> None:
    pyro.set_rng_seed(7)
    svi = SVI(normal_model, AutoNormal(normal_model), pyro.optim.Adam({"lr": 0.01}), loss)
    expected = [svi.step(normal_data()) for _ in range(5)]
    pyro.clear_param_store()
    arguments = {**auto_normal(), "loss": loss, "optimizer": partial(torch.optim.Adam, lr=0.01)}
    assert fit(**arguments, epochs=5, seed=7, progress=False).loss == pytest.approx(expected)


def test_late_parameters_share_the_optimiser_and_its_schedule() -> None:
    run(late_parameters, epochs=1)
    assert list(store()) == ["loc_0", "scale", "loc_1"]
    assert store()["loc_1"] != 0.1
    made = []

    def sgd_at_zero(parameters: list[Tensor]) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.0))
        return made[-1]

    run(late_parameters, optimizer=sgd_at_zero)
    (group,) = made[0].param_groups
    assert len(group["params"]) == 3
    assert store()["loc_1"] == 0.1


def test_float32_stays_float32() -> None:
    torch.set_default_dtype(torch.float32)
    history = run(auto_normal, epochs=1)
    assert {tensor.dtype for tensor in store().values()} == {torch.float32}
    assert history.loss[0] > 0


def test_clip_norm_bounds_the_step() -> None:
    program = partial(run, auto_normal, epochs=1, batch_size=None)
    program(optimizer=partial(sgd, lr=0.0))
    start = store()
    program(optimizer=partial(sgd, lr=1.0), clip_norm=0.25)
    moved = torch.stack([store()[name] - start[name] for name in start]).norm()
    assert moved.item() == pytest.approx(0.25, rel=1e-4)


# --- The record


def test_history_tells_what_happened() -> None:
    step = partial(LambdaLR, lr_lambda=lambda epoch: 0.5**epoch)
    history = run(auto_normal, scheduler=step, validation=normal_data(), validate_every=2)
    assert history.epoch == [1, 2, 3, 4]
    assert history.steps == [3, 6, 9, 12]
    assert history.learning_rate == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])
    assert [value is None for value in history.validation] == [True, False, True, False]
    assert all(seconds > 0 for seconds in history.seconds)
    assert json.loads(json.dumps(asdict(history))) == asdict(history)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["terminal", "notebook", "file"])
def test_progress_is_shown_to_those_who_watch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    stream = {"terminal": Terminal, "notebook": Notebook, "file": io.StringIO}[kind]()
    monkeypatch.setattr(sys, "stderr", stream)
    run(auto_normal, progress=False)
    assert stream.getvalue() == ""
    history = run(auto_normal, progress=True, validation=normal_data())
    if kind == "file":
        assert stream.getvalue() == ""
        return
    assert "12/12" in stream.getvalue()
    last = f"loss={history.loss[-1]:.2f}, validation={history.validation[-1]:.2f}"
    assert last in stream.getvalue()


def test_validation_leaves_no_trace_and_repeats_its_draws() -> None:
    frozen = partial(sgd, lr=0.0)
    loader = DataLoader(
        TensorDataset(torch.ones(6, 2)), 2, shuffle=True, generator=torch.Generator()
    )
    plain = run(vae, optimizer=frozen)
    random_after = checkpoints.random_state()
    arguments = vae()
    program = arguments["model"].__self__
    program.decoder.eval()  # a module's own mode is put back, not just train mode
    watched = run(lambda: arguments, optimizer=frozen, validation=loader, epochs=3)
    assert not program.decoder.training
    assert program.encoder[1].training
    program.eval()
    with checkpoints.forked_rng(0, [loader.generator]):
        batches = [TraceMeanField_ELBO().loss(program.model, program.guide, x) for (x,) in loader]
    program.train()
    # Batch norm moves from epoch to epoch; with its statistics of the end the last one is met.
    assert watched.validation[-1] == pytest.approx(np.mean(batches))
    again = run(vae, optimizer=frozen, validation=torch.ones(6, 2))
    assert again.loss == plain.loss
    assert same(checkpoints.random_state(), random_after)
    fixed = run(auto_normal, optimizer=frozen, validation=normal_data())
    assert len(set(fixed.validation)) == 1


def test_stops_early_and_puts_the_best_back() -> None:
    values = iter([5.0, 3.0, float("nan"), 4.0, 3.0, 1.0])

    class Scripted(Trace_ELBO):
        def loss(self, *args: Any, **kwargs: Any) -> float:
            seen.append(store())
            return next(values)

    seen: list[dict[str, Tensor]] = []
    changes = {"validation": normal_data()[:4], "validation_loss": Scripted(), "epochs": 9}
    history = run(auto_normal, patience=3, **changes)
    assert history.epoch == [1, 2, 3, 4, 5]
    assert history.stopped_early
    assert history.best_epoch == 2
    assert same(store(), seen[1])
    assert not same(seen[1], seen[4])


def test_without_patience_nothing_is_put_back() -> None:
    rising = iter(range(9))

    class Scripted(Trace_ELBO):
        def loss(self, *args: Any, **kwargs: Any) -> float:
            seen.append(store())
            return float(next(rising))

    seen: list[dict[str, Tensor]] = []
    history = run(auto_normal, validation=normal_data()[:4], validation_loss=Scripted())
    assert (history.best_epoch, history.stopped_early) == (1, False)
    assert same(store(), seen[-1])


def test_a_history_is_read_at_a_glance() -> None:
    assert repr(History()) == "History(no epochs)"
    history = run(auto_normal, epochs=30, validation=normal_data()[:4], validate_every=7)
    best = min(value for value in history.validation if value is not None)
    shown = repr(history)
    assert len(shown) < 200
    for part in (
        "30 epochs; ",
        f" s; loss {history.loss[-1]:.2f} (batches of 4 rows); ",
        f"validation {history.validation[27]:.2f} (batches of 4 rows); ",
        f"best {best:.2f} in epoch {history.best_epoch})",
    ):
        assert part in shown
    history.stopped_early = True
    assert "30 epochs, stopped early" in str(history)


# --- Batches that are taken for all data


def grouped(plate: Callable[[Tensor], Any], own: float = 1.0, all_: float = 1.0) -> Callable:
    """Return a model of a global mean whose rows, and two columns, are in plates."""

    def model(x: Tensor) -> None:
        with poutine.scale(scale=all_):
            mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
            with poutine.scale(scale=own), pyro.plate("columns", 2, dim=-2), plate(x):
                pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.stack([x, x]))

    return model


def of_batch(x: Tensor) -> Any:
    return pyro.plate("data", len(x), dim=-1)


def of_all(x: Tensor) -> Any:
    return pyro.plate("data", ROWS, subsample=x, dim=-1)


def local(x: Tensor) -> None:
    """All latents in one plate of the rows, the data in another; 4 columns as in a batch of 4."""
    with pyro.plate("rows", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(4, len(x)))


def loop(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x{i}", dist.Normal(mean, 1.0), obs=x[i])


class LocalGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        pyro.module("guide", self)
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


def of_loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(normal_data()), 4, **options)


MISLED: dict[str, tuple[Callable, dict[str, Any], bool]] = {
    "plate of the batch": (grouped(of_batch), {}, True),
    "in a loop": (loop, {}, True),
    "loader": (grouped(of_batch), {"data": of_loader(), "batch_size": None}, True),
    "batches by themselves": (
        grouped(of_batch),
        {"data": DataLoader(list(normal_data().split(2)), batch_size=None), "batch_size": None},
        False,
    ),
    "warm-up": (grouped(of_batch), {"kl_warmup": 5}, True),
    "all scaled": (grouped(of_batch, all_=0.1), {}, True),
    "scaled by hand": (grouped(of_batch, own=3.0), {}, False),
    "plate of all": (grouped(of_all), {}, False),
    "plate of all, as many columns": (grouped(of_all), {"batch_size": 2}, False),
    "full batch": (grouped(of_batch), {"batch_size": None}, False),
    "one batch": (grouped(of_batch), {"batch_size": 99}, False),
    "local": (local, {"guide": LocalGuide()}, False),
    "vectorised": (
        grouped(of_batch), {"loss": Trace_ELBO(num_particles=4, vectorize_particles=True)}, True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISLED)
def test_a_batch_taken_for_all_data_is_told(name: str) -> None:
    model, changes, misled = MISLED[name]
    guide = AutoNormal(poutine.block(model, hide_fn=lambda site: False))
    arguments = {**auto_normal(), "model": model, "guide": guide, **changes}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(lambda: arguments, epochs=2, transform=None)
    if not misled:
        assert not caught
        return
    (warning,) = caught
    assert warning.filename == run.__code__.co_filename
    assert re.search(
        "Plate 'data' has 4 rows, those of a batch, of 12: .*latent 'mean'.* counts 3 times too "
        r"much. Write pyro.plate\('data', 12, subsample=x\)",
        str(warning.message),
    )


@pytest.mark.slow
def test_the_remedy_gives_the_posterior_of_all_rows() -> None:
    """In closed form for a mean of normal data: 12 rows, and 4 with the plate of the batch."""
    x, widths = normal_data(), []
    for plate in (of_all, of_batch):
        pyro.clear_param_store()
        guide = AutoNormal(grouped(plate), init_scale=0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adam = partial(torch.optim.Adam, lr=0.03)
            options = {"optimizer": adam, "epochs": 60, "loss": Trace_ELBO(), "progress": False}
            fit(grouped(plate), guide, x, batch_size=4, **options)
        widths.append(guide.scales.mean.item())
    assert widths[0] == pytest.approx((0.25 + 2 * ROWS) ** -0.5, rel=0.15)
    assert widths[1] == pytest.approx((0.25 + 2 * 4) ** -0.5, rel=0.15)


# --- Guides that grow, and parameters that Pyro's store does not have


class Growing(PyroModule):
    """The face of a guide that grows, and a plain parameter."""

    def __init__(self, steps_left: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.1))
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
        self.steps_left, self.members, self.components = steps_left, (0,), [1, 2]

    def forward(self, x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(self.loc, self.scale))


def test_a_guide_that_has_not_grown_is_told() -> None:
    message = "Growing has ended with 1 of 2 components: 1970 steps"
    with pytest.warns(UserWarning, match=message) as caught:
        run(auto_normal, epochs=1, guide=Growing(1970))
    assert caught[0].filename == run.__code__.co_filename
    run(auto_normal, epochs=1, guide=Growing(0))


@pytest.mark.parametrize("aggressive", [None, Aggressive(max_steps=3, check_every=1)])
def test_module_local_parameters_are_trained_the_same(aggressive: Aggressive | None) -> None:
    def trained() -> list[Tensor]:
        pyro.clear_param_store()
        torch.manual_seed(3)
        program = local_vae()
        fit(**program, epochs=3, batch_size=4, seed=1, progress=False, aggressive=aggressive)
        return [*program["guide"].parameters(), *program["model"].parameters()]

    expected = trained()
    with pyro.settings.context(module_local_params=True):
        assert same(trained(), expected)
        assert not pyro.get_param_store().keys()


def local_vae() -> dict[str, Any]:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(1, 1)
            self.width = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                mean = self.decoder(z[:, None])[:, 0]
                pyro.sample("x", dist.Normal(mean, self.width), obs=x)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.1))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc * x, 0.5))

    data = {"data": normal_data(), "validation": normal_data()}
    return {"model": Model(), "guide": Guide(), "loss": Trace_ELBO(), **data}


# --- Schedules


def test_burda_schedule_changes_after_the_epochs_of_the_paper() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = burda_schedule(optimizer)
    rates = []
    for _ in range(3280):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert rates == pytest.approx(expected, rel=1e-12)
    changes = [epoch for epoch in range(1, 3280) if rates[epoch] != rates[epoch - 1]]
    assert changes == [1, 4, 13, 40, 121, 364, 1093]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_warmup_weights_the_latents_of_model_and_guide() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.LogNormal(0.5, 2.0))
        with pyro.plate("data", 2 * len(x), subsample=x):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, guide = normal_data(), AutoMultivariateNormal(model)
    guide(x)  # creates its parameters
    still = {"optimizer": partial(sgd, lr=0.0), "epochs": 5, "seed": 6, "progress": False}
    history = fit(model, guide, x, loss=Trace_ELBO(), kl_warmup=4, validation=x, **still)
    pyro.set_rng_seed(6)
    for loss, weight in zip(history.loss, [0.25, 0.5, 0.75, 1.0, 1.0], strict=True):
        # The guide is a normal for log z; by hand, z has its density divided by z.
        base = dist.Normal(guide.loc, guide.scale * guide.scale_tril.squeeze())
        log_z = base.rsample()
        log_q = base.log_prob(log_z) - log_z
        log_prior = dist.LogNormal(0.5, 2.0).log_prob(log_z.exp())
        log_likelihood = 2 * dist.Normal(log_z.exp(), 1.0).log_prob(x).sum()
        expected = -(log_likelihood + weight * (log_prior - log_q))
        assert loss == pytest.approx(expected.item())
    with checkpoints.forked_rng(0):
        assert set(history.validation) == {Trace_ELBO().loss(model, guide, x)}


# --- Interrupted and resumed


QUICK = {"auto_normal", "vae", "late parameters", "loss with parameters"}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS],
)
def test_interrupt_and_resume_equals_no_interrupt(name: str, tmp_path: Path) -> None:
    program, path, other = PROGRAMS[name], tmp_path / "whole.pt", tmp_path / "broken.pt"
    expected = outcome(run(program, checkpoint=path), path)
    last = expected["history"]["steps"][-1]
    for call in random.Random(name).sample(range(last), 2):
        other.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            run(program, checkpoint=other, transform=interrupt_at(call))
        pyro.set_rng_seed(99)  # another process starts elsewhere
        resumed = run(program, checkpoint=other, resume=True, seed=None if call >= 3 else 1)
        assert same(outcome(resumed, other), expected), f"interrupted in call {call}"


@pytest.mark.parametrize("call", range(12))
@pytest.mark.slow
def test_every_kill_point(call: int, tmp_path: Path) -> None:
    path, other = tmp_path / "whole.pt", tmp_path / "broken.pt"
    expected = outcome(run(vae, checkpoint=path), path)
    with pytest.raises(KeyboardInterrupt):
        run(vae, checkpoint=other, transform=interrupt_at(call))
    assert same(outcome(run(vae, checkpoint=other, resume=True), other), expected)


def test_resume_in_the_same_process(tmp_path: Path) -> None:
    path, arguments = tmp_path / "run.pt", vae()
    expected = outcome(run(vae, checkpoint=path), path)["history"]
    common = {"epochs": 4, "batch_size": 4, "seed": 1, "progress": False, "checkpoint": path}
    pyro.clear_param_store()
    with pytest.raises(KeyboardInterrupt):
        fit(**arguments, **common, transform=interrupt_at(8))
    assert same(asdict(fit(**arguments, **common, transform=noisy, resume=True)), expected)


@pytest.mark.slow
def test_a_finished_run_returns_at_once_and_goes_on_with_more_epochs(tmp_path: Path) -> None:
    path, other = tmp_path / "long.pt", tmp_path / "short.pt"
    whole = partial(early, patience=float("inf"))
    expected = outcome(run(whole, epochs=5, checkpoint=path), path)
    short = run(whole, epochs=2, checkpoint=other)
    best = store()
    written = other.read_bytes()
    again = run(whole, epochs=2, checkpoint=other, resume=True)
    assert asdict(again) == asdict(short)
    assert same(store(), best)
    assert other.read_bytes() == written
    longer = run(whole, epochs=5, checkpoint=other, resume=True)
    assert same(outcome(longer, other), expected)


KILLED = """
import sys, torch, pyro
import pyro.distributions as dist
from functools import partial
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro_recursive.training import fit

def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 12, subsample=x):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

def main(path):
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    return fit(model, AutoNormal(model), torch.linspace(-1, 3, 12), loss=Trace_ELBO(), epochs=60,
               batch_size=4, checkpoint=path, resume=True, seed=2, progress=False)

if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_and_resume(tmp_path: Path) -> None:
    path, other = tmp_path / "whole.pt", tmp_path / "killed.pt"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(other)])
    deadline = time.monotonic() + 120
    while not other.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.SystemRandom().uniform(0, 0.3))
    child.send_signal(signal.SIGKILL)
    child.wait()
    names: dict[str, Any] = {"__name__": "killed"}
    exec(KILLED, names)
    done = len(checkpoints.load(other)["history"]["epoch"])
    assert 0 < done < 60, f"killed after {done} epochs"
    expected = outcome(names["main"](path), path)
    assert same(outcome(names["main"](other), other), expected)


# --- Files


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new folder" / "run.pt"
    history = run(auto_normal, epochs=1, checkpoint=path)
    before = path.read_bytes()

    def full_disk(state: Any, file: Any) -> None:
        file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(auto_normal, epochs=2, checkpoint=path, resume=True)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["run.pt"]
    assert checkpoints.load(path)["history"]["loss"] == history.loss


def other_kind(path: Path) -> None:
    torch.save({"parameters": {}}, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    state = checkpoints.load(path)["random"]["torch"].numpy().tobytes()
    content[content.find(state) + 100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [other_kind, truncate, flip_a_byte])
def test_a_damaged_file_is_named(damage: Callable, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(auto_normal, checkpoint=path)
    damage(path)
    with pytest.raises(CheckpointError, match=r"run\.pt'.*delete it to start afresh"):
        run(auto_normal, checkpoint=path, resume=True)


def wide_normal() -> dict[str, Any]:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        pyro.sample("extra", dist.Normal(0.0, 1.0))
        with pyro.plate("data", ROWS, subsample=x):
            pyro.sample("x", dist.Normal(mean.sum(), 1.0), obs=x)

    return {**auto_normal(), "model": model, "guide": AutoNormal(model)}


def without_norm() -> dict[str, Any]:
    arguments = vae_loader(generator=True)
    arguments["model"].__self__.encoder[1] = nn.LayerNorm(4)
    return arguments


def bound_of(count: int, **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**vae(), "loss": IWAE_ELBO(count, **options)}


def lingering(max_steps: int) -> dict[str, Any]:
    options = Aggressive(max_steps=max_steps, check_every=1)
    return {**vae(), "validation": torch.ones(5, 2), "aggressive": options}


MISFITS = {
    "parameters": (auto_normal, wide_normal, {}, r"locs.mean' is 'float64\[\]' in the file, "
                   r"'float64\[3\]' here;.* 'AutoNormal.locs.extra' is 'missing' in the file"),
    "buffers": (without_norm, partial(vae_loader, generator=True), {},
                r"'0.encoder.1.running_mean' is 'missing' in the file, 'float64\[4\]' here"),
    "order": (partial(vae_loader, generator=True), partial(vae_loader, generator=False), {},
              "generators is 1 in the file, 0 here"),
    "loss": (vae, vae, {"loss": IWAE_ELBO(4)}, "loss is 'TraceMeanField_ELBO' in the file, "
             "'IWAE_ELBO' here; loss.num_particles is 1 in the file, 4 here"),
    "samples": (bound_of(4), bound_of(8), {},
                ": loss.num_particles is 4 in the file, 8 here. Resume"),
    "estimator": (bound_of(4), bound_of(4, estimator="dreg"), {},
                  ": loss.estimator is 'pathwise' in the file, 'dreg' here. Resume"),
    "learning rate": (auto_normal, auto_normal, {"optimizer": partial(torch.optim.Adam, lr=0.5)},
                      ": lr is 0.001 in the file, 0.5 here. Resume"),
    "alpha": (auto_normal, auto_normal, {"loss": RenyiELBO(alpha=0.5)},
              "loss is 'Trace_ELBO' in the file, 'RenyiELBO' here"),
    "aggressive": (partial(lingering, 3), partial(lingering, 4), {},
                   "aggressive.max_steps is 3 in the file, 4 here"),
    **{" ".join(changes): (auto_normal, auto_normal, changes, message) for changes, message in (
        ({"optimizer": sgd}, "optimizer is 'Adam' in the file, 'SGD' here"),
        ({"scheduler": burda_schedule}, "scheduler is None in the file, 'LambdaLR' here"),
        ({"shuffle": False}, "shuffle is True in the file, False here"),
        ({"batch_size": 8}, "batch_size is 4 in the file, 8 here"),
        ({"data": torch.ones(8)}, "rows of data is 12 in the file, 8 here"),
        ({"clip_norm": 3.0}, "clip_norm is inf in the file, 3.0 here"),
        ({"kl_warmup": 3}, "kl_warmup is 0 in the file, 3 here"),
        ({"seed": 2}, "seed is 1 in the file, 2 here"),
        ({"batch_size": 8, "clip_norm": 1.0}, "clip_norm is inf in the file, 1.0 here; batch_size "
                                              "is 4 in the file, 8 here. Resume"),
    )},
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_a_file_of_another_program_changes_nothing(kind: str, tmp_path: Path) -> None:
    one, other, changes, message = MISFITS[kind]
    path = tmp_path / "run.pt"
    run(one, checkpoint=path)
    arguments = other()
    run(lambda: arguments, epochs=1, **changes)

    def everything() -> tuple[Any, ...]:
        module = getattr(arguments["model"], "__self__", nn.Module())
        order = getattr(arguments["data"], "generator", None) or torch.Generator().manual_seed(0)
        grads = [site.unconstrained().grad is None for site in pyro.get_param_store().values()]
        buffers = {name: tensor.clone() for name, tensor in module.named_buffers()}
        return store(), buffers, order.get_state(), grads

    before = everything()
    arguments = {"batch_size": 4, **arguments, "transform": noisy, **changes}
    with pytest.raises(CheckpointError, match=rf"run\.pt'.*{message}"):
        fit(**arguments, epochs=9, checkpoint=path, resume=True, progress=False)
    assert same(everything(), before)
    assert all(before[-1])


class Counting(Trace_ELBO):
    """A loss that counts its calls: that is no setting."""

    calls = 0

    def differentiable_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().differentiable_loss(*args, **kwargs)


def test_what_may_differ_and_files_of_before(tmp_path: Path) -> None:
    path, program = (
        tmp_path / "run.pt",
        {**auto_normal(), "loss": Counting(num_particles=2, vectorize_particles=True)},
    )
    options = {"validation": normal_data(), "checkpoint": path}
    run(lambda: program, **options, clip_norm=np.float64(5.0), batch_size=np.int64(4))
    options["clip_norm"] = 5
    changes = {"epochs": 6, "patience": 9.0, "validate_every": 2, "check_every": 3, "seed": None}
    assert len(run(lambda: program, **options, **changes, resume=True).epoch) == 6
    with pytest.raises(CheckpointError, match="seed is 1 in the file, 2 here"):
        run(lambda: program, **options, seed=2, resume=True)
    state = checkpoints.load(path)
    del state["settings"], state["learner"]["optimizer options"]
    checkpoints.save(path, state)
    assert len(run(lambda: program, **options, epochs=7, seed=2, resume=True).epoch) == 7


def test_random_states_come_back() -> None:
    pyro.set_rng_seed(5)
    np.random.standard_normal()  # noqa: NPY002 - leaves half a pair behind
    state = checkpoints.random_state()
    first = (torch.rand(2), random.random(), np.random.standard_normal())  # noqa: NPY002
    checkpoints.set_random_state(state)
    assert same(first, (torch.rand(2), random.random(), np.random.standard_normal()))  # noqa: NPY002


# --- Where a NaN comes from


def nan_data() -> dict[str, Any]:
    data = normal_data()
    data[5] = torch.nan
    return {**auto_normal(), "data": data}


def nan_after_some_steps() -> dict[str, Any]:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.1))
        scale = pyro.param("scale", torch.tensor(0.5))
        shrinks = torch.where(x[0] == normal_data()[8], torch.nan, 1.0)
        pyro.sample("mean", dist.Normal(loc, scale * shrinks))

    return {**auto_normal(), "guide": guide, "shuffle": False}


def exploding_model() -> dict[str, Any]:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", ROWS, subsample=x):
            pyro.sample("x", dist.Normal((800 * mean.abs() + 800).exp(), 1.0), obs=x)

    return {**auto_normal(), "model": model, "guide": AutoNormal(model)}


def impossible_data() -> dict[str, Any]:
    def model(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.Uniform(0.0, 1.0), obs=torch.tensor(2.0))

    return {**auto_normal(), "model": model, "guide": AutoNormal(model)}


def nan_gradient() -> dict[str, Any]:
    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.0))
        loc = pyro.param("loc", torch.tensor(0.1))
        pyro.sample("mean", dist.Normal(loc + slope.abs().sqrt(), 1.0))

    return {**auto_normal(), "guide": guide}


def nan_parameter() -> dict[str, Any]:
    pyro.param("bad", torch.tensor(torch.nan))

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("bad"), 1.0))

    return {**auto_normal(), "guide": guide}


def singular_model() -> dict[str, Any]:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.factor("before", mean * torch.nan)
        torch.linalg.cholesky(mean.expand(2, 2) * torch.nan)

    return {**auto_normal(), "model": model}


BROKEN = {
    "data": (nan_data, r"data tensor '0'; model site 'x', its value is NaN or infinite \(data\)"),
    "guide scale": (nan_after_some_steps, r"step 3, epoch 1.*guide site 'mean', its distribution "
                    "parameter 'scale' is NaN"),
    "explosion": (exploding_model, "model site 'x', its log_prob is -inf"),
    "impossible data": (impossible_data, "model site 'x', its log_prob is -inf"),
    "gradient": (nan_gradient, "the gradient of parameter 'slope'"),
    "parameter": (nan_parameter, "parameter 'bad'; guide site 'mean', its distribution parameter"),
    "linear algebra": (singular_model, "model site 'before', its distribution parameter"),
}  # fmt: skip


@quiet
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_the_site_of_a_nan_is_named_and_parameters_stay(name: str, validate: bool) -> None:
    program, message = BROKEN[name]
    before: list[dict[str, Tensor]] = []
    taken = []

    def look(*batch: Tensor) -> tuple[Tensor, ...]:
        before.append(store())
        return batch

    class Counted(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            taken.append(super().step(closure))

    with pyro.validation_enabled(validate), pytest.raises(NonFiniteError, match=message):
        run(program, transform=look, optimizer=Counted)
    assert len(taken) == len(before) - 1
    after, params = store(), pyro.get_param_store()
    assert all(
        torch.equal(after[name], value) for name, value in before[-1].items() if value == value
    )
    assert all(params[name].unconstrained().grad is None for name in params)


@quiet
@pytest.mark.parametrize("validate", [True, False])
def test_a_nan_is_found_under_the_draws_of_its_step(validate: bool) -> None:
    seen: list[str] = []

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        seen.append(f"draw {mean.item():.8f}")
        # Nothing but this step's own draw shows the fault.
        pyro.factor(seen[-1], torch.where(mean > 1.5, torch.nan, 0.0))

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    arguments = {**auto_normal(), "model": model, "guide": guide}
    problem = pytest.raises(NonFiniteError, match="model site 'draw")
    with pyro.validation_enabled(validate), problem as caught:
        run(lambda: arguments, epochs=100)
    assert len(seen) > 3
    assert seen[-1] == seen[-2]
    assert seen[-1] in str(caught.value)


@quiet
def test_sparse_checks_find_it_by_the_end_of_the_epoch(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="'mean'"):
        run(nan_after_some_steps, check_every=100, checkpoint=path, transform=None)
    assert not path.exists()


def test_masked_nans_are_nobody_s_fault() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", ROWS, subsample=x), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        pyro.factor("late", torch.tensor(torch.inf))

    data = normal_data()
    data[5] = torch.nan
    arguments = {**auto_normal(), "model": model, "guide": AutoNormal(model), "data": data}
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="model site 'late'"):
        run(lambda: arguments, batch_size=None)


def test_other_errors_stay_what_they_are() -> None:
    def broken(x: Tensor) -> None:
        normal_model(x)
        raise ValueError("not about numbers")

    with pytest.raises(ValueError, match="not about numbers"):
        run(lambda: {**auto_normal(), "model": broken})


# --- Arguments


class Nothing(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


WRONG = {
    "epochs": ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
    "validate_every": ({"validate_every": 0}, ValueError, "validate_every must be an integer >= 1"),
    "check_every": ({"check_every": 0}, ValueError, "check_every must be an integer >= 1"),
    "batch_size": ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
    "kl_warmup": ({"kl_warmup": -1}, ValueError, "kl_warmup must be an integer >= 0, got -1"),
    "patience": ({"patience": 0, "validation": torch.ones(2)}, ValueError, "patience must be"),
    "no validation": ({"patience": 2}, ValueError, "patience=2 needs a validation loss"),
    "no file": ({"resume": True}, ValueError, "resume=True needs a file"),
    "empty": ({"data": torch.ones(0, 2)}, ValueError, r"data is empty: lengths \[0\]"),
    "nothing": ({"data": ()}, ValueError, r"data is empty: lengths \[\]"),
    "lengths": ({"data": (torch.ones(2), torch.ones(3))}, ValueError, r"lengths \[2, 3\]"),
    "scalar": ({"data": torch.tensor(1.0)}, ValueError, "data has a scalar tensor"),
    "kind": ({"data": np.ones(3)}, TypeError, "got ndarray.*torch.as_tensor"),
    "validation": ({"validation": torch.ones(0)}, ValueError, "validation is empty"),
    "loader and size": ({"data": DataLoader([1])}, ValueError, "batch_size=4 has no effect"),
    "empty loader": ({"data": DataLoader([]), "batch_size": None}, ValueError, "without batches"),
    "silent loader": ({"data": DataLoader(Nothing()), "batch_size": None}, ValueError,
                      "no batches"),
    "loss": ({"loss": Trace_ELBO}, TypeError, "loss must be a pyro.infer.ELBO, got.*an instance"),
    "validation loss": ({"validation_loss": print}, TypeError, "must be a pyro.infer.ELBO"),
    "PyroOptim": ({"optimizer": pyro.optim.Adam({})}, TypeError, "got a PyroOptim.*SVI.step"),
    "made": ({"optimizer": sgd([torch.ones(1)])}, TypeError, "got a SGD"),
    "pyro.optim": ({"optimizer": pyro.optim.Adam}, TypeError, "got a function.*SVI.step"),
    "no optimiser": ({"optimizer": list}, TypeError, "must return a torch.optim.Opt.*got list"),
    "no parameters": ({"guide": lambda x: pyro.sample("mean", dist.Normal(0.0, 1.0))}, ValueError,
                      "no parameters to train"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_before_anything_changes(name: str) -> None:
    changes, kind, message = WRONG[name]
    arguments = auto_normal()
    run(lambda: arguments, epochs=1)
    before = store()
    defaults: dict[str, Any] = {"epochs": 2, "batch_size": 4, "progress": False}
    with pytest.raises(kind, match=message):
        fit(**{**arguments, **defaults, **changes})
    assert same(store(), before)


@pytest.mark.parametrize("make", [lambda: KLWarmup(0.0), lambda: KLWarmup(float("nan"))])
def test_weight_of_latents_must_be_positive(make: Callable) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        make()


def test_number_of_stages_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        burda_schedule(sgd([torch.ones(1, requires_grad=True)]), num_stages=0)


def test_a_dead_sample_is_not_blamed_for_a_nan() -> None:
    """One sample of zero density is legal; the NaN after it is the fault."""
    watch = FirstNonFiniteSite()
    with pyro.validation_enabled(False), watch:
        pyro.factor("dead", torch.tensor([0.0, -torch.inf]))
        assert watch.first == "model site 'dead', its log_prob is -inf"
        pyro.factor("wrong", torch.tensor(torch.nan))
        pyro.factor("late", torch.tensor(torch.inf))
    assert watch.first is not None and "'wrong'" in watch.first
