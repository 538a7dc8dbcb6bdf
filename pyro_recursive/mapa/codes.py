"""Where the codes of an empiricalised prior come from.

``p(z) = sum_i w_i N(z; c_i, s ** 2 I)`` over M codes ``c_i``, each an unconstrained vector ``[D]``;
with ``s = 0``, the default, a sum of points. All kinds are modules: called with component indices
``[n]`` they return the codes ``[n, D]``, so that only those are computed that a minibatch needs.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_recursive.priors.vamp import squash, unsquash
from pyro_recursive.tracing.arguments import check_instance

__all__ = ["Codes", "EncodedCodes", "FreeCodes", "GridCodes", "PseudoInputCodes"]


class Codes(nn.Module):
    """M codes with their weights and, around each, a normal of scale ``s``.

    Arguments:
        weights: M numbers that are not negative, counts of prototypes say; equal if not given.
        learn_weights: learn them, from there.
        scale: s; None for points. A number is fixed; ``learn_scale`` learns it from there.

    A kind of codes defines `place`.
    """

    logits: Tensor
    log_scale: Tensor

    def __init__(
        self,
        num_components: int,
        *,
        weights: Tensor | None = None,
        learn_weights: bool = False,
        scale: float | None = None,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        logits = _logits(num_components, weights)
        self._keep("logits", logits, learn_weights)
        self.has_scale = scale is not None
        if scale is not None:
            if not 0 < scale < math.inf:
                raise ValueError(
                    f"scale must be positive and finite, or None for points; got {scale}"
                )
            self._keep("log_scale", torch.tensor(math.log(scale)), learn_scale)
        elif learn_scale:
            raise ValueError("learn_scale needs a scale to start from")

    def __len__(self) -> int:
        """Return M, the number of codes."""
        return len(self.logits)

    @abstractmethod
    def place(self, index: Tensor) -> Tensor:
        """Return the codes of components ``[n]``, ``[n, D]``."""

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Return the codes of components ``[n]``, of all if not given: ``[n, D]``."""
        if index is None:
            index = torch.arange(len(self), device=self.logits.device)
        found = self.place(index)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(index):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{type(self).__name__} has to return one vector for each of {len(index)} codes, "
                f"[{len(index)}, D]; got {got}. An encoder maps rows of data to codes alone."
            )
        return found

    @property
    def log_weights(self) -> Tensor:
        """The logarithms of the prior weights ``[M]``, which sum to one."""
        return self.logits.log_softmax(0)

    @property
    def scale(self) -> Tensor | None:
        """s, a positive scalar, or None for points."""
        return self.log_scale.exp() if self.has_scale else None

    def _keep(self, name: str, value: Tensor, learn: bool) -> None:
        if learn:
            setattr(self, name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)


class EncodedCodes(Codes):
    """An encoder of the training data, ``c_i = g(x_i)``: an amortised prior.

    With prototypes in place of the data and ``weights`` their counts, a coreset of them. The inputs
    stay where they are, on the CPU say, and out of the `state_dict`; those that are encoded are
    moved to the encoder.

    Arguments:
        encoder: a module, or any callable, from rows of inputs ``[n, *input]`` to ``[n, D]``.
        inputs: ``[M, *input]``, of any dtype that the encoder takes.

    >>> x = torch.rand(20, 3)
    >>> EncodedCodes(nn.Linear(3, 2), x)(torch.tensor([0, 7])).shape
    torch.Size([2, 2])
    """

    def __init__(self, encoder: Callable[..., Any], inputs: Tensor, **options: Any) -> None:
        check_instance("encoder", encoder)
        _check_rows(inputs, "inputs")
        super().__init__(len(inputs), **options)
        self.encoder = encoder
        self._inputs = (inputs,)  # no buffer: `to(device)` would move all of it

    @property
    def inputs(self) -> Tensor:
        """What the encoder is fed with, ``[M, *input]``."""
        return self._inputs[0]

    def place(self, index: Tensor) -> Tensor:
        """Encode the inputs of some components."""
        rows = self.inputs[index.to(self.inputs.device)]
        return self.encoder(rows.to(self.logits.device, non_blocking=True))


class FreeCodes(Codes):
    """Codes that are parameters of their own, ``[M, D]``; each learns where it is decoded.

    >>> len(FreeCodes(torch.randn(20, 2)))
    20
    """

    def __init__(self, start: Tensor, **options: Any) -> None:
        _check_rows(start, "start")
        if start.dim() != 2 or not start.is_floating_point():
            raise ValueError(f"start must be floats [M, D], got {start.dtype} {tuple(start.shape)}")
        super().__init__(len(start), **options)
        self.codes: Tensor = nn.Parameter(start.detach().clone())

    def place(self, index: Tensor) -> Tensor:
        """Return some of the codes."""
        return self.codes[index]


class GridCodes(Codes):
    """A fixed regular grid of codes, as in a generative topographic mapping.

    ``points`` for each of D dims from ``-bound`` to ``bound``, M = points ** D in all, with equal
    weights or, with ``normal=True``, those of a standard normal.

    Source: `GTM: The Generative Topographic Mapping` (Bishop, Svensen & Williams, Neural
    Computation 1998).

    >>> GridCodes(5, 2)().shape
    torch.Size([25, 2])
    """

    codes: Tensor

    def __init__(
        self,
        points: int,
        dims: int = 1,
        *,
        bound: float = 2.0,
        normal: bool = False,
        **options: Any,
    ) -> None:
        if points < 2 or dims < 1 or not 0 < bound < math.inf:
            raise ValueError(
                "a grid needs at least 2 points, 1 dim and a positive bound; got "
                f"points={points}, dims={dims}, bound={bound}"
            )
        axis = torch.linspace(-bound, bound, points)
        codes = torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)
        if normal:
            options["weights"] = (-0.5 * codes.square().sum(-1)).exp()
        super().__init__(len(codes), **options)
        self.register_buffer("codes", codes)

    def place(self, index: Tensor) -> Tensor:
        """Return some of the grid's points."""
        return self.codes[index]


class PseudoInputCodes(Codes):
    """An encoder of learned pseudo-inputs, ``c_k = g(u_k)``, as those of a VampPrior.

    Arguments:
        encoder: as in `EncodedCodes`.
        pseudo_inputs: where they start, floats ``[M, *input]``: data, or draws around them.
        bounds: the range of the data, ``(low, high)``, which a sigmoid keeps them in.

    Source of the pseudo-inputs: `VAE with a VampPrior` (Tomczak & Welling, arXiv 1705.07120), where
    each has a normal of its own scale; `pyro_recursive.VampPrior` is that.

    >>> codes = PseudoInputCodes(nn.Linear(3, 2), torch.rand(10, 3), bounds=(0, 1))
    >>> codes().shape
    torch.Size([10, 2])
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        pseudo_inputs: Tensor,
        *,
        bounds: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        check_instance("encoder", encoder)
        _check_rows(pseudo_inputs, "pseudo_inputs")
        if not pseudo_inputs.is_floating_point():
            raise TypeError(f"pseudo_inputs are learned: floats, not {pseudo_inputs.dtype}")
        super().__init__(len(pseudo_inputs), **options)
        self.encoder, self.bounds = encoder, bounds
        self.raw_inputs = nn.Parameter(unsquash(pseudo_inputs.detach(), bounds))

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs ``[M, *input]``, in the range of the data."""
        return squash(self.raw_inputs, self.bounds)

    def place(self, index: Tensor) -> Tensor:
        """Encode some of the pseudo-inputs."""
        return self.encoder(self.pseudo_inputs[index])


def _logits(number: int, weights: Tensor | Sequence[float] | None) -> Tensor:
    if weights is None:
        return torch.zeros(number)
    weights = torch.as_tensor(weights)
    ok = weights.shape == (number,) and bool((weights >= 0).all()) and bool(weights.sum() > 0)
    if not ok or not bool(weights.isfinite().all()):
        raise ValueError(
            f"weights must be {number} finite numbers that are not negative, not all 0; got shape "
            f"{tuple(weights.shape)}"
        )
    return weights.to(torch.get_default_dtype()).log()


def _check_rows(rows: Tensor, what: str) -> None:
    if not isinstance(rows, Tensor) or rows.dim() < 1 or not len(rows):
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"{what} must be a tensor with a row for each code, [M, ...]; got {got}")
