"""Posteriors of the public collection posteriordb as Pyro models, and their reference draws.

`posteriordb` (Magnusson et al., BSD-3-Clause) has models, data, and draws of long NUTS runs. The
models here are written from their mathematics, for a default dtype of float64. A folder of the
collection, or a clone of it, is read from ``PYRO_RECURSIVE_DATA/posteriordb``.
"""

import json
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.tasks.reference import Model, Posterior, Values

VARIABLE = "PYRO_RECURSIVE_DATA"
# Where a folder of the collection and a clone of its repository have the files.
PLACES = {
    "posteriors": ("posteriors", "posterior_database/posteriors"),
    "data": ("data", "posterior_database/data/data"),
    "draws": ("draws", "posterior_database/reference_posteriors/draws/draws"),
}
STEPS_A_YEAR = 4  # of the Runge-Kutta method for lotka_volterra


def load(name: str, folder: Path | None = None) -> Posterior:
    """Return a posterior of `NAMES` with its draws; raise FileNotFoundError without its files."""
    folder = folder or Path(os.environ.get(VARIABLE, "")) / "posteriordb"
    about = json.loads(_path(folder, "posteriors", f"{name}.json").read_text())
    data = _unzipped(_path(folder, "data", f"{about['data_name']}.json.zip"))
    tensors = {key: _tensor(value) for key, value in data.items()}
    draws = _unzipped(_path(folder, "draws", f"{about['reference_posterior_name']}.json.zip"))
    reference = {
        parameter: _draws_of(parameter, count, draws)
        for parameter, count in about["dimensions"].items()
    }
    make, parameters = MODELS[name]
    return Posterior(name, make(tensors), reference, parameters)


def _path(folder: Path, kind: str, file: str) -> Path:
    found = [folder / place / file for place in PLACES[kind]]
    for path in found:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"posteriordb has no {file} in {found[0].parent}. Put a clone of it at "
        f"{VARIABLE}/posteriordb."
    )


def _unzipped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def _tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _draws_of(parameter: str, count: int, chains: list[dict[str, list[float]]]) -> Tensor:
    """Return the draws of all chains, ``[S]`` of a number and ``[S, count]`` of a vector."""
    names = [f"{parameter}[{i + 1}]" for i in range(count)]
    if count == 1 and parameter in chains[0]:
        return torch.cat([_tensor(chain[parameter]) for chain in chains])
    columns = [torch.cat([_tensor(chain[name]) for chain in chains]) for name in names]
    return torch.stack(columns, -1)


def _flat(name: str, support: Any, *shape: int) -> Tensor:
    return pyro.sample(name, dist.ImproperUniform(support, torch.Size(), torch.Size(shape)))


def _vector(name: str, prior: Any, size: int) -> Tensor:
    return pyro.sample(name, prior.expand([size]).to_event(1))


def _normal(loc: float, scale: float) -> Any:
    return dist.Normal(_tensor(loc), _tensor(scale))


def _half_cauchy(scale: float) -> Any:
    return dist.HalfCauchy(_tensor(scale))


def _observe(mean: Tensor, scale: Tensor, y: Tensor) -> None:
    """Observe the rows of ``y``, with a mean ``[..., N]`` and one scale ``[...]``."""
    pyro.sample("y", dist.Normal(mean, scale[..., None]).to_event(1), obs=y)


@dataclass(frozen=True)
class Linear:
    """A linear regression; flat priors where there are none."""

    design: Tensor
    y: Tensor
    prior: Any = None  # a normal one, of each coefficient
    sigma_prior: Any = None

    def __call__(self) -> None:
        size = self.design.shape[-1]
        if self.prior is None:
            beta = _flat("beta", constraints.real_vector, size)
        else:
            beta = _vector("beta", self.prior, size)
        if self.sigma_prior is None:
            sigma = _flat("sigma", constraints.positive)
        else:
            sigma = pyro.sample("sigma", self.sigma_prior)
        _observe(beta @ self.design.T, sigma, self.y)


def _columns(*columns: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


def ark(data: Values) -> Model:
    y, lags = data["y"], int(data["K"])
    past = torch.stack([y[lags - k : len(y) - k] for k in range(1, lags + 1)])

    def model() -> None:
        alpha = pyro.sample("alpha", _normal(0, 10))
        beta = _vector("beta", _normal(0, 10), lags)
        sigma = pyro.sample("sigma", _half_cauchy(2.5))
        _observe(alpha[..., None] + beta @ past, sigma, y[lags:])

    return model


def arma(data: Values) -> Model:
    y = data["y"]

    def model() -> None:
        mu = pyro.sample("mu", _normal(0, 10))
        phi, theta = (pyro.sample(name, _normal(0, 2)) for name in ("phi", "theta"))
        sigma = pyro.sample("sigma", _half_cauchy(2.5))
        mu, phi, sigma = mu[..., None], phi[..., None], sigma[..., None]
        before = torch.cat([mu, y[:-1].expand(*mu.shape[:-1], -1)], -1)
        error = recursion(y - mu - phi * before, -theta)
        pyro.factor("y", dist.Normal(0.0, sigma).log_prob(error).sum(-1))

    return model


def recursion(terms: Tensor, factor: Tensor) -> Tensor:
    """Return ``s_t = terms_t + factor s_(t-1)`` for terms ``[..., T]``, by log2 T passes."""
    total, lag = terms, 1
    while lag < terms.shape[-1]:  # total has the last lag terms
        total = total + factor[..., None] * pad(total[..., :-lag], (lag, 0))
        factor, lag = factor.square(), 2 * lag
    return total


def hmm_drive(data: Values) -> Model:
    """Speeds and distances to the hoop; the two states are summed out by a parallel scan."""
    observed, alpha = torch.stack([data["u"], data["v"]], -1), data["alpha"]

    def model() -> None:
        theta = [
            pyro.sample(f"theta{k + 1}", dist.Dirichlet(concentration))
            for k, concentration in enumerate(alpha)
        ]
        rates = []
        for name in ("phi", "lambda"):
            rate = _flat(name, constraints.positive_ordered_vector, 2)
            prior = dist.Normal(_tensor([0.0, 3.0]), 1.0).to_event(1)
            pyro.factor(f"prior of {name}", prior.log_prob(rate))
            rates.append(rate)
        each = dist.Exponential(torch.stack(rates, -1)).to_event(1)  # [..., states]
        first = each.log_prob(observed[0])
        states = dist.Exponential(torch.stack(rates, -1)[..., None, :, :]).to_event(1)
        chain = dist.DiscreteHMM(
            first, torch.stack(theta, -2)[..., None, :, :].log(), states, validate_args=False
        )
        pyro.factor("first", first.logsumexp(-1))
        pyro.sample("x", chain, obs=observed[1:])

    return model


def diamonds(data: Values) -> Model:
    design, y = data["X"][:, 1:], data["Y"]
    design = design - design.mean(0)

    def model() -> None:
        b = _vector("b", _normal(0, 1), design.shape[-1])
        intercept = pyro.sample("Intercept", dist.StudentT(_tensor(3), _tensor(8), _tensor(10)))
        sigma = _flat("sigma", constraints.positive)
        half = dist.StudentT(_tensor(3), _tensor(0), _tensor(10))
        pyro.factor("prior of sigma", half.log_prob(sigma))
        _observe(intercept[..., None] + b @ design.T, sigma, y)

    return model


def earnings(data: Values) -> Model:
    height, male = data["height"], data["male"]
    return Linear(_columns(height, male, height * male), data["earn"].log())


def schools(data: Values, centred: bool) -> Model:
    def model() -> None:
        mu = pyro.sample("mu", _normal(0, 5))
        tau = pyro.sample("tau", _half_cauchy(5))
        with pyro.plate("schools", len(data["y"])):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("theta_trans", _normal(0, 1))
            pyro.sample("y", dist.Normal(theta, data["sigma"]), obs=data["y"])

    return model


def _theta(values: Values) -> Values:
    mu, tau = (values[name].reshape(-1, 1) for name in ("mu", "tau"))
    return {**values, "theta": mu + tau * values["theta_trans"]}


def garch(data: Values) -> Model:
    y, first = data["y"], data["sigma1"]

    def model() -> None:
        mu = _flat("mu", constraints.real)
        alpha0 = _flat("alpha0", constraints.positive)
        alpha1 = _flat("alpha1", constraints.unit_interval)
        beta1 = _flat("beta1", constraints.interval(_tensor(0), 1 - alpha1))
        mu, alpha0, alpha1 = (value[..., None] for value in (mu, alpha0, alpha1))
        terms = alpha0 + alpha1 * (y[:-1] - mu).square()
        variances = torch.cat([first.square().expand_as(mu), terms], -1)
        scale = recursion(variances, beta1).sqrt()
        pyro.sample("y", dist.Normal(mu, scale).to_event(1), obs=y)

    return model


def gp_poisson(data: Values) -> Model:
    x, k = data["x"], data["k"]
    distance = (x[:, None] - x).square()

    def model() -> None:
        rho = pyro.sample("rho", dist.Gamma(_tensor(25), _tensor(4)))
        alpha = pyro.sample("alpha", dist.HalfNormal(_tensor(2)))
        noise = _vector("f_tilde", _normal(0, 1), len(x))
        f = _gp(rho, alpha, noise, distance)
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)

    return model


def _gp(rho: Tensor, alpha: Tensor, noise: Tensor, distance: Tensor) -> Tensor:
    rho, alpha = rho[..., None, None], alpha[..., None, None]
    covariance = alpha.square() * (-distance / (2 * rho.square())).exp()
    covariance = covariance + 1e-10 * torch.eye(len(distance)).to(covariance)
    return (torch.linalg.cholesky(covariance) @ noise[..., None]).squeeze(-1)


def _f(values: Values) -> Values:
    x = torch.arange(-10.0, 11.0, 2.0).to(values["rho"])
    rho, alpha = (values[name].reshape(-1) for name in ("rho", "alpha"))
    noise = values["f_tilde"].reshape(len(rho), -1)
    return {**values, "f": _gp(rho, alpha, noise, (x[:, None] - x).square())}


def lotka_volterra(data: Values) -> Model:
    """Hares and lynxes, by a Runge-Kutta method of order 4."""
    times, y_init, y = data["ts"], data["y_init"], data["y"]

    def model() -> None:
        priors = dist.Normal(_tensor([1, 0.05, 1, 0.05]), _tensor([0.5, 0.05, 0.5, 0.05]))
        theta = _flat("theta", constraints.independent(constraints.positive, 1), 4)
        pyro.factor("prior of theta", priors.log_prob(theta).sum(-1))
        z_init = _vector("z_init", dist.LogNormal(_tensor(math.log(10)), _tensor(1)), 2)
        sigma = _vector("sigma", dist.LogNormal(_tensor(-1), _tensor(1)), 2)
        rates = theta[..., 0::2] * _tensor([1.0, -1.0])
        effects = theta[..., 1::2] * _tensor([-1.0, 1.0])  # on hares by lynxes, on lynxes by hares
        log_z, now, path = z_init.log(), 0.0, []
        for end in times.tolist():
            step = (end - now) / STEPS_A_YEAR
            for _ in range(STEPS_A_YEAR):
                log_z = _runge_kutta(log_z, rates, effects, step)
            path.append(log_z)
            now = end
        start = dist.LogNormal(z_init.log(), sigma).to_event(1)
        pyro.sample("y_init", start, obs=y_init)
        seen = dist.LogNormal(torch.stack(path, -2), sigma[..., None, :]).to_event(2)
        pyro.sample("y", seen, obs=y)

    return model


def _runge_kutta(log_z: Tensor, rates: Tensor, effects: Tensor, step: float) -> Tensor:
    def slope(log_z: Tensor) -> Tensor:
        return torch.addcmul(rates, effects, log_z.exp().flip(-1))

    k1 = slope(log_z)
    k2 = slope(log_z.add(k1, alpha=step / 2))
    k3 = slope(log_z.add(k2, alpha=step / 2))
    k4 = slope(log_z.add(k3, alpha=step))
    return log_z.add(k1 + k4, alpha=step / 6).add(k2 + k3, alpha=step / 3)


def kidiq(data: Values) -> Model:
    school, iq = data["mom_hs"], data["mom_iq"]
    design = _columns(school, iq, school * iq)
    return Linear(design, data["kid_score"], sigma_prior=_half_cauchy(2.5))


def kilpisjarvi(data: Values) -> Model:
    x, y = data["x"], data["y"]

    def model() -> None:
        alpha = pyro.sample("alpha", dist.Normal(data["pmualpha"], data["psalpha"]))
        beta = pyro.sample("beta", dist.Normal(data["pmubeta"], data["psbeta"]))
        sigma = _flat("sigma", constraints.positive)
        _observe(alpha[..., None] + beta[..., None] * x, sigma, y)

    return model


def gauss_mix(data: Values) -> Model:
    y = data["y"]

    def model() -> None:
        mu = _flat("mu", constraints.ordered_vector, 2)
        pyro.factor("prior of mu", _normal(0, 2).log_prob(mu).sum(-1))
        sigma = _vector("sigma", dist.HalfNormal(_tensor(2)), 2)
        theta = pyro.sample("theta", dist.Beta(_tensor(5), _tensor(5)))
        shares = torch.stack([theta, 1 - theta], -1).log()
        terms = dist.Normal(mu[..., None, :], sigma[..., None, :]).log_prob(y[:, None])
        pyro.factor("y", (terms + shares[..., None, :]).logsumexp(-1).sum(-1))

    return model


def mesquite(data: Values) -> Model:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    return Linear(_columns(*(data[name] for name in names)), data["weight"])


def nes(data: Values) -> Model:
    ages = [(data["age_discrete"] == age).double() for age in (2, 3, 4)]
    names = ("educ1", "gender", "income")
    rest = [data[name] for name in names]
    design = _columns(data["real_ideo"], data["race_adj"], *ages, *rest)
    return Linear(design, data["partyid7"])


def blr(data: Values) -> Model:
    return Linear(data["X"], data["y"], _normal(0, 10), dist.HalfNormal(_tensor(10)))


def _same(values: Values) -> Values:
    return values


MODELS: dict[str, tuple[Callable[[Values], Model], Callable[[Values], Values]]] = {
    "arK-arK": (ark, _same),
    "arma-arma11": (arma, _same),
    "bball_drive_event_0-hmm_drive_0": (hmm_drive, _same),
    "diamonds-diamonds": (diamonds, _same),
    "earnings-logearn_interaction": (earnings, _same),
    "eight_schools-eight_schools_noncentered": (lambda data: schools(data, False), _theta),
    "eight_schools-eight_schools_centered": (lambda data: schools(data, True), _same),
    "garch-garch11": (garch, _same),
    "gp_pois_regr-gp_pois_regr": (gp_poisson, _f),
    "hudson_lynx_hare-lotka_volterra": (lotka_volterra, _same),
    "kidiq-kidscore_interaction": (kidiq, _same),
    "kilpisjarvi_mod-kilpisjarvi": (kilpisjarvi, _same),
    "low_dim_gauss_mix-low_dim_gauss_mix": (gauss_mix, _same),
    "mesquite-mesquite": (mesquite, _same),
    "nes2000-nes": (nes, _same),
    "sblrc-blr": (blr, _same),
}
NAMES = tuple(MODELS)
