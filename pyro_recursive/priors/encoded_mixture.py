"""Mixtures of an encoder's posteriors, whose components all rows share."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, Normal

from pyro_recursive.guides.gaussian_families import Family
from pyro_recursive.guides.marginals import log_density
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
        return self.components.support

    @property
    def mean(self) -> Tensor:
        return self.log_weights.exp() @ self.components.mean.flatten(0, -2)

    @property
    def variance(self) -> Tensor:
        weights, means = self.log_weights.exp(), self.components.mean.flatten(0, -2)
        shift = means - means.mean(0)
        within = self.components.variance.flatten(0, -2)
        return weights @ (within + shift**2) - (weights @ shift) ** 2

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EncodedMixture":
        return EncodedMixture(self.log_weights.expand(*batch_shape, -1), self.components)

    def table(self, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return every component's log-density: ``[*batch, D]`` to ``[*batch, J]``."""
        if u.shape[-1:] != self.event_shape:
            raise ValueError(
                f"The prior is over vectors of length {self.event_shape[0]}, got a value of shape "
                f"{tuple(u.shape)}."
            )
        normals = _diagonal_normals(self.components)
        if normals is not None and keep is None:
            return normal_pairs(u, *normals)
        dims = len(self.components.batch_shape)
        each = (..., *[None] * dims, slice(None))
        kept = None if keep is None else keep[each]
        return log_density(self.components, u[each], kept).flatten(-dims)

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
    if hasattr(output, "batch_shape"):
        if output.batch_shape == (rows,) and len(output.event_shape) == 1:
            if isinstance(output, MixtureSameFamily):
                weights = output.mixture_distribution.logits.log_softmax(-1)
                return weights, output.component_distribution
            dtype = inputs.dtype if inputs.is_floating_point() else None
            return torch.zeros(rows, 1, dtype=dtype, device=inputs.device), output
    else:
        if isinstance(output, Tensor) and output.dim() == 2:
            output = output.new_zeros(rows, 1), output[:, None]
        tensors = output if isinstance(output, tuple) else ()
        if [getattr(part, "ndim", None) for part in tensors] == [2, 3]:
            logits, parameters = tensors
            if logits.shape == parameters.shape[:2] and len(logits) == rows:
                size = _size(family, parameters.shape[-1])
                return logits.log_softmax(-1), family(parameters, size)
    raise ValueError(
        f"The encoder returned {type(output).__name__} for {rows} inputs. Return parameters "
        f"[{rows}, n], logits with parameters [{rows}, M, n], or a distribution of batch [{rows}]."
    )


def _size(family: Family, count: int) -> int:
    size = next(n for n in itertools.count(1) if family.num_parameters(n) >= count)
    if family.num_parameters(size) != count:
        raise ValueError(
            f"The encoder returned {count} parameters a row; {family} has "
            f"{family.num_parameters(size)} for vectors of length {size}."
        )
    return size


def _diagonal_normals(components: Any) -> tuple[Tensor, Tensor] | None:
    """Return locations and scales ``[J, D]`` of independent normals, None for other components."""
    if not isinstance(components, Independent) or not isinstance(components.base_dist, Normal):
        return None
    normal = components.base_dist
    if normal.loc.device.type == "mps":  # without float64 the products below would be wrong
        return None
    return normal.loc.flatten(0, -2), normal.scale.flatten(0, -2)
