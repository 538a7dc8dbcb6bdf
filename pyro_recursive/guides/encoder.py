"""Runs of encoders, whose errors say which latents and plate they are about, and which inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_recursive.guides.packing import LatentBlock

__all__ = ["check_numbers", "encoding"]


@contextmanager
def encoding(what: str, latents: LatentBlock, inputs: Any) -> Iterator[None]:
    """Say what an encoder was fed with where it fails: most of the time that is why."""
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # out of memory, a device's errors
            raise
        raise RuntimeError(
            f"{what} of {_names(latents)} failed on {_outline(inputs)}: {error}. Give it inputs as "
            "it was made for: the rows first, its own number of features, dtype and device; "
            "inputs= selects and converts them from the model's arguments."
        ) from error


def check_numbers(what: str, latents: LatentBlock, found: Tensor, inputs: Any) -> None:
    """Raise under validation where an encoder's output is NaN or infinite; waits for the device."""
    if not is_validation_enabled() or bool(found.isfinite().all()):
        return
    dims = tuple(range(len(latents.rows)))
    rows = (~found.isfinite()).flatten(len(dims)).any(-1).nonzero().squeeze(-1).tolist()
    clean = not isinstance(inputs, Tensor) or bool(inputs.isfinite().all())
    cause = (
        "Its inputs are finite: its parameters are not, or are too large. Lower the learning rate."
        if clean
        else "So are inputs. Clean the data, or let inputs= fill the gaps."
    )
    raise ValueError(
        f"{what} of {_names(latents)} returned NaN or infinite numbers, in rows {rows[:5]}"
        f"{'...' if len(rows) > 5 else ''}. {cause}"
    )


def _names(latents: LatentBlock) -> str:
    plate = f" in plate '{latents.rows[-1].name}'" if latents.rows else ""
    return f"latents {[slot.name for slot in latents.slots]}{plate}"


def _outline(inputs: Any) -> str:
    if not isinstance(inputs, Tensor):
        return f"a {type(inputs).__name__}"
    dtype = str(inputs.dtype).removeprefix("torch.")
    return f"inputs of shape {list(inputs.shape)}, {dtype} on {inputs.device}"
