"""What steps are timed on: models written once for Pyro and NumPyro, and as plain densities.

`GROUPS` has them by group and name. Those of a growth curve are named after what grows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, autoguide
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear, softplus

from benchmarks.tasks import enumerated
from benchmarks.tasks.images import VAE
from pyro_recursive import (
    IWAE_ELBO,
    MIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    Stratified_ELBO,
)
from pyro_recursive.guides.flow.zuko_adapter import FLOWS
from pyro_recursive.guides.gaussian_families import LowRank

PIXELS, STATES, MANY = 784, 3, 640
ONE_DRAW: Callable[[], ELBO] = partial(IWAE_ELBO, 1)
SCALE = 0.1  # of a new AutoNormal
Programs = tuple[Callable, Callable]
ByHand = tuple[list[Tensor], Callable[..., Tensor]]  # the parameters' start, and their loss


@dataclass(frozen=True)
class Timed:
    """A model, its guide and its data; `programs` makes them with a name of their own."""

    programs: Callable[[str], Programs]
    args: tuple[Tensor, ...]
    particles: int = 1
    loss: Callable[[], ELBO] = ONE_DRAW
    by_hand: ByHand | None = None
    in_numpyro: Callable[[Any], Programs] | None = None
    many: int = MANY  # steps in a call that takes several
    enumerated: bool = False  # whether the model has enumerated latents


# Models of Pyro and NumPyro: `ppl` is either.


def eight_schools(ppl: Any, y: Any, error: Any) -> None:
    """Rubin (1981), not centred: 10 latents."""
    dist = ppl.distributions
    mean = ppl.sample("mean", dist.Normal(0.0, 5.0))
    spread = ppl.sample("spread", dist.HalfCauchy(5.0))
    with ppl.plate("schools", len(y)):
        effect = ppl.sample("effect", dist.Normal(0.0, 1.0))
        ppl.sample("y", dist.Normal(mean + spread * effect, error), obs=y)


def logistic(ppl: Any, x: Any, y: Any) -> None:
    """A logistic regression."""
    dist = ppl.distributions
    slopes = ppl.sample("slopes", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    intercept = ppl.sample("intercept", dist.Normal(0.0, 1.0))
    with ppl.plate("rows", len(x)):
        ppl.sample("y", dist.Bernoulli(logits=x @ slopes + intercept), obs=y)


def thirty_sites(ppl: Any, y: Any) -> None:
    """A hierarchy with a site for each of 28 effects, and two for their law."""
    dist = ppl.distributions
    mean = ppl.sample("mean", dist.Normal(0.0, 3.0))
    spread = ppl.sample("spread", dist.HalfNormal(2.0))
    columns = range(y.shape[-1])
    effects = [ppl.sample(f"effect_{i}", dist.Normal(mean, spread)) for i in columns]
    with ppl.plate("rows", len(y)):
        for i in columns:
            ppl.sample(f"y_{i}", dist.Normal(effects[i], 1.0), obs=y[:, i])


def mixture(ppl: Any, x: Any, ones: Any) -> None:
    """A mixture of three normals, of which all parameters are latent."""
    dist = ppl.distributions
    shares = ppl.sample("shares", dist.Dirichlet(ones))
    locs = ppl.sample("locs", dist.Normal(0.0, 10.0).expand([STATES]).to_event(1))
    scales = ppl.sample("scales", dist.LogNormal(0.0, 1.0).expand([STATES]).to_event(1))
    with ppl.plate("rows", len(x)):
        parts = dist.Normal(locs, scales)
        ppl.sample("x", dist.MixtureSameFamily(dist.Categorical(shares), parts), obs=x)


def hidden_markov(ppl: Any, logsumexp: Callable, y: Any) -> None:
    """A hidden Markov model by the forward algorithm: transitions and locations are latent."""
    dist = ppl.distributions
    logits = ppl.sample("logits", dist.Normal(0.0, 1.0).expand([STATES, STATES]).to_event(2))
    locs = ppl.sample("locs", dist.Normal(0.0, 3.0).expand([STATES]).to_event(1))
    transition = logits - logsumexp(logits, -1)[..., None]
    emission = dist.Normal(locs, 1.0).log_prob(y[:, None])
    forward = emission[0] - math.log(STATES)
    for t in range(1, len(y)):
        forward = logsumexp(forward[..., None] + transition, -2) + emission[t]
    ppl.factor("y", logsumexp(forward, -1))


def vae_of_numpyro(vae: VAE, numpyro: Any) -> Programs:
    """Return model and guide of a VAE, with the weights that it has."""
    import jax.numpy as jnp

    dist, latent = numpyro.distributions, vae.latent

    def network(name: str, layers: Any, x: Any) -> Any:
        for number in (0, 2, 4):
            weight, bias = (
                numpyro.param(f"{name}{number}{i}", jnp.asarray(each.detach().cpu().numpy()))
                for i, each in enumerate((layers[number].weight, layers[number].bias))
            )
            x = x @ weight.T + bias
            x = x if number == 4 else jnp.tanh(x)
        return x

    def model(x: Any) -> None:
        with numpyro.plate("images", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([latent]).to_event(1))
            pixels = dist.Bernoulli(logits=network("decoder", vae.decoder, z))
            numpyro.sample("x", pixels.to_event(1), obs=x)

    def guide(x: Any) -> None:
        loc, log_scale = jnp.split(network("encoder", vae.encoder, x), 2, -1)
        with numpyro.plate("images", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide


# By hand.


def mean_field(size: int, log_joint: Callable[..., Tensor]) -> ByHand:
    """Return the ELBO of a mean field over real numbers ``[size]``, with one draw."""

    def loss(parameters: list[Tensor], *args: Tensor) -> Tensor:
        loc, scale = parameters[0], softplus(parameters[1])
        noise = torch.randn_like(loc)
        log_q = _normal(noise, 0.0, 1.0) - scale.log().sum()
        return log_q - log_joint(loc + scale * noise, *args)

    raw = math.log(math.expm1(SCALE))
    return [torch.zeros(size), torch.full((size,), raw)], loss


def _normal(x: Tensor, loc: Any, scale: Any) -> Tensor:
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    each = -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    return each.sum()


def eight_schools_by_hand(z: Tensor, y: Tensor, error: Tensor) -> Tensor:
    """Return the log density of mean, log spread and effects, and of the data."""
    mean, log_spread, effect = z[0], z[1], z[2:]
    spread = log_spread.exp()
    half_cauchy = math.log(2 / (5 * math.pi)) - (1 + (spread / 5) ** 2).log() + log_spread
    prior = _normal(mean, 0.0, 5.0) + half_cauchy + _normal(effect, 0.0, 1.0)
    return prior + _normal(y, mean + spread * effect, error)


def logistic_by_hand(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the log density of slopes and intercept, and of the data."""
    errors = binary_cross_entropy_with_logits(x @ z[:-1] + z[-1], y, reduction="sum")
    return _normal(z, 0.0, 1.0) - errors


def thirty_sites_by_hand(z: Tensor, y: Tensor) -> Tensor:
    """Return the log density of mean, log spread and effects, and of the data."""
    mean, log_spread, effects = z[0], z[1], z[2:]
    spread = log_spread.exp()
    half_normal = math.log(2.0) + _normal(spread, 0.0, 2.0) + log_spread
    prior = _normal(mean, 0.0, 3.0) + half_normal + _normal(effects, mean, spread)
    return prior + _normal(y, effects, 1.0)


def vae_by_hand(vae: VAE, particles: int) -> ByHand:
    """Return the IWAE loss as one writes it without any library."""
    starts = [p.detach().clone() for p in (*vae.encoder.parameters(), *vae.decoder.parameters())]

    def network(weights: list[Tensor], x: Tensor) -> Tensor:
        for number in (0, 2):
            x = linear(x, weights[number], weights[number + 1]).tanh()
        return linear(x, weights[4], weights[5])

    def loss(parameters: list[Tensor], x: Tensor) -> Tensor:
        loc, log_scale = network(parameters[:6], x).chunk(2, -1)
        noise = torch.randn(particles, *loc.shape, device=loc.device)
        z = loc + log_scale.exp() * noise
        logits = network(parameters[6:], z)
        errors = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        log_weights = (0.5 * (noise**2 - z**2) + log_scale).sum(-1) - errors.sum(-1)
        return -(log_weights.logsumexp(0) - math.log(particles)).sum()

    return starts, loss


# What is timed.


def auto_normal(model: Callable, name: str, kind: type = autoguide.AutoNormal) -> Programs:
    """Return a model and an autoguide: the parameters of one are named after its class."""
    named = type(name.replace(" ", "").replace(".", ""), (kind,), {"__module__": kind.__module__})
    return model, named(model)


def classical(
    model: Callable,
    data: Callable[[], tuple],
    log_joint: Callable | None = None,
    size: int = 0,
    *more: Any,
) -> Timed:
    """Return a model of global latents with a mean field of Pyro, of NumPyro, and by hand."""

    def in_numpyro(numpyro: Any) -> Programs:
        from jax.nn import logsumexp
        from numpyro.infer import autoguide as of_numpyro
        from numpyro.infer.initialization import init_to_feasible

        own = partial(model, numpyro, *([logsumexp] if more else []))
        guide = of_numpyro.AutoNormal(own, init_loc_fn=init_to_feasible, init_scale=SCALE)
        return own, guide

    return Timed(
        partial(auto_normal, partial(model, pyro, *more)),
        data(),
        by_hand=log_joint and mean_field(size, log_joint),
        in_numpyro=in_numpyro,
    )


def schools_data() -> tuple[Tensor, Tensor]:
    """Return effects and standard errors of eight schools."""
    y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
    return torch.tensor(y), torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def regression(rows: int = 1000, columns: int = 20) -> Timed:
    """Return the logistic regression with simulated data."""
    x = torch.randn(rows, columns)
    y = torch.bernoulli((2 * x[:, 0] - x[:, 1]).sigmoid())
    return classical(logistic, lambda: (x, y), logistic_by_hand, columns + 1)


def clusters(rows: int) -> Tensor:
    """Return numbers around 0, 4 and 8."""
    return torch.randn(rows) + 4.0 * torch.randint(STATES, (rows,))


def table() -> tuple[Tensor]:
    """Return 20 measurements in each of 28 columns."""
    return (torch.randn(28) + torch.randn(20, 28),)


def autoencoder(batch: int, particles: int) -> Timed:
    """Return a VAE of binary images, 784-200-200-50 and back, with the IWAE bound."""
    x = torch.bernoulli(torch.full((batch, PIXELS), 0.3))
    start = VAE(x.mean(0))

    def programs(name: str) -> Programs:
        vae = VAE(x.mean(0), name=name)
        vae.load_state_dict(start.state_dict())
        return vae.model, vae.guide

    return Timed(
        programs,
        (x,),
        particles,
        partial(IWAE_ELBO, particles),
        vae_by_hand(start, particles),
        partial(vae_of_numpyro, start),
        many=max(4, min(64, 3200 // (batch * particles))),
    )


def summed(kind: str, particles: int) -> Timed:
    """Return a model with enumerated latents, and K weights of each row."""

    def programs(name: str) -> Programs:
        own = enumerated.PROGRAMS[kind](name)
        return own.model, own.guide

    loss = partial(IWAE_ELBO, particles)
    many = max(4, 64 // particles)
    args = (enumerated.data(kind),)
    return Timed(programs, args, particles, loss, many=many, enumerated=True)


def of_schools(guide: Callable[[Callable, str], Any], loss: Callable[[], ELBO] = ONE_DRAW) -> Timed:
    """Return eight schools under a guide and a loss."""
    model = partial(eight_schools, pyro)
    return Timed(lambda name: (model, guide(model, name)), schools_data(), loss=loss)


def _recursive(model: Callable, name: str) -> RecursiveMixtureGuide:
    """Return a mixture that has all its components."""
    guide = RecursiveMixtureGuide(model, 4, schedule=Schedule(joint=10**9), name=name)
    guide.prepare(*schools_data())
    while guide.stage.kind != "joint":
        guide.end_stage()
    return guide


def semi_amortized() -> Timed:
    """Return the VAE of 20 images, the posterior of each refined by gradient steps."""
    plain = autoencoder(20, 1)

    def programs(name: str) -> Programs:
        vae: Any = plain.programs(name)[0].__self__  # type: ignore[attr-defined]
        start = AmortizedGuide(vae.model, vae.encoder, name=f"{name} start")
        return vae.model, SemiAmortizedGuide(vae.model, start, name=name)

    return Timed(programs, plain.args, many=plain.many)


def _auto(kind: type, model: Callable, name: str) -> Any:
    return auto_normal(model, name, kind)[1]


def _amortized(family: Any, model: Callable, name: str) -> AmortizedGuide:
    return AmortizedGuide(model, family=family, name=name)


def _mixture(number: int, model: Callable, name: str) -> MixtureGuide:
    return MixtureGuide(model, number, name=name)


def _flow(kind: Any, model: Callable, name: str) -> FlowGuide:
    return FlowGuide(model, kind, name=name)


AUTOGUIDES = [
    *("AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal"),
    *("AutoLowRankMultivariateNormal", "AutoIAFNormal", "AutoDelta"),
]
GUIDES: dict[str, Callable[[], Timed]] = {
    **{n: partial(of_schools, partial(_auto, getattr(autoguide, n))) for n in AUTOGUIDES},
    **{
        f"AmortizedGuide, {name}": partial(of_schools, partial(_amortized, family))
        for name, family in (("diagonal", "diagonal"), ("rank 2", LowRank(2)), ("full", "full"))
    },
    **{f"FlowGuide, {kind}": partial(of_schools, partial(_flow, kind)) for kind in FLOWS},
    "SemiAmortizedGuide, VAE": semi_amortized,
    "MixtureGuide(4)": partial(of_schools, partial(_mixture, 4), partial(Stratified_ELBO, 1)),
    "RecursiveMixtureGuide(4)": partial(of_schools, _recursive, partial(RecursiveMixture_ELBO, 1)),
}


def _under(loss: Callable[[], ELBO]) -> Callable[[], Timed]:
    return partial(of_schools, partial(_auto, autoguide.AutoNormal), loss)


GROUPS: dict[str, dict[str, Callable[[], Timed]]] = {
    "classical": {
        "eight schools": partial(classical, eight_schools, schools_data, eight_schools_by_hand, 10),
        "logistic": regression,
        "30 sites": partial(classical, thirty_sites, table, thirty_sites_by_hand, 30),
        "mixture": partial(classical, mixture, lambda: (clusters(200), torch.ones(STATES))),
        "HMM": partial(classical, hidden_markov, lambda: (clusters(30),), None, 0, torch.logsumexp),
    },
    "VAE": {
        f"{batch} x {particles}": partial(autoencoder, batch, particles)
        for batch in (20, 100, 500)
        for particles in (1, 8, 64)
    },
    "enumerated": {
        f"{kind} x {particles}": partial(summed, kind, particles)
        for kind in enumerated.PROGRAMS
        for particles in (1, 8, 64)
    },
    "guides": GUIDES,
    "K": {
        str(k): _under(partial(IWAE_ELBO, k, estimator="dreg")) for k in (1, 4, 16, 64, 256, 1024)
    },
    "M": {str(m): _under(partial(MIWAE_ELBO, m, 8)) for m in (1, 4, 16, 64, 256)},
    "batch": {str(rows): partial(autoencoder, rows, 1) for rows in (20, 80, 320, 1280)},
    "components": {
        str(n): partial(of_schools, partial(_mixture, n), partial(Stratified_ELBO, 1))
        for n in (1, 2, 4, 8, 16)
    },
    "rows": {str(rows): partial(regression, rows) for rows in (100, 1000, 10_000, 100_000)},
}
MAIN = ("classical", "VAE", "enumerated")
GROWTH = ("K", "M", "batch", "components", "rows")
