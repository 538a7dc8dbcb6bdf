"""NumPyro's AutoDAIS and SteinVI, on the linear regressions of posteriordb in JAX.

AutoDAIS starts where other guides do, SteinVI between -2 and 2: particles must differ."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.methods.posteriordb import DRAWS, RATE, Run, Sampled
from benchmarks.tasks.posteriordb import Linear

SCALE = 0.1  # of the guides at their start
PARTICLES = 10  # of SteinVI, each a Gaussian
ETA = 1e-4  # step size of AutoDAIS at the start, at most ten times that
BRIDGES = 4  # densities between the guide and the posterior, in AutoDAIS


def applies(run: Any) -> bool:
    """Whether a posterior's model is written for NumPyro."""
    return isinstance(run.model, Linear)


def check_installed() -> None:
    """Raise ImportError without the extra."""
    if not find_spec("numpyro"):
        raise ImportError("AutoDAIS and SteinVI need NumPyro: pip install '.[numpyro]'")


def auto_dais(run: Run) -> Sampled:
    """Train AutoDAIS; each of its draws takes a gradient at each of several bridging densities."""
    jax, numpyro, model = _given(run)
    infer = numpyro.infer
    guide = infer.autoguide.AutoDAIS(
        model, K=BRIDGES, eta_init=ETA, eta_max=10 * ETA, **_start(run, numpyro)
    )
    optimizer = numpyro.optim.Adam(RATE)
    svi = infer.SVI(model, guide, optimizer, infer.Trace_ELBO(num_particles=DRAWS))
    fitted = svi.run(
        jax.random.PRNGKey(torch.initial_seed()), run.settings.steps, progress_bar=False
    )
    key = jax.random.PRNGKey(torch.initial_seed() + 1)
    shape = (run.settings.scored,)
    draws = guide.sample_posterior(key, fitted.params, sample_shape=shape)
    gradients = run.model.gradients + run.settings.steps * DRAWS * (BRIDGES + 1)
    return Sampled(_tensors(draws), gradients, {})


def stein(run: Run) -> Sampled:
    """Train Gaussians that repel each other by a kernel, one draw of each in a step."""
    jax, numpyro, model = _given(run)
    from numpyro.contrib.einstein import MixtureGuidePredictive, RBFKernel, SteinVI

    guide = numpyro.infer.autoguide.AutoNormal(model, init_scale=SCALE)
    options = {"num_stein_particles": PARTICLES, "num_elbo_particles": 1}
    svi = SteinVI(model, guide, numpyro.optim.Adam(RATE), RBFKernel(), **options)
    train, draw = jax.random.split(jax.random.PRNGKey(torch.initial_seed()))
    fitted = svi.run(train, run.settings.steps, progress_bar=False)
    sites: Any = {"guide_sites": svi.guide_sites, "return_sites": ["beta", "sigma"]}
    count = run.settings.scored
    predict = MixtureGuidePredictive(model, guide, fitted.params, num_samples=count, **sites)
    draws = predict(draw)
    gradients = run.model.gradients + run.settings.steps * PARTICLES
    return Sampled(_tensors({name: draws[name] for name in ("beta", "sigma")}), gradients, {})


METHODS: dict[str, Callable[[Run], Sampled]] = {"AutoDAIS": auto_dais, "SteinVI": stein}


def _given(run: Run) -> tuple[Any, Any, Callable[[], None]]:
    import jax
    import numpyro

    numpyro.enable_x64()
    assert isinstance(run.posterior.model, Linear)
    return jax, numpyro, partial(_model, run.posterior.model)


def _start(run: Run, numpyro: Any) -> dict[str, Any]:
    values = {name: numpyro_array(value) for name, value in run.start.items()}
    find = numpyro.infer.initialization.init_to_value
    return {"init_loc_fn": partial(find, values=values), "init_scale": SCALE}


def numpyro_array(value: torch.Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(value.detach().numpy())


def _model(linear: Linear) -> None:
    import numpyro

    dist: Any = numpyro.distributions

    class Flat(dist.ImproperUniform):
        """Has one draw, for SteinVI, which runs the model for the shapes of its sites."""

        def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
            shape = (*sample_shape, *self.batch_shape, *self.event_shape)
            return self.support.feasible_like(numpyro_array(torch.zeros(shape)))

    support = dist.constraints
    design, y = numpyro_array(linear.design), numpyro_array(linear.y)
    size = design.shape[-1]
    prior, sigma_prior = Flat(support.real_vector, (), (size,)), Flat(support.positive, (), ())
    if linear.prior is not None:
        scale = float(linear.prior.scale)
        prior = dist.Normal(0.0, scale).expand([size]).to_event(1)
    if linear.sigma_prior is not None:
        kind = getattr(dist, type(linear.sigma_prior).__name__)
        sigma_prior = kind(float(linear.sigma_prior.scale))
    beta, sigma = numpyro.sample("beta", prior), numpyro.sample("sigma", sigma_prior)
    numpyro.sample("y", dist.Normal(design @ beta, sigma).to_event(1), obs=y)


def _tensors(draws: Any) -> dict[str, torch.Tensor]:
    import numpy as np

    return {name: torch.from_numpy(np.array(value)) for name, value in draws.items()}
