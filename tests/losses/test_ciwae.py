"""CIWAE's learned beta: the criterion against quadrature, and the schemes that must fail."""

from functools import partial
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_recursive import CIWAE_ELBO, bounds
from pyro_recursive.bounds.estimators import ESTIMATORS
from pyro_recursive.losses import ciwae
from pyro_recursive.losses.ciwae import optimal_beta
from tests.models.small import conjugate_guide, conjugate_model
from tests.oracles.quadrature import conjugate, normal_grid


def exact_beta(size: int, num_estimates: int, estimator: str) -> float:
    """Return the minimiser of the mean squared error by quadrature, for the guide's location.

    With M estimates averaged, covariance and variance are those of one estimate over M.
    """
    grid = normal_grid(size, nodes=48)
    model = conjugate(grid.eps)
    z = 0.2 + 0.9 * grid.eps[None]
    # Pathwise, the density moves with its location: only log p has a derivative there.
    along = model.path if estimator == "dreg" else model.path - (z - 0.2) / 0.9**2
    gradients = []
    for bound in (bounds.iwae, bounds.elbo):
        path = ESTIMATORS[estimator](bound, model.log_weights).path
        assert path is not None
        gradients.append((path * along).sum((0, 1)))
    iwae, difference = gradients[0], gradients[1] - gradients[0]

    def mean(values: torch.Tensor) -> float:
        return (values * grid.weight).sum().item()

    covariance = mean(iwae * difference) - mean(iwae) * mean(difference)
    variance = mean(difference**2) - mean(difference) ** 2
    return -covariance / num_estimates / (variance / num_estimates + mean(difference) ** 2)


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("vectorize", [True, False])
def test_criterion_is_the_mean_squared_error(size: int, estimator: str, vectorize: bool) -> None:
    """A thousand copies of one datum: the batch's estimate is the exact minimiser."""
    options = {"learn_beta": True, "num_estimates": 2, "vectorize_particles": vectorize}
    loss = CIWAE_ELBO(size, beta=0.4, estimator=estimator, **options)
    targets = torch.stack([_target(loss) for _ in range(20)])
    error = targets.std() / 20**0.5
    exact = min(max(exact_beta(size, 2, estimator), 0.0), 1.0)
    assert (exact == 0) == (estimator == "dreg")  # DReG leaves beta nothing to repair here
    assert abs(targets.mean() - exact) < 4.5 * error + 1e-3


def _target(loss: CIWAE_ELBO) -> torch.Tensor:
    """Return one batch's estimate, as a training step computes it."""
    seen: list[torch.Tensor] = []
    noting = lambda *args: seen.append(optimal_beta(*args)) or seen[0]  # noqa: E731
    with mock.patch.object(ciwae, "optimal_beta", noting):
        loss.differentiable_loss(conjugate_model, conjugate_guide)
    return seen[0]


def test_beta_is_stepped_towards_the_minimiser_and_the_bound_does_not_move_it() -> None:
    loss = CIWAE_ELBO(3, beta=0.9, learn_beta=True, num_estimates=2)
    value = loss.differentiable_loss(conjugate_model, conjugate_guide)
    beta = pyro.param("ciwae.beta")
    (gradient,) = torch.autograd.grad(value, beta.unconstrained())
    target = exact_beta(3, 2, "pathwise")
    slope = 0.9 * 0.1  # of the sigmoid
    assert gradient.item() == pytest.approx((0.9 - target) * slope, rel=0.1)


@pytest.mark.parametrize("start", [0.02, 0.98])
@pytest.mark.slow
def test_svi_learns_beta_from_either_side(start: float) -> None:
    """No boundary is approached by construction: both starts meet at the minimiser."""
    loss = CIWAE_ELBO(3, beta=start, learn_beta=True, num_estimates=2)

    def optim_args(name: str) -> dict[str, float]:
        return {"lr": 0.2 if name == "ciwae.beta" else 0.0}

    svi = SVI(conjugate_model, conjugate_guide, pyro.optim.Adam(optim_args), loss)
    for _ in range(150):
        svi.step()
    assert loss.beta.item() == pytest.approx(exact_beta(3, 2, "pathwise"), abs=0.05)


def test_beta_is_a_parameter_of_the_module() -> None:
    loss = CIWAE_ELBO(4, beta=0.3, learn_beta=True)
    module = loss(torch.nn.Identity(), torch.nn.Identity())
    assert "learned_beta.beta_unconstrained" in dict(module.named_parameters())
    assert "learned_beta.beta_unconstrained" in module.state_dict()
    assert loss.beta.item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(CIWAE_ELBO, 1, learn_beta=True), "num_particles >= 2.*got 1 and 1"),
        (partial(CIWAE_ELBO, 3, learn_beta=True), "or an even num_particles >= 4; got 1 and 3"),
        (partial(CIWAE_ELBO, 4, beta=0.0, learn_beta=True), r"inside \(0, 1\), got 0.0"),
        (partial(CIWAE_ELBO, 4, learn_beta=True, estimator="vimco"), "path derivatives"),
    ],
)
def test_refusals(make: partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_stored_beta_goes_first_and_says_so() -> None:
    first = CIWAE_ELBO(4, beta=0.9, learn_beta=True)
    assert first.beta.item() == pytest.approx(0.9)
    with pytest.warns(UserWarning, match=r"already holds 'ciwae\.beta' = 0\.9"):
        assert CIWAE_ELBO(4, beta=0.1, learn_beta=True).beta.item() == pytest.approx(0.9)
    assert CIWAE_ELBO(4, beta=0.1, learn_beta=True, name="b").beta.item() == pytest.approx(0.1)


def test_criterion_without_path_is_zero() -> None:
    """A guide without reparameterised parameters leaves beta where the estimate says nothing."""

    def guide() -> None:
        with pyro.plate("data", 1000):
            pyro.sample("z", dist.Normal(0.2, 0.9).expand([1000]))

    loss = CIWAE_ELBO(4, beta=0.3, learn_beta=True)
    loss.loss_and_grads(conjugate_model, guide)
