"""Semi-amortised guides: an encoder whose output is refined for each row, inside the guide."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.guides.base import GuideCall, LatentGuide
from pyro_recursive.guides.joint_site import inside, outer_shape
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.row_families import RowFamily
from pyro_recursive.guides.semi_amortized.gradient_site import GradientSite
from pyro_recursive.guides.semi_amortized.refinement import Trajectory, divergence, refine
from pyro_recursive.guides.semi_amortized.row_elbo import ESTIMATORS, LocalBound
from pyro_recursive.guides.semi_amortized.updates import GradientUpdate, Update
from pyro_recursive.tracing.arguments import check_instance, is_count
from pyro_recursive.tracing.handlers import is_dry_run, latent_weight, run_cache
from pyro_recursive.tracing.isolation import SharedNoise, isolated

__all__ = ["MODES", "Refinement", "SemiAmortizedGuide"]

THROUGH = ("first_order", "second_order")  # the bound's own gradient reaches the encoder
MODES = (*THROUGH, "distill", "distill_reverse", "vae_svi", "svi")


class Refinement(NamedTuple):
    """What refinement does for the rows of one call.

    ``start`` and ``numbers`` are what the encoder found and what came of it, ``[*rows, P]``;
    ``elbo_start`` and ``elbo`` the bounds of both on the same new draws, in nats, ``[*rows]``;
    ``clipped`` the share of steps in which a row's gradient was clipped, ``[*rows]``.
    """

    start: Tensor
    numbers: Tensor
    elbo_start: Tensor
    elbo: Tensor
    clipped: Tensor


class SemiAmortizedGuide(LatentGuide):
    """An amortised guide whose output is refined by a few steps on each row's own ELBO.

    The encoder gives numbers ``lambda_0`` to each row, the parameters of its distribution. Inside
    the guide, T steps of an `Update` improve them: by default stochastic gradient ascent with
    momentum on ``elbo_i(lambda) = E[log p(x_i, z_i) - log q(z_i; lambda)]``, with draws of its own
    in each step. Then the guide samples the model's sites from ``q(z_i; lambda_T)``, like any other
    guide. Rows do not see each other: what a row gets does not depend on its minibatch. Latents
    outside the data's plate are left as they are, and given to the rows.

    The runs of the model that this takes leave no trace: no site or parameter is seen by handlers,
    no statistics of a batch norm move, dropout is the same in all steps, a minibatch is the one of
    the guide's plates, and no gradient reaches the model's parameters but by ``"second_order"``.

    ``mode`` says what trains the encoder; the model always learns from the bound at lambda_T:

    - ``"first_order"``: the bound's gradient at lambda_T, as if the steps were a constant.
    - ``"second_order"``: exact differentiation through the steps, for the model as well. The better
      the steps work, the less of the gradient arrives at the encoder.
    - ``"distill"``: the divergence ``KL(q(lambda_0) || q(lambda_T))``, lambda_T being constant;
      ``"distill_reverse"``: ``KL(q(lambda_T) || q(lambda_0))``.
    - ``"vae_svi"``: the ELBO at lambda_0 alone.
    - ``"svi"``: nothing. Start from `FixedStart`, or from a table (`AmortizedGuide` with ``plate=``
      and no encoder), which in training takes the refined rows for the next time.

    Beside the first two, ``direct`` times the ELBO at lambda_0 trains the encoder, whose gradient
    the first step has anyway: 0.1 by default, 1 (and after each step) for `LearnedUpdate`; 0 leaves
    the bound's own gradient. It enters by an auxiliary site ``<name>_direct`` whose density is 1,
    and whose gradient is that of the term, so that losses take it up, and report the bound: those
    that subtract ``log q`` as a whole, not Pyro's `ReweightedWakeSleep`, which would descend it.

    Arguments:
        model: the model, whose bound the rows climb.
        guide: what finds lambda_0: `AmortizedGuide`, `FlowGuide` (its contexts, locations and
            scales are refined), or a `MixtureGuide` of those (all components and weights). A
            refined mixture is no mixture to the stratified losses: train the mixture with them,
            and refine it afterwards, or use ``estimator="dreg+vimco"``.
        steps: T in training.
        test_steps: T in eval mode, if not the same.
        mode: see above.
        update: a step, of `guides.semi_amortized.updates`: `GradientUpdate` by default,
            `LearnedUpdate` for iterative amortised inference; or an `Update` of your own.
        direct: the weight of the ELBO at lambda_0; the update's own default if not given.
        draws: S, the number of draws of z in each step.
        estimator: of the gradient of a step, ``"stl"`` (exact where q is the posterior) or
            ``"pathwise"``.
        seed: None draws anew in each call; a number gives all rows the same fixed draws, so that
            lambda_T is a function of the row's data.
        checkpoint: in second order, recompute each step in the backward pass, so that memory does
            not grow with T; the model then runs three times as often.
        name: as in `AmortizedGuide`; all else is taken from ``guide``.

    Raises:
        NotImplementedError: the model has latents that the guide does not know; a guide of your own
            does not say what numbers its rows have.
        TypeError: ``guide`` is no guide of this package; ``update`` is no `Update`.
        ValueError: an argument is out of range; no latent is in the data's plate.

    Cost of a training step, in those of an ordinary one: at most T + 1 in first order, for T > 0
    with as many draws inside as outside, and up to three times that in second order. Particles of
    one pass share lambda_T; those that are looped are refined each by itself.

    Sources: `Semi-Amortized Variational Autoencoders` (Kim et al., arXiv 1802.02550); `Iterative
    Amortized Inference` (Marino et al., arXiv 1807.09356).

    >>> import pyro.distributions as dist
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> from pyro_recursive import AmortizedGuide
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
    >>> encoder = torch.nn.Linear(1, 2)
    >>> guide = SemiAmortizedGuide(model, AmortizedGuide(model, encoder), steps=5)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    >>> x = torch.tensor([[0.5], [-1.0], [2.0]])
    >>> svi.step(x) > 0
    True
    >>> found = guide.refine(x, steps=50)
    >>> bool((found.elbo > found.elbo_start).all())
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
                "guide must be one that finds numbers for each row: AmortizedGuide, FlowGuide or "
                f"a MixtureGuide of those; got {type(guide).__name__}"
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
                "The guide has run on its own before, and Pyro cannot rename its parameters: make "
                "a new guide of its kind, and copy the state with load_state_dict."
            ) from error
        self.update: Any = GradientUpdate() if update is None else update
        self.steps, self.test_steps = steps, test_steps
        self.mode, self.direct = mode, _direct(mode, direct, self.update)
        self.draws, self.estimator, self.seed, self.checkpoint = draws, estimator, seed, checkpoint
        self._check()

    @property
    def by_row(self) -> bool:
        """As the guide that is refined."""
        return self.guide.by_row

    def refine(self, *args: Any, steps: int | None = None, **kwargs: Any) -> Refinement:
        """Refine the rows of a call, without a graph, and tell what it brings."""
        self.prepare(*args, **kwargs)
        with torch.no_grad(), isolated(noise=SharedNoise()):
            return self._refinement(args, kwargs, steps)

    def _refinement(self, args: tuple, kwargs: dict[str, Any], steps: int | None) -> Refinement:
        call = self.new_call(args, kwargs)
        for latents in self.groups[:-1]:
            call.given.update(self.guide.sample(latents, call))
        latents = self.groups[-1]
        path = self._refined(latents, call, self.num_steps if steps is None else steps)
        target = self._target(latents, call)
        runs = target.noise(path.numbers, -(-100 // self.draws) * self.draws).split(self.draws)
        elbos = [torch.stack([target.value(n, each) for each in runs]) for n in path[:2]]
        found = (path.start, path.numbers, *(elbo.mean(0) for elbo in elbos))
        rows = call.sizes(latents)
        start, numbers, elbo_start, elbo = (
            each.reshape(*rows, *each.shape[latents.nesting :]).clone() for each in found
        )
        return Refinement(start, numbers, elbo_start, elbo, self._clipped(path).reshape(rows))

    def _clipped(self, path: "_Refined") -> Tensor:
        """Return the share of steps in which a row's gradient was clipped, ``[*batch]``."""
        blocks = self.row_family(self.groups[-1]).blocks
        clips = [self.update.clips(gradient, blocks) for gradient in path.gradients]
        if not clips:
            return path.start.new_zeros(path.start.shape[:-1])
        return torch.stack(clips).to(path.start).mean(0)

    @property
    def num_steps(self) -> int:
        """T in the mode that the guide is in."""
        if self.training or self.test_steps is None:
            return self.steps
        return self.test_steps

    def adopt(
        self, groups: tuple[LatentBlock, ...], prior: Callable[[], poutine.Trace], raw: Any
    ) -> None:
        """Share the groups with the guide that is refined."""
        if not groups[-1].local:
            raise ValueError(
                f"{type(self).__name__} refines what an encoder finds for each row, and no latent "
                "is in a plate of rows: give its guide an encoder, or plate= for a table."
            )
        self.guide.adopt(groups, prior, raw)
        super().adopt(groups, prior, raw)

    def build(self, latents: LatentBlock, place: Tensor, raw: Any) -> None:
        """Create what the update needs, for the rows."""
        if latents.local:
            self.update.to(place)
            dims = len(latents.rows)
            few = raw[:2] if isinstance(raw, Tensor) else raw
            features = self.update.features_of(few, dims)
            blocks = self.guide.row_family(latents).blocks
            self.update.build(sum(blocks), blocks, features)

    def _trunk(self) -> Callable[[Any], Any] | None:
        return self.guide._trunk()

    def variational_params(self, latents: LatentBlock, call: GuideCall) -> Tensor:
        """Return the refined numbers of the rows, ``[*batch, P]``."""
        if not latents.local:
            return self.guide.variational_params(latents, call)
        return self._refined(latents, call, self.num_steps).numbers

    def row_family(self, latents: LatentBlock) -> RowFamily:
        """Return the distributions that a row may have: those of the guide that is refined."""
        return self.guide.row_family(latents)

    def posterior(self, latents: LatentBlock, call: GuideCall) -> Any:
        """Return the distribution of a group, for the rows after refinement."""
        if not latents.local:
            return self.guide.posterior(latents, call)
        return self.row_family(latents).distribution(self.variational_params(latents, call))

    def sample(self, latents: LatentBlock, call: GuideCall) -> Values:
        """Sample the sites of a group; note what else the encoder learns from."""
        if not latents.local:
            return self.guide.sample(latents, call)
        path = self._refined(latents, call, self.num_steps)
        if path.also is not None:
            with inside(latents.rows, call.plates):
                term = GradientSite(path.also)
                infer = {"is_auxiliary": True}
                pyro.sample(f"{self.name}_direct", term, obs=term.rsample(), infer=infer)
        posterior = self.row_family(latents).distribution(path.numbers)
        return self.guide.sample_from(posterior, latents, call)

    def _target(self, latents: LatentBlock, call: GuideCall, twice: bool = False) -> LocalBound:
        return LocalBound(
            self.own_model("for the ELBO that its rows climb"),
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
        memory = run_cache()
        if memory is None or call.given:  # global latents may be other ones now
            return self._refine(latents, call, steps)
        if (self, steps) not in memory:
            memory[self, steps] = self._refine(latents, call, steps)
        return memory[self, steps]

    def _refine(self, latents: LatentBlock, call: GuideCall, steps: int) -> "_Refined":
        start = self.guide.variational_params(latents, call)
        if not steps:
            return _Refined(start, start, None, [])
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{type(self).__name__} takes gradients in each call, and torch.inference_mode() "
                "allows none: use torch.no_grad(), or steps=0."
            )
        twice = self.mode == "second_order" and torch.is_grad_enabled()
        target = self._target(latents, call, twice)
        if call.given:  # each particle has global latents of its own, and so rows of its own
            batch = torch.broadcast_shapes(outer_shape(), start.shape[:-1])
            start = start.expand(*batch, -1)
        noise = target.noise(start, steps * self.draws, self.seed)
        path = refine(
            target,
            self.update,
            start if self.mode in THROUGH else start.detach(),
            noise.unflatten(0, (steps, self.draws)),
            self._features(latents, call),
            twice,
            self.checkpoint,
        )
        if self.mode == "svi" and self.training and torch.is_grad_enabled() and not is_dry_run():
            self.guide.keep_rows(latents, call, path.numbers)
        also = self._also(target, start, path)
        return _Refined(start, path.numbers, also, [gradient for _, gradient in path.visited])

    def _features(self, latents: LatentBlock, call: GuideCall) -> Tensor | None:
        features = self.update.features_of(call.rows(latents), len(latents.rows))
        return None if features is None else latents.expand_rows(features)

    def _also(self, target: LocalBound, start: Tensor, path: Trajectory) -> Tensor | None:
        """Return what the encoder climbs beside the bound, for each row, up to a constant."""
        if (self.direct or self.mode.startswith("distill")) and not torch.is_grad_enabled():
            return torch.zeros_like(start[..., 0])
        if self.mode.startswith("distill"):
            numbers = path.numbers.detach()
            pair = (start, numbers) if self.mode == "distill" else (numbers, start)
            # Not the noise of the steps, which the numbers depend on.
            seed = None if self.seed is None else self.seed + 1
            noise = target.noise(start, self.draws, seed)
            return -divergence(target.family, *pair, noise)
        if not self.direct:
            return None
        visited = path.visited if self.update.every_step else path.visited[:1]
        # The start itself: the first step may have had a constant in its place.
        points = [start, *(numbers for numbers, _ in visited[1:])]
        gradients = [gradient.detach() for _, gradient in visited]
        climbed = [(p * g).sum(-1) for p, g in zip(points, gradients, strict=True)]
        return self.direct * torch.stack(torch.broadcast_tensors(*climbed)).sum(0)

    def _check(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.update.every_step and self.mode not in THROUGH:
            raise ValueError(
                f"{type(self.update).__name__} learns its steps from the bound, so that mode must "
                f"be one of {THROUGH}, got {self.mode!r}"
            )
        for name, least in (("steps", 0), ("test_steps", 0), ("draws", 1)):
            number = getattr(self, name)
            if name == "test_steps" and number is None:
                continue
            if not is_count(number) or number < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {number!r}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, got {self.estimator!r}")
        if not 0 <= self.direct < math.inf:
            raise ValueError(f"direct must be a number >= 0, got {self.direct!r}")


class _Refined(NamedTuple):
    """Where rows start and where they end, ``[*batch, P]``, and what led there.

    ``also`` is what the encoder climbs beside the bound, ``[*batch]``; ``gradients`` are those of
    the steps.
    """

    start: Tensor
    numbers: Tensor
    also: Tensor | None
    gradients: list[Tensor]


def _check_update(update: Any) -> None:
    check_instance("update", update, "step of refinement")
    if update is not None and not isinstance(update, Update):
        raise TypeError(
            "update must be an Update of pyro_recursive.guides.semi_amortized.updates, such as "
            f"GradientUpdate() or one of your own, got a {type(update).__name__}"
        )


def _direct(mode: str, direct: float | None, update: Update) -> float:
    if direct is not None:
        if mode not in THROUGH:
            raise ValueError(f"direct is for the modes {THROUGH}; mode={mode!r} has its own term")
        return direct
    if mode in THROUGH:
        return update.direct
    return 1.0 if mode == "vae_svi" else 0.0
