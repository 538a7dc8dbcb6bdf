"""Every guide, loss and prior of the package saved, loaded, copied, converted and resumed.

Two objects are the same when they draw the same under one seed, have the same density, and take the
same next training step: its loss, and a gradient for every parameter.
"""

import copy
import gc
import pickle
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

import pyro_recursive
from pyro_recursive import (
    CIWAE_ELBO,
    MAPA_ELBO,
    MISELBO,
    AmortizedGuide,
    ExemplarPrior,
    MAPAGuide,
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
from tests.models.losses import LOSSES, OF_MIXTURES

ROWS, LATENTS = 4, 2
OF_PYRO = ("mixture_auto_normal", "mixture_auto_diagonal", "mapa_rest")


# A model with a network of its own, and a guide of every kind for it.


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
    rest = autoguide.AutoNormal(pyro.poutine.block(s.model, hide=["z"]))
    codes = EncodedCodes(nn.Linear(3, LATENTS), data(), scale=0.3)
    return MAPAGuide(s.model, codes, data(), site="z", rest=rest)


KIND = {kind.name: kind for kind in [*KINDS, Kind("mapa", mapa), Kind("mapa_rest", mapa_rest)]}
OWN = [name for name in KIND if name not in OF_PYRO]


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

    def loss(self) -> Any:
        if self.kind.name.startswith("mapa"):
            return MAPA_ELBO()
        if self.kind.recursive:
            return RecursiveMixture_ELBO(2)
        if self.kind.mixture and not self.kind.name.startswith("refined"):
            return Stratified_ELBO(2)
        return Trace_ELBO(2)

    def train(self, steps: int = 4, loss: Any = None) -> "Program":
        """Take a few steps; a recursive mixture is then in the middle of its growth."""
        svi = SVI(self.model, self.guide, Adam({"lr": 0.05}), loss or self.loss())
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
        # Of a MAPAGuide's other latents there is no density at given draws.
        if has_density and self.kind.name != "mapa_rest":
            found["density"] = density_at(self.guide.eval(), (self.x,), draws).detach()
            self.guide.train()
        both = nn.ModuleList([self.model, self.guide])
        both.zero_grad()
        pyro.set_rng_seed(4)
        with quiet():
            found["loss"] = self.loss().loss_and_grads(self.model, self.guide, self.x)
        found |= {name: parameter.grad for name, parameter in both.named_parameters()}
        self.load(state)
        return found


def program(name: str, seed: int = 0, *, is_prepared: bool = False) -> Program:
    """Build model and guide, all new."""
    pyro.set_rng_seed(seed)
    model = Model(has_rest=name == "mapa_rest")
    row = Row("saved", lambda: (model, no_guide), args=lambda: (data(),))
    x = data()
    one = Program(model, KIND[name].build(Setting(row, model, ByHand(), (x,))), x, KIND[name])
    if is_prepared:
        one.guide.prepare(x)
    return one


def forget() -> None:
    """Do as if the process had just begun."""
    gc.collect()
    pyro.clear_param_store()


def through_a_file(state: Any, path: Path, **options: Any) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True, **options)


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_moves(one: Program, state: dict[str, Tensor]) -> None:
    """What is trained from here on is what runs."""
    one.train(2)
    assert any((value != state[key]).any() for key, value in one.guide.state_dict().items())


def each(names: Iterable[str], *quick: str) -> Any:
    """Take some kinds in the quick loop, and mark the others."""
    marks = [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in names]
    return pytest.mark.parametrize("name", marks)


# state_dict


@each(KIND, "mapa", "recursive_encoders")
def test_state_dict(name: str, tmp_path: Path) -> None:
    """Into a guide that is prepared or has run; before that it works, or says what to do."""
    trained = program(name).train()
    state = through_a_file(trained.state(), tmp_path / "state.pt")
    expected = trained.outcome()
    assert sum(value is not None for value in expected.values()) > 3
    is_lazy = set(trained.guide.state_dict()) - set(program(name).guide.state_dict())
    del trained
    for ready in ("as made", "prepared", "called"):
        forget()
        fresh = program(name, seed=1, is_prepared=ready == "prepared")
        if ready == "called":
            fresh.guide(fresh.x)
        if ready == "as made" and is_lazy:
            with pytest.raises(RuntimeError, match="not seen its model"):
                fresh.load(state)
        else:
            fresh.load(state)
            same(fresh.outcome(), expected)
        del fresh


def test_state_dict_inside_of_another_module() -> None:
    """One that holds both, of which the guide does not know."""
    trained, fresh = program("table").train(), program("table", seed=1)
    both, other = (nn.ModuleDict({"own": p.model, "their": p.guide}) for p in (trained, fresh))
    with pytest.raises(RuntimeError, match=r"has no 'their\.free_local_unconstrained'.*prepare"):
        other.load_state_dict(both.state_dict())
    fresh.guide.prepare(fresh.x)
    other.load_state_dict(both.state_dict())
    same(fresh.guide.state_dict(), trained.guide.state_dict())


# Pyro's store

STORED = ("table", "encoder", "mixture_encoders", "mixture_auto_diagonal", "recursive", "refined")


@each([*STORED, "mapa"], "encoder", "mixture_auto_diagonal")
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_wins_over_what_the_store_has(assign: bool, name: str) -> None:
    """In a new guide beside what an old one left, or assigned: other tensors than the store's."""
    loaded = program(name).train()
    state, expected = copy.deepcopy(loaded.state()), loaded.draws()
    loaded.train(2)
    if not assign:
        del loaded
        gc.collect()
        loaded = program(name, seed=1, is_prepared=True)
    loaded.model.load_state_dict(state["model"])
    loaded.guide.load_state_dict(copy.deepcopy(state["guide"]), assign=assign)
    same(loaded.draws(), expected)
    assert_moves(loaded, state["guide"])


@each(STORED, "mixture_auto_diagonal", "recursive")
def test_a_store_loaded_under_a_running_guide(name: str, tmp_path: Path) -> None:
    """The guide takes what was loaded, all of it, and not Pyro's own parameters alone."""
    trained = program(name).train()
    draws, stored = trained.draws(), pyro.get_param_store()
    stored.save(tmp_path / "store")
    trained.train(2)
    stored.clear()
    stored.load(tmp_path / "store")
    found = trained.draws()
    if not name.startswith(("recursive", "refined")):  # buffers, and the model's share
        same(found, draws)
    names = {each.replace("$$$", "."): each for each in stored}
    for key, parameter in trained.guide.named_parameters(trained.guide.name):
        own = names.get(key.removesuffix("_unconstrained"))
        assert own is None or stored[own].unconstrained() is parameter, key


@each([n for n in STORED if n not in ("recursive", "refined")], "table", "mixture_encoders")
def test_a_new_guide_takes_what_the_store_has(name: str, tmp_path: Path) -> None:
    """What Pyro's store saved goes to a new guide of the same name, and is trained from there."""
    trained = program(name).train()
    expected = trained.draws()
    pyro.get_param_store().save(tmp_path / "store")
    del trained
    forget()
    pyro.get_param_store().load(tmp_path / "store")
    fresh = program(name)
    fresh.guide(fresh.x)
    same(fresh.draws(), expected)
    assert_moves(fresh, copy.deepcopy(fresh.guide.state_dict()))


def mapa_with_site(is_prepared: bool) -> Any:
    one = program("mapa", is_prepared=is_prepared)
    one.guide.site = "z"
    return one.guide


SUMMARIES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "median": (lambda: AmortizedGuide(Model()), lambda guide: guide.median(data())["z"]),
    "transform": (
        lambda: AmortizedGuide(Model()),
        lambda guide: guide.get_transform(data())(torch.zeros(ROWS * LATENTS)),
    ),
    "new prior": (partial(mapa_with_site, False), lambda guide: guide.recovered().prior().sample()),
    "prior": (partial(mapa_with_site, True), lambda guide: guide.recovered().prior().sample()),
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_summaries_of_a_new_guide_are_of_what_the_store_has(name: str, tmp_path: Path) -> None:
    """No call of the guide comes before, which would take the values."""
    make, summary = SUMMARIES[name]

    def found() -> Any:
        guide = make()
        if not (tmp_path / "store").exists():
            guide(data())
            for parameter in guide.parameters():
                parameter.data += 1.5
            pyro.get_param_store().save(tmp_path / "store")
        pyro.set_rng_seed(1)
        return summary(guide)

    expected = found()
    forget()
    pyro.get_param_store().load(tmp_path / "store")
    same(found(), expected)


def test_a_prior_needs_the_name_of_its_site() -> None:
    trained = program("mapa").train()
    fresh = program("mapa")
    fresh.guide.load_state_dict(trained.guide.state_dict())
    with pytest.raises(RuntimeError, match=r"guide\.prepare"):
        fresh.guide.recovered()


HOW: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda guide: pickle.loads(pickle.dumps(guide)),
}


@each(["table", "encoder", "mixture_unlike", "recursive_encoders"], "encoder", "table")
def test_without_the_store(name: str) -> None:
    """With parameters that are the module's alone, as Pyro's ``module_local_params`` has them."""
    with pyro.settings.context(module_local_params=True), quiet():
        trained = program(name, is_prepared=True)
        optimizer = torch.optim.Adam(trained.guide.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            trained.loss().differentiable_loss(trained.model, trained.guide, trained.x).backward()
            optimizer.step()
        expected = trained.draws()
        fresh = program(name, seed=1, is_prepared=True)
        fresh.load(trained.state())
        same(fresh.draws(), expected)
        for how in HOW.values():
            copied = Program(trained.model, how(trained.guide), trained.x, trained.kind)
            same(copied.draws(), expected)
        assert not any(key.startswith(trained.guide.name) for key in pyro.get_param_store())


# Copied and pickled


@each(OWN, "refined_by_network")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("steps", [0, 4])
def test_copies(steps: int, how: str, name: str) -> None:
    """Before the first call and in the middle of training; the original goes on as it was."""
    original = program(name)
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


class Owner(nn.Module):
    """A module that has a guide and the model whose decoder the guide runs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        model = Model()
        kinds: dict[str, Callable[[], Callable]] = {
            "method": lambda: self.model,
            "module": lambda: model,
            "partial": lambda: partial(call, model),
            "handled method": lambda: pyro.poutine.scale(pyro.poutine.lift(self.model, {}), 1.0),
        }
        inner = AmortizedGuide(kinds[how](), nn.Linear(3, 2 * LATENTS))
        # Before the model, so that it is copied first.
        self.guide = SemiAmortizedGuide(kinds[how](), inner, steps=1, seed=0)
        self.net = model

    def model(self, x: Tensor) -> None:
        self.net(x)


def call(model: Callable, x: Tensor) -> None:
    model(x)


@pytest.mark.parametrize("how", ["method", "module", "partial", "handled method"])
@pytest.mark.parametrize("part", ["owner", "guide"])
def test_copies_of_guide_and_model_belong_together(part: str, how: str) -> None:
    """The copy's guide runs the copied decoder; where the guide alone is copied, the original's."""
    original = Owner(how)
    original.guide.prepare(data())
    if part == "owner":
        copied = copy.deepcopy(copy.deepcopy(original))  # the first was not in use
        guide, decoder, other = copied.guide, copied.net.decoder, original.net.decoder
    else:
        guide, decoder = copy.deepcopy(original.guide), original.net.decoder
        other = copy.deepcopy(original).net.decoder
        assert guide.model == original.guide.model
    with pyro.get_param_store().scope():
        before = guide.refine(data()).params
        other.weight.data += 3.0
        same(guide.refine(data()).params, before)
        decoder.weight.data += 3.0
        assert (guide.refine(data()).params != before).any(-1).all()


@each(OWN, "encoder", "mapa")
def test_pickles_say_what_is_missing(name: str) -> None:
    """The model: an unprepared guide has to see it, and so has one that asks it in each call."""
    one = program(name)
    loaded = HOW["pickle"](one.guide)
    with pytest.raises(RuntimeError, match=r"without its model.*guide\.attach\(model\)"):
        loaded(one.x)
    assert one.guide(one.x)["z"].shape == (ROWS, LATENTS)


@each(["encoder", "mapa"], "encoder", "mapa")
def test_pickles_without_later_attributes_are_loaded(name: str) -> None:
    """As versions wrote them that had no such attributes."""
    trained = program(name).train(1)
    loaded = HOW["pickle"](trained.guide)
    for attribute in ("is_loaded", "is_computed", "_shared", "_warm"):
        vars(loaded).pop(attribute, None)
    loaded.attach(trained.model)
    with pyro.get_param_store().scope():
        Program(trained.model, loaded, trained.x, trained.kind).train(1)


@each(OF_PYRO, "mixture_auto_normal", "mapa_rest")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("steps", [0, 1])
def test_guides_of_pyro_are_refused_unharmed(steps: int, how: str, name: str) -> None:
    """Pyro's autoguides, asked for their state, forget the model themselves."""
    one = program(name).train(steps)
    before = [part for part in one.guide.modules() if isinstance(part, autoguide.AutoGuide)]
    with pytest.raises(TypeError, match=r"Auto(Diagonal)?Normal.*state_dict"):
        HOW[how](one.guide)
    assert before and all(part.model is not None for part in before)
    one.train(1)


@pytest.mark.parametrize("how", ["itself", *HOW])
def test_minibatches_are_told_from_all_data(how: str) -> None:
    """The scale of a minibatch is the model's to say, and no copy may do without."""
    model = partial(small.normal_rows, size=6)
    guide = AmortizedGuide(model, nn.Linear(1, 2))
    guide.prepare(torch.randn(6, 1))
    guide = HOW.get(how, lambda guide: guide)(guide)
    if how == "pickle":
        with pytest.raises(RuntimeError, match=r"attach\(model\)"):
            guide(torch.randn(3, 1))
        guide.attach(model)
    trace = pyro.poutine.trace(guide).get_trace(torch.randn(3, 1))
    assert trace.nodes["z"]["scale"] == 2.0
    assert guide(torch.randn(6, 1))["z"].shape == (6,)


def test_pickles_say_that_a_new_form_of_call_needs_the_model() -> None:
    """Which latents a call observes or masks is the model's to say."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide, x = AmortizedGuide(model, inputs=no_inputs), torch.randn(3)
    guide.prepare(x)
    guide = HOW["pickle"](guide)
    assert guide(x).keys() == {"z", "y"}
    with pytest.raises(RuntimeError, match=r"attach\(model\)"):
        guide(x, x)
    guide.attach(model)
    assert guide(x, x).keys() == {"z"}


def no_inputs(*args: Any) -> None:
    return None


# Other dtypes and devices


@each([name for name in KIND if name != "mapa_rest"], "recursive_encoders")
def test_dtypes(name: str, tmp_path: Path) -> None:
    """A file of float32 fills a guide of float64, which stays so; and one of float32 runs in it."""

    def narrow(value: Tensor) -> Tensor:
        return value.float() if value.is_floating_point() else value

    trained = program(name).train()
    expected = trained.outcome()
    state = {part: {k: narrow(v) for k, v in s.items()} for part, s in trained.state().items()}
    del trained
    forget()
    wide = program(name, seed=1, is_prepared=True)
    wide.load(through_a_file(state, tmp_path / "narrow.pt", map_location="cpu"))
    assert {p.dtype for p in wide.guide.parameters()} == {torch.float64}
    found = density_at(wide.guide.eval(), (wide.x,), expected["draws"]).detach()
    torch.testing.assert_close(found, expected["density"], rtol=1e-4, atol=1e-4)
    wide.guide(wide.x)  # has parameters in the store now, which are to follow
    wide.guide.train().float()
    wide.model.float()
    one = Program(wide.model, wide.guide, wide.x.float(), wide.kind)
    outcome = one.outcome(has_density=False)
    kept = [*one.guide.parameters(), *outcome.pop("draws").values(), *outcome.values()]
    assert {value.dtype for value in kept if isinstance(value, Tensor)} == {torch.float32}
    one.train(1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [n for n in KIND if n not in ("mapa_rest", "mixture_auto_normal")])
def test_devices(name: str, tmp_path: Path) -> None:
    """From one device to the other, by a file and by ``to``."""
    trained = program(name).train()
    state = through_a_file(trained.state(), tmp_path / "cpu.pt", map_location="cuda")
    expected = trained.outcome()
    del trained
    forget()
    there = program(name, seed=1, is_prepared=True)
    there.model.to("cuda"), there.guide.to("cuda")
    there.load(state)
    there.x = there.x.to("cuda")
    drawn = {key: value.to("cuda") for key, value in expected["draws"].items()}
    found = density_at(there.guide.eval(), (there.x,), drawn)
    torch.testing.assert_close(found.cpu().detach(), expected["density"], rtol=1e-6, atol=1e-6)
    there.guide.train()
    there.train(2)
    back = through_a_file(there.state(), tmp_path / "cuda.pt", map_location="cpu")
    del there
    forget()
    home = program(name, seed=2, is_prepared=True)
    home.load(back)
    assert {p.device.type for p in home.guide.parameters()} == {"cpu"}
    home.train(1)


# Resumed by fit


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
            fit(one.model, one.guide, one.x, loss=one.loss(), epochs=epochs, **options)
        return copy.deepcopy(one.state())

    expected = run(tmp_path / "whole.pt", 3)
    run(tmp_path / "parts.pt", 1)
    same(run(tmp_path / "parts.pt", 3, resume=True), expected)


# Losses

SAVED_LOSSES: dict[str, tuple[Callable[[], Any], str]] = {
    **{name: (partial(make, 1, 2), "encoder") for name, make in LOSSES.items()},
    "CIWAE_ELBO, learned": (lambda: CIWAE_ELBO(4, learn_beta=True), "encoder"),
    **{name: (partial(make, 1, 2), "mixture_encoders") for name, make in OF_MIXTURES.items()},
    "RecursiveMixture_ELBO": (
        lambda: RecursiveMixture_ELBO(2, update="alternating", joint=MISELBO(2)),
        "recursive_encoders",
    ),
    "MAPA_ELBO": (MAPA_ELBO, "mapa"),
}


def step_of(loss: Any, one: Program) -> list[Any]:
    """Return a step's value and gradients, those of the loss too, ordered by what they are."""
    pyro.set_rng_seed(5)
    with pyro.poutine.trace(param_only=True) as seen:
        value = loss.loss_and_grads(one.model, one.guide, one.x)
    parameters = [site["value"].unconstrained() for site in seen.trace.nodes.values()]
    found = [p.grad for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return [value, *sorted(found, key=lambda each: (tuple(each.shape), each.sum().item()))]


@pytest.mark.parametrize("name", SAVED_LOSSES)
def test_losses(name: str) -> None:
    """Copies and pickles of a trained loss go on alike; all but a learned beta remember nothing."""
    make, guide = SAVED_LOSSES[name]
    loss, one = make(), program(guide)
    before = pickle.dumps(loss)
    one.train(3, loss)
    assert (pickle.dumps(loss) == before) is (name != "CIWAE_ELBO, learned")
    state = copy.deepcopy(one.state())
    expected = step_of(loss, one)
    for how in HOW.values():
        one.load(state)
        same(step_of(how(loss), one), expected)


def test_a_learned_beta(tmp_path: Path) -> None:
    """Saved and loaded, in a new process and beside what the store still holds."""
    one, loss = program("encoder", is_prepared=True), CIWAE_ELBO(4, learn_beta=True)
    one.train(3, loss)
    state = through_a_file(loss.state_dict(), tmp_path / "loss.pt")
    programs, trained = copy.deepcopy(one.state()), loss.beta.item()
    assert abs(trained - 0.5) > 1e-3
    expected = step_of(loss, one)
    one.train(1, loss)  # the store goes on
    with pytest.warns(UserWarning, match="already holds 'ciwae.beta'"):
        beside = CIWAE_ELBO(4, learn_beta=True)
    beside.load_state_dict(state)
    assert beside.beta.item() == trained
    del one, loss
    forget()
    again, fresh = program("encoder", 1, is_prepared=True), CIWAE_ELBO(4, beta=0.2, learn_beta=True)
    fresh.load_state_dict(state)
    again.load(programs)
    same(step_of(fresh, again), expected)
    with pytest.raises(RuntimeError, match=r"fixed beta of 0\.3"):
        CIWAE_ELBO(4, beta=0.3).load_state_dict(state)


# Priors and codes

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
    for other in (fresh, *(how(trained) for how in HOW.values())):
        same(found(other), found(trained))
        assert {p.dtype for p in other.float().parameters()} <= {torch.float32}


def test_every_public_class_is_here() -> None:
    """A guide, a loss, a prior or a kind of codes that is not in a table above."""
    public = [getattr(pyro_recursive, name) for name in pyro_recursive.__all__]
    public += [getattr(empirical, name) for name in empirical.__all__]
    classes = {each for each in public if isinstance(each, type)}
    guides = {type(program(name).guide) for name in KIND}
    assert {each for each in classes if issubclass(each, LatentGuide)} <= guides
    losses = {type(make()) for make, _ in SAVED_LOSSES.values()}
    assert {each for each in classes if issubclass(each, ELBO)} <= losses
    modules = {type(make()) for make in MODULES.values()} | guides | {empirical.Codes}
    modules.add(empirical.RecoveredPrior)  # by kind in the tests of recovery
    assert {each for each in classes if issubclass(each, nn.Module)} <= modules
