"""What all guides of this package share: groups of latents, the plates of a call, and names."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.guides import undone
from pyro_recursive.guides.joint_site import drawn_from, emit, outer_shape
from pyro_recursive.guides.packing import LatentBlock, Values, latents_of
from pyro_recursive.guides.row_families import RowFamily
from pyro_recursive.guides.saving import check_copyable, check_prepared, note_loaded
from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.param_store import evict_stale, load_from_store, shared_parameter
from pyro_recursive.tracing.program import rows_needed
from pyro_recursive.tracing.sites import Site, nesting_of, plates_of, sites

__all__ = ["GuideCall", "LatentGuide", "first_argument"]


@dataclass(frozen=True)
class GuideCall:
    """One call of a guide: its arguments, its plates by name, and what it has sampled so far."""

    args: tuple
    kwargs: dict[str, Any]
    plates: Mapping[str, Any]
    inputs: Callable[..., Any]
    given: Values
    trunk: Callable[[Any], Any] | None = None  # what all encoders share
    made: frozenset[str] = frozenset()  # the plates that create_plates made, in any order
    cut: frozenset[str] = frozenset()  # the plates whose minibatch the inputs are
    encoded: list[Any] = field(default_factory=list)

    @cached_property
    def raw(self) -> Any:
        """What encoders are fed with, before any minibatch is taken out of it."""
        return self.inputs(*self.args, **self.kwargs)

    def rows(self, latents: LatentBlock) -> Any:
        """Return the encoders' inputs, ``[*rows, ...]``, for the rows of the minibatch."""
        if not self.encoded:  # the trunk runs once
            rows = self._minibatch(latents)
            self.encoded.append(rows if self.trunk is None else self.trunk(rows))
        return self.encoded[0]

    def _minibatch(self, latents: LatentBlock) -> Any:
        rows = self.raw
        for place, frame in enumerate(latents.rows):
            plate = self.plates[frame.name]
            if plate.subsample_size < plate.size and rows.shape[place] == plate.size:
                rows = rows.index_select(place, plate.indices.to(rows.device))
            elif self._is_unclear(plate, rows.shape[place]):
                raise ValueError(
                    f"Plate '{plate.name}' has all {plate.size} rows, in an order of its own, and "
                    "the encoder's inputs may be in that order or in the data's. Give all rows in "
                    "order, or call prepare() with a minibatch, if minibatches are what you pass."
                )
        return rows

    def _is_unclear(self, plate: Any, length: int) -> bool:
        """Whether inputs of all rows may be in the data's order, or in another one of the plate."""
        if length != plate.size or plate.name in self.cut or plate.indices is self.raw:
            return False
        return self.order_of(plate) is not None

    def order_of(self, plate: Any) -> Tensor | None:
        """Return the order of a plate that has all rows, None where it is that of the data.

        Only a user's plate can have another one. It may be given the rows' values in the place of
        their numbers (``subsample=x``): they are no permutation of the numbers.
        """
        index = plate.indices
        if plate.name not in self.made or index.dim() != 1 or index.is_floating_point():
            return None
        numbers = torch.arange(len(index), device=index.device)
        in_order, permuted = torch.equal(index, numbers), torch.equal(index.sort()[0], numbers)
        return index if permuted and not in_order else None

    def sizes(self, latents: LatentBlock) -> tuple[int, ...]:
        """Return how many rows the minibatch has, for each plate of the rows."""
        return tuple(self.plates[frame.name].subsample_size for frame in latents.rows)


class ModelReference:
    """A model that is neither copied nor pickled with the guide."""

    def __init__(self, model: Callable | None) -> None:
        self.model = model

    def __deepcopy__(self, memo: Any) -> "ModelReference":
        """Refer to the same model."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Refer to none."""
        return ModelReference, (None,)


class LatentGuide(PyroModule):
    """A guide over a model's continuous latents, in one or two groups of packed vectors.

    The latents inside the plate of the data are one group, with a distribution for each row; those
    outside are the other, with one joint distribution. Nothing is known before the first call or
    `prepare`, which looks at the model once.

    ``load_state_dict`` wants a guide that is prepared, and wins over what Pyro's store holds under
    the guide's name. Copies have the same model; pickles leave it out, and `attach` gives it back.
    """

    def __init__(
        self,
        model: Callable,
        *,
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or type(self).__name__)
        self.name = name or type(self).__name__
        self._model = ModelReference(model)
        self.plate, self.create_plates = plate, create_plates
        self.inputs = inputs or first_argument
        self.groups: tuple[LatentBlock, ...] = ()  # the global latents, then the local ones
        self.nesting = 0  # how many dims the model's plates take
        self._follows: dict[str, str] = {}  # which size of a plate is the inputs' length, if any
        self._lengths: dict[
            str, dict[int, tuple[int, int]]
        ] = {}  # the plates' sizes by that length
        self._chosen: frozenset[str] = frozenset()  # plates whose minibatch the model is given
        self.is_loaded = False  # since the last call
        self._shared: tuple[str, Tensor] | None = None  # a parameter that Pyro's store had, too
        self.register_load_state_dict_pre_hook(check_prepared)
        self.register_load_state_dict_post_hook(note_loaded)

    can_be_component: ClassVar[bool] = True  # of a mixture: its distribution is all that it is

    @abstractmethod
    def posterior(self, latents: LatentBlock, call: GuideCall) -> Any:
        """Return the distribution of a group: batch ``[*batch]``, event ``[D]``, unconstrained."""

    def variational_params(self, latents: LatentBlock, call: GuideCall) -> Tensor:
        """Return the numbers that make up the distribution of each row, ``[*batch, P]``."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say which numbers make up the distribution of a row: "
            "define its variational_params() and row_family()."
        )

    def row_family(self, latents: LatentBlock) -> RowFamily:
        """Return the distributions that a row may have, as functions of those numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not define row_family().")

    def keep_rows(self, latents: LatentBlock, call: GuideCall, numbers: Tensor) -> None:
        """Put numbers ``[*batch, P]`` into the table for the minibatch's rows, if there is one."""
        if not self.by_row:
            raise NotImplementedError(f"{type(self).__name__} has no table to keep rows in.")

    def build(self, latents: LatentBlock, place: Tensor, raw: Any) -> None:
        """Create what depends on the model's latents.

        ``place`` is a draw from the prior, ``[*batch, D]``, and ``raw`` what encoders are fed with.
        """

    def attach(self, model: Callable) -> None:
        """Tell the guide its model; needed after unpickling, which leaves models out."""
        self._model = ModelReference(model)

    def own_model(self, purpose: str) -> Callable:
        """Return the model; raise RuntimeError, saying what for, where it was left out."""
        if self._model.model is None:
            raise RuntimeError(
                f"This {type(self).__name__} was pickled without its model, and needs it "
                f"{purpose}: call guide.attach(model)."
            )
        return self._model.model

    def served_model(self) -> Callable:
        """Return the model with the latents that this guide packs, the others hidden."""
        return self.own_model("to see its latents")

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Look at the model, and create all parameters; the first call does so by itself.

        Needed before `load_state_dict`. Draws from the model's prior under the random state.
        """
        if not self.groups:
            with self.rollback_first_call(), rows_needed(args, kwargs):
                self.look(*args, **kwargs)

    @contextmanager
    def rollback_first_call(self) -> Iterator[None]:
        """Stay new where the first call fails: it may have been the data's fault."""
        if self.groups:
            yield
            return
        with undone.rollback_first_call(self, self.name):
            yield

    def look(self, *args: Any, **kwargs: Any) -> None:
        """Do what `prepare` does, the first time."""
        model = self.served_model()
        minibatch = _Minibatches()

        def prior() -> poutine.Trace:
            with poutine.block(), torch.no_grad():
                return poutine.trace(minibatch(model)).get_trace(*args, **kwargs)

        trace, raw = prior(), self.inputs(*args, **kwargs)
        latent = [s for s in sites(trace) if not s["is_observed"] and not _enumerated(s)]
        if not latent:
            raise ValueError(
                f"{type(self).__name__} found no latent sites in the model: all are observed, "
                "enumerated or blocked. The guide of such a model is an empty function."
            )
        local = self._local(trace, latent)
        parts = [[s for s in latent if s["name"] not in local]]
        parts.append([s for s in latent if s["name"] in local])
        groups = tuple(latents_of(part, i == 1) for i, part in enumerate(parts) if part)
        self.nesting = nesting_of(trace)
        self._follows = dict(_following(groups, raw))
        self._chosen = frozenset(minibatch.names)
        trunk, is_training = self._trunk(), self.training
        with poutine.block(), torch.no_grad():
            self.eval()  # no statistics of a batch norm, say, from this look
            self.adopt(groups, prior, raw if trunk is None else trunk(raw[:2]))
            self.train(is_training)

    def _trunk(self) -> Callable[[Any], Any] | None:
        """Return what is applied to the inputs before all encoders, if anything."""
        return None

    def adopt(
        self, groups: tuple[LatentBlock, ...], prior: Callable[[], poutine.Trace], raw: Any
    ) -> None:
        """Take over groups of latents, with a function that draws from the prior."""
        if self.groups:
            return
        if self._has("encoder") and not any(latents.local for latents in groups):
            raise ValueError(
                f"{type(self).__name__} has an encoder, and there are no rows to encode: no "
                "vectorised plate encloses all observed sites and some latent. Name the plate of "
                "the rows with plate=, or leave out the encoder."
            )
        drawn = prior()
        values = {name: site["value"] for name, site in drawn.nodes.items() if "value" in site}
        for latents in groups:
            self.build(latents, latents.pack(values), raw)
        self.groups = groups

    def forward(self, *args: Any, **kwargs: Any) -> Values:
        """Sample the model's latent sites; return their values."""
        with self.rollback_first_call():
            self.get_ready(args, kwargs)
            call = self.new_call(args, kwargs)
            for latents in self.groups:
                call.given.update(self.sample(latents, call))
        return call.given

    def sample(self, latents: LatentBlock, call: GuideCall) -> Values:
        """Sample the sites of a group."""
        return self.sample_from(self.posterior(latents, call), latents, call)

    def sample_from(self, posterior: Any, latents: LatentBlock, call: GuideCall) -> Values:
        """Sample the sites of a group from its distribution."""
        u = drawn_from(posterior, outer_shape())
        return emit(latents, call.plates, u, posterior.log_prob)

    def new_call(self, args: tuple, kwargs: dict[str, Any]) -> GuideCall:
        """Return a call of the guide, with its plates."""
        plates: dict[str, Any] = {}
        if self.create_plates is not None:
            made = self.create_plates(*args, **kwargs)
            plates = {p.name: p for p in ([made] if isinstance(made, pyro.plate) else made)}
        cut = {name for name, what in self._follows.items() if what == "minibatch"}
        made = frozenset(plates)
        call = GuideCall(args, kwargs, plates, self.inputs, {}, self._trunk(), made, frozenset(cut))
        for latents in self.groups:
            for frame in (f for slot in latents.slots for f in slot.frames):
                if frame.name not in plates:
                    plates[frame.name] = self._plate(frame, latents, call)
        return call

    def _plate(self, frame: Any, latents: LatentBlock, call: GuideCall) -> Any:
        """Make a plate as the model's, or of the length of the inputs where it was theirs."""
        full, size = frame.full_size or frame.size, frame.size
        if frame.name in self._chosen and self._follows.get(frame.name) != "minibatch":
            raise ValueError(
                f"The model is given the minibatch of plate '{frame.name}' (subsample=), and the "
                "guide would draw another one. Give the guide create_plates=, a function from the "
                "model's arguments to the same plate."
            )
        if frame.name in self._follows:
            length = call.raw.shape[latents.rows.index(frame)]
            if self._follows[frame.name] == "minibatch":
                size = length
            elif full == size:
                full, size = self._sizes_of(frame, length, call)
            else:
                full, size = length, min(size, length)
        return pyro.plate(frame.name, full, subsample_size=size, dim=frame.dim)

    def _sizes_of(self, frame: Any, length: int, call: GuideCall) -> tuple[int, int]:
        """Return a plate's full size and size where inputs of another length may be all or part.

        Inputs that were all of the data when the guide was prepared may be a minibatch now: the
        model knows, and is asked once for each length.
        """
        known = self._lengths.setdefault(frame.name, {frame.size: (frame.size, frame.size)})
        if length not in known:
            model = self.own_model(f"to tell whether {length} rows are all data or a minibatch")
            known[length] = (length, length)
            for site in sites(outline(model, call.args, call.kwargs)):
                plate = plates_of(site).get(frame.name)
                if plate is not None and plate.size == length:
                    known[length] = (plate.full_size or length, length)
        return known[length]

    def get_ready(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Do what comes before each run: the first has much to do."""
        is_new = self._claim()
        self.prepare(*args, **kwargs)
        if self.is_loaded:
            evict_stale(self, self._pyro_name)
            self.is_loaded, self._shared = False, None
        elif is_new or self._is_left_behind():
            load_from_store(self, self._pyro_name)

    def _is_left_behind(self) -> bool:
        """Whether Pyro's store was loaded since the last call."""
        if self._shared is None:
            self._shared = shared_parameter(self, self._pyro_name)
            return False
        (name, parameter), store = self._shared, pyro.get_param_store()
        return name in store and store[name] is not parameter

    def _claim(self) -> bool:
        """Raise where another guide of this name has its parameters in Pyro's store.

        Return whether this guide had not run under its name before.
        """
        other = _OWNERS.get(self._pyro_name)
        if other is self:
            return False
        if other is not None:
            theirs = {id(parameter) for parameter in other.parameters()}
            theirs -= {id(parameter) for parameter in self.parameters()}
            for name, parameter in pyro.get_param_store().named_parameters():
                if id(parameter) in theirs and name.startswith(f"{self._pyro_name}."):
                    raise ValueError(
                        f"Another guide named '{self._pyro_name}' has its parameters in Pyro's "
                        f"store ('{name}'), and this one would train those in place of its own. "
                        "Tell them apart with name=, call pyro.clear_param_store() where the other "
                        "one is done with, or run a copy under pyro.get_param_store().scope()."
                    )
        _OWNERS[self._pyro_name] = self
        return True

    @property
    def by_row(self) -> bool:
        """Whether the latents in the data's plate have a distribution for each row by default.

        With an encoder they do.
        """
        return self._has("encoder")

    def _has(self, module: str) -> bool:
        """Whether there is a module; asking a PyroModule for it would register its parameters."""
        return any(name == module for name, _ in self.named_children())

    def _local(self, trace: poutine.Trace, latent: list[Site]) -> set[str]:
        """Return the names of the latents that have a distribution for each row of the data."""
        plate = self.plate
        if plate is None and self.by_row:
            plate = _data_plate(trace, latent)
        if plate is None:
            return set()
        plates = {site["name"]: _vectorized(site) for site in latent}
        within = {name for name, frames in plates.items() if plate in frames}
        if not within:
            known = sorted(set().union(*plates.values()))
            raise ValueError(
                f"No latent site is inside a vectorised plate '{plate}'; those of the latents are "
                f"{known}."
            )
        return within

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled; models are neither (`ModelReference`)."""
        check_copyable(self)
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)  # Pyro's weak reference: nothing to save
        return {**self.__dict__, "_shared": None}


# The guide that last ran under a name: Pyro's store is by name, and would mix up two of them.
_OWNERS: WeakValueDictionary[str, LatentGuide] = WeakValueDictionary()


class _Minibatches(Messenger):
    """Notes the plates that are given their minibatch: the innermost handler of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.names.add(msg["name"])


def first_argument(*args: Any, **kwargs: Any) -> Any:
    """Return what encoders are fed with where no ``inputs`` are given."""
    if args:
        return args[0]
    return next(iter(kwargs.values()), None)


def _data_plate(trace: poutine.Trace, latent: list[Site]) -> str | None:
    """Return the plate that holds all the data and some latents, None if there is none."""
    observed = [set(plates_of(site)) for site in sites(trace) if site["is_observed"]]
    shared = set.intersection(*observed) if observed else set()
    frames = {
        name: frame
        for site in latent
        for name, frame in _vectorized(site).items()
        if name in shared
    }
    if not frames:
        return None
    # Of several the one that holds the most latents: its sites have the others as rows or inside.
    return max(frames, key=lambda name: sum(name in plates_of(site) for site in latent))


def _vectorized(site: Site) -> dict[str, Any]:
    return {name: frame for name, frame in plates_of(site).items() if frame.vectorized}


def _enumerated(site: Site) -> bool:
    return bool(site["infer"].get("enumerate"))


def _following(groups: tuple[LatentBlock, ...], raw: Any) -> Iterator[tuple[str, str]]:
    """Yield the row plates that are as long as the inputs: all of the plate, or a minibatch."""
    if isinstance(raw, Tensor):
        for latents in groups:
            for place, frame in enumerate(latents.rows):
                length = raw.shape[place] if raw.dim() > place else None
                if length in (frame.full_size or frame.size, frame.size):
                    yield (
                        frame.name,
                        "all" if length == (frame.full_size or frame.size) else "minibatch",
                    )


PackedGuide = LatentGuide  # its former name
