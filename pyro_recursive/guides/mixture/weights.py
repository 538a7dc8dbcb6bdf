"""The weights of a mixture: from a network, a table with a row for each datum, or one vector."""

from collections.abc import Container
from typing import Any

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock

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
        if not callable(kind) and kind not in KINDS:
            raise ValueError(f"weights must be one of {KINDS} or a module, got {kind!r}.")
        self.kind = "module" if callable(kind) else kind
        self.network: Any = kind if callable(kind) else None
        self.learn, self.separate = learn, False
        self.tables: list[str] = []  # "overall" and "local", where there are parameters
        self.initial: Tensor
        self.register_buffer("initial", _unsquashed(initial))

    def start_separately(self, initial: Tensor) -> None:
        """Give each logit a start and parameters of its own, which an optimiser can leave alone."""
        self.initial, self.separate = _unsquashed(initial), True

    def build(self, latents: LatentBlock, start: Tensor, raw: Any) -> None:
        """Create the weights of a group, with dtype and device of a point."""
        self.initial = self.initial.to(start)
        parts = list(self.initial.split(1 if self.separate else len(self.initial)))
        if latents.local and self.kind == "linear":
            self.network = _Linear(latents, raw, parts)
        if latents.local and self.kind in ("module", "linear"):
            return
        own_rows = latents.local and self.kind == "table"
        sizes = [frame.full_size or frame.size for frame in latents.rows] if own_rows else []
        table = "local" if latents.local else "overall"
        self.tables.append(table)
        for name, initial in zip(self._names(table), parts, strict=True):
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
            if held and self.kind == "module":
                found = _joined(list(found.split(1, -1)), held)
        else:
            names = self._names("local" if latents.local else "overall")
            found = _joined([getattr(self, name) for name in names], held)
            if found.dim() > 1:
                found = latents.expand_rows(call.table_rows(found, latents))
            else:
                found = found.expand(*[1] * latents.nesting, -1)
        found = found if self.learn else found.detach()
        return LARGEST * torch.tanh(found / LARGEST)

    def all_rows(self, latents: LatentBlock) -> Tensor:
        """Return the logits of all rows, ``[*rows, n]``, where no network has them."""
        names = self._names("local" if latents.local else "overall")
        found = torch.cat([getattr(self, name) for name in names], -1)
        return LARGEST * torch.tanh(found / LARGEST)

    @torch.no_grad()
    def reset(self, index: int) -> None:
        """Reset one logit to its start, where it has parameters of its own."""
        if not self.separate or self.kind == "module":
            return
        if self.kind == "linear":
            self.network.reset(index, self.initial[index])
        for table in self.tables:
            getattr(self, f"{table}_{index}").fill_(self.initial[index])

    @torch.no_grad()
    def set_vector(self, indices: list[int], logits: Tensor) -> None:
        """Set some of the logits that all rows share, each with a parameter of its own."""
        table, limit = self.vector(), LARGEST * (1 - 1e-3)
        for index, logit in zip(indices, logits.clamp(-limit, limit), strict=True):
            getattr(self, f"{table}_{index}").copy_(_unsquashed(logit))

    @torch.no_grad()
    def set_shared(self, logits: Tensor) -> None:
        """Set the one vector of logits that a group without rows has."""
        limit = LARGEST * (1 - 1e-3)
        self.overall.copy_(_unsquashed(logits.clamp(-limit, limit)))

    def vector(self) -> str:
        """Return the name of the vector that all rows share; raise ValueError if there is none."""
        for table in self.tables:
            if getattr(self, f"{table}_0").dim() == 1:
                return table
        raise ValueError("Rows have weights of their own. Use weights='gradient' in the loss.")

    def _names(self, table: str) -> list[str]:
        return [f"{table}_{i}" for i in range(len(self.initial))] if self.separate else [table]


class _Linear(nn.Module):
    """A linear map of the flattened features of a row for each part of the logits."""

    def __init__(self, latents: LatentBlock, raw: Any, initial: list[Tensor]) -> None:
        super().__init__()
        self.row_dims = len(latents.rows)
        if not isinstance(raw, Tensor) or raw.dim() <= self.row_dims:
            raise ValueError("weights='linear' needs inputs that are one tensor with features.")
        features = raw[(0,) * self.row_dims].numel()
        like = raw if raw.is_floating_point() else initial[0]
        self.parts = nn.ModuleList(nn.Linear(features, len(part)).to(like) for part in initial)
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


def _unsquashed(logits: Tensor) -> Tensor:
    """Return what the bounded logits are made of."""
    return LARGEST * torch.atanh(logits / LARGEST)
