"""The codes of an empirical prior: encoded data, parameters, a grid, or encoded pseudo-inputs.

``p(z) = sum_i w_i N(z; c_i, s ** 2 I)`` over M codes ``c_i``, each an unconstrained vector ``[D]``;
``s = 0``, the default, is a sum of points. Each kind is a module that maps component indices
``[n]`` to their codes ``[n, D]``, so that a minibatch computes only its own.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_recursive.priors.vamp import squash, unsquash


class Codes(nn.Module):
    """M codes with their weights and, around each, a normal of scale ``s``.

    A kind of codes has them as ``codes`` ``[M, D]``, or defines `select_codes`.

    Args:
        num_components: M.
        weights: M numbers that are not negative, such as counts of prototypes; equal by default.
        learn_weights: learn them, from there.
        scale: s; None for points. A number is fixed, or learned from there by ``learn_scale``.
        like: a tensor on the device and, if it has floats, with the dtype for weights and scale.
    """

    codes: Tensor
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
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        if like is None or not like.is_floating_point():
            like = torch.empty((), device=None if like is None else like.device)
        weights = torch.ones(num_components) if weights is None else torch.as_tensor(weights)
        valid = weights.shape == (num_components,) and (weights >= 0).all()
        if not (valid and 0 < weights.sum() < math.inf):
            raise ValueError(f"weights must be {num_components} finite numbers >= 0, not all 0.")
        self._keep("logits", weights.to(like).log(), learn_weights)
        self.has_scale = scale is not None
        if scale is not None:
            self._keep("log_scale", like.new_tensor(math.log(scale)), learn_scale)
        elif learn_scale:
            raise ValueError("learn_scale needs a scale to start from.")

    def __len__(self) -> int:
        """Return M, the number of codes."""
        return len(self.logits)

    def select_codes(self, index: Tensor) -> Tensor:
        """Return the codes of components ``[n]``, ``[n, D]``: by default rows of ``codes``."""
        return self.codes[index]

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Return the codes of components ``[n]``, of all if not given: ``[n, D]``."""
        if index is None:
            index = torch.arange(len(self), device=self.logits.device)
        codes = self.select_codes(index)
        if codes.dim() != 2 or len(codes) != len(index):
            raise ValueError(f"Codes must be [{len(index)}, D], got {list(codes.shape)}.")
        return codes

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
    """Codes of the training data by an encoder, ``c_i = g(x_i)``.

    Prototypes with ``weights`` of their counts are a coreset of the data. The inputs stay on their
    device and out of the `state_dict`; a minibatch's are moved to the encoder.

    Args:
        encoder: a module, or any callable, from rows of inputs ``[n, *input]`` to ``[n, D]``.
        inputs: ``[M, *input]``, of any dtype that the encoder takes.

    >>> x = torch.rand(20, 3)
    >>> EncodedCodes(nn.Linear(3, 2), x)(torch.tensor([0, 7])).shape
    torch.Size([2, 2])
    """

    def __init__(self, encoder: Callable[..., Any], inputs: Tensor, **options: Any) -> None:
        super().__init__(len(inputs), like=next(_parameters(encoder), inputs), **options)
        self.encoder = encoder
        self._inputs = (inputs,)  # no buffer: `to(device)` would move all of it

    @property
    def inputs(self) -> Tensor:
        """The encoder's inputs, ``[M, *input]``."""
        return self._inputs[0]

    def select_codes(self, index: Tensor) -> Tensor:
        """Encode the inputs of some components."""
        rows = self.inputs[index.to(self.inputs.device)]
        device = next(_parameters(self.encoder), self.logits).device
        return self.encoder(rows.to(device, non_blocking=True))


class FreeCodes(Codes):
    """Codes that are free parameters, ``[M, D]``; a step trains those that it decodes."""

    def __init__(self, start: Tensor, **options: Any) -> None:
        super().__init__(len(start), like=start, **options)
        self.codes = nn.Parameter(start.detach().clone())


class GridCodes(Codes):
    """A fixed regular grid of codes, as in a generative topographic mapping.

    ``points`` for each of D dims from ``-bound`` to ``bound``, M = points ** D in all, with equal
    weights or, with ``normal=True``, those of a standard normal.

    Source: `GTM: The Generative Topographic Mapping` (Bishop, Svensen & Williams, Neural
    Computation 1998).
    """

    def __init__(
        self, points: int, dims: int = 1, *, bound: float = 2.0, normal: bool = False, **given: Any
    ) -> None:
        axis = torch.linspace(-bound, bound, points)
        codes = torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)
        if normal:
            given["weights"] = (-0.5 * codes.square().sum(-1)).exp()
        super().__init__(len(codes), **given)
        self.register_buffer("codes", codes)


class PseudoInputCodes(Codes):
    """Codes of learned pseudo-inputs by an encoder, ``c_k = g(u_k)``.

    Args:
        encoder: as in `EncodedCodes`.
        pseudo_inputs: their initial values, floats ``[M, *input]``: data, or draws around them.
        bounds: the range of the data, ``(low, high)``, enforced by a sigmoid.

    Source: `VAE with a VampPrior` (Tomczak & Welling, arXiv 1705.07120).

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
        super().__init__(len(pseudo_inputs), like=pseudo_inputs, **options)
        self.encoder, self.bounds = encoder, bounds
        self.raw_inputs = nn.Parameter(unsquash(pseudo_inputs.detach(), bounds))

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs ``[M, *input]``, in the range of the data."""
        return squash(self.raw_inputs, self.bounds)

    def select_codes(self, index: Tensor) -> Tensor:
        """Encode some of the pseudo-inputs."""
        return self.encoder(self.pseudo_inputs[index])


def _parameters(encoder: Callable) -> Iterator[Tensor]:
    parameters = encoder.parameters() if isinstance(encoder, nn.Module) else iter(())
    return (each for each in parameters if each.is_floating_point())
