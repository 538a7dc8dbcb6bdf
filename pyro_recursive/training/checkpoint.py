"""Checkpoint files and random states, so that a run goes on bit for bit where it stopped.

A file is written whole or not at all, holds only tensors and plain containers, and is read without
running any code that it might contain.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Generator, Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_recursive.tracing.tensor_files import read_whole, write_whole

__all__ = ["CheckpointError", "forked_rng", "load", "random_state", "save", "set_random_state"]

FORMAT = 1  # raised whenever a file of the older kind could no longer be read


class CheckpointError(RuntimeError):
    """A checkpoint file cannot be read, or belongs to another program."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state to a file, which holds the old or the new state whole, whatever happens.

    The state goes to ``path + ".tmp"`` in the same folder (a rename is atomic only within one file
    system) and from there, once on the disk, takes the place of the old file.

    :param path: the file; missing folders are made
    :param state: tensors and plain containers (dict, list, tuple, str, numbers, None)
    :raises OSError: the file cannot be written; the old one is left as it was

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run.pt"
    >>> save(path, {"loc": torch.ones(2)})
    >>> load(path)["loc"]
    tensor([1., 1.])
    """
    write_whole(path, {"format": FORMAT, **state}, path.with_name(path.name + ".tmp"))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, all tensors on the CPU.

    :raises CheckpointError: the file is truncated, damaged, or no checkpoint of this package
    """
    remedy = "Restore it from a copy, or delete it to start afresh."
    state = read_whole(path, CheckpointError, f"Checkpoint '{path}' cannot be read: {{}}. {remedy}")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"'{path}' is no checkpoint of format {FORMAT} written by fit (got {got!r}). {remedy}"
        )
    return state


def check_tensors(
    path: Path, kind: str, saved: Mapping[str, Tensor], live: Mapping[str, Tensor]
) -> None:
    """Raise where the names, shapes or dtypes of two sets of tensors differ.

    :raises CheckpointError: naming the file, and each tensor with what is there and what should be
    """
    problems = [
        f"'{name}': {_outline(saved.get(name))} in the file, {_outline(live.get(name))} in the "
        "program"
        for name in [*saved, *(live.keys() - saved.keys())]
        if _outline(saved.get(name)) != _outline(live.get(name))
    ]
    if problems:
        raise CheckpointError(
            f"Checkpoint '{path}' does not fit the {kind} of model and guide: "
            f"{'; '.join(problems)}. Use the model and guide that wrote it, or another file."
        )


def check_generators(path: Path, state: Mapping[str, Any], live: Collection[Generator]) -> None:
    """Raise where a file has another number of data orders than the program.

    :raises CheckpointError: naming the file and both numbers
    """
    if len(state["generators"]) != len(live):
        raise CheckpointError(
            f"Checkpoint '{path}' does not fit the data: it holds {len(state['generators'])} "
            f"generators of their order, the program has {len(live)}. Use the data, batch_size, "
            "shuffle and aggressive of the run that wrote it, or another file."
        )


def check_processes(path: Path, state: Mapping[str, Any], count: int) -> None:
    """Raise where a file was written by another number of processes.

    :raises CheckpointError: naming the file and both numbers
    """
    written = 1 + len(state.get("other processes", ()))
    if written != count:
        raise CheckpointError(
            f"Checkpoint '{path}' does not fit the processes: {written} wrote it, and there are "
            f"{count}. Random states and shares of the batches are those of each process. Start "
            f"{written}, or use another file."
        )


def _outline(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def random_state(generators: Iterable[Generator] = ()) -> dict[str, Any]:
    """Return the states of torch (CPU and CUDA), numpy, ``random`` and of the generators given."""
    state: dict[str, Any] = get_rng_state()
    kind, keys, *rest = state["numpy"]
    state["numpy"] = (kind, torch.from_numpy(keys.astype(np.int64)), *rest)
    # Asking an idle CUDA for its state would start it up.
    state["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state["generators"] = [generator.get_state() for generator in generators]
    return state


def set_random_state(state: Mapping[str, Any], generators: Iterable[Generator] = ()) -> None:
    """Set all random states from what `random_state` returned."""
    kind, keys, *rest = state["numpy"]
    numpy_state = (kind, keys.numpy().astype(np.uint32), *rest)
    set_rng_state({"torch": state["torch"], "random": state["random"], "numpy": numpy_state})
    devices = torch.cuda.device_count() if state["cuda"] else 0
    for device, cuda_state in zip(range(devices), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state, device)
    for generator, own_state in zip(generators, state["generators"], strict=True):
        generator.set_state(own_state)


@contextmanager
def forked_rng(seed: int | None = None, generators: Iterable[Generator] = ()) -> Iterator[None]:
    """Leave no trace of the block's random draws; start the block from a seed, if given.

    >>> state = torch.get_rng_state()
    >>> with forked_rng(seed=0):
    ...     draw = torch.rand(3)
    >>> torch.equal(torch.get_rng_state(), state)
    True
    """
    generators = list(generators)
    before = random_state(generators)
    try:
        if seed is not None:
            pyro.set_rng_seed(seed)
        yield
    finally:
        set_random_state(before, generators)


def state_of(owner: Optimizer | LRScheduler | None) -> dict[str, Any] | None:
    """Return the state and the class of an optimiser or scheduler."""
    if owner is None:
        return None
    return {"class": type(owner).__name__, "state": owner.state_dict()}


def set_state_of(
    owner: Optimizer | LRScheduler | None, path: Path, kind: str, saved: dict[str, Any] | None
) -> None:
    """Load the state of an optimiser or scheduler of the same class.

    :raises CheckpointError: it is of another class, or has other parameter groups
    """
    got, expected = type(owner).__name__, saved["class"] if saved else "NoneType"
    problem = f"it was {expected}, now {got}" if got != expected else None
    try:
        if owner is not None and saved is not None and problem is None:
            owner.load_state_dict(saved["state"])
    except ValueError as error:
        problem = str(error)
    if problem:
        raise CheckpointError(
            f"Checkpoint '{path}' does not fit the {kind}: {problem}. Use the {kind} of the run "
            "that wrote it, or another file."
        )
