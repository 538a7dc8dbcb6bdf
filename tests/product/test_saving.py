"""Every guide, loss and prior of the package saved, loaded, copied, converted and resumed.

Two objects are the same when they draw the same under one seed, have the same density, and take the
same next training step: its loss, and a gradient for every parameter.
"""

import copy
import gc
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, autoguide
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_recursive
from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MAPA_ELBO,
    MISELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    SIWAE_ELBO,
    AmortizedGuide,
    ExemplarPrior,
    MAPAGuide,
    MixtureGuide,
    MultiSampleELBO,
    RecursiveMixture_ELBO,
    SemiAmortizedGuide,
    Stratified_ELBO,
    VampPrior,
    empirical,
    fit,
)
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.mapa import EncodedCodes, FreeCodes, GridCodes, PseudoInputCodes
from tests.models import Row, small
from tests.models.guides import KINDS, Kind, Setting, density_at, no_guide, quiet

ROWS, LATENTS = 4, 2
OF_PYRO = ("mixture_auto_normal", "mixture_auto_diagonal", "mapa_rest")


# --- A model with a network of its own, and a guide of every kind for it


class Model(nn.Module):
    """A decoder of two latents a row, in the dtype of the data; ``has_rest`` adds a global one."""

    def __init__(self, has_rest: bool = False) -> None:
        super().__init__()
        self.decoder, self.has_rest = nn.Linear(LATENTS, 3), has_rest

    def forward(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        shift = 0.0
        if self.has_rest:
            shift = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            mean = self.decoder(z) + shift
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)


class ByHand(nn.Module):
    """A guide that is a module and samples the model's own site."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2 * LATENTS)

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def data() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)


def mapa(s: Setting) -> MAPAGuide:
    """Everything that a MAPAGuide can learn, and steps to warm up that are counted."""
    codes = FreeCodes(torch.randn(ROWS, LATENTS), learn_weights=True, scale=0.3, learn_scale=True)
    return MAPAGuide(s.model, codes, data(), top=1, samples=1, warm_up=5)


def mapa_rest(s: Setting) -> MAPAGuide:
    hidden = pyro.poutine.block(s.model, hide=["z"])
    rest = autoguide.AutoNormal(hidden)
    codes = EncodedCodes(nn.Linear(3, LATENTS), data(), scale=0.3)
    return MAPAGuide(s.model, codes, data(), site="z", rest=rest)


MAPA = [Kind("mapa", mapa), Kind("mapa_rest", mapa_rest)]
TABLE = [*KINDS, *MAPA]
KIND = {kind.name: kind for kind in TABLE}


@dataclass
class Program:
    """A model, a guide for it, and what they are called with."""

    model: Model
    guide: Any
    x: Tensor
    kind: Kind

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "guide": self.guide.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.guide.load_state_dict(state["guide"])

    @property
    def loss(self) -> Any:
        if self.kind.name.startswith("mapa"):
            return MAPA_ELBO()
        if self.kind.recursive:
            return RecursiveMixture_ELBO(2)
        if self.kind.mixture and not self.kind.name.startswith("refined"):
            return Stratified_ELBO(2)
        return Trace_ELBO(2)

    def svi(self, loss: Any) -> SVI:
        return SVI(self.model, self.guide, Adam({"lr": 0.05}), loss)

    def train(self, steps: int = 4) -> "Program":
        """Take a few steps; a recursive mixture is then in the middle of its growth."""
        svi = self.svi(self.loss)
        with quiet():
            for _ in range(steps):
                svi.step(self.x)
        return self

    def draws(self) -> dict[str, Tensor]:
        """Return draws under one seed, after a first call if there was none."""
        self.guide.eval()  # a table of refined rows moves in training
        self.guide.prepare(self.x)
        pyro.set_rng_seed(3)
        found = {name: value.detach() for name, value in self.guide(self.x).items()}
        self.guide.train()
        return found

    def outcome(self, has_density: bool = True) -> dict[str, Any]:
        """Return draws, densities, and the next training step; the state is as it was before."""
        state, draws = copy.deepcopy(self.state()), self.draws()
        found: dict[str, Any] = {"draws": draws}
        self.guide.eval()
        if has_density:
            found["density"] = density_at(self.guide, (self.x,), draws).detach()
        self.guide.train()
        parts = {"model": self.model, "guide": self.guide}
        for part in parts.values():
            part.zero_grad()
        pyro.set_rng_seed(4)
        with quiet():
            found["loss"] = self.loss.loss_and_grads(self.model, self.guide, self.x)
        for part in parts.values():
            for name, parameter in part.named_parameters():
                found[f"{type(part).__name__}.{name}"] = parameter.grad
        self.load(state)
        return found


def program(name: str, seed: int = 0) -> Program:
    """Build model and guide, all new."""
    pyro.set_rng_seed(seed)
    model = Model(has_rest=name == "mapa_rest")
    row = Row("saved", lambda: (model, no_guide), args=lambda: (data(),))
    x = data()
    return Program(model, KIND[name].build(Setting(row, model, ByHand(), (x,))), x, KIND[name])


def has_density(name: str) -> bool:
    return name != "mapa_rest"  # given one draw of the other latents, not another


def forget() -> None:
    """Do as if the process had just begun."""
    pyro.clear_param_store()


def through_a_file(state: Any, path: Path, **options: Any) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True, **options)


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def each(names: Iterable[str], *quick: str) -> Any:
    """Take some kinds in the quick loop, and mark the others."""
    marks = [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in names]
    return pytest.mark.parametrize("name", marks)


# --- state_dict


@each(KIND, "mixture_unlike", "mapa")
def test_state_dict(name: str, tmp_path: Path) -> None:
    """Into a guide that is prepared or has run; before that it works, or says what to do."""
    trained = program(name).train()
    state = through_a_file(trained.state(), tmp_path / "state.pt")
    expected = trained.outcome(has_density(name))
    assert sum(value is not None for value in expected.values()) > 3
    lazy = set(trained.guide.state_dict()) - set(program(name).guide.state_dict())
    del trained
    for ready in ("as made", "prepared", "called"):
        forget()
        fresh = program(name, seed=1)
        if ready == "prepared":
            fresh.guide.prepare(fresh.x)
        if ready == "called":
            fresh.guide(fresh.x)
        if ready == "as made" and lazy:
            with pytest.raises(RuntimeError, match=r"not seen its model.*guide\.prepare\(\*args\)"):
                fresh.load(state)
        else:
            fresh.load(state)
            same(fresh.outcome(has_density(name)), expected)
        del fresh


def test_state_dict_inside_of_another_module() -> None:
    """One that holds both, of which the guide does not know."""
    trained = program("table").train()
    both = nn.ModuleDict({"own": trained.model, "their": trained.guide})
    fresh = program("table", seed=1)
    other = nn.ModuleDict({"own": fresh.model, "their": fresh.guide})
    with pytest.raises(RuntimeError, match=r"has no 'their\.free_local_unconstrained'.*prepare"):
        other.load_state_dict(both.state_dict())
    fresh.guide.prepare(fresh.x)
    other.load_state_dict(both.state_dict())
    same(fresh.guide.state_dict(), trained.guide.state_dict())


def test_growth_goes_on_where_it_was(tmp_path: Path) -> None:
    trained = program("recursive_encoders").train()
    state = through_a_file(trained.state(), tmp_path / "state.pt")
    expected = [trained.guide.stage, trained.guide.members]
    assert trained.guide.stage.kind == "refine" and trained.guide.members == (0, 1)
    del trained
    forget()
    fresh = program("recursive_encoders", seed=1)
    fresh.guide.prepare(fresh.x)
    fresh.load(state)
    assert [fresh.guide.stage, fresh.guide.members] == expected


def test_warm_up_is_counted_on(tmp_path: Path) -> None:
    trained = program("mapa").train(3)
    fresh = program("mapa", seed=1)
    fresh.guide.prepare(fresh.x)
    fresh.guide.load_state_dict(trained.guide.state_dict())
    assert int(fresh.guide.steps_to_warm_up) == 2


def test_parameters_of_a_function_are_in_the_store_alone() -> None:
    """A guide that is no module has its parameters in Pyro's store, so that no state has them."""

    def by_hand(x: Tensor) -> None:
        loc = pyro.param("loc", x.new_ones(LATENTS))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    model = Model()
    encoder = AmortizedGuide(model, nn.Linear(3, 2 * LATENTS))
    guide = MixtureGuide(model, [by_hand, encoder], weights="shared")
    guide(data())
    assert "loc" in pyro.get_param_store()
    assert not any("loc" in key.split(".")[-1] for key in guide.state_dict() if "local" not in key)


# --- Pyro's store


STORED = ("table", "encoder", "mixture_encoders", "mixture_auto_diagonal", "recursive", "refined")


@each([*STORED, "mapa"], "encoder")
def test_a_state_wins_over_what_an_old_guide_left(name: str) -> None:
    """In one process, where nobody has cleared the store."""
    trained = program(name).train()
    state = copy.deepcopy(trained.state())
    expected = trained.draws()
    trained.train()
    del trained
    gc.collect()
    fresh = program(name, seed=1)
    fresh.guide.prepare(fresh.x)
    fresh.guide.load_state_dict(state["guide"])
    fresh.model.load_state_dict(state["model"])
    same(fresh.draws(), expected)
    before = copy.deepcopy(fresh.guide.state_dict())
    fresh.train()  # and what is trained from here on is what runs
    after = fresh.guide.state_dict()
    assert any((after[key] != before[key]).any() for key in after)


@each(STORED, "mixture_auto_diagonal", "recursive")
def test_a_state_may_be_assigned(name: str) -> None:
    """``assign=True`` gives a guide other tensors than those that the store has."""
    trained = program(name).train()
    state = copy.deepcopy(trained.state())
    expected = trained.draws()
    trained.train(2)
    trained.model.load_state_dict(state["model"])
    trained.guide.load_state_dict(copy.deepcopy(state["guide"]), assign=True)
    same(trained.draws(), expected)
    trained.train(2)
    moved = trained.guide.state_dict()
    assert any((moved[key] != value).any() for key, value in state["guide"].items())


@each(STORED, "mixture_auto_diagonal", "recursive")
def test_a_store_loaded_under_a_running_guide(name: str, tmp_path: Path) -> None:
    """The guide takes what was loaded, all of it, and not Pyro's own parameters alone."""
    trained = program(name).train()
    draws = trained.draws()
    pyro.get_param_store().save(tmp_path / "store")
    trained.train(2)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    found = trained.draws()
    if not name.startswith(("recursive", "refined")):  # buffers, and the model's share
        same(found, draws)
    stored = pyro.get_param_store()
    for key, parameter in trained.guide.named_parameters(trained.guide.name):
        names = {each.replace("$$$", "."): each for each in stored}
        own = names.get(key.removesuffix("_unconstrained"))
        assert own is None or stored[own].unconstrained() is parameter, key


@each([n for n in STORED if n not in ("recursive", "refined")], "table", "mixture_encoders")
def test_a_new_guide_takes_what_the_store_has(name: str, tmp_path: Path) -> None:
    """What Pyro's store saved goes to a new guide of the same name, and is trained from there."""
    trained = program(name).train()
    expected = trained.outcome()
    pyro.get_param_store().save(tmp_path / "store")
    del trained
    forget()
    pyro.get_param_store().load(tmp_path / "store")
    fresh = program(name)
    fresh.guide(fresh.x)
    fresh.model(fresh.x)
    same(fresh.draws(), expected["draws"])
    before = copy.deepcopy(fresh.guide.state_dict())
    fresh.train(1)
    assert any((value != before[key]).any() for key, value in fresh.guide.state_dict().items())


def test_a_store_is_read_without_running_code(tmp_path: Path) -> None:
    """Pyro's ``load`` unpickles whatever a file holds; torch reads it safely, told the classes."""
    trained = program("mixture_auto_normal").train()
    expected = trained.draws()
    torch.save(pyro.get_param_store().get_state(), tmp_path / "store")
    del trained
    forget()
    with pytest.raises(pickle.UnpicklingError, match="constraints"):
        torch.load(tmp_path / "store", weights_only=True)
    known = [type(constraints.real), type(dist.constraints.softplus_positive)]
    with torch.serialization.safe_globals(known):
        pyro.get_param_store().set_state(torch.load(tmp_path / "store", weights_only=True))
    same(program("mixture_auto_normal", seed=1).draws(), expected)


@each(["table", "encoder", "mixture_unlike", "recursive_encoders"], "encoder", "table")
def test_without_the_store(name: str) -> None:
    """With parameters that are the module's alone, as Pyro's ``module_local_params`` has them."""

    with pyro.settings.context(module_local_params=True), quiet():
        trained = program(name)
        trained.guide.prepare(trained.x)
        optimizer = torch.optim.Adam(trained.guide.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = trained.loss.differentiable_loss(trained.model, trained.guide, trained.x)
            loss.backward()
            optimizer.step()
        expected = trained.draws()
        fresh = program(name, seed=1)
        fresh.guide.prepare(fresh.x)
        fresh.load(trained.state())
        same(fresh.draws(), expected)
        for how in HOW.values():
            copied = Program(trained.model, how(trained.guide), trained.x, trained.kind)
            same(copied.draws(), expected)
        assert not any(key.startswith(trained.guide.name) for key in pyro.get_param_store())


# --- Copied and pickled


def pickled(guide: Any) -> Any:
    return pickle.loads(pickle.dumps(guide))


HOW = {"deepcopy": copy.deepcopy, "pickle": pickled}


@each([name for name in KIND if name not in OF_PYRO], "refined_by_network")
@pytest.mark.parametrize("how", HOW)
def test_copies(how: str, name: str) -> None:
    """Before the first call and in the middle of training; the original goes on as it was."""
    for steps in (0, 4):
        forget()
        original = program(name)
        if steps:
            original.train(steps)
        copied = Program(original.model, HOW[how](original.guide), original.x, KIND[name])
        if how == "pickle":
            copied.guide.attach(original.model)
        if not steps:
            copied.guide.prepare(copied.x)
            original.guide.prepare(original.x)
            copied.guide.load_state_dict(original.guide.state_dict())
        expected = original.outcome()
        with pyro.get_param_store().scope():
            same(copied.outcome(), expected)
            state = copy.deepcopy(original.model.state_dict())  # the one model of both
            copied.train(1)
        original.model.load_state_dict(state)
        same(original.outcome(), expected)
        del original, copied


@each([name for name in KIND if name not in OF_PYRO], "encoder", "mapa")
def test_pickles_say_what_is_missing(name: str) -> None:
    """The model: an unprepared guide has to see it, and so has one that asks it in each call."""
    one = program(name)
    loaded = pickled(one.guide)
    with pytest.raises(RuntimeError, match=r"without its model.*call guide\.attach\(model\)"):
        loaded(one.x)
    assert one.guide(one.x)["z"].shape == (ROWS, LATENTS)


@each(OF_PYRO, "mixture_auto_normal", "mapa_rest")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("steps", [0, 1])
def test_guides_of_pyro_are_refused_unharmed(steps: int, how: str, name: str) -> None:
    """Pyro's autoguides, asked for their state, forget the model themselves."""
    one = program(name)
    if steps:
        one.train(steps)
    before = [part for part in one.guide.modules() if isinstance(part, autoguide.AutoGuide)]
    with pytest.raises(TypeError, match=r"Pyro's Auto\w+ cannot be copied.*state_dict\(\)"):
        HOW[how](one.guide)
    assert before and all(part.model is not None for part in before)
    one.train(1)


def test_functions_among_the_arguments_are_named() -> None:
    """A lambda that a guide needs in each call is copied; pickle says which it cannot find."""
    model = Model()
    guide = AmortizedGuide(model, nn.Linear(3, 4), inputs=lambda x: x)
    assert copy.deepcopy(guide)(data())["z"].shape == (ROWS, LATENTS)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(guide)


@pytest.mark.parametrize("how", HOW)
def test_copies_tell_minibatches_from_all_data(how: str) -> None:
    """The scale of a minibatch is the model's to say, and no copy may do without."""

    model = partial(small.normal_rows, size=6)
    guide = AmortizedGuide(model, nn.Linear(1, 2))
    guide.prepare(torch.randn(6, 1))
    copied = HOW[how](guide)
    if how == "pickle":
        with pytest.raises(RuntimeError, match=r"without its model.*attach\(model\)"):
            copied(torch.randn(3, 1))
        copied.attach(model)
    trace = pyro.poutine.trace(copied).get_trace(torch.randn(3, 1))
    assert trace.nodes["z"]["scale"] == 2.0


# --- Other dtypes and devices


@each([name for name in KIND if name != "mapa_rest"], "recursive_encoders")
def test_dtypes(name: str, tmp_path: Path) -> None:
    """A file of float32 fills a guide of float64, which stays so; and one of float32 runs in it."""
    trained = program(name).train()
    expected = trained.outcome()
    state = {part: {k: _narrow(v) for k, v in s.items()} for part, s in trained.state().items()}
    del trained
    forget()
    wide = program(name, seed=1)
    wide.guide.prepare(wide.x)
    wide.load(through_a_file(state, tmp_path / "narrow.pt", map_location="cpu"))
    assert {p.dtype for p in wide.guide.parameters()} == {torch.float64}
    torch.testing.assert_close(
        density_at(wide.guide.eval(), (wide.x,), expected["draws"]).detach(),
        expected["density"],
        rtol=1e-4,
        atol=1e-4,
    )
    wide.guide(wide.x)  # has parameters in the store now, which are to follow
    wide.guide.train().float()
    wide.model.float()
    narrow = Program(wide.model, wide.guide, wide.x.float(), wide.kind)
    assert {p.dtype for p in narrow.guide.parameters()} == {torch.float32}
    found = narrow.outcome(has_density=False)
    assert {value.dtype for value in found["draws"].values()} == {torch.float32}
    assert {v.dtype for v in found.values() if isinstance(v, Tensor)} == {torch.float32}
    narrow.train(1)


def _narrow(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


@pytest.mark.cuda
@pytest.mark.parametrize("name", [n for n in KIND if n not in ("mapa_rest", "mixture_auto_normal")])
def test_devices(name: str, tmp_path: Path) -> None:
    """From one device to the other, by a file and by ``to``."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    trained = program(name).train()
    state = through_a_file(trained.state(), tmp_path / "cpu.pt", map_location="cuda")
    expected = trained.outcome()
    del trained
    forget()
    fresh = program(name, seed=1)
    fresh.guide.prepare(fresh.x)
    fresh.model.to("cuda"), fresh.guide.to("cuda")
    fresh.load(state)
    there = Program(fresh.model, fresh.guide, fresh.x.to("cuda"), fresh.kind)
    drawn = {key: value.to("cuda") for key, value in expected["draws"].items()}
    found = density_at(there.guide.eval(), (there.x,), drawn)
    torch.testing.assert_close(found.cpu().detach(), expected["density"], rtol=1e-6, atol=1e-6)
    there.guide.train()
    there.train(2)
    back = through_a_file(there.state(), tmp_path / "cuda.pt", map_location="cpu")
    del fresh, there
    forget()
    home = program(name, seed=2)
    home.guide.prepare(home.x)
    home.load(back)
    assert {p.device.type for p in home.guide.parameters()} == {"cpu"}
    home.train(1)


# --- Resumed by fit


@pytest.mark.filterwarnings("ignore:Training has ended with")
@each(KIND, "refined_table")
def test_fit_resumes(name: str, tmp_path: Path) -> None:
    """Three epochs in two runs end where three in one run do, bit for bit."""

    def run(path: Path, epochs: int, **options: Any) -> dict[str, Any]:
        forget()
        one = program(name)
        optimizer = partial(torch.optim.Adam, lr=0.05)
        options |= {"checkpoint": path, "progress": False, "seed": 1, "optimizer": optimizer}
        with quiet():
            fit(one.model, one.guide, one.x, loss=one.loss, epochs=epochs, **options)
        return copy.deepcopy(one.state())

    expected = run(tmp_path / "whole.pt", 3)
    run(tmp_path / "parts.pt", 1)
    same(run(tmp_path / "parts.pt", 3, resume=True), expected)


# --- Losses

LOSSES: dict[str, Callable[[], Any]] = {
    "MultiSampleELBO": lambda: MultiSampleELBO(num_particles=2),
    "IWAE_ELBO": lambda: IWAE_ELBO(4, estimator="dreg"),
    "MIWAE_ELBO": lambda: MIWAE_ELBO(2, 2),
    "PIWAE_ELBO": lambda: PIWAE_ELBO(2, 2),
    "CIWAE_ELBO": lambda: CIWAE_ELBO(4),
    "CIWAE_ELBO, learned": lambda: CIWAE_ELBO(4, learn_beta=True),
    "MISELBO": lambda: MISELBO(2),
    "SIWAE_ELBO": lambda: SIWAE_ELBO(2),
    "Stratified_ELBO": lambda: Stratified_ELBO(2),
    "RecursiveMixture_ELBO": lambda: RecursiveMixture_ELBO(2, update="alternating"),
    "MAPA_ELBO": MAPA_ELBO,
}
GUIDE_OF = {"MISELBO": "mixture_encoders", "RecursiveMixture_ELBO": "recursive_encoders"}
GUIDE_OF |= {"SIWAE_ELBO": "mixture_encoders", "Stratified_ELBO": "mixture_encoders"}
GUIDE_OF |= {"MAPA_ELBO": "mapa"}


def step_of(loss: Any, one: Program) -> list[Any]:
    """Return a step's value and gradients, those of the loss too."""
    captured = pyro.poutine.trace(param_only=True)
    pyro.set_rng_seed(5)
    with captured as seen:
        value = loss.loss_and_grads(one.model, one.guide, one.x)
    parameters = [site["value"].unconstrained() for site in seen.trace.nodes.values()]
    found = [value, *(p.grad if p.grad is None else p.grad.clone() for p in parameters)]
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    """Copies and pickles of a trained loss go on alike; all but a learned beta remember nothing."""
    loss, one = LOSSES[name](), program(GUIDE_OF.get(name, "encoder"))
    before = pickle.dumps(loss)
    svi = one.svi(loss)
    for _ in range(3):
        svi.step(one.x)
    assert (pickle.dumps(loss) == before) is (name != "CIWAE_ELBO, learned")
    state = copy.deepcopy(one.state())
    expected = step_of(loss, one)
    for how in HOW.values():
        one.load(state)
        same(step_of(how(loss), one), expected)


REPRS = {
    "IWAE_ELBO": "num_estimates=1, num_particles=4, estimator='dreg'",
    "MIWAE_ELBO": "num_estimates=2, num_particles=2, estimator='pathwise'",
    "CIWAE_ELBO, learned": "num_particles=4, .*beta=0.5, learn_beta=True",
    "Stratified_ELBO": "num_estimates=1, num_particles=2, estimator='pathwise'",
    "RecursiveMixture_ELBO": r"num_particles=2, .*objective=Exact.*update='alternating'",
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_its_options(name: str) -> None:
    shown = repr(LOSSES[name]())
    assert re.fullmatch(rf"{name.split(',')[0]}\(.*num_particles=\d.*\)", shown)
    assert re.search(REPRS.get(name, ""), shown)
    assert "vectorize" not in shown and "global_latents" not in shown
    if name == "IWAE_ELBO":
        shown = repr(IWAE_ELBO(4, vectorize_particles=False, global_latents="elbo"))
        assert shown.endswith("vectorize_particles=False, global_latents='elbo')")


def test_a_learned_beta(tmp_path: Path) -> None:
    """Saved and loaded, in a new process and beside what the store still holds."""
    one, loss = program("encoder"), CIWAE_ELBO(4, learn_beta=True)
    one.guide.prepare(one.x)
    svi = one.svi(loss)
    for _ in range(3):
        svi.step(one.x)
    state = through_a_file(loss.state_dict(), tmp_path / "loss.pt")
    programs, trained = copy.deepcopy(one.state()), loss.beta.item()
    assert abs(trained - 0.5) > 1e-3
    expected = step_of(loss, one)
    svi.step(one.x)  # the store goes on
    with pytest.warns(UserWarning, match="already holds 'ciwae.beta'"):
        beside = CIWAE_ELBO(4, learn_beta=True)
    beside.load_state_dict(state)
    assert beside.beta.item() == trained
    del one, loss, svi
    forget()
    again, fresh = program("encoder", seed=1), CIWAE_ELBO(4, beta=0.2, learn_beta=True)
    fresh.load_state_dict(state)
    again.guide.prepare(again.x)
    again.load(programs)
    same(sorted_step(step_of(fresh, again)), sorted_step(expected))


def sorted_step(step: list[Any]) -> list[Any]:
    """Order gradients by what they are: parameters are met in another order."""
    return [step[0], *sorted(step[1:], key=lambda each: (tuple(each.shape), each.sum().item()))]


def test_states_of_other_losses_are_refused() -> None:
    fixed, learned = CIWAE_ELBO(4, beta=0.3), CIWAE_ELBO(4, learn_beta=True)
    assert fixed.state_dict() == {}
    fixed.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"a fixed beta of 0\.3: make it with learn_beta=True"):
        fixed.load_state_dict(learned.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        learned.load_state_dict({})


# --- Priors and codes

MODULES: dict[str, Callable[[], nn.Module]] = {
    "VampPrior": lambda: VampPrior(
        nn.Linear(3, 4), torch.rand(5, 3), bounds=(0, 1), learn_weights=True
    ),
    "ExemplarPrior": lambda: ExemplarPrior(nn.Linear(3, 4), data()),
    "EncodedCodes": lambda: EncodedCodes(nn.Linear(3, 2), data(), scale=0.5, learn_scale=True),
    "FreeCodes": lambda: FreeCodes(torch.randn(5, 2), learn_weights=True),
    "GridCodes": lambda: GridCodes(3, 2),
    "PseudoInputCodes": lambda: PseudoInputCodes(nn.Linear(3, 2), torch.rand(5, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_priors_and_codes(name: str, tmp_path: Path) -> None:
    """Saved, copied and pickled: the same distribution, or the same codes, weights and scale."""

    def found(module: Any) -> list[Tensor | None]:
        if isinstance(module, empirical.Codes):
            return [module(), module.log_weights, module.scale]
        return [module().log_prob(torch.ones(2))]

    trained, fresh = MODULES[name](), MODULES[name]()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    fresh.load_state_dict(through_a_file(trained.state_dict(), tmp_path / "state.pt"))
    for other in (fresh, copy.deepcopy(trained), pickled(trained)):
        same(found(other), found(trained))
        assert {p.dtype for p in other.float().parameters()} <= {torch.float32}


# --- Nothing is missing


def test_every_public_class_is_here() -> None:
    """A guide, a loss, a prior or a kind of codes that is not in a table above."""
    public = [getattr(pyro_recursive, name) for name in pyro_recursive.__all__]
    public += [getattr(empirical, name) for name in empirical.__all__]
    classes = {each for each in public if isinstance(each, type)}
    guides = {type(program(kind.name).guide) for kind in TABLE}
    assert {each for each in classes if issubclass(each, LatentGuide)} <= guides
    losses = {type(make()) for make in LOSSES.values()}
    assert {each for each in classes if issubclass(each, ELBO)} <= losses
    modules = {type(make()) for make in MODULES.values()} | guides | {empirical.Codes}
    modules.add(empirical.RecoveredPrior)  # by kind in the tests of recovery
    assert {each for each in classes if issubclass(each, nn.Module)} <= modules
    assert SemiAmortizedGuide in guides  # whatever is public, this stays
