"""Where a mixture's weights come from: a network, a table with a row for each datum, a vector."""

from typing import Any

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_recursive.guides.latents import Latents
from pyro_recursive.guides.packed import Call
from pyro_recursive.guides.tables import rows_of

__all__ = ["Weights"]

KINDS = ("linear", "shared", "table")
LARGEST = 8.0  # a logit beyond it would leave a component without gradient


class Weights(PyroModule):
    """Logits ``[*batch, n]`` of a mixture's weights, for each group of latents.

    ``kind`` is a module from the rows of the inputs to ``[*rows, n]``, or ``"linear"`` for a linear
    one, ``"table"`` for a row of its own for each entry of the plate, ``"shared"`` for one vector.
    A group outside the data's plate has one vector in any case. All start at ``initial``.
    """

    def __init__(self, kind: nn.Module | str, initial: Tensor, learn: bool) -> None:
        super().__init__()
        if not (isinstance(kind, nn.Module) or kind in KINDS):
            raise ValueError(f"weights must be one of {KINDS} or a module, got {kind!r}")
        self.kind = "module" if isinstance(kind, nn.Module) else kind
        self.network: Any = kind if isinstance(kind, nn.Module) else None
        self.learn = learn
        self.register_buffer("initial", initial)

    def build(self, latents: Latents, raw: Any) -> None:
        """Create the weights of a group."""
        if latents.local and self.kind == "module":
            return
        if latents.local and self.kind == "linear":
            self.network = self._linear(latents, raw)
            return
        own_rows = latents.local and self.kind == "table"
        sizes = [frame.full_size or frame.size for frame in latents.rows] if own_rows else []
        logits = self.initial.expand(*sizes, -1).clone()
        if self.learn:
            setattr(self, _name(latents), PyroParam(logits))
        else:
            self.register_buffer(_name(latents), logits)

    def _linear(self, latents: Latents, raw: Any) -> nn.Module:
        if not isinstance(raw, Tensor) or raw.dim() <= len(latents.rows):
            raise ValueError(
                "weights='linear' needs inputs that are one tensor with the rows first and "
                "features behind; inputs= makes one of the model's arguments. Or use "
                "weights='shared', or a module."
            )
        features = raw[(0,) * len(latents.rows)].numel()
        linear = nn.Linear(features, len(self.initial)).to(self.initial)
        with torch.no_grad():
            linear.weight.zero_()
            linear.bias.copy_(self.initial)
        return nn.Sequential(nn.Flatten(len(latents.rows)), linear)

    def logits(self, latents: Latents, call: Call) -> Tensor:
        """Return the logits, ``[*batch, n]``, between -8 and 8."""
        if latents.local and self.kind in ("module", "linear"):
            found = self.network(call.rows(latents))
            rows = [call.plates[frame.name].subsample_size for frame in latents.rows]
            if found.shape != (*rows, len(self.initial)):
                raise ValueError(
                    f"The weights' module returned shape {tuple(found.shape)}, and the mixture "
                    f"needs {(*rows, len(self.initial))}: logits for each row."
                )
        else:
            found = getattr(self, _name(latents))
            if found.dim() > 1:
                found = rows_of(found, latents, call)
        found = found if self.learn else found.detach()
        return _place(latents, found.clamp(-LARGEST, LARGEST))

    def set_vector(self, places: list[int], logits: Tensor) -> None:
        """Set some of the logits that all rows share.

        Raises ValueError where rows have weights of their own.
        """
        vector = getattr(self, "overall", None)
        vector = getattr(self, "local", None) if vector is None else vector
        if vector is None or vector.dim() > 1:
            raise ValueError(
                "Weights can be set only where all rows share one vector; with weights of their "
                "own use weights='gradient' in the loss, or weights='shared' in the guide."
            )
        with torch.no_grad():
            vector[places] = logits.clamp(-LARGEST, LARGEST).to(vector)


def _place(latents: Latents, found: Tensor) -> Tensor:
    if found.dim() == 1:
        return found.expand(*[1] * latents.nesting, -1)
    return latents.expand_rows(found)


def _name(latents: Latents) -> str:
    return "local" if latents.local else "overall"
