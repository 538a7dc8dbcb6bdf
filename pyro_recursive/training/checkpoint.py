"""Checkpoint files: what they hold, how they are written, and whether they fit a call of `fit`.

A file is replaced as a whole (`tracing.tensor_files`), holds tensors and plain containers only, and
loading it runs no code.
"""

import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from pyro.util import get_rng_state, set_rng_state
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from pyro_recursive.tracing.tensor_files import read_whole, write_whole

FINGERPRINT_ROWS = 1000
FORMAT = 2  # to be raised when files of the former kind can no longer be read


class CheckpointError(RuntimeError):
    """A checkpoint file cannot be read, or does not fit the call that resumes from it."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain containers to a file; if that fails, the old file stays as it was."""
    write_whole(path, {"format": FORMAT, **state})


def load(path: Path) -> dict[str, Any]:
    """Read a file of `save`, with all tensors on the CPU."""
    remedy = "Restore it from a copy, or delete it to start afresh."
    state = read_whole(path, CheckpointError, f"Checkpoint '{path}' cannot be read: {{}}. {remedy}")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is no checkpoint of format {FORMAT}. {remedy}")
    return state


def check_same(path: Path, saved: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    """Raise where the entries of a file differ from those of the call that resumes."""
    differences = [
        f"{name} is {saved.get(name, 'missing')!r} in the file, {live.get(name, 'missing')!r} here"
        for name in dict.fromkeys([*saved, *live])
        if saved.get(name, "missing") != live.get(name, "missing")
    ]
    if differences:
        raise CheckpointError(
            f"Checkpoint '{path}' does not fit this call: {'; '.join(differences)}. Resume with "
            "what wrote it, or use another file."
        )


def outline(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Return dtype and shape of each tensor of each kind, under ``"kind 'name'"``."""
    return {
        f"{kind} '{name}'": f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        for kind, tensors in weights.items()
        for name, tensor in tensors.items()
    }


def random_states(generators: Iterable[Generator] = ()) -> dict[str, Any]:
    """Return the states of torch (CPU and CUDA), numpy, ``random`` and of the generators given."""
    state: dict[str, Any] = get_rng_state()
    kind, keys, *rest = state["numpy"]
    state["numpy"] = (kind, torch.from_numpy(keys.astype(np.int64)), *rest)
    # Reading the state of CUDA would initialise it.
    state["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state["generators"] = [generator.get_state() for generator in generators]
    return state


def set_random_states(state: Mapping[str, Any], generators: Iterable[Generator] = ()) -> None:
    """Set all random states from a result of `random_states`."""
    kind, keys, *rest = state["numpy"]
    set_rng_state({**state, "numpy": (kind, keys.numpy().astype(np.uint32), *rest)})
    devices = range(torch.cuda.device_count() if state["cuda"] else 0)
    for device, cuda_state in zip(devices, state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state, device)
    for generator, own_state in zip(generators, state["generators"], strict=True):
        generator.set_state(own_state)


@contextmanager
def forked_rng(seed: int | None = None, generators: Iterable[Generator] = ()) -> Iterator[None]:
    """Restore all random states after the block, which starts from a seed if one is given."""
    generators = list(generators)
    before = random_states(generators)
    try:
        if seed is not None:
            pyro.set_rng_seed(seed)
        yield
    finally:
        set_random_states(before, generators)


def options_of(loss: ELBO) -> dict[str, Any]:
    """Return the attributes of a loss that are arguments of its constructors."""
    names = {
        name
        for kind in type(loss).__mro__[:-1]
        if "__init__" in vars(kind)
        for name in inspect.signature(vars(kind)["__init__"]).parameters
    }
    # Pyro's losses set the nesting themselves, in their first call.
    names -= {"self", "max_plate_nesting", "max_iarange_nesting"}
    own = {name.removeprefix("_"): value for name, value in vars(loss).items()} | vars(loss)
    return {name: own[name] for name in sorted(names & own.keys())}


def fingerprint(data: Any) -> str:
    """Return a hash of tensors: dtype, shape and 1,000 rows at even distances.

    Of a DataLoader, of the tensors of its TensorDataset, or else the type of its data set.
    """
    tensors = getattr(data.dataset, "tensors", None) if isinstance(data, DataLoader) else data
    if tensors is None:
        return type(data.dataset).__qualname__
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        count = min(len(tensor), FINGERPRINT_ROWS)
        rows = np.linspace(0, len(tensor) - 1, count).round().astype(np.int64)
        some = tensor.detach()[torch.from_numpy(rows).to(tensor.device)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def plain(value: Any) -> Any:
    """Return a value in plain types, which are the same in each process and in each run."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Real):  # NumPy's numbers too: weights_only=True does not load these
        return int(value) if isinstance(value, Integral) else float(value)
    name = getattr(value, "name", None) or getattr(value, "__qualname__", None)
    return name or re.sub(" at 0x[0-9a-f]+", "", repr(value))
