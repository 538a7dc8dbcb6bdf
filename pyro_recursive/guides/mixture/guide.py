"""Mixtures of guides."""

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall, first_argument
from pyro_recursive.guides.gaussian_families import Family, FamilyName
from pyro_recursive.guides.joint_site import emit, inside
from pyro_recursive.guides.marginals import log_density
from pyro_recursive.guides.mixture.components import component_of
from pyro_recursive.guides.mixture.weights import Weights
from pyro_recursive.guides.mixture_distributions import ListMixture, Mixture, StackedMixture
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.row_families import MixtureRows, RowFamily
from pyro_recursive.guides.starts import InitLocFn, StartSearch, component_steps
from pyro_recursive.guides.whitening import Gaussian
from pyro_recursive.tracing.handlers import ComponentAssignment, ComponentIndex, current_assignment
from pyro_recursive.tracing.plates import outer_shape
from pyro_recursive.tracing.sites import PARTICLE_PLATE

# Components are drawn at random where no loss assigns them.
AT_RANDOM = ComponentAssignment(())
SPREAD = -1 / 3  # components start D ** SPREAD apart in each of D dims: wide, and of a good density


class MixtureGuide(LatentGuide):
    """A mixture of guides with its exact log-density, over all components and latent sites.

    ``q(z | x) = sum_m w_m(x) q_m(z | x)``. Latents inside the data's plate have a mixture and
    weights for each row, the others one mixture jointly. An auxiliary site ``<name>_component``
    draws the component. Train with `Stratified_ELBO`, `SIWAE_ELBO` or `MISELBO`: under ordinary
    losses the weights have a score-function gradient (use ``estimator="vimco"``).

    Args:
        model: a Pyro model with continuous latents.
        components: guides: `AmortizedGuide`, `FlowGuide`, Pyro's autoguides, or any guide that
            samples the model's own sites; or a number, for Gaussians with parameters of their own.
            Those without an ``init_loc_fn`` of their own start some way from the mixture's in each
            unconstrained dim, as equal ones would stay equal. Parameters of plain functions are not
            in the `state_dict`.
        weights: a module from the rows of the inputs to ``[*rows, M]`` logits l, bounded by
            ``8 tanh(l / 8)``; ``"linear"`` for a linear one (the default with an encoder), or
            ``"shared"`` for the same weights in all rows. By default each row has its own.
        learn_weights: False keeps the weights where they start.
        trunk: a module before all encoders and weights, held while single components are trained.
        init_loc_fn: a common start, as in `AmortizedGuide`.
        family, init_scale: of the Gaussians, where ``components`` is a number.
        whiten: the coordinates of all components, as in `AmortizedGuide`; they start around its
            Gaussian, with its scales.
        plate, inputs, create_plates, name: as in `AmortizedGuide`. The plate is found if a
            component has an encoder or is written by hand; else all latents are one group.

    `Automatic Differentiation Variational Inference with Mixtures` (arXiv 2003.01687).

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_recursive import Stratified_ELBO
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
    ...     pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))
    >>> guide = MixtureGuide(model, 2)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Stratified_ELBO(8))
    >>> losses = [svi.step() for _ in range(10)]
    """

    can_be_component: ClassVar[bool] = False

    def __init__(
        self,
        model: Callable,
        components: int | Sequence[Callable],
        *,
        weights: nn.Module | str | None = None,
        learn_weights: bool = True,
        trunk: nn.Module | None = None,
        family: FamilyName | Family = "diagonal",
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        init_loc_fn: InitLocFn | None = None,
        init_scale: float = 0.1,
        whiten: bool | Gaussian = False,
        name: str | None = None,
    ) -> None:
        if isinstance(components, int):
            options: dict[str, Any] = {"family": family, "init_scale": init_scale}
            components = [AmortizedGuide(model, **options) for _ in range(components)]
        own = [guide for guide in components if isinstance(guide, LatentGuide)]
        for guide in own:
            if not guide.can_be_component:
                raise ValueError(f"{type(guide).__name__} cannot be a component of a mixture.")
        options = {"create_plates": create_plates, "init_loc_fn": init_loc_fn, "whiten": whiten}
        super().__init__(model, plate=plate, inputs=inputs, name=name, **options)
        # Guides that are plain functions have no parameters of their own to register.
        self._functions = {m: c for m, c in enumerate(components) if not isinstance(c, nn.Module)}
        modules = [c if isinstance(c, nn.Module) else nn.Identity() for c in components]
        self.register("components", PyroModule[nn.ModuleList](modules))
        self.trunk: Any = trunk
        with_encoder = [guide for guide in own if guide.by_row]
        if inputs is None and with_encoder:
            self.inputs = with_encoder[0].inputs
        kind = weights or ("linear" if with_encoder else "table")
        self.weights = Weights(kind, torch.zeros(len(components)), learn_weights)

    @property
    def by_row(self) -> bool:
        """With an encoder or a guide written by hand, each row has a mixture of its own."""
        return any(
            c.by_row if isinstance(c, LatentGuide) else not isinstance(c, AutoContinuous)
            for c in self.components
        )

    def rows_have_parameters(self) -> bool:
        """Whether each row has parameters in a component, or a weight of its own."""
        own = [c for c in self.components if isinstance(c, LatentGuide)]
        return self.weights.kind == "table" or any(guide.rows_have_parameters() for guide in own)

    def component(self, m: int) -> Any:
        """Return component ``m``."""
        return self._functions.get(m, self.components[m])

    def inspect_model(self, *args: Any, **kwargs: Any) -> None:
        """Look at the model, and create all parameters, those of the components too."""
        for component in self.components:
            if not isinstance(component, LatentGuide) or not component.by_row:
                continue
            if component.inputs in (self.inputs, first_argument):
                continue
            if not _same(component.inputs(*args, **kwargs), self.inputs(*args, **kwargs)):
                raise ValueError("A component has inputs= of its own. Give them to the mixture.")
        super().inspect_model(*args, **kwargs)
        for m in range(len(self.components)):
            if not isinstance(self.component(m), LatentGuide):
                self._check_sizes(self.component(m))
                with poutine.block(), torch.no_grad():
                    self.component(m)(*args, **kwargs)

    def _check_sizes(self, component: Any) -> None:
        """Raise where a plate has no size and an autoguide of Pyro would fail to copy it."""
        if isinstance(component, AutoGuide) and component.create_plates is None:
            for frame in (f for latents in self.groups for s in latents.slots for f in s.frames):
                if frame.full_size is None:
                    name = type(component).__name__
                    raise ValueError(
                        f"Plate '{frame.name}' has no size, which {name} needs. Give that guide "
                        "create_plates=."
                    )

    def create_parameters(
        self, groups: tuple[LatentBlock, ...], search: StartSearch, raw: Any
    ) -> None:
        """Share the groups with the components, each around a point of its own."""
        start = search.find()
        steps = {
            slot.name: latents.size**SPREAD * self.component_steps(start[slot.name])
            for latents in groups
            for slot in latents.slots
        }
        rows = {frame.name for latents in groups if latents.local for frame in latents.rows}
        for m, component in enumerate(self.components):
            if rows and isinstance(component, AutoContinuous):
                is_by_plate = self.plate is not None and not self.by_row
                remedy = "Leave out plate=" if is_by_plate else "Use AutoNormal or AmortizedGuide"
                raise ValueError(
                    f"{type(component).__name__} has one joint density, and the mixture has one "
                    f"for each row of plate '{min(rows)}'. {remedy}."
                )
            if groups[0].whitening is not None and not isinstance(component, LatentGuide):
                name = getattr(component, "__name__", type(component).__name__)
                raise ValueError(
                    f"whiten= needs AmortizedGuide or FlowGuide as components, got {name}."
                )
            if isinstance(component, LatentGuide):
                if component.plate is not None and component.plate not in rows:
                    raise ValueError(
                        f"A component has plate='{component.plate}'. Give it to the mixture."
                    )
                step = {name: each[m] for name, each in steps.items()}
                near = search.moved(groups[0].step(step))
                component.create_parameters(groups, near, raw)
        super().create_parameters(groups, search, raw)

    def component_steps(self, start: Tensor) -> Tensor:
        """Return the components' distances from a common start, ``[M, *shape]``."""
        return component_steps(len(self.components), start)

    def build(self, latents: LatentBlock, start: Tensor, raw: Any) -> None:
        """Create the weights of a group."""
        self.weights.build(latents, start, raw)

    def center_outputs(self, search: StartSearch, guide: LatentGuide) -> None:
        """Move the encoders of all components."""
        for component in self.components:
            if isinstance(component, LatentGuide):
                component.center_outputs(search, guide)

    def _trunk(self) -> Callable[[Any], Any] | None:
        if not self._has("trunk"):
            return None
        is_frozen = bool((current_assignment() or AT_RANDOM).frozen)

        def encode(rows: Any) -> Any:
            with _gradients(not is_frozen):
                return self.trunk(rows)

        return encode

    @property
    def holds_densities(self) -> bool:
        """Whether it can stop the gradient of parameters in densities, not in draws."""
        return _alike([self.component(m) for m in range(len(self.components))])

    @property
    def members(self) -> tuple[int, ...]:
        """The numbers of the components that make up the mixture."""
        return tuple(range(len(self.components)))

    def log_weights(self, latents: LatentBlock, call: GuideCall, members: Sequence[int]) -> Tensor:
        """Return the logarithms of the members' weights in a group, ``[*batch, J]``."""
        logits = self.weights.logits(latents, call)
        if len(members) < len(self.components):
            logits = logits[..., list(members)]
        return logits.log_softmax(-1)

    def component_weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the weights of `members` for a call, ``[*rows, J]`` (``[J]`` for global latents).

        Those of the rows of the minibatch, where there is a mixture for each row.
        """
        self.get_ready(args, kwargs)
        latents, call = self.groups[-1], self.new_call(args, kwargs)
        with poutine.block():
            weights = self.log_weights(latents, call, self.members).exp()
        sizes = call.sizes(latents)
        batch = latents.expand_rows(weights.new_empty(*sizes, 1)).shape[:-1]
        return weights.expand(*batch, -1).reshape(*sizes, -1)

    def posterior(self, latents: LatentBlock, call: GuideCall) -> Mixture:
        """Return the mixture over a group: batch ``[*batch]``, event ``[D]``."""
        assignment = current_assignment() or AT_RANDOM
        if assignment.components and len(self.groups) > 1:
            raise NotImplementedError(
                "This guide has one mixture over the global latents, one by row. Use Trace_ELBO, "
                "or leave out plate=."
            )
        members, frozen = assignment.members or self.members, assignment.frozen
        log_weights = self.log_weights(latents, call, members)
        guides = [self.component(m) for m in members]
        if _alike(guides):
            params = torch.broadcast_tensors(*self.params_of(latents, call, members, frozen))
            return StackedMixture(log_weights, torch.stack(params), guides[0].family, latents.size)
        components = []
        for column, guide in enumerate(guides):
            with _gradients(column not in frozen):
                components.append(component_of(guide, latents, call))
        return ListMixture(log_weights, components)

    def free_posteriors(self) -> list[Any] | None:
        """Return the mixtures of all rows of each block, None with an encoder or other guides."""
        parts = [self.component(m) for m in self.members]
        is_gaussian = all(isinstance(part, AmortizedGuide) for part in parts)
        if self.by_row or self.weights.network is not None or not is_gaussian:
            return None
        columns = zip(*(part.free_posteriors() for part in parts), strict=True)
        return [
            ListMixture(self.free_log_weights(latents), components)
            for latents, components in zip(self.groups, columns, strict=True)
        ]

    def free_log_weights(self, latents: LatentBlock) -> Tensor:
        """Return the logarithms of the members' weights in all rows, ``[*rows, J]``."""
        return self.weights.all_rows(latents)[..., list(self.members)].log_softmax(-1)

    def params_of(
        self, latents: LatentBlock, call: GuideCall, members: Sequence[int], frozen: Container[int]
    ) -> list[Tensor]:
        """Return the parameters of each member, ``[*batch, P]``; ``frozen`` are columns."""
        known: dict[int, Tensor] = {}
        for column, m in enumerate(members):
            with _gradients(column not in frozen):
                extra = self.earlier_params(m, known, call.sizes(latents))
                known[m] = self.component(m).variational_params(latents, call, *extra)
        return list(known.values())

    def earlier_params(self, m: int, known: dict[int, Tensor], rows: Sequence[int]) -> list[Tensor]:
        """Return what the encoder of component ``m`` gets beside its inputs."""
        return []

    def variational_params(self, latents: LatentBlock, call: GuideCall) -> Tensor:
        """Return the parameters of all members and their log-weights, ``[*batch, P]``."""
        self._check_members()
        params = self.params_of(latents, call, self.members, ())
        params.append(self.log_weights(latents, call, self.members))
        batch = torch.broadcast_shapes(*(own.shape[:-1] for own in params))
        return torch.cat([own.expand(*batch, -1) for own in params], -1)

    def row_family(self, latents: LatentBlock) -> RowFamily:
        """Return the mixtures that a row may have."""
        self._check_members()
        return MixtureRows([self.component(m).row_family(latents) for m in self.members])

    def _check_members(self) -> None:
        for guide in (self.component(m) for m in self.members):
            if not isinstance(guide, LatentGuide):
                raise TypeError(
                    f"Component {type(guide).__name__} has no parameters of a row. Use "
                    "AmortizedGuide or FlowGuide."
                )

    def transform_of(self, latents: LatentBlock, call: GuideCall) -> Transform:
        """Refuse: a mixture is no map of standard normals."""
        weights = self.log_weights(latents, call, self.members).reshape(-1)
        heaviest = self.members[int(weights.argmax())]
        raise NotImplementedError(
            f"{type(self).__name__} is no map of standard normals. Use nuts_start, or its heaviest "
            f"component, component({heaviest})."
        )

    def sample_from(self, mixture: Mixture, latents: LatentBlock, call: GuideCall) -> Values:
        """Sample a component for each row, then the sites of a group."""
        assignment = current_assignment() or AT_RANDOM
        if mixture.num_components == 1 and not assignment.components:
            device = mixture.log_weights.device
            index = torch.zeros(mixture.batch_shape, dtype=torch.long, device=device)
        else:
            group = "" if len(self.groups) == 1 else "_local" if latents.local else "_global"
            with inside(latents.rows, call.plates):
                index = pyro.sample(
                    f"{self.site_prefix}{group}_component",
                    ComponentIndex(logits=mixture.log_weights),
                    obs=_assigned(assignment, mixture) if assignment.components else None,
                    infer={"is_auxiliary": True},
                )
        shape = torch.broadcast_shapes(outer_shape(), mixture.batch_shape)
        if assignment.points is None:
            u = mixture.draw(index.expand(shape), assignment.components or None)
        else:
            u = assignment.points_of(shape)
        scored = mixture
        if assignment.stop_density_gradient:
            assert isinstance(mixture, StackedMixture)  # `holds_densities`
            scored = mixture.held()
        keep = latents.keep(call.kept)
        particle = assignment.particle  # of this run: another one may follow before the density

        def density(u: Tensor, volume: Tensor) -> Tensor:
            if assignment.reference is None:
                return log_density(scored, u, keep) - volume
            table, weights = scored.table(u, keep), mixture.log_weights
            return assignment.reference(table, weights, volume, particle) - volume

        return emit(latents, call, u, density)


def _alike(guides: Sequence[Any]) -> bool:
    """Whether all are Gaussians of one family, so that they can be evaluated at once."""
    gaussian = all(isinstance(guide, AmortizedGuide) for guide in guides)
    return gaussian and len({guide.family for guide in guides}) == 1


def _gradients(enabled: bool) -> torch.set_grad_enabled:
    """Return a context with or without gradients; without where it already is."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and enabled)


def _assigned(assignment: ComponentAssignment, mixture: Mixture) -> Tensor:
    """Return the component of each particle and row."""
    device = mixture.log_weights.device
    frame = next((f for f in get_plates() if f.name == PARTICLE_PLATE), None)
    if frame is None:
        index = torch.tensor(assignment.components[assignment.particle or 0], device=device)
    else:
        index = _on_device(assignment.components, device).reshape(-1, *[1] * (-frame.dim - 1))
    return index.expand(torch.broadcast_shapes(outer_shape(), mixture.batch_shape))


@functools.lru_cache(maxsize=64)
def _on_device(components: tuple[int, ...], device: torch.device) -> Tensor:
    """Return component numbers as a tensor, copied to the device once."""
    with torch.inference_mode(False):  # also for calls outside of it
        return torch.tensor(components, device=device)


def _same(one: Any, other: Any) -> bool:
    """Whether two inputs are the same, or tensors with the same values, perhaps in tuples."""
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return one is other or (tensors and torch.equal(one, other))
