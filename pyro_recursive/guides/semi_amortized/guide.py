"""Semi-amortised guides: an encoder whose output is refined for each row, inside the guide."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.joint_site import inside
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.row_families import RowFamily
from pyro_recursive.guides.semi_amortized.refinement import Trajectory, divergence, refine
from pyro_recursive.guides.semi_amortized.row_elbo import ESTIMATORS, LocalBound
from pyro_recursive.guides.semi_amortized.updates import GradientUpdate, Update
from pyro_recursive.guides.starts import StartSearch
from pyro_recursive.tracing.handlers import is_dry_run, latent_weight, run_cache
from pyro_recursive.tracing.isolation import SharedNoise, isolated
from pyro_recursive.tracing.plates import outer_shape

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


class SemiAmortizedGuide(LatentGuide):
    """An amortised guide whose output is refined by T steps on each row's own ELBO.

    The encoder gives each row parameters ``lambda_0``. T steps of an `Update` improve the row's
    ``E[log p(x_i, z_i) - log q(z_i; lambda)]``, and the guide samples from ``q(z_i; lambda_T)``.
    Latents outside the data's plate are not refined. Mathematics and cost: the documentation's page
    on refinement.

    Args:
        model: the model whose bound the rows climb.
        guide: gives lambda_0: `AmortizedGuide`, `FlowGuide` (contexts, locations and scales are
            refined), or a `MixtureGuide` of those (all components and weights).
        steps, test_steps: T in training, and in eval mode if not the same.
        mode: what trains the encoder. ``"first_order"``: the bound's gradient at lambda_T;
            ``"second_order"``: that through all steps; ``"distill"``, ``"distill_reverse"``: the KL
            divergence of lambda_0 and lambda_T; ``"vae_svi"``: the ELBO at lambda_0; ``"svi"``:
            nothing (start from `FixedStart`, or a table of parameters).
        update: a step of `pyro_recursive.guides.semi_amortized.updates`; `GradientUpdate` if None.
        direct: the weight of the ELBO at lambda_0 in the first two modes; if None the update's.
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
        if isinstance(guide, SemiAmortizedGuide):
            raise ValueError("A SemiAmortizedGuide cannot be refined again.")
        for what, value, known in (("mode", mode, MODES), ("estimator", estimator, ESTIMATORS)):
            if value not in known:
                raise ValueError(f"{what} must be one of {known}, got {value!r}.")
        names = ("plate", "create_plates", "init_loc_fn")
        shared: dict[str, Any] = {name: getattr(guide, name) for name in names}
        super().__init__(model, inputs=guide.inputs, name=name, **shared)
        self.register("guide", guide)
        self.update: Any = GradientUpdate() if update is None else update
        if mode not in THROUGH:
            if direct is not None or self.update.every_step:
                raise ValueError(f"direct= and learned updates need a mode of {THROUGH}.")
            direct = 1.0 if mode == "vae_svi" else 0.0
        self.steps, self.test_steps, self.mode = steps, test_steps, mode
        self.direct = self.update.direct if direct is None else direct
        if not self.direct >= 0:
            raise ValueError(f"direct must be at least 0, got {self.direct}.")
        self.draws, self.estimator, self.seed, self.checkpoint = draws, estimator, seed, checkpoint

    @property
    def by_row(self) -> bool:
        """As in the guide that is refined."""
        return self.guide.by_row

    def rows_have_parameters(self) -> bool:
        """As in the guide that is refined."""
        return self.guide.rows_have_parameters()

    def refine(self, *args: Any, steps: int | None = None, **kwargs: Any) -> Refinement:
        """Return the refined parameters of the rows of a call, without a graph, and their ELBOs."""
        self.get_ready(args, kwargs)
        with torch.no_grad(), isolated(noise=SharedNoise()):
            call = self.new_call(args, kwargs)
            for latents in self.groups[:-1]:
                call.given.update(self.guide.sample(latents, call))
            latents = self.groups[-1]
            found = self._refined(latents, call, self.num_steps if steps is None else steps)
            target = self._target(latents, call)
            noise = target.noise(found.params, -(-100 // self.draws) * self.draws)
            ends = found.points[0], found.params
            elbos = [
                torch.stack([target.value(p, part) for part in noise.split(self.draws)]).mean(0)
                for p in ends
            ]
            blocks = target.family.blocks
            clips = [self.update.clips(gradient, blocks).to(noise) for gradient in found.gradients]
            clipped = torch.stack(clips or [torch.zeros_like(elbos[0])]).mean(0)
            rows = call.sizes(latents)
            return Refinement(
                *(p.reshape(*rows, -1).clone() for p in ends),
                *(each.reshape(rows).clone() for each in (*elbos, clipped)),
            )

    @property
    def num_steps(self) -> int:
        """T in the mode that the guide is in."""
        if self.training or self.test_steps is None:
            return self.steps
        return self.test_steps

    def create_parameters(
        self, groups: tuple[LatentBlock, ...], search: StartSearch, raw: Any
    ) -> None:
        """Share the blocks with the guide that is refined."""
        if not groups[-1].local:
            raise ValueError("Refinement needs rows. Give the guide an encoder or plate=.")
        self.guide.create_parameters(groups, search, raw)
        super().create_parameters(groups, search, raw)

    def center_outputs(self, search: StartSearch, guide: LatentGuide) -> None:
        """Move the encoder of the guide that is refined."""
        self.guide.center_outputs(search, guide)

    def build(self, latents: LatentBlock, start: Tensor, raw: Any) -> None:
        """Create the parameters of the update."""
        if latents.local:
            self.update.to(start)
            few = raw[:2] if isinstance(raw, Tensor) else raw
            features = self.update.features_of(few, len(latents.rows))
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
        term = refined.encoder_term
        if term is not None:  # losses with -log q maximise it; the density is 1
            with inside(latents.rows, call.plates):
                pyro.factor(f"{self.site_prefix}_direct", term.detach() - term, has_rsample=True)
        posterior = self.row_family(latents).distribution(refined.params)
        return self.guide.sample_from(posterior, latents, call)

    def _target(self, latents: LatentBlock, call: GuideCall, twice: bool = False) -> LocalBound:
        nesting = max(self.nesting, len(outer_shape()))
        options: dict[str, Any] = {"estimator": self.estimator, "double_backward": twice}
        family, weight = self.row_family(latents), latent_weight()
        return LocalBound(self.own_model(), latents, call, family, nesting, weight, **options)

    def _refined(self, latents: LatentBlock, call: GuideCall, steps: int) -> Trajectory:
        """Refine the rows; once, where a loss runs the guide twice on the same noise."""
        cache = run_cache()
        if cache is None or call.given:  # global latents may be other ones now
            return self._refine(latents, call, steps)
        if (self, steps) not in cache:
            cache[self, steps] = self._refine(latents, call, steps)
        return cache[self, steps]

    def _refine(self, latents: LatentBlock, call: GuideCall, steps: int) -> Trajectory:
        start = self.guide.variational_params(latents, call)
        if not steps:
            return Trajectory([start], [])
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Refinement takes gradients. Use torch.no_grad(), or steps=0.")
        twice = self.mode == "second_order" and torch.is_grad_enabled()
        target = self._target(latents, call, twice)
        if call.given:  # each particle has global latents of its own, and so rows of its own
            batch = torch.broadcast_shapes(outer_shape(), start.shape[:-1])
            start = start.expand(*batch, -1)
        noise = target.noise(start, steps * self.draws, self.seed)
        features = self.update.features_of(call.rows(latents), len(latents.rows))
        found = refine(
            target,
            self.update,
            start if self.mode in THROUGH else start.detach(),
            noise.unflatten(0, (steps, self.draws)),
            None if features is None else latents.expand_rows(features),
            twice,
            self.checkpoint,
        )
        if self.mode == "svi" and self.training and torch.is_grad_enabled() and not is_dry_run():
            self.guide.keep_rows(latents, call, found.params)
        return found._replace(encoder_term=self._encoder_term(target, start, found))

    def _encoder_term(self, target: LocalBound, start: Tensor, found: Trajectory) -> Tensor | None:
        """Return the encoder's objective beside the bound, for each row, up to a constant."""
        if not self.direct and not self.mode.startswith("distill"):
            return None
        if not torch.is_grad_enabled():
            return torch.zeros_like(start[..., 0])
        if self.mode.startswith("distill"):
            params = found.params.detach()
            pair = (start, params) if self.mode == "distill" else (params, start)
            # Not the noise of the steps, which the parameters depend on.
            seed = None if self.seed is None else self.seed + 1
            return -divergence(target.family, *pair, target.noise(start, self.draws, seed))
        count = len(found.gradients) if self.update.every_step else 1
        # The start itself: the first step may have had a constant in its place.
        pairs = zip([start, *found.points[1:count]], found.gradients[:count], strict=True)
        terms = [(params * gradient.detach()).sum(-1) for params, gradient in pairs]
        return self.direct * torch.stack(torch.broadcast_tensors(*terms)).sum(0)
