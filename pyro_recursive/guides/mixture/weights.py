"""The weights of a mixture: from a network, a table with a row for each datum, or one vector."""

from collections.abc import Container
from typing import Any

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.tracing.arguments import check_module

KINDS = ("linear", "shared", "table")
LARGEST = 8.0  # logits stay inside: beyond, a component has hardly any gradient


class Weights(PyroModule):
    """Logits ``[*batch, n]`` of a mixture's weights, for each group of latents.

    ``kind`` is a module from the rows of the inputs to ``[*rows, n]``, ``"linear"`` for a linear
    one, ``"table"`` for a row for each entry of the plate, or ``"shared"`` for one vector, which a
    group outside the data's plate always has. All start at ``initial``.
    """

    def __init__(self, kind: nn.Module | str, initial: Tensor, learn: bool) -> None:
        super().__init__()
        if callable(kind):
            check_module("weights", kind)
        elif kind not in KINDS:
            raise ValueError(f"weights must be one of {KINDS} or a module, got {kind!r}.")
        self.kind = "module" if isinstance(kind, nn.Module) else kind
        self.network: Any = kind if isinstance(kind, nn.Module) else None
        self.learn, self.separate = learn, False
        self.initial: Tensor
        self.register_buffer("initial", _unsquashed(initial))

    def start_separately(self, initial: Tensor) -> None:
        """Give each logit another start, and parameters of its own unless a module returns all.

        An optimiser can then leave a logit alone.
        """
        self.initial, self.separate = _unsquashed(initial), True

    def build(self, latents: LatentBlock, place: Tensor, raw: Any) -> None:
        """Create the weights of a group, with dtype and device of a draw ``place``."""
        self.initial = self.initial.to(place)
        if latents.local and self.kind == "module":
            return
        if latents.local and self.kind == "linear":
            features = _features(latents, raw)
            parts = self._initial_parts()
            if raw.is_floating_point():
                parts = [part.to(raw) for part in parts]
            self.network = _Linear(features, len(latents.rows), parts)
            return
        own_rows = latents.local and self.kind == "table"
        sizes = [frame.full_size or frame.size for frame in latents.rows] if own_rows else []
        for name, initial in zip(self._names(latents), self._initial_parts(), strict=True):
            logits = initial.expand(*sizes, -1).clone()
            if self.learn:
                setattr(self, name, PyroParam(logits))
            else:
                self.register_buffer(name, logits)

    def logits(self, latents: LatentBlock, call: GuideCall, held: Container[int] = ()) -> Tensor:
        """Return the logits, ``[*batch, n]``, between -8 and 8; those ``held`` are constants."""
        if latents.local and self.kind in ("module", "linear"):
            extra = (held,) if self.kind == "linear" else ()
            width, name = len(self.initial), "The weights' network"
            found = call.encode(self.network, latents, width, *extra, name=name)
        else:
            found = _joined([getattr(self, name) for name in self._names(latents)], held)
            if found.dim() > 1:
                found = latents.expand_rows(call.table_rows(found, latents))
            else:
                found = found.expand(*[1] * latents.nesting, -1)
        if held and self.kind == "module":
            found = _joined(list(found.split(1, -1)), held)
        found = found if self.learn else found.detach()
        return LARGEST * torch.tanh(found / LARGEST)

    @torch.no_grad()
    def reset(self, index: int) -> None:
        """Reset one logit to its start, where it has parameters of its own."""
        if not self.separate or self.kind == "module":
            return
        if self.kind == "linear":
            self.network.reset(index, self.initial[index])
        for name in (f"local_{index}", f"overall_{index}"):
            if hasattr(self, name):
                getattr(self, name).fill_(self.initial[index])

    @torch.no_grad()
    def set_vector(self, indices: list[int], logits: Tensor) -> None:
        """Set some of the logits that all rows share, each with a parameter of its own."""
        self.check_vector()
        kind = "overall" if hasattr(self, "overall_0") else "local"
        limit = LARGEST * (1 - 1e-3)
        for index, logit in zip(indices, logits.clamp(-limit, limit), strict=True):
            getattr(self, f"{kind}_{index}").copy_(_unsquashed(logit))

    def check_vector(self) -> None:
        """Raise ValueError where rows have weights of their own."""
        vectors = [getattr(self, f"{kind}_0", None) for kind in ("local", "overall")]
        if not any(vector is not None and vector.dim() == 1 for vector in vectors):
            raise ValueError(
                "Weights can be set only where all rows share one vector. Use weights='gradient' "
                "in the loss, or weights='shared' in the guide."
            )

    def _initial_parts(self) -> list[Tensor]:
        return list(self.initial.split(1 if self.separate else len(self.initial)))

    def _names(self, latents: LatentBlock) -> list[str]:
        kind = "local" if latents.local else "overall"
        if not self.separate:
            return [kind]
        return [f"{kind}_{index}" for index in range(len(self.initial))]


class _Linear(nn.Module):
    """A linear map of the flattened features of a row for each part of the logits."""

    def __init__(self, features: int, row_dims: int, initial: list[Tensor]) -> None:
        super().__init__()
        self.row_dims = row_dims
        self.parts = nn.ModuleList(nn.Linear(features, len(part)).to(part) for part in initial)
        for index, part in enumerate(initial):
            self.reset(index, part)

    @torch.no_grad()
    def reset(self, index: int, initial: Tensor) -> None:
        """Give all rows the same initial logits."""
        part = self.parts[index]
        assert isinstance(part, nn.Linear)
        part.weight.zero_()
        part.bias.copy_(initial)

    def forward(self, rows: Tensor, held: Container[int] = ()) -> Tensor:
        """Return the logits, ``[*rows, n]``."""
        flat = rows.flatten(self.row_dims) if rows.dim() > self.row_dims else rows
        return _joined([part(flat) for part in self.parts], held)


def _joined(parts: list[Tensor], held: Container[int]) -> Tensor:
    """Join logits, without the graph of those that are held."""
    parts = [part.detach() if index in held else part for index, part in enumerate(parts)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _features(latents: LatentBlock, raw: Any) -> int:
    if not isinstance(raw, Tensor) or raw.dim() <= len(latents.rows):
        raise ValueError(
            "weights='linear' needs inputs that are one tensor, with the rows first and features "
            "behind. Give inputs=, a module, or weights='shared'."
        )
    return raw[(0,) * len(latents.rows)].numel()


def _unsquashed(logits: Tensor) -> Tensor:
    """Return what the bounded logits are made of."""
    return LARGEST * torch.atanh(logits / LARGEST)
