"""One step of refinement: better parameters of a row, given the gradient of its ELBO."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Blocks = Sequence[int]  # the lengths of the blocks of parameters
Features = Tensor | None  # of the rows, [*batch, F]


class Update(nn.Module, ABC):
    """One step of refinement, for each row by itself.

    ``direct`` is the default weight of the ELBO at the start in the encoder's objective, or with
    ``every_step``, for updates that are trained, of the ELBO after each step.
    """

    direct: ClassVar[float] = 0.0
    every_step: ClassVar[bool] = False

    def features_of(self, rows: Any, row_dims: int) -> Features:
        """Return features of the rows for `forward`, ``[*rows, F]``, if any."""
        return None

    def build(self, size: int, blocks: Blocks, features: Features) -> None:
        """Create modules for P parameters, ``size``, and these features."""

    @abstractmethod
    def forward(
        self, params: Tensor, gradient: Tensor, state: Any, blocks: Blocks, features: Features
    ) -> tuple[Tensor, Any]:
        """Return the next parameters, ``[*batch, P]``, and the state for the next step.

        ``state`` is that of the last step, None at first; a gradient without a graph is a constant.
        """

    def clips(self, gradient: Tensor, blocks: Blocks) -> Tensor:
        """Return which rows have a block whose gradient is clipped, ``[*batch]``."""
        return torch.zeros_like(gradient[..., 0], dtype=torch.bool)


class GradientUpdate(Update):
    """Gradient ascent with momentum: ``v' = momentum v + g``, ``params' = params + rate v'``.

    The gradient ``g`` is that of the ELBO of one row: a published rate for the mean over B rows is
    B times too large here. It is clipped for each row and each block of parameters (locations,
    logarithms of scales, ...). Over a Gaussian posterior of variance v steps are stable for
    ``rate < 2 (1 + momentum) v``.

    Args:
        rate: the step size.
        momentum: gamma, in [0, 1).
        clip: the largest norm of a block's gradient, ``math.inf`` for any.
        learn_rate: whether the step size is a parameter (its logarithm is).

    >>> update = GradientUpdate(rate=0.5, momentum=0.0)
    >>> update(torch.zeros(1, 2), torch.ones(1, 2), None, (1, 1), None)[0]
    tensor([[0.5000, 0.5000]])
    """

    direct = 0.1

    def __init__(
        self, rate: float = 0.03, momentum: float = 0.5, clip: float = 5.0, learn_rate: bool = False
    ) -> None:
        super().__init__()
        if not (rate > 0 and 0 <= momentum < 1 and clip > 0):
            raise ValueError(f"Need {rate=} > 0, 0 <= {momentum=} < 1 and {clip=} > 0.")
        self.momentum, self.clip, self._rate = momentum, clip, rate
        self.log_rate = nn.Parameter(torch.tensor(math.log(rate))) if learn_rate else None

    @property
    def rate(self) -> Tensor | float:
        """The step size."""
        return self._rate if self.log_rate is None else self.log_rate.exp()

    def forward(
        self, params: Tensor, gradient: Tensor, state: Any, blocks: Blocks, features: Features
    ) -> tuple[Tensor, Any]:
        """Take a step; the state is the velocity."""
        velocity = self._clipped(gradient, blocks)
        if state is not None:
            velocity = self.momentum * state + velocity
        return params + self.rate * velocity, velocity

    def clips(self, gradient: Tensor, blocks: Blocks) -> Tensor:
        """Return which rows have a block whose norm is above ``clip``, ``[*batch]``."""
        norms = [part.detach().norm(dim=-1) for part in gradient.split(list(blocks), -1)]
        return torch.stack(norms).amax(0) > self.clip

    def _clipped(self, gradient: Tensor, blocks: Blocks) -> Tensor:
        if math.isinf(self.clip):
            return gradient
        tiny = torch.finfo(gradient.dtype).tiny  # the norm has no derivative at 0
        parts = gradient.split(list(blocks), -1)
        norms = [part.square().sum(-1, keepdim=True).clamp_min(tiny).sqrt() for part in parts]
        pairs = zip(parts, norms, strict=True)
        return torch.cat([part * (self.clip / norm).clamp_max(1) for part, norm in pairs], -1)


class LearnedUpdate(Update):
    """A network of the gradient: iterative amortised inference.

    Of features of a row, the parameters, and their gradient divided by its root mean square in each
    block, with the logarithm of that, it makes a gate s and a proposal:
    ``params' = s params + (1 - s) proposal``. Each step learns from the ELBO after it. After
    `Iterative Amortized Inference` (Marino, Yue, Mandt, arXiv 1807.09356).

    Args:
        hidden: the widths of the network's hidden layers.
        features: a module from the encoder's inputs to ``[*rows, F]``; flattens them if None.
        network: a module of your own, ``[*rows, F + 2 P + number of blocks]`` to ``[*rows, 2 P]``.

    >>> update = LearnedUpdate(hidden=(8,))
    >>> update.build(2, (1, 1), torch.zeros(3, 5))
    >>> update(torch.zeros(3, 2), torch.ones(3, 2), None, (1, 1), torch.zeros(3, 5))[0].shape
    torch.Size([3, 2])
    """

    direct = 1.0
    every_step = True

    def __init__(
        self,
        hidden: Sequence[int] = (512, 512),
        features: nn.Module | None = None,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.hidden = tuple(hidden)
        self.features: Any = features
        self.network: Any = network

    def features_of(self, rows: Any, row_dims: int) -> Tensor:
        """Return the network's features of the rows, ``[*rows, F]``."""
        if self.features is not None:
            return self.features(rows)
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"LearnedUpdate got inputs of type {kind}. Give it features=.")
        return rows.flatten(row_dims) if rows.dim() > row_dims else rows.unsqueeze(-1)

    def build(self, size: int, blocks: Blocks, features: Features) -> None:
        """Make the network, if none was given."""
        if self.network is not None or features is None:
            return
        widths = [features.shape[-1] + 2 * size + len(blocks), *self.hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ELU()]
        last = nn.Linear(widths[-1], 2 * size)
        nn.init.zeros_(last.weight)  # the first steps go half-way to zero
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*layers, last).to(features)

    def forward(
        self, params: Tensor, gradient: Tensor, state: Any, blocks: Blocks, features: Features
    ) -> tuple[Tensor, Any]:
        """Return the gated step of the network, without state."""
        if not gradient.requires_grad:
            params = params.detach()
        inputs = [params]
        for part in gradient.split(list(blocks), -1):
            # A row at its optimum, such as one without data, has a gradient of zero.
            least = torch.finfo(part.dtype).eps
            size = part.square().mean(-1, keepdim=True).clamp_min(least).sqrt()
            inputs += [part / size, size.log()]
        batch = params.shape[:-1]
        assert features is not None
        output = self.network(torch.cat([features.expand(*batch, -1), *inputs], -1))
        gate, proposal = output.chunk(2, -1)
        return torch.lerp(proposal, params, gate.sigmoid()), None


class FixedStart(nn.Module):
    """An encoder with the same output for all rows, zeros if not given.

    For a diagonal Gaussian zeros are the standard normal, in unconstrained space.

    >>> FixedStart(4)(torch.ones(2, 7))
    tensor([[0., 0., 0., 0.],
            [0., 0., 0., 0.]])
    """

    def __init__(self, size: int, start: Tensor | None = None, row_dims: int = 1) -> None:
        super().__init__()
        self.row_dims = row_dims
        self.start: Tensor
        self.register_buffer("start", torch.zeros(size) if start is None else start)

    def forward(self, rows: Any) -> Tensor:
        """Return the start, ``[*rows, size]``."""
        is_real = isinstance(rows, Tensor) and rows.is_floating_point()
        start = self.start.to(rows.device, rows.dtype if is_real else self.start.dtype)
        return start.expand(*rows.shape[: self.row_dims], -1)
