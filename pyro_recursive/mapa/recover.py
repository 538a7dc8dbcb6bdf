"""From codes to a continuous prior, and a model with it in place of its own."""

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.transforms import ReshapeTransform

from pyro_recursive.guides.flow.zuko_adapter import AffineFlow, build_flow, check_flow
from pyro_recursive.mapa.recovered_priors import KDEPrior, QuantilePrior, RecoveredPrior
from pyro_recursive.tracing.sites import is_delta
from pyro_recursive.tracing.supports import (
    bare_support,
    coordinates,
    is_circular,
    plain_support,
)

_STEPS_PER_VALIDATION = 25
_VALIDATION = 0.1  # of the codes


class FlowPrior(RecoveredPrior):
    """A flow fitted to standardised codes by Adam, with early stopping.

    A tenth of the codes is for validation, every 25 steps: the parameters with the highest mean
    log-density are kept, those of `steps_taken`, and the fit ends after ``patience`` validations
    without a higher one. It starts as the normal with the codes' means and standard deviations.
    """

    kind = "flow"

    def __init__(
        self,
        codes: Tensor,
        log_weights: Tensor,
        *,
        flow: str | Callable[[int, int], Any] = "spline",
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        seed: int = 0,
        **fit: Any,
    ) -> None:
        super().__init__(codes.shape[1], len(codes))
        check_flow(flow)
        weights = log_weights.exp()[:, None]
        loc = (weights * codes).sum(0)
        scale = (weights * (codes - loc) ** 2).sum(0).sqrt()
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # for initial weights
            torch.default_generator.manual_seed(seed)  # torch.manual_seed is for GPUs as well
            built = build_flow(flow, self.size, 0, transforms, hidden)
        self.flow = AffineFlow(built, 0, torch.zeros_like(loc), 1.0)
        self.steps_taken = _fit(self.flow, (codes - loc) / scale, log_weights, generator, **fit)
        with torch.no_grad():
            shift, log_stretch = self.flow.bias.chunk(2)
            self.flow.bias.copy_(torch.cat([loc + scale * shift, log_stretch + scale.log()]))

    def forward(self) -> Any:
        """Return the flow's distribution, batch ``[]`` and event ``[D]``."""
        return self.flow(None, torch.Size())

    def from_normal(self, noise: Tensor) -> Tensor:
        """Return the flow's value at standard normals, ``[..., D]`` to ``[..., D]``."""
        return self.forward().push(noise.to(self.flow.bias.dtype))


KINDS: dict[str, Callable[..., RecoveredPrior]] = {
    "copula": QuantilePrior,
    "flow": FlowPrior,
    "kde": KDEPrior,
    "kernels": KDEPrior,
}


def recover_prior(
    codes: Tensor,
    kind: str = "auto",
    *,
    log_weights: Tensor | None = None,
    scale: float | Tensor | None = None,
    held_out: float = 0.1,
    trainable: bool = False,
    seed: int = 0,
    **options: Any,
) -> RecoveredPrior:
    """Fit a continuous prior to the codes ``[N, D]`` of a latent site.

    With it in place of N codes (`pyro_recursive.mapa.with_prior`) a model generates new data.
    Torch's global random state is not changed.

    Args:
        codes: unconstrained vectors, ``[N, D]``, those of `biject_to` for a constrained support.
        kind: ``"copula"`` for D = 1, ``"flow"`` (of the extra `flows`), ``"kde"``, ``"kernels"`` of
            a ``scale``; ``"auto"`` is the copula for D = 1, else a flow where zuko is installed, or
            ``"kde"``.
        log_weights: ``[N]``, which need not be normalised.
        scale: of ``"kernels"``; a number or one for each of D.
        held_out: the share of the codes for `held_out_log_prob`, at random: left out of a first fit
            and part of the second, which is returned.
        trainable: whether the prior's parameters have gradients. A copula has none.
        seed: of the codes held out, and of fits.
        options: ``knots`` of ``"copula"``; ``width`` of ``"kde"``; ``flow`` (``"spline"``,
            ``"coupling"``, ``"maf"``, ``"iaf"`` or a function), ``transforms``, ``hidden``,
            ``steps``, ``batch_size``, ``lr``, ``patience`` of ``"flow"``.

    >>> codes = torch.cat([torch.randn(200, 1) - 3, torch.randn(200, 1) + 3])
    >>> prior = recover_prior(codes)
    >>> prior.kind, prior.num_codes, prior().event_shape
    ('copula', 400, torch.Size([1]))
    """
    codes, weights = _weighted(codes, log_weights)
    if kind == "auto":
        several = "flow" if importlib.util.find_spec("zuko") else "kde"
        kind = "copula" if codes.shape[1] == 1 else several
    if kind not in KINDS:
        raise ValueError(f"kind must be 'auto' or one of {list(KINDS)}, got {kind!r}.")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {held_out}.")
    if kind == "copula" and trainable:
        raise ValueError("kind='copula' has nothing to train: use 'flow', 'kde' or 'kernels'.")
    if (scale is None) == (kind == "kernels"):
        raise ValueError(f"scale is for kind='kernels', which needs it; got kind={kind!r}.")
    if kind == "kernels":
        options["scale"] = scale
    if kind in ("flow", "kde"):
        options["seed"] = seed
    prior = _fitted(kind, codes, weights, options).requires_grad_(trainable)
    if held_out:
        count = max(1, round(held_out * len(codes)))
        if len(codes) - count < 2:
            raise ValueError(f"{len(codes)} codes are too few to hold {count} out: use held_out=0.")
        order = torch.randperm(len(codes), generator=torch.Generator("cpu").manual_seed(seed))
        out, rest = order.to(codes.device).tensor_split([count])
        first = _fitted(kind, codes[rest], weights[rest].log_softmax(0), options)
        with torch.no_grad():
            log_prob = first().log_prob(codes[out])
        prior.held_out_log_prob = (weights[out].softmax(0) @ log_prob).item()
    return prior


def _fitted(kind: str, codes: Tensor, weights: Tensor, options: dict[str, Any]) -> RecoveredPrior:
    size = codes.abs().amax(0)
    constant = codes.std(0, correction=0) <= 10 * torch.finfo(codes.dtype).eps * size
    if kind != "kernels" and constant.any():
        raise ValueError("All codes are equal in a coordinate: use kind='kernels'.")
    return KINDS[kind](codes, weights, **options)


def _weighted(codes: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the codes of positive weight, ``[N, D]``, and normalised log-weights."""
    if codes.dim() != 2 or not codes.is_floating_point():
        raise ValueError("codes must be floats [N, D]; those of a scalar site are codes[:, None].")
    codes = codes.detach()
    if not codes.isfinite().all():
        raise ValueError(f"{int((~codes.isfinite()).any(1).sum())} codes are not finite.")
    if log_weights is None:
        return codes, codes.new_full((len(codes),), -math.log(len(codes)))
    log_weights = log_weights.detach().to(codes)
    if log_weights.shape != codes.shape[:1] or not log_weights.logsumexp(0).isfinite():
        raise ValueError(f"log_weights must be {list(codes.shape[:1])}, one of them above -inf.")
    used = log_weights > -math.inf
    return codes[used], log_weights[used].log_softmax(0)


@torch.enable_grad()
def _fit(
    flow: AffineFlow,
    codes: Tensor,
    log_weights: Tensor,
    generator: torch.Generator,
    *,
    steps: int = 2000,
    batch_size: int = 256,
    lr: float = 2e-3,
    patience: int = 8,
) -> int:
    """Fit the flow to standardised codes, and return the step of the parameters that are kept."""
    order = torch.randperm(len(codes), generator=generator)
    count = math.ceil(_VALIDATION * len(codes))
    chosen, rest = order[:count].to(codes.device), order[count:]
    weights = log_weights.exp().cpu().double()[rest]

    def log_prob(rows: Tensor) -> Tensor:
        return flow(None, torch.Size()).log_prob(codes[rows])

    @torch.no_grad()
    def validate() -> float:
        return (log_weights[chosen].softmax(0) @ log_prob(chosen)).item()

    optimizer = torch.optim.Adam(flow.parameters(), lr)
    best, best_step, state = validate(), 0, copy.deepcopy(flow.state_dict())
    for step in range(1, steps + 1):
        batch = rest[torch.multinomial(weights, batch_size, True, generator=generator)]
        optimizer.zero_grad()
        (-log_prob(batch.to(codes.device)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        if step % _STEPS_PER_VALIDATION and step != steps:
            continue
        score = validate()
        if score > best:
            best, best_step, state = score, step, copy.deepcopy(flow.state_dict())
        elif step - best_step >= patience * _STEPS_PER_VALIDATION:
            break
    flow.load_state_dict(state)
    return best_step


def with_prior(
    model: Callable, site: str, prior: Distribution | Callable[[], Any]
) -> "ReplacedPrior":
    """Return the same model with the prior of one latent site replaced.

    A value of the site is ``biject_to(support)`` of a vector of the prior, with the Jacobian in its
    density; each entry of the site's plates has a vector of its own. Names, plates, scales and
    shapes stay. Parameters of a module with gradients are registered as ``<site>_prior``.

    Args:
        model: any Pyro model.
        site: the name of a latent site, continuous, not a Delta.
        prior: from `pyro_recursive.mapa.recover_prior`; or a distribution over vectors, batch
            ``[]`` and event ``[D]``, with D the size of the site's event in unconstrained space; or
            a callable that returns one, such as a `pyro_recursive.VampPrior`.

    Raises ValueError when the model runs and the site is absent, observed, a Delta, or masked.

    >>> from pyro.infer import Predictive
    >>> def model(size):
    ...     with pyro.plate("data", size):
    ...         scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...         return pyro.sample("x", dist.Normal(0.0, scale))
    >>> codes = torch.randn(500, 1) / 10 + 2  # of log(scale)
    >>> recovered = with_prior(model, "scale", recover_prior(codes))
    >>> draws = Predictive(recovered, num_samples=20)(1000)["scale"]
    >>> draws.shape, bool((draws.log() - 2).abs().mean() < 0.2)
    (torch.Size([20, 1000]), True)
    """
    return ReplacedPrior(model, site, prior)


class ReplacedPrior:
    """A model with another prior: a callable with ``model``, ``site`` and ``prior``."""

    def __init__(self, model: Callable, site: str, prior: Distribution | Callable[[], Any]) -> None:
        self.model, self.site, self.prior = model, site, prior

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the other prior."""
        prior = self.prior
        if isinstance(prior, nn.Module) and any(p.requires_grad for p in prior.parameters()):
            pyro.module(f"{self.site}_prior", prior)
        handler = _ReplacePrior(self.site, prior)
        with handler:
            result = self.model(*args, **kwargs)
        if self.site not in handler.seen:
            raise ValueError(f"The model has no sample site '{self.site}'; it has {handler.seen}.")
        return result


class _ReplacePrior(Messenger):
    """Replaces the distribution of one sample site."""

    def __init__(self, site: str, prior: Distribution | Callable[[], Any]) -> None:
        super().__init__()
        self.site, self.prior = site, prior
        self.seen: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.seen.append(msg["name"])
        if msg["name"] == self.site:
            if (
                msg["is_observed"]
                or is_delta(msg)
                or isinstance(msg["fn"], dist.MaskedDistribution)
            ):
                raise ValueError(f"Site '{self.site}' is observed, masked or a Delta.")
            prior = self.prior  # Pyro's distributions are callable too: a call would draw
            new = prior if isinstance(prior, Distribution) else prior()
            msg["fn"] = _replaced(msg["fn"], new, self.site)


class _Supported(dist.TransformedDistribution):
    """A transformed distribution with the support of the site, not of its transforms."""

    def __init__(self, base: Any, transforms: list, support: Any) -> None:
        self.base, self.given = base, support
        super().__init__(base, transforms, validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the site."""
        return self.given

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Supported":
        """Expand the vectors' distribution."""
        return _Supported(self.base.expand(torch.Size(batch_shape)), self.transforms, self.given)


def _replaced(old: Any, new: Any, site: str) -> Any:
    """Return the new distribution with the batch, event and support of the old one."""
    support, is_angle = plain_support(old.support), is_circular(old)
    transform = coordinates(old, is_angle)
    whole = transform.inverse_shape(old.batch_shape + old.event_shape)  # bounds may have rows
    shape = whole[len(old.batch_shape) :]
    if new.batch_shape or new.event_shape != (shape.numel(),):
        raise ValueError(f"Site '{site}' needs a prior over vectors of length {shape.numel()}.")
    new = new.expand(old.batch_shape)
    steps: list[Transform] = (
        [] if shape == new.event_shape else [ReshapeTransform(new.event_shape, shape)]
    )
    if is_angle:
        support = constraints.independent(transform.codomain, old.event_dim)
    if bare_support(support) is not constraints.real:
        steps.append(transform)
    return _Supported(new, steps, support) if steps else new
