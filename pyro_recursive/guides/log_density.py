"""The log-density of a model over its packed, unconstrained latents, for many points at once."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_recursive.guides.call import GuideCall, copied_plate, first_argument
from pyro_recursive.guides.joint_site import emit
from pyro_recursive.guides.model_masks import LatentsInCalls, read_masks, sampled_latents
from pyro_recursive.guides.packing import LatentBlock, Values, latents_of
from pyro_recursive.guides.placement import check_bounds
from pyro_recursive.tracing.choice import choose
from pyro_recursive.tracing.compatibility import check_batch_shapes
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.isolation import isolated, outline
from pyro_recursive.tracing.plates import layout_of, outer_shape
from pyro_recursive.tracing.program import FAILURES, Program, structure_of
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import sites, subsample_scale
from pyro_recursive.tracing.user_warnings import warn_user

CHUNK = 2**20  # numbers in the largest site of one pass
NEAR = 0.1  # how far around a start the structure of the model is looked at


class LogDensity:
    """``f(u) = sum_sites log p + sum_k log |dT_k / du_k|`` at points ``[*batch, D]``: ``[*batch]``.

    In nats; u has the continuous latents of a model, ``z_k = T_k(u_k)``, in the order and layout of
    guides without an encoder. All points run in one pass, under a plate or `torch.vmap`; where
    neither gives the numbers of single runs, in a loop. Supports are read in each pass: they may
    depend on data and on other latents. Improper priors count as 0, enumerated latents are summed
    out, and masked entries that no density depends on are constant.

    Points at which the model fails (a matrix that is not positive definite) have -inf. The model
    sees u in the dtype of its latents; results have the dtype of the points. Runs leave the random
    state and running statistics of modules as they are.

    Args:
        model, args, kwargs: the model, and the arguments of all its runs.
        trace: a trace of the model that has points of finite density; by default one run, in which
            improper priors have ``T(0)``.

    Raises:
        ValueError: the model has no continuous latents, or subsamples a plate.
        NotImplementedError: a latent is discrete and not enumerated, or has no coordinates.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(0.0, scale), obs=x)
    >>> f = LogDensity(model, (torch.tensor([0.5, -1.0]),))
    >>> [round(value, 3) for value in f(torch.tensor([[0.0], [1.0]])).tolist()]
    [-2.463, -2.922]
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        trace: poutine.Trace | None = None,
    ) -> None:
        kwargs = kwargs or {}
        trace = outline(model, args, kwargs) if trace is None else trace
        check_batch_shapes(sites(trace))
        _check_whole(trace)
        latent = sampled_latents(trace)
        if not latent:
            raise ValueError("The model has no continuous latent sites.")
        self.block = latents_of(latent, local=False)
        check_bounds((self.block,), trace, model, args, kwargs)
        with torch.no_grad():
            self.start = self.block.pack_trace(trace.nodes).detach()
        is_masked = LatentsInCalls.seen(trace, args, kwargs).are_masked
        points = _Points(model, self.block, self.start, is_masked)
        self.program = Program(model, points, args, kwargs)
        structure = structure_of(self.program)
        choose(self.program, structure)
        if structure.misfit is not None:
            raise type(structure.misfit)(*structure.misfit.args)
        self.is_vectorized = structure.mode != "loop"
        self._why_looped = None if self.is_vectorized else structure.cause  # until it is told
        largest = max(site["value"].numel() for site in sites(trace))
        self.chunk = max(1, CHUNK // max(self.size, largest * structure.num_values))
        # Points at which the density alone, its gradient, or all second derivatives were computed.
        self.num_values = self.num_gradients = self.num_hessians = 0
        self.num_errors = 0  # points at which the model raised

    @property
    def size(self) -> int:
        """D, the length of the vector."""
        return self.block.size

    def __call__(self, u: Tensor) -> Tensor:
        """Return the log-density, ``[*batch, D]`` to ``[*batch]``, with its graph."""
        self.num_values += u.shape[:-1].numel()
        return self._value(u)

    def gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-density and gradient, ``[*batch, D]`` to ``[*batch]`` and ``[*batch, D]``."""
        self.num_gradients += u.shape[:-1].numel()
        value, grad, _ = self._gradient(u, create_graph=False)
        return value.detach(), grad

    def hessian(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-density, gradient and the matrix of second derivatives ``[*batch, D, D]``.

        By D backward passes through one graph, many at once where `torch.vmap` can run them.
        """
        self.num_hessians += u.shape[:-1].numel()
        value, grad, leaf = self._gradient(u, create_graph=True)
        count = max(1, self.chunk // max(1, u.shape[:-1].numel()))
        matrix = _jacobian(grad, leaf, count).detach()
        return value.detach(), grad.detach(), (matrix + matrix.mT) / 2

    def error_at(self, u: Tensor) -> Exception | None:
        """Return what the model raises at a point ``[D]``."""
        try:
            self._run(u[None].to(self.start))
        except FAILURES as error:
            return error
        return None

    def values(self, u: Tensor) -> Values:
        """Return the unconstrained values of the sites at a point ``[D]``, in their own shapes."""
        return self.block.unflatten(u.to(self.start).reshape(self.start.shape))

    def values_at(self, u: Tensor) -> Values:
        """Return the values of the sites at a point ``[D]``, with the supports that it gives."""
        model, args, kwargs = self.program.model, self.program.args, self.program.kwargs
        call = GuideCall(args, kwargs, {}, first_argument, model=lambda: model)
        u = u.detach().to(self.start).reshape(self.start.shape)
        return call.block_at(self.block, u).unpack(u)

    def _value(self, u: Tensor) -> Tensor:
        points = u.reshape(-1, self.size).to(self.start)
        found = [self._where_possible(part) for part in points.split(self.chunk)]
        return torch.cat(found).reshape(u.shape[:-1]).to(u)

    def _gradient(self, u: Tensor, create_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        leaf = u.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = self._value(leaf)
        return value, _derivative(value, leaf, create_graph=create_graph), leaf

    def _where_possible(self, u: Tensor) -> Tensor:
        """Return the log-density, -inf at points at which the model raises: halves show which."""
        try:
            return self._run(u)
        except FAILURES:
            if len(u) == 1:
                self.num_errors += 1
                return 0.0 * u.sum(-1) - math.inf
        half = len(u) // 2
        return torch.cat([self._where_possible(u[:half]), self._where_possible(u[half:])])

    def _run(self, u: Tensor) -> Tensor:
        if self._why_looped is not None:
            warn_user(f"The model runs for each point by itself: {self._why_looped}.")
            self._why_looped = None
        rows = (u,) if self.is_vectorized else u.split(1)
        return torch.cat([self._pass(row) for row in rows])

    def _pass(self, u: Tensor) -> Tensor:
        needs_second = torch.is_grad_enabled() and u.requires_grad
        with isolated(double_backward=needs_second), pyro.validation_enabled(False), _Given(u):
            particles, runs = run_particles(self.program, 1, len(u))
            layout = layout_of(particles, [run.table for run in runs])
            total = densities(runs, layout).reparameterized
        return total.expand(1, len(u), *layout.shape).reshape(len(u), -1).sum(-1)


class _Points:
    """A guide of all latents at once, with density 1 over their packed vector u.

    Log-weights of this guide are the log-density of the model with the Jacobians. ``u`` is near a
    start where no handler gives it.
    """

    def __init__(self, model: Callable, block: LatentBlock, start: Tensor, is_masked: bool) -> None:
        self.model, self.block, self.start, self.is_masked = model, block, start, is_masked

    def __call__(self, *args: Any, **kwargs: Any) -> Values:
        frames = {frame.name: frame for slot in self.block.slots for frame in slot.frames}
        plates = {name: copied_plate(frame) for name, frame in frames.items()}
        call = GuideCall(args, kwargs, plates, first_argument, model=lambda: self.model)
        if self.is_masked:
            read_masks((self.block,), call, self.start)
        shape = torch.broadcast_shapes(outer_shape(), self.start.shape[:-1])
        u = self.start + NEAR * torch.randn(*shape, self.block.size).to(self.start)
        return emit(self.block, call, u, lambda u, volume: -volume)


class _Given(Messenger):
    """Gives the packed vector of a run these points, ``[n, D]``."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.points = points

    def _pyro_joint_draw(self, msg: Any) -> None:
        msg["value"], msg["done"] = self.points.reshape(msg["args"][0].shape), True


def _check_whole(trace: poutine.Trace) -> None:
    """Raise where a plate is subsampled: the density would be another one in each run."""
    for site in sites(trace):
        for frame in site["cond_indep_stack"]:
            if subsample_scale(frame) != 1:
                raise ValueError(
                    f"Plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}), and "
                    "the log-density needs all of its rows. Give the model all data."
                )


def _derivative(values: Tensor, leaf: Tensor, **options: Any) -> Tensor:
    if not values.requires_grad:
        return torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True, **options)
    return torch.zeros_like(leaf) if grad is None else grad


def _jacobian(grad: Tensor, leaf: Tensor, count: int) -> Tensor:
    """Return the derivatives of ``grad[..., i]``, ``[..., i, D]``, ``count`` of them at once."""
    size = leaf.shape[-1]
    if not grad.requires_grad:
        return leaf.new_zeros(*leaf.shape, size)
    basis = torch.eye(size, dtype=leaf.dtype, device=leaf.device)
    basis = basis.reshape(size, *[1] * (leaf.dim() - 1), size).expand(size, *leaf.shape)

    def rows(vectors: Tensor) -> Tensor:
        options: Any = {"retain_graph": True, "allow_unused": True}
        (found,) = torch.autograd.grad(grad, leaf, vectors, is_grads_batched=True, **options)
        return torch.zeros_like(vectors) if found is None else found

    try:
        found = torch.cat([rows(part) for part in basis.split(count)])
    except RuntimeError:  # an operation that torch.vmap cannot run
        each = [_derivative(grad[..., i], leaf, retain_graph=True) for i in range(size)]
        found = torch.stack(each)
    return found.movedim(0, -2)
