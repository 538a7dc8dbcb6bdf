"""One call of a guide: its plates, and outputs of encoders and tables for its minibatch."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.guides.packing import LatentBlock, Values, same_tensors
from pyro_recursive.guides.placement import AllRead, Placement
from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.isolation import isolated
from pyro_recursive.tracing.minibatch import MinibatchRows


def plate_devices(trace: Any) -> dict[str, Any]:
    """Return the devices of the indices of a trace's plates that have another one than default."""
    plates = {name: site["fn"] for name, site in trace.nodes.items() if site_is_subsample(site)}
    default = torch.get_default_device()
    return {name: p.device for name, p in plates.items() if torch.device(p.device) != default}


def copied_plate(frame: Any, device: Any = None) -> Any:
    """Return a plate like a model's, given its frame and device (None: the default one)."""
    if frame.full_size is None:  # one without a size makes no subsample site: see `sites`
        with poutine.block():
            return pyro.plate(frame.name, frame.size, dim=frame.dim)
    sizes = frame.full_size, frame.size
    return pyro.plate(frame.name, *sizes, dim=frame.dim, device=device)


@dataclass
class GuideCall:
    """One call of a guide: the model's arguments, plates, and the values sampled so far, by name.

    ``inputs`` maps the arguments to the encoders' inputs, and ``trunk`` their rows to what all
    encoders share. ``created`` are the plates that a user's ``create_plates`` made, in any order.
    ``input_sizes`` says by plate whether the inputs have "all" of its rows or its "minibatch".
    ``row_plates`` are the plates of the rows that the arguments are, if those are known by number.
    ``masks`` are the model's of its latents; where log q leaves entries out, ``kept`` has the
    others, as unconstrained values.
    ``model`` returns the model whose latents the guide packs.
    """

    args: tuple
    kwargs: dict[str, Any]
    plates: dict[str, Any]
    inputs: Callable[..., Any]
    given: Values = field(default_factory=dict)
    trunk: Callable[[Any], Any] | None = None
    created: frozenset[str] = frozenset()
    input_sizes: Mapping[str, str] = field(default_factory=dict)
    row_plates: Mapping[str, MinibatchRows] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Values = field(default_factory=dict)
    model: Callable[[], Callable] | None = None
    _rows: Any = None

    @cached_property
    def raw(self) -> Any:
        """The encoders' inputs, before any minibatch is taken out of them."""
        return self.inputs(*self.args, **self.kwargs)

    def sizes(self, latents: LatentBlock) -> tuple[int, ...]:
        """Return how many rows the minibatch has, for each plate of the rows."""
        return tuple(self.plates[frame.name].subsample_size for frame in latents.rows)

    @property
    def fixed_values(self) -> Values:
        """The values that runs of the model have in this call: minibatches, and sites so far."""
        return {**{name: plate.indices for name, plate in self.plates.items()}, **self.given}

    def block_at(self, latents: LatentBlock, u: Tensor) -> LatentBlock:
        """Return a block with the supports of this call, given ``[*batch, D]``."""
        if not latents.varying_supports:
            return latents
        return self._read(Placement(latents, u, stop=True))

    def block_of(self, latents: LatentBlock, values: Values) -> LatentBlock:
        """Return a block with the supports of this call, given the values of its sites."""
        if not latents.varying_supports:
            return latents
        return self._read(Placement(latents, values=values, stop=True))

    def shared_block(
        self,
        latents: LatentBlock,
        points: tuple[Tensor, Tensor],
        earlier: tuple[Values, Values] = ({}, {}),
    ) -> LatentBlock:
        """Return a block with the supports of this call, which must not depend on latents.

        They are compared at two points of the block, each with values of the blocks before it.
        """
        if not latents.varying_supports:
            return latents
        pairs = [*zip(points, earlier, strict=True), (torch.ones_like(points[0]), earlier[0])]
        first, *others = (
            replace(self, given={**self.given, **values}).block_at(latents, u)
            for u, values in pairs
        )
        for other in others:
            for one, slot in zip(first.slots, other.slots, strict=True):
                if not same_tensors(one.support, slot.support):
                    raise NotImplementedError(
                        f"The bounds of latent site '{slot.name}' depend on other latents: take "
                        "the quantiles of draws."
                    )
        return first

    def of_all_rows(self, blocks: Sequence[LatentBlock], by_inputs: bool) -> "GuideCall":
        """Return the call with all rows of plates that the guide has drawn a minibatch of.

        ``by_inputs`` says that the rows have those parameters that a network makes of the inputs.
        """
        known = {*self.created, *self.row_plates}
        if by_inputs:
            known |= {name for name, size in self.input_sizes.items() if size == "minibatch"}
        drawn = [
            self.plates[frame.name]
            for latents in blocks
            for frame in latents.rows
            if frame.name not in known
        ]
        drawn = [plate for plate in drawn if plate.subsample_size < plate.size]
        if not drawn:
            return self
        whole = {p.name: pyro.plate(p.name, p.size, dim=p.dim) for p in drawn}
        created = self.created | whole.keys()
        return replace(self, plates={**self.plates, **whole}, created=created)

    def _read(self, placed: Placement) -> LatentBlock:
        assert self.model is not None
        # Latents of later blocks are drawn from the prior: `prepare` refuses where one matters.
        with isolated(), suppress(AllRead), placed, SubstituteByName(self.fixed_values):
            self.model()(*self.args, **self.kwargs)
        return placed.block

    def rows(self, latents: LatentBlock) -> Any:
        """Return the encoders' inputs, ``[*rows, ...]``, for the rows of the minibatch."""
        if self._rows is None:  # the trunk runs once
            rows = self.raw
            for dim, frame in enumerate(latents.rows):
                plate, length = self.plates[frame.name], rows.shape[dim]
                if plate.subsample_size < plate.size and length == plate.size:
                    rows = rows.index_select(dim, plate.indices.to(rows.device))
                elif (
                    length == plate.size
                    and self.input_sizes.get(plate.name) != "minibatch"
                    and plate.indices is not self.raw
                    and self._order_of(plate) is not None
                ):  # the inputs may be in the data's order or in that of the plate
                    raise ValueError(
                        f"Plate '{plate.name}' has all {length} rows in another order than the "
                        "data. Sort them."
                    )
            self._rows = rows if self.trunk is None else self.trunk(rows)
        return self._rows

    def _order_of(self, plate: Any) -> Tensor | None:
        """Return the order of a plate that has all rows, None where it is that of the data.

        Only a user's plate can have another one. Values in place of indices (``subsample=x``) are
        no order.
        """
        index = plate.indices
        if plate.name not in self.created or index.dim() != 1 or index.is_floating_point():
            return None
        in_order = torch.arange(len(index), device=index.device)
        is_other = torch.equal(index.sort()[0], in_order) and not torch.equal(index, in_order)
        return index if is_other else None

    def table_rows(self, table: Tensor, latents: LatentBlock) -> Tensor:
        """Return a table's rows for the minibatch, ``[*all rows, n]`` to ``[*rows, n]``."""
        for dim, frame in enumerate(latents.rows):
            index = self.row_index(frame.name, table.shape[dim])
            if index is not None:
                table = table.index_select(dim, index.to(table.device))
        return table

    def row_index(self, name: str, entries: int) -> Tensor | None:
        """Return which of the ``entries`` of a table a plate has; None for all in order."""
        plate = self.plates[name]
        if name in self.row_plates:
            return self.row_plates[name].index_of(plate, entries)
        if plate.size != entries:
            raise ValueError(
                f"Plate '{name}' has {plate.size} entries, and the guide has parameters for "
                f"{entries} rows. Say which with MinibatchRows, or use an encoder."
            )
        if self.input_sizes.get(name) == "minibatch" and name not in self.created:
            raise ValueError(
                f"Plate '{name}' draws {plate.subsample_size} of {plate.size} rows, and the inputs "
                "are as many rows of their own. Say which with MinibatchRows."
            )
        index = self._order_of(plate) if plate.subsample_size == plate.size else plate.indices
        if index is not None and index.is_floating_point():  # subsample=x
            raise ValueError(
                f"Plate '{name}' has values in the place of row numbers. Say which rows these are "
                "with MinibatchRows."
            )
        return index

    def encode(
        self,
        network: Callable[..., Tensor],
        latents: LatentBlock,
        width: int | None = None,
        *extra: Any,
        name: str = "The encoder",
    ) -> Tensor:
        """Return a network's output for the rows of the minibatch, ``[*batch, width]``.

        It maps the rows ``[*rows, ...]``, and ``extra``, to ``[*rows, width]``.
        """
        output = run(network, self.rows(latents), latents, *extra, name=name)
        return self.place(output, latents, width, name)

    def place(
        self, output: Tensor, latents: LatentBlock, width: int | None, name: str = "The encoder"
    ) -> Tensor:
        """Check a network's output, and put its rows where Pyro has the plates."""
        rows = self.sizes(latents)
        if output.shape[:-1] != rows or width not in (None, output.shape[-1]):
            raise ValueError(
                f"{name} returned shape {tuple(output.shape)}; {_names(latents)} need "
                f"{(*rows, width or 'context')}: select inputs=."
            )
        # Asking waits for the device.
        if is_validation_enabled() and not bool(output.isfinite().all()):
            wrong = (~output.isfinite()).flatten(len(rows)).any(-1).nonzero().squeeze(-1).tolist()
            raise ValueError(
                f"{name} of {_names(latents)} returned NaN or infinity in rows {wrong[:5]}. Clean "
                "the data, or lower the learning rate."
            )
        return latents.expand_rows(output)


def run(
    network: Callable, inputs: Any, latents: LatentBlock, *extra: Any, name: str = "The encoder"
) -> Tensor:
    """Return a network's output; add latents, plate and inputs to its error."""
    try:
        return network(inputs, *extra)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # out of memory, a device's errors
            raise
        got = f"a {type(inputs).__name__}"
        if isinstance(inputs, Tensor):
            dtype = str(inputs.dtype).removeprefix("torch.")
            got = f"inputs of shape {list(inputs.shape)}, {dtype} on {inputs.device}"
        raise RuntimeError(
            f"{name} of {_names(latents)} failed on {got}: {error}. Select and convert its inputs."
        ) from error


def _names(latents: LatentBlock) -> str:
    plate = f" in plate '{latents.rows[-1].name}'" if latents.rows else ""
    return f"latents {[slot.name for slot in latents.slots]}{plate}"


def first_argument(*args: Any, **kwargs: Any) -> Any:
    """Return the first argument: the encoders' inputs where no ``inputs`` are given."""
    return next(iter((*args, *kwargs.values())), None)
