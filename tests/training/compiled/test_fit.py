"""`fit(compile=...)` takes the steps of `fit`."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, AmortizedGuide, fit
from pyro_recursive.training.history import History
from pyro_recursive.training.learner import Learner
from pyro_recursive.training.nan_search import NonFiniteError

X = torch.randn(64, 2, generator=torch.Generator().manual_seed(3)).double()
ADAM = partial(torch.optim.Adam, lr=0.02)
STEPS: dict[str, Any] = {"epochs": None, "steps": 14}  # they end within a pass


class Model(nn.Module):
    """Rows with one latent each; 16 draws a step are the same random numbers in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


class Root(Model):
    """Has no finite gradient at large data, of a finite loss."""

    def forward(self, x: Tensor) -> None:
        super().forward(x)
        pyro.factor("root", ((self.decoder.bias.sum() * (x.amax() < 10)) ** 2).sqrt())


def run(
    compile: Any,
    x: Tensor = X,
    encoder: bool = True,
    program: type[Model] = Model,
    **options: Any,
) -> tuple[History, Any]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = program()
    guide = AmortizedGuide(model, nn.Linear(2, 2) if encoder else None, plate="data")
    settings = {"epochs": 3, "batch_size": 16, "optimizer": ADAM, "seed": 4, "progress": False}
    loss = IWAE_ELBO(1, estimator="dreg")
    history = fit(model, guide, x, loss=loss, compile=compile, **settings | options)
    values = torch.cat([p.detach().reshape(-1) for m in (model, guide) for p in m.parameters()])
    return history, values


@pytest.mark.quick("plain", "clip_norm+kl_warmup", "epochs+steps+shuffle")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder": False},  # parameters by row
        {"clip_norm": 0.5, "kl_warmup": 3},
        {"batch_size": 48},  # the last batch has 16 rows
        {"batch_size": None, "epochs": 6},
        {"scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)},
        {"shuffle": False},
        STEPS,
        STEPS | {"batch_size": 48},
        STEPS | {"batch_size": 64},
        STEPS | {"steps": "auto", "max_steps": 14},
        STEPS | {"shuffle": False},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_compiled_fit_takes_the_steps_of_fit(options: dict[str, Any]) -> None:
    (expected, end), (found, same) = run(False, **options), run("graph", **options)
    torch.testing.assert_close(torch.tensor(found.loss), torch.tensor(expected.loss))
    torch.testing.assert_close(same, end, rtol=1e-9, atol=1e-11)
    assert (found.steps, found.rows) == (expected.steps, expected.rows)


def test_compiled_steps_go_on_after_a_resume(tmp_path: Any) -> None:
    options = STEPS | {"checkpoint": tmp_path / "run.pt", "resume": True}
    run("graph", **options | {"steps": 6})  # in the middle of the second pass
    _, found = run("graph", **options)
    torch.testing.assert_close(found, run(False, **STEPS)[1], rtol=1e-9, atol=1e-11)


def test_on_step_may_change_what_the_next_step_uses() -> None:
    def trained(compile: Any) -> Tensor:
        made: list[torch.optim.Optimizer] = []

        def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
            made.append(torch.optim.SGD(parameters, lr=0.001))
            return made[0]

        def on_step(step: int, loss: Tensor) -> None:
            for group in made[0].param_groups:
                group["lr"] = 0.001 / step
                for parameter in group["params"]:
                    parameter.data.clamp_(max=0.2)

        return run(compile, optimizer=optimizer, on_step=on_step)[1]

    torch.testing.assert_close(trained("graph"), trained(False), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_on_step_is_called_for_each_step() -> None:
    seen: list[tuple[int, float]] = []
    history, _ = run("graph", on_step=lambda step, loss: seen.append((step, loss.item())))
    assert [step for step, _ in seen] == list(range(1, 13))
    assert history.loss[2] == pytest.approx(sum(loss for _, loss in seen[8:]) / 4)


def test_a_block_stops_before_what_is_not_finite() -> None:
    x = X.clone()
    x[-1] = torch.inf  # the last rows of the first epoch
    with pytest.raises(NonFiniteError, match="step 4, epoch 1"):
        run("graph", x, epochs=1, shuffle=False)


@pytest.mark.slow
def test_a_block_stops_before_a_gradient_that_is_not_finite() -> None:
    x, made = torch.cat([X, X]), list[torch.optim.Optimizer]()
    x[-1] = 20.0

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        made.append(ADAM(parameters))
        return made[0]

    with pytest.raises(NonFiniteError, match="step 8, epoch 1: the gradient of"):
        run("graph", x, program=Root, epochs=1, shuffle=False, optimizer=optimizer)
    states = made[0].state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {7}


@pytest.mark.slow
def test_what_is_not_finite_in_one_of_two_graphs_is_reported() -> None:
    """The last batch has a graph of its own, of which all is finite."""
    x = X.clone()

    def on_step(step: int, loss: Tensor) -> None:
        if step == 8:  # both graphs were compared
            x[0] = 20.0

    options: dict[str, Any] = {"batch_size": 48, "shuffle": False, "check_every": 1000, "epochs": 6}
    with pytest.raises(NonFiniteError, match="epoch 5"):
        run("graph", x, program=Root, on_step=on_step, **options)


@pytest.mark.quick(1)
@pytest.mark.parametrize("check_every", [None, 100])
def test_what_does_not_recur_is_said_to_be_so(
    check_every: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = X.clone()
    x[-1] = 20.0
    monkeypatch.setattr(Learner, "_find_non_finite", lambda self, batch, state: [])
    with pytest.raises(NonFiniteError, match="other random numbers; compile=False names the site"):
        run("graph", x, program=Root, epochs=1, shuffle=False, check_every=check_every)


def test_engines_are_checked() -> None:
    with pytest.raises(ValueError, match=r"compile must be an engine .*'graph'.*, got 'fast'"):
        run("fast")


@pytest.mark.slow
def test_trained_parameters_have_storages_of_their_own() -> None:
    """A saved parameter that is a view has the whole storage of all."""
    pyro.clear_param_store()
    model = Model()
    guide = AmortizedGuide(model, nn.Linear(2, 2))
    settings = {"optimizer": ADAM, "batch_size": 16, "epochs": 3, "progress": False}
    fit(model, guide, X, loss=IWAE_ELBO(1), compile="graph", **settings)
    for parameter in [*model.parameters(), *guide.parameters()]:
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_checkpoints_hold_the_state_of_compiled_steps(tmp_path: Any) -> None:
    file = tmp_path / "run.pt"
    run("graph", checkpoint=file, epochs=2)
    states = torch.load(file, weights_only=False)["learner"]["states"]
    assert {int(state["step"]) for state in states[0]["state"].values()} == {8}
