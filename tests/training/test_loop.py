"""What `fit` learns: loops by hand, `SVI` and closed forms are the oracles."""

import io
import json
import math
import re
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_recursive import RecursiveMixture_ELBO, RecursiveMixtureGuide, Schedule
from pyro_recursive.training import Aggressive, History, KLWarmup, burda_schedule, fit
from pyro_recursive.training import checkpoint as checkpoints
from pyro_recursive.training.data import Minibatches, Passes, Table
from tests.oracles.bitwise import same
from tests.oracles.training import (
    ROWS,
    Scripted,
    auto_normal,
    late_parameters,
    normal_data,
    normal_model,
    pyro_modules,
    run,
    sgd,
    store,
    vae,
)


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
    adam = partial(torch.optim.Adam, lr=0.01)
    options = {"optimizer": adam, "epochs": 3, "seed": 7, "transform": None}
    assert run(auto_normal, batch_size=batch_size, **options).loss == expected
    assert same(store(), parameters)


@pytest.mark.parametrize(
    "make",
    [
        Trace_ELBO,
        partial(RenyiELBO, alpha=0.5, num_particles=2),
        partial(TraceTailAdaptive_ELBO, num_particles=3, vectorize_particles=True),
        partial(JitTrace_ELBO, ignore_jit_warnings=True),
    ],
    ids=["Trace", "Renyi", "TailAdaptive", "JitTrace"],
)
def test_equals_svi(make: Any) -> None:
    pyro.set_rng_seed(1)
    options = {"lr": 1e-3, "momentum": 0.9}
    svi = SVI(normal_model, AutoNormal(normal_model), pyro.optim.SGD(options), make())
    expected = [svi.step(normal_data()) for _ in range(4)]
    parameters = store()
    optimizer = partial(torch.optim.SGD, **options)
    changes = {"loss": make(), "optimizer": optimizer, "batch_size": None, "transform": None}
    found = run(auto_normal, **changes)
    assert found.loss == pytest.approx(expected)
    torch.testing.assert_close(store(), parameters)


def test_a_loss_without_a_value_trains_eagerly() -> None:
    loss = TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True)
    with pytest.warns(UserWarning, match="run eagerly: TraceTailAdaptive_ELBO has no value"):
        assert run(auto_normal, loss=loss, compile="graph").loss[-1] == math.inf


def test_a_gradient_from_before_is_not_added() -> None:
    found = []
    for old in (0.0, 7.0):
        program = auto_normal()
        program["guide"](program["data"])
        for parameter in program["guide"].parameters():
            parameter.grad = torch.full_like(parameter, old)
        fit(**program, epochs=1, optimizer=sgd, progress=False, seed=2)
        found.append([p.detach() for p in program["guide"].parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


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


@pytest.mark.parametrize("always", [False, True])
def test_validation_is_off_after_the_first_epoch(always: bool) -> None:
    seen = []

    def model(x: Tensor) -> None:
        normal = dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0)
        seen.append(is_validation_enabled() and normal._validate_args)
        with pyro.plate("data", len(x)):
            pyro.sample("x", normal, obs=x)

    settings = {"loss": Trace_ELBO(), "epochs": 3, "batch_size": 50, "progress": False}
    with pyro.validation_enabled(True):
        fit(model, lambda x: None, normal_data(), validate_args=always, **settings)
    steps = len(seen) // 3
    assert all(seen[:steps]) and all(seen[-steps:]) == always


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
    with pytest.raises(ValueError, match="must be above 0"):
        KLWarmup(0.0)


@pytest.mark.parametrize("aggressive", [None, Aggressive(max_steps=3, check_every=1)])
def test_module_local_parameters_are_trained_the_same(aggressive: Aggressive | None) -> None:
    def trained() -> list[Tensor]:
        arguments = pyro_modules()
        run(lambda: arguments, validation=normal_data(), aggressive=aggressive, epochs=3)
        return [*arguments["guide"].parameters(), *arguments["model"].parameters()]

    expected = trained()
    with pyro.settings.context(module_local_params=True):
        assert same(trained(), expected)
        assert not pyro.get_param_store().keys()


# --- Validation


def test_validation_leaves_no_trace_and_repeats_its_draws() -> None:
    frozen = partial(sgd, lr=0.0)
    loader = DataLoader(
        TensorDataset(torch.ones(6, 2)), 2, shuffle=True, generator=torch.Generator()
    )
    plain = run(vae, optimizer=frozen)
    random_after = checkpoints.random_states()
    arguments = vae()
    program = arguments["model"].__self__
    program.decoder.eval()  # the mode of each module is restored, not just train mode
    watched = run(lambda: arguments, optimizer=frozen, validation=loader, epochs=3)
    assert not program.decoder.training
    assert program.encoder[1].training
    program.eval()
    with checkpoints.forked_rng(0, [loader.generator]):
        batches = [TraceMeanField_ELBO().loss(program.model, program.guide, x) for (x,) in loader]
    program.train()
    # The last validation is with the final statistics of the batch norm.
    assert watched.validation[-1] == pytest.approx(np.mean(batches))
    again = run(vae, optimizer=frozen, validation=torch.ones(6, 2))
    assert again.loss == plain.loss
    assert same(checkpoints.random_states(), random_after)
    fixed = run(auto_normal, optimizer=frozen, validation=normal_data())
    assert len(set(fixed.validation)) == 1


@pytest.mark.parametrize("wrap", [lambda m: m, partial, lambda m: partial(partial(m.forward))])
def test_modules_in_partials_are_found(wrap: Any) -> None:
    """They validate in evaluation mode."""
    arguments, modes = pyro_modules(), []
    decoder = arguments["model"].decoder
    decoder.register_forward_pre_hook(lambda *_: modes.append(decoder.training))
    arguments["model"] = wrap(arguments["model"])
    run(lambda: arguments, epochs=2, validation=normal_data(), loss=Trace_ELBO(), batch_size=None)
    assert modes.count(False) == 2 < len(modes)


def test_stops_early_and_puts_the_best_back() -> None:
    scripted = Scripted([5.0, 3.0, float("nan"), 4.0, 3.0, 1.0])
    changes = {"validation": normal_data()[:4], "validation_loss": scripted, "epochs": 9}
    history = run(auto_normal, patience=3, **changes)
    assert history.epoch == [1, 2, 3, 4, 5]
    assert history.stopped_early
    assert history.best_epoch == 2
    assert same(store(), scripted.seen[1])
    assert not same(scripted.seen[1], scripted.seen[4])
    scripted = Scripted(range(9))  # without patience nothing is put back
    history = run(auto_normal, **{**changes, "validation_loss": scripted})
    assert (history.best_epoch, history.stopped_early) == (1, False)
    assert same(store(), scripted.seen[-1])


# --- Data, the record and schedules


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(5, [5, 5]), (12, [12]), (20, [12]), (4, [4] * 3)]
)
def test_even_minibatches(batch_size: int, sizes: list[int]) -> None:
    batches = Minibatches(torch.randn(12, 2), batch_size, shuffle=False).again()
    assert [len(x) for (x,) in batches] == sizes
    assert batches.count == len(sizes)
    assert batches.generators


@pytest.mark.parametrize("in_tables", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [None, 3, 5, 12, "one batch", "loader"])
def test_passes_go_on_after_each_block_and_after_a_resume(
    size: Any, shuffle: bool, in_tables: bool
) -> None:
    """Two blocks of 7 steps, the second also from the state after the first."""

    def made() -> Minibatches:
        torch.manual_seed(5)
        if isinstance(size, int | None):
            return Minibatches(torch.arange(ROWS), size, shuffle)
        rows = 5 if size == "loader" else ROWS
        own = torch.Generator().manual_seed(6)
        data = TensorDataset(torch.arange(ROWS))
        return Minibatches(DataLoader(data, rows, shuffle, generator=own))

    def taken(passes: Passes) -> list[list[int]]:
        found = []
        for piece, steps in passes.take(7, in_tables):
            for step in range(steps):
                (x,) = piece.batch(step) if isinstance(piece, Table) else piece
                found.append(x.tolist())
        return found

    batches = made()
    expected = [x.tolist() for _ in range(14) for (x,) in batches][:14]
    passes = Passes(made())
    first, state = taken(passes), passes.state()
    assert first + taken(passes) == expected
    resumed = Passes(made())
    resumed.set_state(state, in_tables)
    assert taken(resumed) == expected[7:]


def test_validation_rows() -> None:
    x, y = torch.arange(10.0), torch.arange(10)
    held_out = Minibatches((x, y), 3, shuffle=False)
    first = held_out.choose(4)
    assert same(first, held_out.choose(4))
    assert torch.equal(first[0].long(), first[1])
    assert len(set(first[1].tolist())) == 4
    assert same(held_out.choose(99), (x, y))
    batches = Minibatches(DataLoader(TensorDataset(x, y), 3))
    assert same(batches.choose(4), (x[:4], y[:4]))
    assert same(batches.choose(99), (x, y))


def test_a_plateau_is_one_of_validations() -> None:
    """Neither the training loss nor a value that was seen before ends it."""
    plateau = partial(ReduceLROnPlateau, patience=0, factor=0.1)
    options = {"validation": normal_data()[:4], "validate_every": 3, "epochs": 13}
    values = Scripted([5.0, 4.0, 4.5, 3.0])
    found = run(auto_normal, scheduler=plateau, validation_loss=values, **options)
    assert found.learning_rate == pytest.approx([1e-3] * 9 + [1e-4] * 4)


def test_history_tells_what_happened() -> None:
    step = partial(LambdaLR, lr_lambda=lambda epoch: 0.5**epoch)
    options = {"validation": normal_data()[:4], "validate_every": 2}
    history = run(auto_normal, scheduler=step, **options)
    assert history.epoch == [1, 2, 3, 4]
    assert history.steps == [3, 6, 9, 12]
    assert history.learning_rate == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])
    assert [value is None for value in history.validation] == [True, False, True, False]
    assert all(seconds > 0 for seconds in history.seconds)
    assert json.loads(json.dumps(asdict(history))) == asdict(history)
    assert repr(History()) == "History(no epochs)"
    history.stopped_early = True
    best = min(value for value in history.validation if value is not None)
    assert re.fullmatch(
        rf"History\(4 epochs, stopped early; \d+\.\d s; loss {history.loss[-1]:.2f} "
        rf"\(batches of 4 rows\); validation {history.validation[3]:.2f} \(batches of 4 rows\); "
        rf"best {best:.2f} in epoch {history.best_epoch}\)",
        repr(history),
    )


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


@pytest.mark.parametrize("num_epochs", [1, 10, 328, 6560])
def test_burda_schedule_keeps_the_proportions_of_its_stages(num_epochs: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = burda_schedule(optimizer, num_epochs=num_epochs)
    stages = []
    for _ in range(num_epochs):
        stages.append(round(-7 * math.log10(optimizer.param_groups[0]["lr"])))
        optimizer.step()
        scheduler.step()
    for stage in range(8):
        length = 3**stage * num_epochs / 3280
        assert abs(stages.count(stage) - length) < 1
    assert stages == sorted(stages)


# --- What is shown


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


def test_a_guide_that_has_not_grown_is_told() -> None:
    def program() -> dict[str, Any]:
        schedule = Schedule(first=2, propose=2, refine=2)
        guide = RecursiveMixtureGuide(normal_model, 2, paths=0, schedule=schedule)
        return {**auto_normal(), "guide": guide, "loss": RecursiveMixture_ELBO(2)}

    options = {"batch_size": None, "transform": None}
    with pytest.warns(UserWarning, match="1 of 2 components and 4 steps left") as caught:
        run(program, epochs=2, **options)
    assert caught[0].filename == run.__code__.co_filename
    run(program, epochs=6, **options)


# --- What is refused


class Nothing(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


WRONG = {
    "epochs": ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
    "validate_every": ({"validate_every": 0}, ValueError, "validate_every must be an integer >= 1"),
    "check_every": ({"check_every": 0}, ValueError, "check_every must be an integer >= 1"),
    "batch_size": ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
    "kl_warmup": ({"kl_warmup": -1}, ValueError, "kl_warmup must be an integer >= 0, got -1"),
    "patience": ({"patience": 2}, ValueError, "need a validation loss"),
    "aggressive": ({"aggressive": Aggressive()}, ValueError, "need a validation loss"),
    "no patience": ({"patience": 0, "validation": torch.ones(2)}, ValueError, "patience=0"),
    "no gradient": ({"clip_norm": 0.0}, ValueError, "clip_norm=0.0 must be above 0"),
    "no file": ({"resume": True}, ValueError, "resume=True needs a file"),
    "empty": ({"data": torch.ones(0, 2)}, ValueError, r"data need one number .* lengths \[0\]"),
    "nothing": ({"data": ()}, ValueError, "batch_size=4 has no effect without data"),
    "lengths": ({"data": (torch.ones(2), torch.ones(1))}, ValueError, r"lengths \[2, 1\]"),
    "kind": ({"data": (np.ones(3),)}, TypeError, "data must be tensors .* got ndarray"),
    "validation": ({"validation": torch.ones(0)}, ValueError, "tensors of validation need"),
    "loader and size": ({"data": DataLoader([1])}, ValueError, "batch_size=4 has no effect"),
    "silent loader": ({"data": DataLoader(Nothing()), "batch_size": None}, ValueError,
                      "DataLoader data gave no batches"),
    "no optimiser": ({"optimizer": list}, TypeError, "must return a torch optimiser, got list"),
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


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("size", [None, 3, 5, 7, 20])
def test_batches_are_counted_without_being_made(
    size: int | None, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Minibatches(torch.zeros(15, 2), size, even=even)
    expected = len(list(batches))
    monkeypatch.setattr(Minibatches, "_shares", None)  # as many slices as there are batches
    assert batches.count == expected
