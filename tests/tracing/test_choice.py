"""How samples run: the mode that is chosen for a program, and its errors and warnings."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform

from pyro_recursive import (
    IWAE_ELBO,
    MIWAE_ELBO,
    log_marginal,
)
from pyro_recursive.tracing.choice import _moved, choose
from pyro_recursive.tracing.program import Program, structure_of
from tests.models.one_sample import (
    CASE,
    Case,
    D,
    N,
    X,
    Y,
    each_case,
    looping,
    observe,
    weights,
    weights_guide,
)


@each_case
def test_the_mode_that_is_chosen(case: Case) -> None:
    program = Program(*case.programs(), case.args)
    structure = structure_of(program)
    choose(program, structure)
    assert structure.mode == case.mode, structure.cause
    assert bool(structure.cause) == (case.mode != "plate")


@pytest.mark.parametrize("init_scale", [0.5, 1e-3, 1e-8])
@pytest.mark.parametrize(
    "loc",
    [
        lambda b: b.flatten()[1],
        lambda b: b.detach().max(),
        lambda b: b[..., 0] / len(b),
        lambda b: b.sum(-1) / b.numel(),
        lambda b: b.sort(0).values.sum(),
        lambda b: X[:, b.argmax() % D],
    ],
)
def test_narrow_guides_hide_nothing(loc: Callable, init_scale: float) -> None:
    """The particles of the comparison differ, however near the guide's draws are."""
    model = partial(lambda: observe(loc(weights())))
    program = Program(model, AutoNormal(model, init_scale=init_scale))
    structure = structure_of(program)
    choose(program, structure)
    assert structure.mode == "vmap"


@pytest.mark.parametrize("of", [lambda z: z.max(), lambda z: z.prod(), lambda z: z[..., :1].sum(0)])
def test_discrete_latents_with_one_likely_value(of: Callable) -> None:
    """Draws that are all the same do not hide that a model mixes them."""

    def guide() -> Tensor:
        return pyro.sample("z", dist.Bernoulli(torch.tensor([1 - 1e-9])).to_event(1))

    model = partial(lambda: observe(of(guide()) * X[:, 0]))
    program = Program(model, partial(guide))
    structure = structure_of(program)
    choose(program, structure)
    assert structure.mode == "vmap"


@pytest.mark.parametrize("of", [lambda u: u.cumsum(0), lambda u: u.cumsum(-1)])
def test_values_that_a_guide_computes(of: Callable) -> None:
    """They have no density of their own, and the model fits a plate; the guide is exact here."""
    x, left = torch.tensor([1.0, -1.0, 0.5]), torch.tril(torch.ones(3, 3))
    covariance = left @ left.T

    def model() -> None:
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(3), covariance))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        fn = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        u = pyro.sample("u", fn, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(of(u), event_dim=1))

    exact = dist.MultivariateNormal(torch.zeros(3), covariance + torch.eye(3)).log_prob(x)
    found = log_marginal(model, guide, num_particles=4000, diagnostics=True)
    assert abs(found.log_marginal - exact) < 4 * found.standard_error < 0.2
    is_left = of(torch.ones(2, 3))[0, 1] == 1
    assert structure_of(Program(model, guide)).mode == ("vmap guide" if is_left else "plate")


@pytest.mark.parametrize("has_own_noise", [False, True])
def test_noise_outside_sites_is_not_shared(has_own_noise: bool) -> None:
    """Samples computed from it would be equal; noise in parameters, as dropout, may be shared."""

    def model() -> None:
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=Y)

    def guide() -> None:
        fn, noise = dist.Normal(0.8 * Y, 0.6), 0.6 * torch.randn(N)
        with pyro.plate("data", N):
            if has_own_noise:
                pyro.sample("z", dist.Normal(0.8 * Y + 0.1 * noise, 0.6))
            else:
                z = 0.8 * Y + noise
                pyro.sample("z", dist.Delta(z, log_density=fn.log_prob(z)))

    exact = dist.Normal(0.0, 1.25**0.5).log_prob(Y)
    found = log_marginal(model, guide, num_particles=4000, diagnostics=True)
    error = found.standard_error
    assert ((found.log_marginal - exact).abs() < 4 * error).all() and (error < 0.05).all()
    assert structure_of(Program(model, guide)).mode == ("plate" if has_own_noise else "vmap guide")


@pytest.mark.parametrize("rows", [3, 5, 7, 11])
def test_sizes_that_coincide(rows: int) -> None:
    """Rows as many as coefficients, particles, or the particles of the comparison."""
    x = 0.2 * torch.randn(rows, rows, generator=torch.Generator().manual_seed(rows))

    def model() -> None:
        observe(x @ weights(rows), torch.linspace(-1, 1, rows))

    guide = AutoNormal(model, init_scale=0.9)
    exact = dist.MultivariateNormal(torch.zeros(rows), torch.eye(rows) + x @ x.T)
    expected = exact.log_prob(torch.linspace(-1, 1, rows)).item()
    found = log_marginal(model, guide, num_particles=rows, diagnostics=True)
    assert structure_of(Program(model, guide)).mode == "vmap"
    many = log_marginal(model, guide, num_particles=50_000, diagnostics=True)
    assert abs(many.log_marginal.item() - expected) < 4 * many.standard_error.item() + 1e-3
    assert found.log_marginal < expected + 4


def test_the_first_entry_is_no_particle() -> None:
    """`b[0]` of one entry: IWAE with many samples is the exact evidence."""
    torch.manual_seed(3)
    x = torch.randn(30)
    y = 0.7 * x + torch.randn(30)

    def model() -> None:
        observe(weights(1)[0] * x, y)

    guide = AutoNormal(model, init_scale=0.5)
    covariance = torch.eye(30) + x[:, None] * x
    exact = dist.MultivariateNormal(torch.zeros(30), covariance).log_prob(y).item()
    found = log_marginal(model, guide, num_particles=20_000, diagnostics=True)
    assert abs(found.log_marginal.item() - exact) < 4 * found.standard_error.item() < 0.1


@pytest.mark.parametrize("name", ["branching", "recurrent", "buffer", "normalized", "guide"])
def test_loops_warn_once_and_are_right(name: str) -> None:
    case = CASE[name]
    programs = case.programs()
    with looping(case):
        IWAE_ELBO(4).loss(*programs)
    values = []
    for vectorize in (True, False):
        pyro.set_rng_seed(5)
        values.append(IWAE_ELBO(4, vectorize_particles=vectorize).loss(*programs))
    assert values[0] == values[1]


def test_errors_of_the_user_pass_unchanged() -> None:
    """In a run of one sample, in one pass, and under `torch.vmap`."""

    def program(text: str, when: Callable[[Tensor], bool]) -> Callable:
        def model() -> None:
            b = weights()
            if when(b):
                raise RuntimeError(text)
            observe(X @ b if "vmap" in text else (X * b).sum(-1))

        return model

    cases = {"boom": lambda b: True, "boom of many": lambda b: b.dim() > 2 and len(b) == 4}
    for text, when in cases.items():
        model = program(text, when)
        with pytest.raises(RuntimeError, match=f"^{text}\\b") as caught:
            IWAE_ELBO(4).loss(model, partial(weights_guide))
        assert not getattr(caught.value, "__notes__", [])


def test_values_near_the_draws_may_be_impossible() -> None:
    def guide() -> Tensor:
        return pyro.sample("z", dist.Normal(0.0, 1e-9))

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        left = torch.linalg.cholesky((1e-6 - z.abs())[..., None, None])
        observe(left[..., 0, 0] * X[:, 0])

    program = Program(model, guide)
    structure = structure_of(program)
    choose(program, structure)
    assert structure.mode == "plate"


def test_errors_of_shapes_have_a_note() -> None:
    def model() -> None:
        b = weights()
        observe((X * b).sum(-1) + (torch.zeros(7) if len(b) == 4 else 0.0))

    with pytest.raises(RuntimeError) as caught:
        IWAE_ELBO(4).loss(model, partial(weights_guide))
    (note,) = caught.value.__notes__
    assert note.startswith("All 4 samples run in one pass")


@pytest.mark.parametrize("what", ["data", "latent", "parameter"])
def test_invalid_values_raise_as_in_a_run_of_one_sample(what: str) -> None:
    """The density would be a finite number: nothing else could tell."""
    data, shift = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), torch.zeros(())

    def model() -> None:
        b = weights()
        rate = pyro.sample("rate", dist.Exponential(1.0))
        with pyro.plate("data", N):
            probs = (X @ b).sigmoid() + shift
            pyro.sample("y", dist.Bernoulli(probs * rate.clamp(1, 1)), obs=data)

    def guide() -> None:
        weights_guide()
        fn = dist.Normal(torch.tensor(5.0), 0.1)
        pyro.sample(
            "rate", fn.expand_by([]) if what != "latent" else dist.Normal(5 + 9 * shift, 0.1)
        )

    guide = partial(guide)
    assert math.isfinite(IWAE_ELBO(4).loss(model, guide))
    assert structure_of(Program(model, guide)).mode == "vmap"
    if what == "data":
        data[0] = 0.5
    else:
        shift.fill_(2.0 if what == "parameter" else -1.0)
    with pytest.raises(ValueError, match=r"Expected|At site"):
        IWAE_ELBO(4).loss(model, guide)


def test_a_model_that_branches_later_is_looped() -> None:
    """Also where the choice was made before; the warning names the cause."""
    branches = []

    def model() -> None:
        b = weights()
        observe(X @ b if not branches or b[0] > 0 else 0.0)

    guide = partial(weights_guide)
    IWAE_ELBO(4).loss(model, guide)
    branches.append(True)
    pyro.set_rng_seed(2)
    looped = IWAE_ELBO(4, vectorize_particles=False).loss(model, guide)
    pyro.set_rng_seed(2)
    with pytest.warns(UserWarning, match="one by one .4 runs"):
        found = IWAE_ELBO(4).loss(model, guide)
    assert math.isfinite(found) and math.isfinite(looped)


def test_misfits_are_told_before_errors_of_shapes() -> None:
    """Latents without a guide, a batch dim without a plate."""

    def unguided() -> None:
        observe(X @ (weights() + weights(name="c")))

    def unplated() -> None:
        pyro.sample("y", dist.Normal(X @ weights(), 1.0), obs=Y)

    for model, error, message in (
        (unguided, ValueError, "'c' is latent and the guide does not"),
        (unplated, ValueError, r"'y' has batch shape \(6,\), and dim -1 belongs to no plate"),
    ):
        for call in (IWAE_ELBO(4).loss, MIWAE_ELBO(2, 3).loss_and_grads, log_marginal):
            with pytest.raises(error, match=message):
                call(model, partial(weights_guide))


def test_indices_are_checked_where_values_are_on_another_device() -> None:
    """Five groups, and samples where ``b[group]`` takes the groups."""
    group = torch.tensor([0, 4, 1, 2, 3, 4])

    def model() -> None:
        observe(weights(5)[group])

    guide = AutoNormal(model)
    guide()
    causes = []
    for devices in ({"cpu"}, {"cpu", "cuda"}):
        program = Program(model, guide)
        structure = replace(structure_of(program), devices=frozenset(devices))
        choose(program, structure)
        assert structure.mode == "vmap"
        causes.append(structure.cause)
    assert "out of bounds for a dimension of size 3" not in causes[0]
    assert "IndexError (index 4 is out of bounds for a dimension of size 3)" in causes[1]


@pytest.mark.parametrize(("where", "failing"), [("guide", 2), ("model", 3)])
def test_no_mode_is_chosen_where_memory_runs_out(where: str, failing: int) -> None:
    """In the runs under the plate."""
    calls = {"guide": 0, "model": 0}

    def count(name: str) -> None:
        calls[name] += 1
        if name == where and calls[name] == failing:
            raise torch.OutOfMemoryError("out of memory")

    def model() -> None:
        count("model")
        observe((X * weights()).sum(-1))

    def guide() -> None:
        count("guide")
        weights_guide()

    program = Program(model, guide)
    structure = structure_of(program)
    with pytest.raises(torch.OutOfMemoryError):
        choose(program, structure)
    assert structure.mode is None
    choose(program, structure)
    assert structure.mode == "plate"


@pytest.mark.parametrize("transform", [[], [AffineTransform(0.0, 1.0)]])
def test_values_are_moved_within_the_support(transform: list[Any]) -> None:
    """Torch takes the support of an affine map for the real line."""
    fn = dist.TransformedDistribution(
        dist.Normal(torch.zeros(40), 1.0), [ExpTransform(), *transform]
    )
    value = 1e-3 * fn.sample()
    moved = _moved(value, fn)
    assert (moved > 0).all() and (moved != value).all()
    assert ((moved / value).log().abs() < 0.6).all()


@pytest.mark.parametrize("name", ["branching", "recurrent", "guide"])
def test_the_remedy_of_shapes_is_for_shapes(name: str) -> None:
    with pytest.warns(UserWarning, match="one by one") as caught:
        IWAE_ELBO(4).loss(*CASE[name].programs())
    text = str(caught[0].message)
    assert "Count dims" not in text and "vectorize_particles=False" in text
