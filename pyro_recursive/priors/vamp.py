"""Priors made of encoders: mixtures in the latent space that follow the aggregate posterior.

A prior is a module of the model; calling it builds a distribution over vectors ``[D]``.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_recursive.guides.gaussian_families import Family, FamilyName, family_of
from pyro_recursive.priors.encoded_mixture import EncodedMixture, encoded

_MARGIN = 0.01  # of the bounds' width: at the bounds themselves the sigmoid has no gradient


class VampPrior(nn.Module):
    """A mixture of the encoder's posteriors at K learned pseudo-inputs.

    ``p(z) = sum_k w_k q(z | u_k)``. Calling the module encodes the pseudo-inputs and returns a
    distribution: batch ``[]``, event ``[D]``; plates expand it. Its samples have no gradient.

    Args:
        encoder: a module, or any callable, from inputs ``[K, *input]`` to parameters ``[K, n]`` of
            the ``family``; or to a pair of logits ``[K, M]`` and parameters ``[K, M, n]``, for a
            prior of K * M components; or to a distribution with batch ``[K]`` and event ``[D]``.
        pseudo_inputs: where they start, ``[K, *input]``: data, or draws around them.
        num_components: K; that many random rows of ``pseudo_inputs``, all if None.
        bounds: the range of the data, ``(low, high)``: keeps the pseudo-inputs in it by a sigmoid.
        learn_weights: learn the weights, which otherwise stay equal.
        family: ``"diagonal"`` (n = 2 D: locations, then logarithms of scales), ``"full"``, or a
            `pyro_recursive.guides.gaussian_families.Family` such as ``LowRank(2)``.

    Raises ValueError for fewer than K pseudo-inputs, some out of bounds, and wrong shapes.

    `VAE with a VampPrior` (Tomczak & Welling, arXiv 1705.07120).

    >>> import pyro
    >>> encoder, x = nn.Linear(5, 4), torch.rand(20, 5)
    >>> prior = VampPrior(encoder, x, num_components=3, bounds=(0, 1))
    >>> def model(x):
    ...     pyro.module("prior", prior)
    ...     with pyro.plate("data", len(x)):
    ...         return pyro.sample("z", prior())
    >>> model(x).shape, prior.pseudo_inputs.shape
    (torch.Size([20, 2]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        pseudo_inputs: Tensor,
        num_components: int | None = None,
        *,
        bounds: tuple[float, float] | None = None,
        learn_weights: bool = False,
        family: FamilyName | Family = "diagonal",
    ) -> None:
        super().__init__()
        _check_count("num_components", num_components, pseudo_inputs)
        start = pseudo_inputs.detach()
        if num_components is not None:
            start = start[torch.randperm(len(start), device=start.device)[:num_components]]
        self.encoder, self.family, self.bounds = encoder, family_of(family), bounds
        self.raw_inputs = nn.Parameter(unsquash(start, bounds))
        logits = start.new_zeros(len(start))
        self.logits: Tensor
        if learn_weights:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs ``[K, *input]``, in the range of the data."""
        return squash(self.raw_inputs, self.bounds)

    def forward(self) -> EncodedMixture:
        log_weights, components = encoded(self.encoder, self.pseudo_inputs, self.family)
        log_weights = log_weights + self.logits.log_softmax(0)[:, None]
        return EncodedMixture(log_weights.flatten(), components)


class ExemplarPrior(nn.Module):
    """A mixture of equal normals at the encoder's means of the training data.

    ``p(z) = 1/N sum_n N(z; mu(x_n), s ** 2 I)`` with one learned scale ``s``. Calling the module
    encodes the exemplars and returns a distribution: event ``[D]``, batch ``[]`` or that of
    ``leave_out``, the indices of the minibatch, which leaves out each row's own datum. With
    ``num_exemplars``, calls in training mode use that many random exemplars: a valid, looser bound.

    Args:
        encoder: as in `VampPrior`; its means are used, and a mixture's means and weights.
        exemplars: the training data, ``[N, *input]``, of any dtype that the encoder takes. They are
            not in the `state_dict`.
        num_exemplars: the size of the random subset.
        init_scale: where ``s`` starts.
        family: as in `VampPrior`.

    Raises ValueError for fewer exemplars than ``num_exemplars`` and wrong shapes. Where
    ``leave_out`` is out of range, IndexError under Pyro's validation, else densities are NaN.

    `Exemplar VAE` (Norouzi, Fleet & Norouzi, arXiv 2004.04795).

    >>> import pyro
    >>> encoder, x = nn.Linear(5, 4), torch.rand(20, 5)
    >>> prior = ExemplarPrior(encoder, x, num_exemplars=10)
    >>> def model():
    ...     pyro.module("prior", prior)
    ...     with pyro.plate("data", 20, subsample_size=4) as indices:
    ...         return pyro.sample("z", prior(leave_out=indices))
    >>> model().shape, prior.eval()().num_components
    (torch.Size([4, 2]), 20)
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        exemplars: Tensor,
        *,
        num_exemplars: int | None = None,
        init_scale: float = 1.0,
        family: FamilyName | Family = "diagonal",
    ) -> None:
        super().__init__()
        _check_count("num_exemplars", num_exemplars, exemplars)
        self.encoder, self.family, self.num_exemplars = encoder, family_of(family), num_exemplars
        self._data = _Data(exemplars)
        dtype = exemplars.dtype if exemplars.is_floating_point() else torch.get_default_dtype()
        scale = torch.tensor(math.log(init_scale), dtype=dtype, device=exemplars.device)
        self.log_scale = nn.Parameter(scale)

    @property
    def exemplars(self) -> Tensor:
        """The exemplars, ``[N, *input]``."""
        return self._data.values

    def forward(self, leave_out: Tensor | None = None) -> EncodedMixture:
        """Return the prior without the rows' own data, ``[*batch]`` indices, if given."""
        exemplars, chosen = self.exemplars, None
        if self.num_exemplars is not None and self.training:
            order = torch.randperm(len(exemplars), device=exemplars.device)
            chosen = order[: self.num_exemplars]
            exemplars = exemplars[chosen]
        log_weights, components = encoded(self.encoder, exemplars, self.family)
        used = self._used(log_weights, chosen, leave_out)
        centers = components.mean.flatten(0, -2)
        windows = dist.Normal(centers, self.log_scale.exp().expand_as(centers)).to_event(1)
        return EncodedMixture((used[..., None] + log_weights).flatten(-2), windows)

    def _used(self, like: Tensor, chosen: Tensor | None, leave_out: Tensor | None) -> Tensor:
        number = len(like)
        if leave_out is None:
            return like.new_full((number,), -math.log(number))
        if leave_out.dtype == torch.bool or leave_out.is_floating_point():
            raise TypeError(f"leave_out must be indices of exemplars, got {leave_out.dtype}.")
        if number < 2:
            raise ValueError(f"leave_out needs 2 exemplars at a time, got {number}.")
        size = len(self.exemplars)
        is_known = (leave_out >= 0) & (leave_out < size)
        if is_validation_enabled() and not is_known.all():
            span = f"from {leave_out.min()} to {leave_out.max()}"
            raise IndexError(f"leave_out goes {span}, and there are {size} exemplars.")
        if chosen is None:
            chosen = torch.arange(number, device=leave_out.device)
        own = leave_out[..., None] == chosen
        left = (number - own.sum(-1, keepdim=True)).to(like.dtype)
        left = left.masked_fill(~is_known[..., None], math.nan)
        return (-left.log()).masked_fill(own, -math.inf)


class _Data(nn.Module):
    """A tensor that moves with a module, and is not copied where modules run isolated."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)


def _check_count(name: str, number: int | None, data: Tensor) -> None:
    number = len(data) if number is None else number
    if not 1 <= number <= len(data):
        raise ValueError(f"{name} must be from 1 to the {len(data)} rows, got {number}.")


def unsquash(inputs: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Return the real numbers that `squash` maps to given inputs; copies without bounds.

    Inputs that are within 1% of a bound are moved to 1% from it.
    """
    if bounds is None:
        return inputs.clone()
    low, high = bounds
    if not (low < high and low <= inputs.min() <= inputs.max() <= high):
        span = f"from {inputs.min():g} to {inputs.max():g}"
        raise ValueError(f"pseudo_inputs go {span}, out of {(low, high)}.")
    return ((inputs - low) / (high - low)).clamp(_MARGIN, 1 - _MARGIN).logit()


def squash(raw: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Return inputs of real numbers, by a sigmoid between the bounds, if there are some."""
    if bounds is None:
        return raw
    low, high = bounds
    return low + (high - low) * torch.sigmoid(raw)
