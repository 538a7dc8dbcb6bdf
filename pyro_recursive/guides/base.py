"""What all guides of this package share: blocks of latents, plates, and names in Pyro's store."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.distributions.transforms import LowerCholeskyAffine
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform

from pyro_recursive.guides.call import GuideCall, first_argument, plate_devices
from pyro_recursive.guides.joint_site import emit
from pyro_recursive.guides.marginals import log_density
from pyro_recursive.guides.model_masks import LatentsInCalls, read_masks, sampled_latents
from pyro_recursive.guides.model_plates import ModelPlates, of_all_rows
from pyro_recursive.guides.model_reference import ModelReference
from pyro_recursive.guides.neutra import NeutraGuide
from pyro_recursive.guides.packing import LatentBlock, Values, latents_of
from pyro_recursive.guides.placement import check_bounds
from pyro_recursive.guides.row_families import RowFamily
from pyro_recursive.guides.starts import InitLocFn, StartSearch, site_function
from pyro_recursive.guides.whitening import Gaussian, Whitening
from pyro_recursive.tracing.compatibility import check_batch_shapes
from pyro_recursive.tracing.isolation import eval_mode, isolated
from pyro_recursive.tracing.param_store import (
    check_coordinates,
    check_prepared,
    claim_name,
    evict_stale,
    is_of_another,
    load_from_store,
    note_loaded,
    rollback,
    shared_parameter,
)
from pyro_recursive.tracing.plates import outer_shape
from pyro_recursive.tracing.program import GivenMinibatches, rows_needed
from pyro_recursive.tracing.sites import (
    Site,
    nesting_of,
    plates_of,
    sites,
)


class LatentGuide(AutoGuide):
    """An autoguide over a model's continuous latents, in one or two blocks of packed vectors.

    With an encoder or ``plate=``, the latents inside the plate of the data are one block, with a
    distribution for each row, and those outside another. Else all latents have one joint
    distribution. A subclass defines `posterior` and `build`; for refinement and
    `pyro_recursive.gaps` also `variational_params` and `row_family`. Copies of a guide alone share
    the model, and pickles leave it out: see `attach`.
    """

    can_be_component: ClassVar[bool] = True  # of a mixture: sampling needs only `posterior`
    has_marginals: ClassVar[bool] = False  # whether it can leave out sites that a call observes
    # Of the class, for pickles of versions that had no such attributes.
    is_loaded = is_computed = False  # the parameters, since the last call
    _shared: tuple[str, Tensor] | None = None  # a parameter that Pyro's store had, too

    def __init__(
        self,
        model: Callable,
        *,
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        init_loc_fn: InitLocFn | None = None,
        whiten: bool | Gaussian = False,
        name: str | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self.name = self._pyro_name = name or type(self).__name__
        self._model = ModelReference(model)
        self.plate = plate
        self.inputs = inputs or first_argument
        site_function(init_loc_fn)  # which raises for an unknown name
        self.init_loc_fn = init_loc_fn  # None: the default, or what a mixture has
        if not isinstance(whiten, bool | tuple):
            raise ValueError(f"whiten must be True, False or (loc, scale_tril), got {whiten!r}.")
        self.whiten = whiten
        self.whitening: Whitening | None = None
        self.groups: tuple[LatentBlock, ...] = ()  # the global latents, then the local ones
        self.nesting = 0  # how many dims the model's plates take
        self._plates = ModelPlates()
        self._in_calls = LatentsInCalls()
        self.register_load_state_dict_pre_hook(check_prepared)
        self.register_load_state_dict_post_hook(note_loaded)

    @abstractmethod
    def posterior(self, latents: LatentBlock, call: GuideCall) -> Any:
        """Return the distribution of a block: batch ``[*batch]``, event ``[D]``, unconstrained."""

    def variational_params(self, latents: LatentBlock, call: GuideCall) -> Tensor:
        """Return the parameters of the distribution of each row, ``[*batch, P]``."""
        raise NotImplementedError(f"{type(self).__name__} does not define variational_params().")

    def row_family(self, latents: LatentBlock) -> RowFamily:
        """Return the distributions that a row may have, as functions of its parameters."""
        raise NotImplementedError(f"{type(self).__name__} does not define row_family().")

    def keep_rows(self, latents: LatentBlock, call: GuideCall, params: Tensor) -> None:
        """Write ``[*batch, P]`` to the minibatch's rows of the parameters, if each row has some."""
        if not self.by_row:
            raise NotImplementedError(f"{type(self).__name__} has no table to keep rows in.")

    def free_posteriors(self) -> list[Any] | None:
        """Return the distributions of all rows of each block, None if not all have parameters.

        Gaussians and `ListMixture` of them, batch ``[*rows]``, in the coordinates of the family.
        """
        return None

    def build(self, latents: LatentBlock, start: Tensor, raw: Any) -> None:
        """Create the parameters of a block around a point, ``[*batch, D]``, unconstrained.

        ``raw`` are the encoders' inputs, or what a shared trunk returns for two of their rows.
        """

    def attach(self, model: Callable) -> None:
        """Set the guide's model; needed after unpickling, which leaves models out."""
        self._model = ModelReference(model)

    def own_model(self) -> Callable:
        """Return the model; raise RuntimeError where unpickling left it out."""
        if self._model.model is None:
            raise RuntimeError(
                f"{type(self).__name__} was pickled without its model: call guide.attach(model)."
            )
        return self._model.model

    def served_model(self) -> Callable:
        """Return the model whose latents this guide packs; a subclass may hide others."""
        return self.own_model()

    @property
    def model(self) -> Callable:
        """The guide's model."""
        return self.own_model()

    @property
    def site_prefix(self) -> str:
        """What the names of auxiliary sites start with: two parts of a list may have one name."""
        return self.name if self.master is None else self._pyro_name

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute as any module does: guides inside this one keep their own plates."""
        super(AutoGuide, self).__setattr__(name, value)

    def _update_master(self, master_ref: Callable[[], Any]) -> None:
        """Take the plates of an AutoGuideList, whose `append` calls this; a mixture makes none."""
        if isinstance(master_ref(), AutoGuideList):
            super()._update_master(master_ref)

    @property
    def by_row(self) -> bool:
        """Whether the data's plate is found without ``plate=``, as it is with an encoder."""
        return self._has("encoder")

    def _has(self, name: str) -> bool:
        """Whether an attribute is set; `getattr` of a PyroModule would register its parameters."""
        return any(own.get(name) is not None for own in (self._modules, vars(self)))

    def register(self, name: str, module: nn.Module) -> None:
        """Set an attribute to a module; Pyro renames the guides in it."""
        try:
            setattr(self, name, module)
        except AssertionError as error:  # Pyro's own check
            raise ValueError("The guide has run by itself: it keeps its names.") from error

    # --- The first call

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once and create all parameters; the first call does so by itself.

        Needed before `load_state_dict`. Moves the random state.
        """
        if not self.groups:
            with self.rollback_first_call(), rows_needed(args, kwargs):
                self.inspect_model(*args, **kwargs)

    def rollback_first_call(self) -> AbstractContextManager[None]:
        """If the block raises before the guide is prepared, restore the guide and Pyro's store."""
        return nullcontext() if self.groups else rollback(self)

    def inspect_model(self, *args: Any, **kwargs: Any) -> None:
        """Run the model, find blocks and plates, and create the parameters."""
        given = GivenMinibatches()
        search = StartSearch(given(self.served_model()), args, kwargs, self.init_loc_fn)
        trace, raw = search.trace, self.inputs(*args, **kwargs)
        check_batch_shapes(sites(trace))
        latent = sampled_latents(trace)
        if not latent:
            raise ValueError(
                f"{type(self).__name__} found no latent sites. Use an empty function as guide."
            )
        local = self._local(trace, latent)
        parts = [[s for s in latent if (s["name"] in local) is inside] for inside in (False, True)]
        groups = tuple(latents_of(part, i == 1) for i, part in enumerate(parts) if part)
        check_bounds(groups, trace, given(self.served_model()), args, kwargs)
        self.nesting = nesting_of(trace)
        has_tables = self.rows_have_parameters()
        self._plates = ModelPlates.seen(
            groups,
            latent,
            raw,
            given=given.values,
            devices=plate_devices(trace),
            rows_have_parameters=has_tables,
        )
        rows = self._plates.of_rows(self, args, kwargs)
        groups = tuple(of_all_rows(latents, rows) for latents in groups)
        if self.whiten is not False:
            groups, search = self._whitened(groups, search)
        self._in_calls = LatentsInCalls.seen(trace, args, kwargs)
        trunk, is_training = self._trunk(), self.training
        with poutine.block(), torch.no_grad(), eval_mode(self):  # for statistics of batch norms
            self.create_parameters(groups, search, raw if trunk is None else trunk(raw[:2]))
            if is_training:
                self.center_outputs(search, self)

    def _whitened(
        self, groups: tuple[LatentBlock, ...], search: StartSearch
    ) -> tuple[tuple[LatentBlock, ...], StartSearch]:
        """Return the block in whitened coordinates, and a search whose start is at their zero."""
        latents, *others = groups
        if latents.local or others:
            raise ValueError(
                f"whiten= needs one joint distribution of all latents, and {self.name} has one for "
                "each row. Leave out plate= and encoders."
            )
        like = latents.pack_trace(search.trace.nodes)
        given = search.gaussian() if isinstance(self.whiten, bool) else self.whiten
        loc, scale_tril = (tensor.to(like) for tensor in given)
        if loc.shape != like.shape[-1:]:
            raise ValueError(
                f"whiten=(loc, scale_tril) has loc of shape {list(loc.shape)}, and the latents "
                f"{[slot.name for slot in latents.slots]} have {latents.size} coordinates."
            )
        self.whitening = Whitening(loc, scale_tril)
        latents = replace(latents, whitening=self.whitening)
        if self.init_loc_fn is None:
            search = search.at(latents.unflatten(torch.zeros_like(like)))
        return (latents,), search

    def _local(self, trace: poutine.Trace, latent: list[Site]) -> set[str]:
        """Return the names of the latents that have a distribution for each row of the data."""
        plates = {
            site["name"]: [name for name, frame in plates_of(site).items() if frame.vectorized]
            for site in latent
        }
        plate = self.plate
        if plate is None and self.by_row:
            # The plate around all observed sites; of several, that around the most latents.
            observed = [set(plates_of(s)) for s in sites(trace) if s["is_observed"]]
            shared = set.intersection(*observed) if observed else set()
            frames = [name for own in plates.values() for name in own if name in shared]
            plate = max(frames, key=lambda f: sum(f in plates_of(s) for s in latent), default=None)
        if plate is None:
            return set()
        within = {name for name, frames in plates.items() if plate in frames}
        if not within:
            known = sorted(set().union(*plates.values()))
            raise ValueError(f"No latent site is inside plate '{plate}', only inside {known}.")
        return within

    def rows_have_parameters(self) -> bool:
        """Whether each row of the local latents has parameters of its own."""
        return not self.by_row

    def create_parameters(
        self, groups: tuple[LatentBlock, ...], search: StartSearch, raw: Any
    ) -> None:
        """Create the parameters of blocks of latents."""
        if self.groups:
            self._check_same(groups)
            return
        if self._has("encoder") and not any(latents.local for latents in groups):
            raise ValueError(f"{type(self).__name__} has no rows to encode. Give plate=.")
        if self.whiten is not False and groups[0].whitening is None:
            raise ValueError(
                f"{self.name} is part of another guide and has whiten=. Give that to the mixture, "
                "or leave it out."
            )
        start = search.find(self.init_loc_fn)
        for latents in groups:
            self.build(latents, latents.flatten(start), raw)
        self.groups = groups

    def _check_same(self, groups: tuple[LatentBlock, ...]) -> None:
        """Raise where this guide was prepared for other blocks than those it is to be a part of."""
        if list(map(_layout, self.groups)) != list(map(_layout, groups)):
            names = [slot.name for latents in self.groups for slot in latents.slots]
            raise ValueError(
                f"{type(self).__name__} has run by itself, and has sites {names} in other blocks, "
                "in another order or in other coordinates than the guide that it is part of. Put a "
                "new one into that guide."
            )

    def center_outputs(self, search: StartSearch, guide: "LatentGuide") -> None:
        """Shift the output of an untrained encoder to the start; ``guide`` makes the calls."""

    # --- Every call

    if TYPE_CHECKING:  # torch types calls of modules as Any

        def __call__(self, *args: Any, **kwargs: Any) -> Values: ...

    def forward(self, *args: Any, **kwargs: Any) -> Values:
        """Sample the model's latent sites; return their values."""
        with self.rollback_first_call():
            self.get_ready(args, kwargs)
            call = self.new_call(args, kwargs)
            for latents in self.groups:
                call.given.update(self.sample(latents, call))
        return call.given

    def get_ready(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Prepare a new guide; load parameters from Pyro's store, or evict another guide's."""
        is_newer = self.is_loaded or self.is_computed
        if self.whiten is True and not is_newer:
            check_coordinates(self)
        is_new = claim_name(self)
        self.prepare(*args, **kwargs)
        if is_newer:
            evict_stale(self, self._pyro_name)
            self.is_loaded = self.is_computed = False
            self._shared = None
        elif is_new or self._store_was_loaded():
            load_from_store(self, self._pyro_name)

    def take_stored(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take a loaded store's values, unless they are another guide's, and prepare the guide."""
        if is_of_another(self):
            self.prepare(*args, **kwargs)
        else:
            self.get_ready(args, kwargs)

    def _store_was_loaded(self) -> bool:
        """Whether Pyro's store was loaded since the last call."""
        store = pyro.get_param_store()
        if not len(store):
            return False
        if self._shared is None:  # no parameter is known to be shared
            self._shared = shared_parameter(self, self._pyro_name)
            return self._shared is None
        name, parameter = self._shared
        return name in store and store[name] is not parameter

    def new_call(self, args: tuple, kwargs: dict[str, Any]) -> GuideCall:
        """Return a call of the guide, with its plates."""
        plates, names = self._plates.given_to(self, args, kwargs)
        rows, sizes = self._plates.of_rows(self, args, kwargs), self._plates.input_sizes
        call = GuideCall(args, kwargs, plates, self.inputs, {}, self._trunk(), names, sizes, rows)
        call.model = self.served_model
        call.absent = self._in_calls.absent_in(self, args, kwargs)
        self._plates.complete(self, call)
        if self._in_calls.are_masked:
            parameters = (p for p in self.parameters() if p.is_floating_point())
            like = next(parameters, torch.empty(()))
            read_masks(self.groups, call, like)
        return call

    def sample(self, latents: LatentBlock, call: GuideCall) -> Values:
        """Sample the sites of a block."""
        return self.sample_from(self.posterior(latents, call), latents, call)

    def sample_from(self, posterior: Any, latents: LatentBlock, call: GuideCall) -> Values:
        """Sample the sites of a block from its distribution, or from a marginal of it."""
        shape = torch.broadcast_shapes(outer_shape(), posterior.batch_shape)
        u, keep, present = posterior.expand(shape).rsample(), latents.keep(call.kept), latents
        if call.absent:
            present, flags = latents.without(call.absent)
            if not present.slots:
                return {}
            flags = flags.to(u.device)
            u, keep = u[..., flags], flags if keep is None else keep & flags

        def density(u: Tensor, volume: Tensor) -> Tensor:
            if call.absent:
                part, u = u, u.new_zeros(*u.shape[:-1], latents.size)
                u[..., flags] = part
            return log_density(posterior, u, keep) - volume

        return emit(present, call, u, density)

    def marginals(self, latents: LatentBlock, call: GuideCall) -> tuple[Tensor, Tensor]:
        """Return means and scales of a block's Gaussian in unconstrained space, ``[*batch, D]``."""
        raise NotImplementedError(
            f"{type(self).__name__} has no quantiles in closed form: take those of draws."
        )

    def median(self, *args: Any, **kwargs: Any) -> Values:
        """Return the posterior median of each latent, as `quantiles` does."""
        found = self.quantiles([0.5], *args, **kwargs)
        return {name: values[0] for name, values in found.items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Iterable[float], *args: Any, **kwargs: Any) -> Values:
        """Return posterior quantiles of each latent, ``[Q, *site's shape]``.

        Vectors such as simplices have those of each unconstrained coordinate, as in Pyro. Where the
        model's plates draw a minibatch, those of all rows that the guide or its inputs have.

        Raises:
            NotImplementedError: the guide's marginals are no Gaussians, or bounds depend on other
                latents.
        """
        self.take_stored(args, kwargs)
        found: dict[str, list[Tensor]] = {}
        levels = list(quantiles)
        with isolated():
            call = self.new_call(args, kwargs)
            whole = call.of_all_rows(self.groups, self.by_row)
            marginals = [self.marginals(latents, whole) for latents in self.groups]
            blocks = [replace(latents, whitening=None) for latents in self.groups]
            earlier: tuple[Values, Values] = {}, {}
            for block, (loc, scale) in zip(blocks, marginals, strict=True):
                normal = torch.distributions.Normal(loc, scale)
                if whole is not call and block.rows and block.varying_supports:
                    raise NotImplementedError(
                        f"The bounds of latent site '{block.varying_supports[0]}' are known for "
                        "the rows of one minibatch at a time: take the quantiles of draws."
                    )
                points = loc - scale, loc + scale
                latents = call.shared_block(block, points, earlier)
                for values, point in zip(earlier, points, strict=True):
                    values.update(latents.unpack(point))
                for q in levels:
                    ends = [normal.icdf(loc.new_tensor(p)) for p in (q, 1 - q)]
                    below, above = map(latents.unpack, ends)
                    for slot in latents.slots:
                        if slot.name not in call.absent:
                            values = above if slot.is_decreasing else below
                            found.setdefault(slot.name, []).append(values[slot.name])
        return {name: torch.stack(values) for name, values in found.items()}

    def transform_of(self, latents: LatentBlock, call: GuideCall) -> Transform:
        """Return the map from standard normals to a block without rows, ``[D]`` to ``[D]``."""
        raise NotImplementedError(
            f"{type(self).__name__} is no map of standard normals. Use AmortizedGuide or FlowGuide."
        )

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Return the map from standard normals ``[D]`` to all latents, packed, as Pyro's guides do.

        Raises:
            NotImplementedError: the guide is no such map, or has one for each row of the data.
        """
        self.take_stored(args, kwargs)
        latents, *others = self.groups
        if others or latents.local:
            raise NotImplementedError(
                f"{type(self).__name__} has a distribution for each row of plate "
                f"'{self.groups[-1].rows[-1].name}'. Leave out plate= and encoder for a joint one."
            )
        transform = self.transform_of(latents, GuideCall(args, kwargs, {}, self.inputs))
        white = latents.whitening
        if white is None:
            return transform
        return ComposeTransform([transform, LowerCholeskyAffine(white.loc, white.scale_tril)])

    def neutra(self, *args: Any, **kwargs: Any) -> NeutraGuide:
        """Return the guide in the form that `pyro.infer.reparam.NeuTraReparam` takes.

        Arguments are the model's. For NUTS in coordinates in which the guide is standard normal;
        its `NeutraGuide.values` maps draws back. Errors are those of `get_transform`; angles have
        no such coordinates.

        `NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo` (Hoffman et al., arXiv 1903.03704).

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.reparam import NeuTraReparam
        >>> from pyro_recursive import AmortizedGuide
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 3.0))
        >>> neutra = NeuTraReparam(AmortizedGuide(model).neutra())
        >>> nuts = pyro.infer.NUTS(neutra.reparam(model))  # samples the site z_shared_latent
        """
        with torch.no_grad():
            transform = self.get_transform(*args, **kwargs)
            (latents,) = self.groups
            call = GuideCall(args, kwargs, {}, self.inputs, model=self.served_model)
            like = next(p for p in self.parameters() if p.is_floating_point())
            zero = like.new_zeros(latents.size)
            latents = replace(latents, whitening=None)  # the map has these coordinates
            return NeutraGuide(self.served_model(), latents, transform, call, zero)

    def _trunk(self) -> Callable[[Any], Any] | None:
        """Return what is applied to the inputs before all encoders, if anything."""
        return None

    def make_plate(self, frame: Any, latents: LatentBlock, call: GuideCall) -> Any:
        """Return a plate like the model's, of the size that it has in a call."""
        return self._plates.make(self, frame, latents, call)

    # --- Pyro's parameter store, copies and pickles

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled; models are neither (`ModelReference`).

        Raises:
            TypeError: the guide holds an autoguide of Pyro, which would lose its model.
        """
        for part in self.modules():
            if isinstance(part, AutoGuide) and not isinstance(part, LatentGuide):
                raise TypeError(
                    f"Pyro's {type(part).__name__} cannot be copied or pickled. Save the guide's "
                    "state_dict()."
                )
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)  # Pyro's weak reference: nothing to save
        plates = self._plates.forget_inputs()
        return {**self.__dict__, "_plates": plates, "_shared": None, "master": None}


def _layout(latents: LatentBlock) -> tuple[Any, ...]:
    """Return what the meaning of a block's vector depends on."""
    slots = [(slot.name, slot.event_shape, slot.inner_plates) for slot in latents.slots]
    return slots, [frame.name for frame in latents.rows], latents.local, latents.whitening


PackedGuide = LatentGuide  # its former name
