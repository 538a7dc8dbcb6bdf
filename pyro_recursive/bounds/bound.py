"""Multi-sample bounds on the evidence: pure functions of log-weights.

A bound maps log-weights ``log p(x, z) - log q(z)``, an ``[M, K, *plates]`` tensor of M independent
estimates with K samples each, to one number in nats per datum, a ``[*plates]`` tensor. A new bound
is a subclass of `Bound` with one method, `Bound.estimate`; its gradient estimators follow.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Derivatives(NamedTuple):
    """First and second derivative of a bound in each log-weight, ``[M, K, *plates]`` both."""

    first: Tensor
    second: Tensor


class Bound(ABC):
    """A bound is the average over M estimates of one function of K log-weights.

    The derivatives and the replaced estimates below are right for any `estimate` that treats its
    estimates one by one, at a cost that grows as K squared; a subclass may give closed forms.
    """

    is_split = False  # whether the guide has another bound than the model, `guide`

    @abstractmethod
    def estimate(self, log_weights: Tensor) -> Tensor:
        """Return one value per estimate: ``[M, K, *plates]`` to ``[M, *plates]``, in nats."""

    def __call__(self, log_weights: Tensor) -> Tensor:
        return self.estimate(log_weights).mean(0)

    @property
    def guide(self) -> "Bound":
        """The bound that the guide's parameters maximise; another one only in `Split`."""
        return self

    def is_linear(self, num_estimates: int, num_particles: int) -> bool:
        """Whether the bound is a plain average of log-weights, as every bound is for K = 1."""
        return num_particles == 1

    def derivatives(self, log_weights: Tensor) -> Derivatives:
        """Return both derivatives of the bound in each log-weight, without a graph."""
        with torch.enable_grad():
            leaf = log_weights.detach().requires_grad_()
            (first,) = torch.autograd.grad(self(leaf).sum(), leaf, create_graph=True)
            dead = log_weights.isneginf()
            if not first.requires_grad:  # a linear bound
                return Derivatives(first.masked_fill(dead, 0.0), torch.zeros_like(first))
            basis = _identity(leaf).unsqueeze(1).to(leaf)
            (rows,) = torch.autograd.grad(
                first, leaf, basis.expand(-1, *leaf.shape), is_grads_batched=True
            )
        second = torch.diagonal(rows, dim1=0, dim2=2).movedim(-1, 1)
        return Derivatives(first.detach().masked_fill(dead, 0.0), second.masked_fill(dead, 0.0))

    def replaced(self, log_weights: Tensor, substitute: Tensor) -> Tensor:
        """Return each estimate with log-weight k replaced by entry k of ``substitute``.

        ``[M, K, *plates]``, as ``substitute`` is; log-weights may have size 1 where it has more.
        Control variates of the score function follow from it.
        """
        log_weights, substitute = torch.broadcast_tensors(log_weights, substitute)
        others = substitute.movedim(1, 0).unsqueeze(2)
        replaced = torch.where(_identity(log_weights).unsqueeze(1), others, log_weights)
        size = log_weights.shape[1]
        return self.estimate(replaced.flatten(0, 1)).unflatten(0, (size, -1)).movedim(0, 1)


@dataclass(frozen=True)
class PowerMeans(Bound):
    """A weighted sum of logarithms of power means: ``sum_j weight_j * power_mean(order_j)``.

    ``terms`` holds pairs (weight, order). With ``w = exp(log_weights)`` a term is

        log(mean_k(w_k ** (1 - order))) / (1 - order),    or  mean_k(log w_k)  where order is 1

    Order 0 is the importance-weighted bound, order 1 the ELBO, an order in between the VR-IWAE
    bound; a negative order is no lower bound.
    """

    terms: tuple[tuple[float | Tensor, float], ...]

    def __repr__(self) -> str:
        match self.terms:
            case ((1.0, 0.0),):
                return "iwae"
            case ((1.0, 1.0),):
                return "elbo"
            case ((1.0, order),):
                return f"renyi({order})"
            case ((beta, 1.0), (_, 0.0)):
                return f"ciwae({float(beta):.4g})"
        return f"PowerMeans({self.terms})"

    def is_linear(self, num_estimates: int, num_particles: int) -> bool:
        return num_particles == 1 or all(order == 1 for _, order in self.terms)

    def estimate(self, log_weights: Tensor) -> Tensor:
        return sum(weight * _power_mean(log_weights, order) for weight, order in self.terms)  # type: ignore[return-value]

    def derivatives(self, log_weights: Tensor) -> Derivatives:
        """Return both derivatives in closed form: ``s`` and ``(1 - order) * (s - s * s)``."""
        first = second = log_weights.new_zeros(())
        for weight, order in self.terms:
            share = _normalized(log_weights, order)
            weight = weight / log_weights.shape[0]
            first = first + weight * share
            if order != 1:
                second = second + weight * (1 - order) * (share - share * share)
        return Derivatives(first, second.expand_as(log_weights))

    def replaced(self, log_weights: Tensor, substitute: Tensor) -> Tensor:
        """Return `Bound.replaced` at a cost linear in K."""
        return sum(  # type: ignore[return-value]
            weight * _power_mean_replacing(log_weights, substitute, order)
            for weight, order in self.terms
        )


@dataclass(frozen=True)
class Pooled(Bound):
    """Another bound with all M * K samples inside one logarithm."""

    bound: Bound

    def is_linear(self, num_estimates: int, num_particles: int) -> bool:
        return self.bound.is_linear(1, num_estimates * num_particles)

    def estimate(self, log_weights: Tensor) -> Tensor:
        """Return the value of the pooled bound: ``[M, K, *plates]`` to ``[1, *plates]``."""
        return self.bound.estimate(log_weights.flatten(0, 1).unsqueeze(0))

    def derivatives(self, log_weights: Tensor) -> Derivatives:
        pooled = self.bound.derivatives(log_weights.flatten(0, 1).unsqueeze(0))
        return Derivatives(*(part.reshape(log_weights.shape) for part in pooled))

    def replaced(self, log_weights: Tensor, substitute: Tensor) -> Tensor:
        pooled = (each.flatten(0, 1).unsqueeze(0) for each in (log_weights, substitute))
        return self.bound.replaced(*pooled).squeeze(0).unflatten(0, log_weights.shape[:2])


@dataclass(frozen=True)
class Split(Bound):
    """Two bounds on the same samples: the model maximises one, the guide the other.

    The value is the model's bound. No scalar function has both gradients.
    """

    is_split = True
    model_bound: Bound
    guide_bound: Bound

    @property
    def guide(self) -> Bound:
        return self.guide_bound

    def is_linear(self, num_estimates: int, num_particles: int) -> bool:
        bounds = self.model_bound, self.guide_bound
        return all(bound.is_linear(num_estimates, num_particles) for bound in bounds)

    def estimate(self, log_weights: Tensor) -> Tensor:
        return self.model_bound.estimate(log_weights)

    def derivatives(self, log_weights: Tensor) -> Derivatives:
        return self.model_bound.derivatives(log_weights)


@dataclass(frozen=True, eq=False)
class Weighted(Bound):
    """Another bound whose M estimates do not count alike: ``weights`` are ``[M, *plates]``.

    Of size 1 where estimates, or entries of plates, count alike. The estimates of a stratified loss
    come from different components of the guide, those of other entries from other values of a
    latent. Where the weight is 0 the estimate does not matter, whatever it is.
    """

    bound: Bound
    weights: Tensor

    def is_linear(self, num_estimates: int, num_particles: int) -> bool:
        return self.bound.is_linear(num_estimates, num_particles)

    def estimate(self, log_weights: Tensor) -> Tensor:
        return times(self._weights(log_weights)[:, 0], self.bound.estimate(log_weights))

    def derivatives(self, log_weights: Tensor) -> Derivatives:
        weights = self._weights(log_weights)
        return Derivatives(*(weights * part for part in self.bound.derivatives(log_weights)))

    def replaced(self, log_weights: Tensor, substitute: Tensor) -> Tensor:
        weights = self._weights(log_weights)
        return times(weights, self.bound.replaced(log_weights, substitute))

    def _weights(self, log_weights: Tensor) -> Tensor:
        """Return the weights as ``[M, 1, *plates]``, for log-weights with more dims of size 1."""
        weights = self.weights.unsqueeze(1)
        if weights.dim() == log_weights.dim():
            return weights
        return weights.reshape(len(weights), 1, *log_weights.shape[2:])


@dataclass(frozen=True, eq=False)
class Nested(Weighted):
    """Estimates of which each S have one logarithm: ``mean_m log mean_s exp(sum L_ms)``.

    Its first derivative in a log-weight is ``u L'`` with u the share of ``exp(sum L_ms)`` over M,
    for ``weights`` of M S times u; the second is ``u L'' + u (1 - M u) L' ** 2``. It has
    derivatives alone, as a log-weight replaced in one entry changes the logarithm over all.
    """

    num_globals: int

    def estimate(self, log_weights: Tensor) -> Tensor:
        raise NotImplementedError("Nested has derivatives alone: its logarithm is over all data.")

    def replaced(self, log_weights: Tensor, substitute: Tensor) -> Tensor:
        raise NotImplementedError("Nested has derivatives alone: its logarithm is over all data.")

    def derivatives(self, log_weights: Tensor) -> Derivatives:
        first, second = self.bound.derivatives(log_weights)
        weights, count = self.weights.unsqueeze(1), len(log_weights)
        moved = count * (1 - weights / self.num_globals) * first * first
        return Derivatives(weights * first, weights * (second + moved))


class Jackknife(Bound):
    """First-order jackknife of the importance-weighted bound; less biased, and no lower bound.

    ``K L_K - (K - 1) mean_k L_(without k)``, from `Debiasing Evidence Approximations: On
    Importance-weighted Autoencoders and Jackknife Variational Inference` (Nowozin, ICLR 2018). The
    mean leaves out a value of -inf: where one sample alone is alive the correction would be
    infinite.
    """

    def __repr__(self) -> str:
        return "jackknife"

    def estimate(self, log_weights: Tensor) -> Tensor:
        size = log_weights.shape[1]
        if size < 2:
            raise ValueError(f"the jackknife bound needs num_particles >= 2, got {size}")
        without, share = self._others(log_weights)
        mean = (share * without.masked_fill(share == 0, 0.0)).sum(1) - math.log(size - 1)
        return size * _power_mean(log_weights, 0.0) - (size - 1) * mean

    def derivatives(self, log_weights: Tensor) -> Derivatives:
        """Return both derivatives in closed form, at a cost linear in K."""
        size = log_weights.shape[1]
        without, share = self._others(log_weights)
        weights = _normalized(log_weights, 0.0)
        # What sample j has of the mean over k != j: exp(lw_j - without_k), and its square.
        inverse = (-without).masked_fill(share == 0, -math.inf)
        first = (log_weights + _log_sum_exp_of_others(inverse)).exp()
        square = (2 * log_weights + _log_sum_exp_of_others(2 * inverse)).exp()
        factor = (size - 1) * share.amax(1, keepdim=True)
        return Derivatives(
            (size * weights - factor * first) / len(log_weights),
            (size * (weights - weights * weights) - factor * (first - square)) / len(log_weights),
        )

    @staticmethod
    def _others(log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the sum of the other weights, and its share in the mean."""
        without = _log_sum_exp_of_others(log_weights)
        alive = (~without.isneginf()).to(log_weights)
        return without, alive / alive.sum(1, keepdim=True).clamp_min(1)


elbo = PowerMeans(((1.0, 1.0),))
"""The evidence lower bound, ``mean_{m,k} log w``."""

iwae = PowerMeans(((1.0, 0.0),))
"""`Importance Weighted Autoencoders` (arXiv 1509.00519): ``mean_m log mean_k w``."""

miwae = iwae
"""MIWAE is IWAE averaged over M > 1 estimates (arXiv 1802.04537)."""

piwae = Split(Pooled(iwae), miwae)
"""PIWAE (arXiv 1802.04537): the model climbs IWAE over all M * K samples, the guide MIWAE."""

jackknife = Jackknife()


def ciwae(beta: float | Tensor) -> PowerMeans:
    """Return CIWAE, ``beta * ELBO + (1 - beta) * IWAE`` on the same samples (arXiv 1802.04537).

    Raises ValueError for a number outside [0, 1], where it is no bound.

    >>> log_weights = torch.tensor([[-1.0, -3.0]])
    >>> bool(ciwae(1.0)(log_weights) == log_weights.mean())
    True
    """
    if not isinstance(beta, Tensor) and not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    terms: list[tuple[float | Tensor, float]] = [(beta, 1.0), (1 - beta, 0.0)]
    # A term of weight zero is no term: zero times the mean of a dead sample would be NaN.
    return PowerMeans(tuple(term for term in terms if isinstance(term[0], Tensor) or term[0] != 0))


def renyi(alpha: float) -> PowerMeans:
    """Return the VR-IWAE bound of order ``alpha`` (arXiv 2210.06226): 0 is IWAE, 1 the ELBO.

    The value is that of `Renyi Divergence Variational Inference` (arXiv 1602.02311).
    """
    return PowerMeans(((1.0, float(alpha)),))


def times(weights: Tensor, values: Tensor) -> Tensor:
    """Return the product; 0 where the weight is 0 and the value infinite."""
    return weights * values.masked_fill(weights == 0, 0.0)


def _identity(log_weights: Tensor) -> Tensor:
    """Return a mask ``[K, K, *1]``: whether two of the K samples are the same."""
    size = log_weights.shape[1]
    diagonal = torch.eye(size, dtype=torch.bool, device=log_weights.device)
    return diagonal.reshape(size, size, *[1] * (log_weights.dim() - 2))


def sum_of_others(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the sum over some dims without the own entry; -inf where another entry is."""
    dead = tensor.isneginf()
    finite = tensor.masked_fill(dead, 0.0)
    total, dead_total = finite.sum(dims, keepdim=True), dead.sum(dims, keepdim=True)
    return (total - finite).masked_fill(dead_total - dead.long() > 0, -math.inf)


def _log_sum_exp_of_others(log_weights: Tensor) -> Tensor:
    """Return the logarithm of the sum of the other K - 1 weights for each sample.

    From both ends, never as a difference: subtracting a weight that holds nearly the whole sum
    would lose every digit of the rest.
    """
    edge = torch.full_like(log_weights[:, :1], -math.inf)
    before = torch.cat([edge, log_weights[:, :-1]], 1).logcumsumexp(1)
    after = torch.cat([log_weights[:, 1:], edge], 1).flip(1).logcumsumexp(1).flip(1)
    return torch.logaddexp(before, after)


def _power_mean(log_weights: Tensor, order: float) -> Tensor:
    if order == 1:
        return log_weights.mean(1)
    log_size = math.log(log_weights.shape[1])
    if order == 0:
        return torch.logsumexp(log_weights, 1) - log_size
    largest = _largest(log_weights)
    scaled = (1 - order) * (log_weights - largest)
    # Where the mean counts, each term is below the clamp, whose gradient is finite elsewhere.
    change = scaled.clamp(max=1 + log_size).expm1().mean(1)
    log_mean = _log_1p(change, scaled.logsumexp(1) - log_size)
    return largest.squeeze(1) + log_mean / (1 - order)


def _largest(log_weights: Tensor) -> Tensor:
    """Return the largest log-weight of each estimate, 0 where it is infinite, ``[M, 1, *plates]``.

    Power means move with what is subtracted from all log-weights: it needs no derivative.
    """
    return log_weights.detach().amax(1, keepdim=True).nan_to_num(math.nan, 0.0, 0.0)


def _log_1p(change: Tensor, logarithm: Tensor) -> Tensor:
    """Return ``log(1 + change)``: as given, or by `log1p` where that has more digits."""
    return torch.where(change.abs() < 0.5, change.clamp(-0.5, 0.5).log1p(), logarithm)


def _normalized(log_weights: Tensor, order: float) -> Tensor:
    """Return the self-normalised weights; zeros where every sample is dead."""
    if order == 1:
        return torch.full_like(log_weights, 1 / log_weights.shape[1])
    return torch.softmax((1 - order) * log_weights, 1).nan_to_num(nan=0.0)


def _power_mean_replacing(log_weights: Tensor, substitute: Tensor, order: float) -> Tensor:
    size = log_weights.shape[1]
    if order == 1:
        return (sum_of_others(log_weights, (1,)) + substitute) / size
    power, largest = 1 - order, _largest(log_weights)
    scaled, other = power * (log_weights - largest), power * (substitute - largest)
    total = torch.logaddexp(_log_sum_exp_of_others(scaled), other)
    change = (sum_of_others(scaled.expm1(), (1,)) + other.expm1()) / size
    return largest + _log_1p(change, total - math.log(size)) / power


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.double()  # which has no float64
