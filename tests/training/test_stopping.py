"""When training stops: noise and drifts with known answers, and runs of `fit`."""

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from pyro_recursive import AmortizedGuide, MixtureGuide, RecursiveMixtureGuide
from pyro_recursive.guides.mixture_distributions import ListMixture
from pyro_recursive.training import History, burda_schedule, fit
from pyro_recursive.training.divergence import divergence_of, symmetric_kl
from pyro_recursive.training.parameters import IterateSum, TrainedParameters
from pyro_recursive.training.stopping import BLOCK, BlockMeans, StopRule, fall, last_halves, mean_of
from tests.oracles.bitwise import same
from tests.oracles.training import (
    auto_normal,
    growing,
    interrupt_at,
    normal_data,
    outcome,
    run,
    store,
    vae,
    vae_loader,
)

ADAM = partial(torch.optim.Adam, lr=0.05)


def autoregression(rho: float, steps: int, runs: int) -> Tensor:
    """Return stationary noise with variance 1, ``[steps, runs]``."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(runs, generator=generator)]
    for noise in (1 - rho**2) ** 0.5 * torch.randn(steps - 1, runs, generator=generator):
        found.append(rho * found[-1] + noise)
    return torch.stack(found)


def blocks(iterates: Tensor) -> Tensor:
    return iterates.unflatten(0, (-1, BLOCK)).mean(1)


def unit_normals(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float((one["loc"] - other["loc"]).square().sum())


# --- The rule alone


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.98])
def test_the_excess_is_that_of_the_average(rho: float) -> None:
    means = BlockMeans()
    for mean in blocks(autoregression(rho, 40 * BLOCK, 4000)):
        means.add({"loc": mean})
    assert (len(means.means), means.width) == (20, 2)
    one, other = map(mean_of, last_halves(means.means))
    excess = unit_normals(one, other) / 8
    true = unit_normals(mean_of([one, other]), {"loc": torch.zeros(4000)}) / 2
    assert excess == pytest.approx(true, rel=0.15)


def test_a_drift_of_one_sd_a_block_never_stops() -> None:
    noise = blocks(autoregression(0.9, 400 * BLOCK, 5))
    rule, level = StopRule(0.01), StopRule(0.01)
    for number, mean in enumerate(noise):
        assert not rule.add(BLOCK, 0.0, {"loc": mean + number}, unit_normals)
        assert not level.add(BLOCK, -number + noise[number, 0].item(), {}, None)
    assert rule.excess is not None and rule.excess > 1


@pytest.mark.parametrize("rho", [0.0, 0.9, 0.98])
def test_stages_of_a_loss_end_at_noise_and_not_on_a_drift(rho: float) -> None:
    means = blocks(autoregression(rho, 64 * BLOCK, 100)).T
    means = means / means.std()
    for drift, sure in ((0.0, lambda n: n > 95), (0.3, lambda n: n < 6)):
        ended = 0
        for own in means:
            rule = StopRule(1e-6)
            ended += any(
                rule.add(BLOCK, float(v), {}, None) for v in own - drift * torch.arange(64.0)
            )
        assert sure(ended), f"{ended} of 100 at a drift of {drift}"


def test_no_stage_ends_while_the_loss_falls_by_orders() -> None:
    rule, mean = StopRule(0.01), {"loc": torch.zeros(2)}
    losses = [10.0 ** (6 - number / 8) for number in range(64)] + 100 * [0.0]
    ends = [
        number for number, loss in enumerate(losses) if rule.add(BLOCK, loss, mean, unit_normals)
    ]
    assert losses[ends[0]] < 0.02
    assert rule.is_done and rule.stages == 2


def test_fall_of_a_line() -> None:
    size, error = fall([-2.0 * n for n in range(16)])
    assert (size, error) == (pytest.approx(8.0), pytest.approx(1.0))


def test_the_cap_leaves_the_average_if_the_loss_is_level() -> None:
    for slope, expected in ((0.0, 5.5), (-1.0, None)):
        rule = StopRule(0.01)
        for number in range(8):
            rule.add(BLOCK, slope * number, {"loc": torch.tensor([1.0 * number])}, unit_normals)
        found = rule.at_the_cap()
        assert (found["loc"].item() if found else None) == expected
        assert rule.reason(400) == "cap of 400 steps: excess 0.5 nats"


# --- Divergences


def test_divergence_of_mixtures_is_an_upper_bound_that_weights_alone_attain() -> None:
    parts = [dist.Normal(torch.tensor([loc]), 1.0).to_event(1) for loc in (-50.0, 50.0)]
    p, q = (ListMixture(torch.tensor(w).log(), parts) for w in ([0.3, 0.7], [0.5, 0.5]))
    expected = -0.2 * math.log(0.3 / 0.5) + 0.2 * math.log(0.7 / 0.5)
    assert symmetric_kl(p, q).item() == pytest.approx(expected)


def three_means() -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    with pyro.plate("data", 12):
        pyro.sample("x", dist.Normal(mean.sum(-1), 1.0), obs=normal_data())


def log_evidence() -> float:
    covariance = torch.eye(12) + 12 * torch.ones(12, 12)
    return dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(normal_data()).item()


def draws(count: int) -> Trace_ELBO:
    return Trace_ELBO(count, vectorize_particles=True, max_plate_nesting=1)


# --- Runs of fit


@pytest.mark.slow
def test_a_conjugate_model_stops_at_the_evidence() -> None:
    guide = AmortizedGuide(three_means, family="full")
    settings = {"steps": "auto", "seed": 1, "progress": False, "compile": "graph"}
    history = fit(three_means, guide, (), loss=draws(8), optimizer=ADAM, **settings)
    assert history.stopped is not None
    assert history.stopped.startswith("excess 0.00")
    assert history.steps == list(range(BLOCK, history.steps[-1] + 1, BLOCK))
    assert history.learning_rate[-1] < history.learning_rate[0] == 0.05
    elbo = -draws(20_000).loss(three_means, guide)
    assert log_evidence() - 0.05 < elbo < log_evidence() + 0.01


def iterates_of(**options: Any) -> tuple[History, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the history and the parameters of a run, and those after each step."""
    seen: list[dict[str, Tensor]] = []
    history = run(
        auto_normal,
        on_step=lambda step, loss: seen.append(store()),
        optimizer=ADAM,
        **options,
    )
    return history, store(), seen


@pytest.mark.parametrize("compile", [False, "graph"])
@pytest.mark.parametrize("length", [{"epochs": 5}, {"epochs": None, "steps": 120}])
def test_the_average_is_that_of_the_last_half(length: dict[str, Any], compile: Any) -> None:
    options = {"average": True, "transform": None, "compile": compile}
    history, found, seen = iterates_of(**length, **options)
    first = 6 if "steps" not in length else 50
    assert history.steps[-1] == len(seen) == (15 if first == 6 else 120)
    for name, value in found.items():
        expected = torch.stack([each[name] for each in seen[first:]]).mean(0)
        assert torch.allclose(value, expected, rtol=1e-12)


def test_averages_of_complex_parameters_keep_their_imaginary_part() -> None:
    like = {"root": torch.tensor([1 + 2j], dtype=torch.complex64)}
    total, resumed = IterateSum(), IterateSum()
    total.add(like)
    resumed.set_state(vars(total), like)
    resumed.add({"root": torch.tensor([3 - 1j], dtype=torch.complex64)})
    assert resumed.mean()["root"].tolist() == [2 + 0.5j]


def test_sums_of_many_steps_keep_the_digits_of_float32() -> None:
    """In float32 ``2**24 + 1`` is ``2**24``."""
    ones = {"loc": torch.ones(2, dtype=torch.float32)}
    total, resumed = IterateSum(), IterateSum()
    total.add({"loc": 2**24 * ones["loc"]}, 2**24)
    resumed.set_state({"count": 2**24, "sums": {"loc": 2**24 * ones["loc"]}}, ones)  # of old files
    for sums in (total, resumed):
        for _ in range(20):
            sums.add(ones)
        assert sums.mean()["loc"].tolist() == [1.0, 1.0]


def test_steps_go_on_in_the_middle_of_a_pass_and_the_record_is_in_blocks() -> None:
    _, expected, _ = iterates_of(epochs=40)
    history, found, _ = iterates_of(epochs=None, steps=120)
    assert same(found, expected)
    assert (history.epoch, history.steps) == ([1, 2, 3], [50, 100, 120])
    assert history.stopped is None


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_recursive.training.run.BLOCK", 4)


AUTO: dict[str, Any] = {"epochs": None, "steps": "auto", "tolerance": 0.5, "max_steps": 150}
interrupted = partial(pytest.warns, UserWarning, match="Training was interrupted")


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.quick("excess", "steps, loader")
@pytest.mark.parametrize(
    ("program", "options"),
    [
        (auto_normal, AUTO),
        (partial(vae_loader, generator=False), AUTO | {"average": True}),
        (partial(vae_loader, generator=True), {"epochs": None, "steps": 30, "average": True}),
        (vae, {"epochs": None, "steps": 30}),
    ],
    ids=["excess", "loss, loader", "steps, loader", "steps"],
)
def test_a_resumed_run_is_that_without_interrupt(
    program: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"optimizer": ADAM, "batch_size": 5, **options}
    if isinstance(program, partial):
        settings["batch_size"] = None
    path, other = tmp_path / "whole.pt", tmp_path / "broken.pt"
    program = partial(lambda make: {**make(), "batch_size": settings["batch_size"]}, program)
    expected = outcome(run(program, checkpoint=path, **settings), path)
    for call in random.Random(3).sample(range(expected["history"]["steps"][-1]), 2):
        other.unlink(missing_ok=True)
        with interrupted():
            broken = run(program, checkpoint=other, transform=interrupt_at(call), **settings)
        assert broken.stopped == "interrupted"
        pyro.set_rng_seed(99)
        seed = None if other.exists() else 1
        resumed = run(program, checkpoint=other, resume=True, **settings, seed=seed)
        assert same(outcome(resumed, other), expected), f"interrupted in call {call}"
    again = run(program, checkpoint=path, resume=True, **settings)
    assert same(outcome(again, path), expected)


def sixteen() -> None:
    loc = torch.linspace(-1.0, 1.0, 16)
    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize(
    "optimizer",
    [
        ADAM,
        partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1),
        partial(torch.optim.SGD, lr=0.05, momentum=0.5),
    ],
)
def test_compiled_stages_are_those_of_eager_steps(optimizer: Any) -> None:
    found = []
    for compile in (False, "graph"):
        pyro.clear_param_store()
        guide = AmortizedGuide(sixteen, init_loc_fn={"z": torch.linspace(-1.0, 1.0, 16)})
        settings = AUTO | {"optimizer": optimizer, "seed": 1, "progress": False}
        history = fit(sixteen, guide, (), loss=Trace_ELBO(), compile=compile, **settings)
        assert len(set(history.learning_rate)) > 1
        found.append((history.steps, history.stopped, history.learning_rate, store()))
    (*eager, parameters), (*compiled, own) = found
    assert compiled == eager
    for name, value in parameters.items():
        assert torch.allclose(own[name], value, rtol=1e-8)


@pytest.mark.usefixtures("short_blocks")
def test_no_block_counts_while_a_mixture_grows_or_latents_warm_up() -> None:
    history = run(growing, **AUTO | {"max_steps": 12})
    assert history.steps[-1] >= 12 + 12
    assert history.stopped == "cap of 12 steps: too few steps to judge"
    warm = run(auto_normal, kl_warmup=3, **AUTO | {"max_steps": 12})
    assert warm.steps[-1] == 2 * 4 + 12


@pytest.mark.usefixtures("short_blocks")
def test_a_mixture_that_a_loss_does_not_grow_is_judged() -> None:
    def other() -> dict[str, Any]:
        return {**growing(), "loss": Trace_ELBO()}

    def stop(step: int, loss: Tensor) -> None:
        assert step <= 12

    with pytest.warns(UserWarning, match="1 of 3 components and 14 steps left"):
        history = run(other, **AUTO | {"max_steps": 12, "on_step": stop})
    assert history.steps[-1] == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": None}, "either epochs or steps"),
        ({"steps": 5}, "either epochs or steps"),
        (AUTO | {"scheduler": burda_schedule}, "sets the learning rate"),
        (AUTO | {"patience": 1, "validation": torch.ones(2)}, "Leave out average"),
        ({"average": True, "patience": 1, "validation": torch.ones(2)}, "Leave out average"),
        (AUTO | {"tolerance": 0.0}, "tolerance must be above 0"),
        (AUTO | {"steps": "often"}, "a number or 'auto'"),
        (AUTO | {"steps": 9}, "no effect without steps='auto'"),
        ({"max_steps": 9}, "no effect without steps='auto'"),
        ({"data": (), "batch_size": 2}, "no effect without data"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(lambda: {**auto_normal(), **options}, **options)


@pytest.mark.parametrize(
    "make",
    [
        AutoNormal,
        AutoDiagonalNormal,
        AutoMultivariateNormal,
        partial(AutoLowRankMultivariateNormal, rank=1),
        AmortizedGuide,
        partial(AmortizedGuide, family="full"),
        lambda model: MixtureGuide(model, [AmortizedGuide(model), AmortizedGuide(model)]),
    ],
)
def test_divergence_of_a_shift(make: Any) -> None:
    pyro.clear_param_store()
    guide, parameters = make(sixteen), TrainedParameters([])
    with poutine.trace(param_only=True) as captured:
        guide()
    parameters.add(captured.trace)
    start = {name: value.detach().clone() for name, value in parameters.by_name.items()}
    moved = {name: value.clone() for name, value in start.items()}
    for name, value in moved.items():
        if name.endswith(("loc", "locs.z", "free_global")):
            value[3] += 0.2
    divergence = divergence_of(guide, parameters)
    assert divergence is not None
    variance = 0.01
    if isinstance(guide, AutoLowRankMultivariateNormal):
        variance = 1 / guide.get_posterior().precision_matrix[3, 3].item()
    assert divergence(start, moved) == pytest.approx(0.04 / variance)
    assert same(dict(parameters.by_name), start)


def test_weights_of_all_rows_are_those_of_calls() -> None:
    for guide in (MixtureGuide(sixteen, 3), RecursiveMixtureGuide(sixteen, 3)):
        with torch.no_grad():
            for parameter in (guide.prepare(), *guide.parameters())[1:]:
                parameter += 0.3 * torch.randn_like(parameter)
        if isinstance(guide, RecursiveMixtureGuide):
            guide.progress[3 + 2] = 1
        (found,) = guide.free_posteriors() or ()
        assert torch.allclose(found.log_weights.exp(), guide.component_weights())
        pyro.clear_param_store()
