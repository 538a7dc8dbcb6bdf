"""Mixtures of an encoder's posteriors, whose components all rows share."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, Normal

from pyro_recursive.guides.gaussian_families import Family
from pyro_recursive.guides.mixture_distributions import Mixture
from pyro_recursive.priors.pairwise import normal_pairs


class EncodedMixture(Mixture):
    """``p(z) = sum_j w_j p_j(z)`` with weights ``[*batch, J]``, components shared by the batch.

    ``components`` is a distribution with J entries in its batch dims and event ``[D]``. Diagonal
    normals cost two matrix products and ``[*batch, J]`` numbers, others ``[*batch, J, D]``.
    """

    def __init__(self, log_weights: Tensor, components: Any) -> None:
        self.components = components
        super().__init__(log_weights, torch.Size(), components.event_shape[0])

    @property
    def support(self) -> Any:
        """The support of the components."""
        return self.components.support

    @property
    def mean(self) -> Tensor:
        """The mean, ``[*batch, D]``."""
        return self.log_weights.exp() @ self.components.mean.flatten(0, -2)

    @property
    def variance(self) -> Tensor:
        """The variance of each coordinate, ``[*batch, D]``."""
        weights, means = self.log_weights.exp(), self.components.mean.flatten(0, -2)
        shift = means - means.mean(0)
        within = self.components.variance.flatten(0, -2)
        return weights @ (within + shift**2) - (weights @ shift) ** 2

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EncodedMixture":
        """Expand the weights; the components stay as they are."""
        return EncodedMixture(self.log_weights.expand(*batch_shape, -1), self.components)

    def table(self, u: Tensor) -> Tensor:
        """Return every component's log-density: ``[*batch, D]`` to ``[*batch, J]``."""
        if u.shape[-1:] != self.event_shape:
            raise ValueError(
                f"The prior is over vectors of length {self.event_shape[0]}, got a value of shape "
                f"{tuple(u.shape)}: the encoder and the latent site disagree."
            )
        normals = _diagonal_normals(self.components)
        if normals is not None:
            return normal_pairs(u, *normals)
        dims = len(self.components.batch_shape)
        return self.components.log_prob(u[(..., *[None] * dims, slice(None))]).flatten(-dims)

    def draw(self, index: Tensor, present: Sequence[int] | None = None) -> Tensor:
        """Return a draw from the component ``index`` of each row, ``[*batch]`` to ``[*batch, D]``.

        ``present`` are the components that occur; they make no difference here.
        """
        normals = _diagonal_normals(self.components)
        if normals is not None:
            loc, scale = normals
            return torch.normal(loc[index], scale[index])
        # A distribution cannot be indexed: all components draw as often as the most frequent one.
        flat = index.flatten()
        counts, order = flat.bincount(minlength=self.num_components), flat.argsort()
        first = counts.cumsum(0) - counts
        nth = torch.empty_like(flat)
        nth[order] = torch.arange(len(flat), device=flat.device) - first[flat[order]]
        draws = self.components.sample((int(counts.max()),)).flatten(1, -2)
        return draws[nth, flat].reshape(*index.shape, -1)


def encoded(encoder: Callable[..., Any], inputs: Tensor, family: Family) -> tuple[Tensor, Any]:
    """Return log-weights ``[K, M]`` and components with K * M entries, event ``[D]``."""
    output, rows = encoder(inputs), len(inputs)
    pair = output if isinstance(output, tuple) else (None, output)
    if not isinstance(pair[-1], Tensor) and pair[0] is None:
        return _of_distribution(output, inputs)
    if isinstance(output, Tensor) and output.dim() == 2:
        pair = output.new_zeros(rows, 1), output[:, None]
    if not _fit(pair, rows):
        raise _wrong_output(output, rows)
    logits, parameters = pair
    return logits.log_softmax(-1), family(parameters, _size(family, parameters.shape[-1]))


def _fit(pair: tuple, rows: int) -> bool:
    """Return whether a pair is of logits ``[K, M]`` and parameters ``[K, M, n]``."""
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        return False
    logits, parameters = pair
    return parameters.dim() == 3 and logits.shape == parameters.shape[:2] and len(logits) == rows


def _of_distribution(output: Any, inputs: Tensor) -> tuple[Tensor, Any]:
    rows = len(inputs)
    shape, event = getattr(output, "batch_shape", None), getattr(output, "event_shape", ())
    if shape != (rows,) or len(event) != 1:
        raise _wrong_output(output, rows)
    if isinstance(output, MixtureSameFamily):
        return output.mixture_distribution.logits.log_softmax(-1), output.component_distribution
    dtype = inputs.dtype if inputs.is_floating_point() else None
    return torch.zeros(rows, 1, dtype=dtype, device=inputs.device), output


def _wrong_output(output: Any, rows: int) -> ValueError:
    parts = output if isinstance(output, tuple) else (output,)
    return ValueError(
        f"For {rows} inputs the encoder returned {' and '.join(map(_outline, parts))}. Return "
        f"parameters [{rows}, n], logits [{rows}, M] with parameters [{rows}, M, n], or a "
        "distribution: lambda u: dist.Normal(*encoder(u)).to_event(1)."
    )


def _outline(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"a tensor of shape {tuple(part.shape)}"
    if hasattr(part, "batch_shape"):
        shapes = tuple(part.batch_shape), tuple(part.event_shape)
        return f"a {type(part).__name__} with batch {shapes[0]} and event {shapes[1]}"
    return f"a {type(part).__name__}"


def _size(family: Family, count: int) -> int:
    """Return the length of the vectors for which a family has so many parameters."""
    for size in itertools.count(1):
        needed = family.num_parameters(size)
        if needed == count:
            return size
        if needed > count:
            break
    raise ValueError(
        f"The encoder returned {count} parameters a row; {family} has "
        f"{family.num_parameters(size - 1)} for vectors of length {size - 1}, {needed} for {size}."
    )


def _diagonal_normals(components: Any) -> tuple[Tensor, Tensor] | None:
    """Return locations and scales ``[J, D]`` of independent normals, None for other components."""
    if not isinstance(components, Independent) or not isinstance(components.base_dist, Normal):
        return None
    normal = components.base_dist
    if normal.loc.device.type == "mps":  # without float64 the products below would be wrong
        return None
    return normal.loc.flatten(0, -2), normal.scale.flatten(0, -2)
