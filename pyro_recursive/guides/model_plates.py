"""The model's plates in a `LatentGuide`, ``guide`` below, and their sizes in each call."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_recursive.guides.call import GuideCall, copied_plate, first_argument
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.tracing.handlers import is_dry_run
from pyro_recursive.tracing.isolation import OUTSIDE_OF_GRAPHS, outline
from pyro_recursive.tracing.minibatch import MinibatchRows, minibatch_rows, plates_of_rows
from pyro_recursive.tracing.sites import Site, plates_of, sites
from pyro_recursive.tracing.user_warnings import warn_user

COMPARISONS = 3  # of tensors that are not the same object; each waits for the device


@dataclass(frozen=True)
class SeenInputs:
    """The inputs of a guide's first call, None where no more are compared."""

    tensor: Tensor | None
    version: int = 0
    comparisons: int = COMPARISONS

    @classmethod
    def of(cls, inputs: Any) -> "SeenInputs":
        """Return what is compared later."""
        return cls(inputs, _version(inputs)) if isinstance(inputs, Tensor) else cls(None)

    def after(self, inputs: Any, guide: str, plate: str) -> "SeenInputs":
        """Return what is compared later, and warn where the inputs have changed."""
        first = self.tensor
        if first is None or not isinstance(inputs, Tensor):
            return self
        if inputs is first and _version(inputs) == self.version:
            return self
        if inputs.shape[:1] != first.shape[:1]:  # told by the sizes of plates
            return self
        if inputs is not first and _equal(inputs, first):  # a copy
            left = self.comparisons - 1
            return replace(self, comparisons=left) if left else SeenInputs(None)
        warn_user(
            f"{guide} has parameters for each row of plate '{plate}', and its inputs have changed. "
            "For minibatches use fit, MinibatchRows or an encoder; for new data a new guide."
        )
        return SeenInputs(None)


@dataclass
class ModelPlates:
    """What a guide knows about the model's plates from its first call.

    ``input_sizes`` says by plate whether the inputs have "all" of its rows or its "minibatch".
    ``given`` are plates with ``subsample=`` in the model, ``tables`` those whose rows have
    parameters of their own, ``joint`` those whose entries have one distribution. ``watched`` is one
    of these that has the inputs' length. ``devices`` are those of plates that name one.
    """

    input_sizes: dict[str, str] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    joint: frozenset[str] = frozenset()
    watched: str | None = None
    _input_shape: tuple[int, ...] | None = None
    _follow_rows: frozenset[str] | None = None  # those with parameters that have a call's rows
    devices: dict[str, Any] = field(default_factory=dict)
    _sizes: dict[tuple[str, Any], tuple[int, int]] = field(default_factory=dict)
    _seen: SeenInputs | None = None  # inputs of the first call that does not say its rows

    @classmethod
    def seen(
        cls,
        groups: tuple[LatentBlock, ...],
        latent: Iterable[Site],
        raw: Any,
        *,
        devices: dict[str, Any],
        given: Iterable[str],
        rows_have_parameters: bool,
    ) -> "ModelPlates":
        """Return what the guide's first call shows."""
        rows = {f.name for latents in groups for f in latents.rows}
        local = {slot.name for latents in groups if latents.local for slot in latents.slots}
        frames = {name: f for site in latent for name, f in plates_of(site).items()}
        outside = {name for s in latent if s["name"] not in local for name in plates_of(s)}
        tables, joint = frozenset(rows if rows_have_parameters else ()), frozenset(outside - rows)
        length = raw.shape[0] if isinstance(raw, Tensor) and raw.dim() else None
        of_inputs = [
            name
            for name in sorted(tables | joint)
            if frames[name].size == length and frames[name].full_size in (None, length)
        ]
        return cls(
            dict(_input_sizes(groups, raw)),
            frozenset(given),
            tables,
            joint,
            of_inputs[-1] if of_inputs else None,
            _shape_of(raw),
            devices=devices,
        )

    def of_rows(self, guide: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, MinibatchRows]:
        """Return the plates with parameters for each row whose rows a call is given by number.

        Raises:
            ValueError: the rows are unknown, or they have one joint distribution.
        """
        rows = minibatch_rows()
        if rows is None or rows.is_all or not self.tables | self.joint:
            return {}
        if self._follow_rows is None:
            first = first_argument(*args, **kwargs) if rows.index is None else rows.index
            count = len(first) if isinstance(first, Tensor) and first.dim() else 1
            model = guide.served_model()
            self._follow_rows = plates_of_rows(model, args, kwargs, count, rows.total)
        for name in sorted(self._follow_rows & self.joint):
            raise ValueError(
                f"{type(guide).__name__} has one distribution for all entries of plate '{name}', "
                f"and each batch has other rows. Give plate='{name}' or an encoder."
            )
        found = dict.fromkeys(sorted(self._follow_rows & self.tables), rows)
        for name in found:
            rows.check_known(name)
        return found

    def given_to(
        self, guide: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], frozenset[str]]:
        """Return the plates of a list of guides, or a user's, and the names of a user's."""
        create_plates = guide.create_plates
        if guide.master is None:
            created = create_plates(*args, **kwargs) if create_plates is not None else ()
            created = [created] if isinstance(created, pyro.plate) else created
            plates = {plate.name: plate for plate in created if plate.size != -1}
            return plates, frozenset(plates)
        plates, makes = dict(getattr(guide.master(), "plates", {})), guide.master().create_plates
        if create_plates is not None:
            raise ValueError("Give create_plates= to the AutoGuideList, not to a part of it.")
        for name in sorted(plates.keys() & self.given if makes is None else ()):
            raise ValueError(
                f"Plate '{name}' has subsample= in the model: give AutoGuideList create_plates=."
            )
        return plates, frozenset(plates if makes is not None else ())

    def complete(self, guide: Any, call: GuideCall) -> None:
        """Add the plates of a call that nobody made, and check the others."""
        is_extra = is_dry_run() or OUTSIDE_OF_GRAPHS.get() is not None
        if self.watched is not None and minibatch_rows() is None and not is_extra:
            seen = self._seen or SeenInputs.of(call.raw)
            self._seen = seen.after(call.raw, type(guide).__name__, self.watched)
        for latents in guide.groups:
            for frame in (f for slot in latents.slots for f in slot.frames):
                if frame.name not in call.plates:
                    call.plates[frame.name] = guide.make_plate(frame, latents, call)
            for frame in latents.rows if guide.master is not None else ():
                self._check_length(frame, latents, call)

    def make(self, guide: Any, frame: Any, latents: LatentBlock, call: GuideCall) -> Any:
        """Copy the model's plate; a size that was the inputs' length is their present length."""
        if frame not in latents.rows:
            self._check_joint(guide, frame, call)
        name, full, size = frame.name, frame.full_size or frame.size, frame.size
        inputs_are = self.input_sizes.get(name)
        if inputs_are is None and full == size and name in call.row_plates:
            full = size = call.row_plates[name].count
        if name in self.given and inputs_are != "minibatch":
            raise ValueError(f"Plate '{name}' has subsample= in the model: give create_plates=.")
        if inputs_are is not None:
            length = call.raw.shape[latents.rows.index(frame)]
            if inputs_are == "all" and full != size:
                full, size = length, min(size, length)
            elif inputs_are == "all" and length != size:
                size, full = self._sizes_at(guide, frame, length, call)
            else:
                size = length
        is_sized = frame.full_size is not None
        frame = frame._replace(size=size, full_size=full if is_sized else None)
        return copied_plate(frame, self.devices.get(name))

    def forget_inputs(self) -> "ModelPlates":
        """Return a copy without tensors, to be pickled."""
        return replace(self, _seen=None)

    def _check_length(self, frame: Any, latents: LatentBlock, call: GuideCall) -> None:
        """Raise where a plate that the guide has not made is not of the inputs' length."""
        if frame.name in self.input_sizes:
            plate, length = call.plates[frame.name], call.raw.shape[latents.rows.index(frame)]
            if length not in (plate.size, plate.subsample_size):
                raise ValueError(
                    f"Plate '{frame.name}' of the AutoGuideList has {plate.size} entries, and the "
                    f"inputs {length} rows. Give the list create_plates=."
                )

    def _check_joint(self, guide: Any, frame: Any, call: GuideCall) -> None:
        """Raise where inputs of another shape change the size of a plate without rows."""
        shape = _shape_of(call.raw)
        if shape is not None and shape != self._input_shape and not is_dry_run():
            size, _ = self._sizes_at(guide, frame, shape, call)
            if size != frame.size:
                raise ValueError(
                    f"Plate '{frame.name}' has {size} entries now, and {type(guide).__name__} has "
                    f"one distribution for {frame.size}. Make a new guide, or give it an encoder."
                )

    def _sizes_at(self, guide: Any, frame: Any, length: Any, call: GuideCall) -> tuple[int, int]:
        """Return a plate's size and full size for inputs of another length than the first.

        These may be all data or a minibatch, or the plate has nothing to do with them. One run of
        the model for each length, or shape, decides.
        """
        name = frame.name
        if (name, length) not in self._sizes:
            trace = outline(guide.own_model(), call.args, call.kwargs)
            frames = (plates_of(site).get(name) for site in sites(trace))
            now = next((f for f in frames if f is not None), frame)
            self._sizes[name, length] = now.size, now.full_size or now.size
        return self._sizes[name, length]


def of_all_rows(latents: LatentBlock, given: dict[str, MinibatchRows]) -> LatentBlock:
    """Return a block whose rows are those of all data, where a call has some of them."""
    rows = [
        f._replace(full_size=given[f.name].total) if f.name in given else f for f in latents.rows
    ]
    return replace(latents, rows=tuple(rows))


def _shape_of(raw: Any) -> tuple[int, ...] | None:
    return tuple(raw.shape) if isinstance(raw, Tensor) else None


def _input_sizes(groups: tuple[LatentBlock, ...], raw: Any) -> Iterator[tuple[str, str]]:
    """Yield each row plate of the inputs' length, and whether that is "all" or a "minibatch"."""
    shape = raw.shape if isinstance(raw, Tensor) else ()
    for latents in groups:
        for frame, length in zip(latents.rows, shape, strict=False):
            full = frame.full_size or frame.size
            if length in (full, frame.size):
                yield frame.name, "all" if length == full else "minibatch"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compare values, in the lower of two precisions."""
    if one.shape != other.shape:
        return False
    one = one.to(other.device)
    if one.is_floating_point() and other.is_floating_point():
        dtype = min(one.dtype, other.dtype, key=lambda each: torch.finfo(each).bits)
        one, other = one.to(dtype), other.to(dtype)
    return torch.allclose(one.to(other), other, rtol=0.0, atol=0.0, equal_nan=True)
