"""Semi-amortised guides: an encoder whose output is refined for each row, inside the guide."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils.checkpoint import checkpoint

from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.joint_site import inside, outer_shape
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.row_families import GaussianRows, RowFamily
from pyro_recursive.guides.semi_amortized.row_elbo import ESTIMATORS, LocalBound
from pyro_recursive.guides.semi_amortized.updates import GradientUpdate, Update
from pyro_recursive.tracing.arguments import check_at_least, check_instance
from pyro_recursive.tracing.handlers import is_dry_run, latent_weight, run_cache
from pyro_recursive.tracing.isolation import SharedNoise, isolated

THROUGH = ("first_order", "second_order")  # the bound's own gradient reaches the encoder
MODES = (*THROUGH, "distill", "distill_reverse", "vae_svi", "svi")


class Refinement(NamedTuple):
    """The rows of one call before and after refinement.

    ``start`` and ``params`` are the encoder's and the refined parameters, ``[*rows, P]``;
    ``elbo_start`` and ``elbo`` their ELBOs from the same new draws, in nats, ``[*rows]``;
    ``clipped`` is the share of steps in which a row's gradient was clipped, ``[*rows]``.
    """

    start: Tensor
    params: Tensor
    elbo_start: Tensor
    elbo: Tensor
    clipped: Tensor

    @property
    def numbers(self) -> Tensor:
        """The former name of ``params``."""
        return self.params


class SemiAmortizedGuide(LatentGuide):
    """An amortised guide whose output is refined by T steps on each row's own ELBO.

    The encoder gives each row variational parameters ``lambda_0``. T steps of an `Update` improve
    ``elbo_i(lambda) = E[log p(x_i, z_i) - log q(z_i; lambda)]``, and the guide samples from
    ``q(z_i; lambda_T)``. Latents outside the data's plate are not refined. The mathematics, cost,
    and what is left alone by the runs of the model: the documentation's page on refinement.

    Args:
        model: the model whose bound the rows climb.
        guide: gives lambda_0: `AmortizedGuide`, `FlowGuide` (contexts, locations and scales are
            refined), or a `MixtureGuide` of those (all components and weights).
        steps: T in training.
        test_steps: T in eval mode, if not the same.
        mode: what trains the encoder. ``"first_order"``: the bound's gradient at lambda_T;
            ``"second_order"``: that through all steps; ``"distill"``, ``"distill_reverse"``: the KL
            divergence of lambda_0 and lambda_T; ``"vae_svi"``: the ELBO at lambda_0; ``"svi"``:
            nothing (start from `FixedStart`, or a table of parameters).
        update: a step of `pyro_recursive.guides.semi_amortized.updates`; `GradientUpdate` if None.
        direct: the weight of the ELBO at lambda_0 for the encoder in the first two modes; if None
            the update's own.
        draws: S, the number of draws of z in each step.
        estimator: of a step's gradient: ``"stl"`` (exact where q is the posterior), ``"pathwise"``.
        seed: for the same fixed draws in all rows and calls.
        checkpoint: in second order, recompute each step in the backward pass to save memory.
        name: as in `AmortizedGuide`; all else is taken from ``guide``.

    >>> import pyro.distributions as dist
    >>> from pyro_recursive import AmortizedGuide
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
    >>> guide = SemiAmortizedGuide(model, AmortizedGuide(model, torch.nn.Linear(1, 2)))
    >>> refined = guide.refine(torch.tensor([[0.5], [-1.0], [2.0]]), steps=50)
    >>> bool((refined.elbo > refined.elbo_start).all())
    True
    """

    can_be_component: ClassVar[bool] = False

    def __init__(
        self,
        model: Callable,
        guide: LatentGuide,
        *,
        steps: int = 5,
        test_steps: int | None = None,
        mode: str = "first_order",
        update: Update | None = None,
        direct: float | None = None,
        draws: int = 1,
        estimator: str = "stl",
        seed: int | None = None,
        checkpoint: bool = False,
        name: str | None = None,
    ) -> None:
        if not isinstance(guide, LatentGuide) or isinstance(guide, SemiAmortizedGuide):
            raise TypeError(
                "guide must be an AmortizedGuide, FlowGuide or a MixtureGuide of those; got "
                f"{type(guide).__name__}."
            )
        _check_update(update)
        super().__init__(
            model,
            plate=guide.plate,
            inputs=guide.inputs,
            create_plates=guide.create_plates,
            name=name,
        )
        try:
            self.guide: Any = guide
        except AssertionError as error:  # Pyro's own check
            raise ValueError(
                "The guide has run on its own before, and Pyro cannot rename its parameters. Make "
                "a new one, and copy the state with load_state_dict."
            ) from error
        self.update: Any = GradientUpdate() if update is None else update
        self.steps, self.test_steps = steps, test_steps
        self.mode, self.direct = mode, _direct(mode, direct, self.update)
        self.draws, self.estimator, self.seed, self.checkpoint = draws, estimator, seed, checkpoint
        self._check()

    @property
    def by_row(self) -> bool:
        """As in the guide that is refined."""
        return self.guide.by_row

    def refine(self, *args: Any, steps: int | None = None, **kwargs: Any) -> Refinement:
        """Return the refined parameters of the rows of a call, without a graph, and their ELBOs."""
        self.prepare(*args, **kwargs)
        with torch.no_grad(), isolated(noise=SharedNoise()):
            return self._refinement(args, kwargs, steps)

    def _refinement(self, args: tuple, kwargs: dict[str, Any], steps: int | None) -> Refinement:
        call = self.new_call(args, kwargs)
        for latents in self.groups[:-1]:
            call.given.update(self.guide.sample(latents, call))
        latents = self.groups[-1]
        refined = self._refined(latents, call, self.num_steps if steps is None else steps)
        target = self._target(latents, call)
        noises = target.noise(refined.params, -(-100 // self.draws) * self.draws).split(self.draws)
        elbos = [
            torch.stack([target.value(params, noise) for noise in noises]).mean(0)
            for params in (refined.start, refined.params)
        ]
        rows = call.sizes(latents)
        start, params, elbo_start, elbo = (
            each.reshape(*rows, *each.shape[latents.nesting :]).clone()
            for each in (refined.start, refined.params, *elbos)
        )
        return Refinement(start, params, elbo_start, elbo, self._clipped(refined).reshape(rows))

    def _clipped(self, refined: "_Refined") -> Tensor:
        """Return the share of steps in which a row's gradient was clipped, ``[*batch]``."""
        blocks = self.row_family(self.groups[-1]).blocks
        clips = [self.update.clips(gradient, blocks) for gradient in refined.gradients]
        if not clips:
            return refined.start.new_zeros(refined.start.shape[:-1])
        return torch.stack(clips).to(refined.start).mean(0)

    @property
    def num_steps(self) -> int:
        """T in the mode that the guide is in."""
        if self.training or self.test_steps is None:
            return self.steps
        return self.test_steps

    def adopt(
        self, groups: tuple[LatentBlock, ...], prior: Callable[[], poutine.Trace], raw: Any
    ) -> None:
        """Share the blocks with the guide that is refined."""
        if not groups[-1].local:
            raise ValueError(
                f"{type(self).__name__} refines the parameters of each row, and no latent is in a "
                "plate of rows. Give its guide an encoder, or plate= for a table."
            )
        self.guide.adopt(groups, prior, raw)
        super().adopt(groups, prior, raw)

    def build(self, latents: LatentBlock, prior_draw: Tensor, raw: Any) -> None:
        """Create the parameters of the update."""
        if latents.local:
            self.update.to(prior_draw)
            dims = len(latents.rows)
            few = raw[:2] if isinstance(raw, Tensor) else raw
            features = self.update.features_of(few, dims)
            blocks = self.guide.row_family(latents).blocks
            self.update.build(sum(blocks), blocks, features)

    def _trunk(self) -> Callable[[Any], Any] | None:
        return self.guide._trunk()

    def variational_params(self, latents: LatentBlock, call: GuideCall) -> Tensor:
        """Return the refined parameters of the rows, ``[*batch, P]``."""
        if not latents.local:
            return self.guide.variational_params(latents, call)
        return self._refined(latents, call, self.num_steps).params

    def row_family(self, latents: LatentBlock) -> RowFamily:
        """Return the distributions that a row may have: those of the guide that is refined."""
        return self.guide.row_family(latents)

    def posterior(self, latents: LatentBlock, call: GuideCall) -> Any:
        """Return the distribution of a block, of the rows after refinement."""
        if not latents.local:
            return self.guide.posterior(latents, call)
        return self.row_family(latents).distribution(self.variational_params(latents, call))

    def sample(self, latents: LatentBlock, call: GuideCall) -> Values:
        """Sample the sites of a block, and the auxiliary site with the encoder's own term."""
        if not latents.local:
            return self.guide.sample(latents, call)
        refined = self._refined(latents, call, self.num_steps)
        if refined.encoder_term is not None:
            with inside(latents.rows, call.plates):
                term = GradientSite(refined.encoder_term)
                infer = {"is_auxiliary": True}
                pyro.sample(f"{self.name}_direct", term, obs=term.rsample(), infer=infer)
        posterior = self.row_family(latents).distribution(refined.params)
        return self.guide.sample_from(posterior, latents, call)

    def _target(self, latents: LatentBlock, call: GuideCall, twice: bool = False) -> LocalBound:
        return LocalBound(
            self.own_model("for the ELBO of its rows"),
            latents,
            call,
            self.row_family(latents),
            max(self.nesting, len(outer_shape())),
            latent_weight=latent_weight(),
            estimator=self.estimator,
            double_backward=twice,
        )

    def _refined(self, latents: LatentBlock, call: GuideCall, steps: int) -> "_Refined":
        """Refine the rows; once, where a loss runs the guide twice on the same noise."""
        cache = run_cache()
        if cache is None or call.given:  # global latents may be other ones now
            return self._refine(latents, call, steps)
        if (self, steps) not in cache:
            cache[self, steps] = self._refine(latents, call, steps)
        return cache[self, steps]

    def _refine(self, latents: LatentBlock, call: GuideCall, steps: int) -> "_Refined":
        start = self.guide.variational_params(latents, call)
        if not steps:
            return _Refined(start, start, None, [])
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{type(self).__name__} takes gradients in each call. Use torch.no_grad() in place "
                "of torch.inference_mode(), or steps=0."
            )
        twice = self.mode == "second_order" and torch.is_grad_enabled()
        target = self._target(latents, call, twice)
        if call.given:  # each particle has global latents of its own, and so rows of its own
            batch = torch.broadcast_shapes(outer_shape(), start.shape[:-1])
            start = start.expand(*batch, -1)
        noise = target.noise(start, steps * self.draws, self.seed)
        features = self.update.features_of(call.rows(latents), len(latents.rows))
        trajectory = refine(
            target,
            self.update,
            start if self.mode in THROUGH else start.detach(),
            noise.unflatten(0, (steps, self.draws)),
            None if features is None else latents.expand_rows(features),
            twice,
            self.checkpoint,
        )
        if self.mode == "svi" and self.training and torch.is_grad_enabled() and not is_dry_run():
            self.guide.keep_rows(latents, call, trajectory.params)
        term = self._encoder_term(target, start, trajectory)
        gradients = [gradient for _, gradient in trajectory.visited]
        return _Refined(start, trajectory.params, term, gradients)

    def _encoder_term(
        self, target: LocalBound, start: Tensor, trajectory: "Trajectory"
    ) -> Tensor | None:
        """Return the encoder's objective beside the bound, for each row, up to a constant."""
        if (self.direct or self.mode.startswith("distill")) and not torch.is_grad_enabled():
            return torch.zeros_like(start[..., 0])
        if self.mode.startswith("distill"):
            params = trajectory.params.detach()
            pair = (start, params) if self.mode == "distill" else (params, start)
            # Not the noise of the steps, which the parameters depend on.
            seed = None if self.seed is None else self.seed + 1
            noise = target.noise(start, self.draws, seed)
            return -divergence(target.family, *pair, noise)
        if not self.direct:
            return None
        visited = trajectory.visited if self.update.every_step else trajectory.visited[:1]
        # The start itself: the first step may have had a constant in its place.
        points = [start, *(params for params, _ in visited[1:])]
        gradients = [gradient.detach() for _, gradient in visited]
        terms = [(p * g).sum(-1) for p, g in zip(points, gradients, strict=True)]
        return self.direct * torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def _check(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}.")
        if self.update.every_step and self.mode not in THROUGH:
            raise ValueError(
                f"{type(self.update).__name__} learns its steps from the bound: mode must be one "
                f"of {THROUGH}, got {self.mode!r}."
            )
        check_at_least(0, steps=self.steps, test_steps=self.test_steps)
        check_at_least(1, draws=self.draws)
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, got {self.estimator!r}.")
        if not 0 <= self.direct < math.inf:
            raise ValueError(f"direct must be a number >= 0, got {self.direct!r}.")


class _Refined(NamedTuple):
    """Parameters before and after refinement, ``[*batch, P]``, and the gradients of the steps.

    ``encoder_term`` is the encoder's objective beside the bound, ``[*batch]``.
    """

    start: Tensor
    params: Tensor
    encoder_term: Tensor | None
    gradients: list[Tensor]


@dataclass(frozen=True)
class Trajectory:
    """The steps of the rows: ``visited`` has their parameters and gradients, ``[*batch, P]``."""

    visited: list[tuple[Tensor, Tensor]]
    params: Tensor


def refine(
    target: LocalBound,
    update: Update,
    params: Tensor,
    noise: Tensor,
    features: Tensor | None = None,
    twice: bool = False,
    recompute: bool = False,
) -> Trajectory:
    """Take a step of ``update`` for each entry of ``noise``, ``[T, S, J, *batch, n]``.

    Gradients are constants. With ``twice`` they have a graph, so that the steps can be
    differentiated; with ``recompute`` each step's graph is built again in the backward pass.
    """
    step = partial(_step, target, update, features, twice)
    if twice and recompute:
        step = partial(checkpoint, step, use_reentrant=False)
    state, visited = None, []
    for each in noise:
        following, state, gradient = step(params, state, each)
        visited.append((params, gradient))
        params = following
    return Trajectory(visited, params)


def _step(
    target: LocalBound,
    update: Update,
    features: Tensor | None,
    twice: bool,
    params: Tensor,
    state: Any,
    noise: Tensor,
) -> tuple[Tensor, Any, Tensor]:
    gradient = target.gradient(params, noise, create_graph=twice)
    following, state = update(params, gradient, state, target.family.blocks, features)
    return following, state, gradient


def divergence(family: RowFamily, first: Tensor, second: Tensor, noise: Tensor) -> Tensor:
    """Return ``KL(q(first) || q(second))`` of each row in nats, ``[*batch, P]`` to ``[*batch]``.

    In closed form for Gaussians, else from draws of ``first``, ``[S, J, *batch, n]``.
    """
    if isinstance(family, GaussianRows):
        return kl_divergence(family.distribution(first), family.distribution(second))
    u, log_first = family.scored_draw(first, noise)
    gap = log_first - family.log_prob(second, u)
    return (family.log_weights(first).exp() * gap).sum(1).mean(0)


class GradientSite(TorchDistribution):
    """A site with density 1 and the gradient of minus a term: losses with -log q maximise it."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, term: Tensor) -> None:
        self.term = term
        super().__init__(term.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GradientSite":
        """Expand the term."""
        return GradientSite(self.term.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return zeros: the value has no meaning."""
        return self.term.new_zeros(torch.Size(sample_shape) + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zeros, with a gradient."""
        return self.term.detach() - self.term


def _check_update(update: Any) -> None:
    check_instance("update", update)
    if update is not None and not isinstance(update, Update):
        raise TypeError(
            "update must be an Update of pyro_recursive.guides.semi_amortized.updates, such as "
            f"GradientUpdate(); got a {type(update).__name__}."
        )


def _direct(mode: str, direct: float | None, update: Update) -> float:
    if direct is not None:
        if mode not in THROUGH:
            raise ValueError(f"direct is for the modes {THROUGH}; mode={mode!r} has its own term.")
        return direct
    if mode in THROUGH:
        return update.direct
    return 1.0 if mode == "vae_svi" else 0.0
