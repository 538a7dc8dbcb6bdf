"""The sample sites of a guide whose distribution is over a packed vector.

Each site's value is part of one joint draw. The last site carries the joint log-density, computed
from the values that the sites have by then, so that a guide can be replayed on other values.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock, PackedSite, Values
from pyro_recursive.tracing.handlers import joint_draw
from pyro_recursive.tracing.sites import JOINT, LEAVES_OUT, MODEL_MASK, PACKED, JointDraw


class JointSite(TorchDistribution):
    """One site's part of a joint draw; ``density`` is the joint log-density, at the last site."""

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(
        self, slot: PackedSite, value: Tensor, density: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.slot, self.value, self.density = slot, value, density
        split = value.dim() - slot.event_dim
        super().__init__(value.shape[:split], value.shape[split:], validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the model's site."""
        return self.slot.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "JointSite":
        """Expand the draw: entries of a plate that the guide does not have share it."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        return JointSite(self.slot, self.value.expand(shape + self.event_shape), self.density)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return the site's part of the joint draw."""
        if sample_shape:
            raise NotImplementedError(
                f"Site '{self.slot.name}' is drawn jointly: use a pyro.plate or Predictive."
            )
        return self.value

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the joint log-density, in equal parts where the site has inner plates."""
        if self.density is None:
            return value.new_zeros(self.batch_shape)
        joint = self.density(value)
        joint = joint.reshape(joint.shape[max(joint.dim() - len(self.batch_shape), 0) :])
        entries = math.prod(size for _, size in self.slot.inner_plates)
        return (joint / entries).expand(self.batch_shape)


def emit(
    latents: LatentBlock,
    call: GuideCall,
    u: Tensor,
    log_density: Callable[[Tensor, Tensor], Tensor],
) -> Values:
    """Sample the sites of a block as parts of ``u``; return their values.

    ``log_density`` maps a packed vector ``[*batch, D]`` and its ``log |dz / du|``, ``[*batch]``, to
    the log-density of the sites, ``[*batch]``, both without the entries that the call leaves out.
    """
    u = joint_draw(u, frozenset(slot.name for slot in latents.slots))
    latents = call.block_at(latents, u)
    drawn = latents.unpack(u)
    values: Values = {}
    # A site without inner plates carries the density, if there is one.
    *others, last = sorted(latents.slots, key=lambda slot: -len(slot.inner_plates))

    def density(value: Tensor) -> Tensor:
        current, block, point = {**values, last.name: value}, latents, u
        if any(current[name] is not drawn[name] for name in drawn):
            # The inverse transform is needed only for values other than this draw's.
            block = call.block_of(latents, current)
            point = block.pack(current)
        return log_density(point, block.log_volume(point, call.kept))

    rows, joint = {frame.name for frame in latents.rows}, JointDraw(u, drawn)
    for slot in (*others, last):
        site = JointSite(slot, drawn[slot.name], density if slot is last else None)
        packed = frozenset(frame.name for frame in slot.frames) - rows
        infer = {PACKED: packed, JOINT: joint, MODEL_MASK: call.masks.get(slot.name)}
        infer[LEAVES_OUT] = slot.name in call.kept
        with inside(slot.frames, call.plates):
            values[slot.name] = pyro.sample(slot.name, site, infer=infer)
    return values


def inside(frames: Iterable[Any], plates: Mapping[str, Any]) -> ExitStack:
    """Enter the plates of frames."""
    stack = ExitStack()
    for frame in frames:
        stack.enter_context(plates[frame.name])
    return stack
