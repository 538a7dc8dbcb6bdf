"""Parameters with a row for each entry of a plate."""

from torch import Tensor

from pyro_recursive.guides.base import GuideCall
from pyro_recursive.guides.packing import LatentBlock

__all__ = ["rows_of"]


def rows_of(table: Tensor, latents: LatentBlock, call: GuideCall) -> Tensor:
    """Return the rows of a table that are in the minibatch, ``[*all rows, n]`` to ``[*rows, n]``.

    Raises ValueError where the plate has another size than the table.
    """
    for place, frame in enumerate(latents.rows):
        plate = call.plates[frame.name]
        if plate.size != table.shape[place]:
            raise ValueError(
                f"Plate '{plate.name}' has {plate.size} entries, and the guide has parameters for "
                f"{table.shape[place]}. A guide with an encoder takes data of another size."
            )
        whole = plate.subsample_size == plate.size
        index = call.order_of(plate) if whole else plate.indices
        if index is not None:
            table = table.index_select(place, index.to(table.device))
    return table
