"""One step of training: the loss, its parameters and their one optimiser."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.tracing.isolation import set_torch_state, torch_state
from pyro_recursive.training import checkpoint
from pyro_recursive.training.distributed import DistributedStep
from pyro_recursive.training.minibatches import Batch, Minibatches
from pyro_recursive.training.non_finite import (
    FirstNonFiniteSite,
    NonFiniteError,
    message_of,
    non_finite,
    non_finite_data,
)
from pyro_recursive.training.parts import ParameterOwners, Part, unconstrained
from pyro_recursive.training.row_counts import RowCounts
from pyro_recursive.training.settings import check_optimizer_options, optimizer_options
from pyro_recursive.training.shares import row_plates

__all__ = ["Learner", "MakeOptimizer", "MakeScheduler"]

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
Weights = dict[str, dict[str, Tensor]]  # the parameters (unconstrained) and the buffers, by name

ACCELERATOR_CHECKS_EVERY = 100  # steps; each check waits until the device has caught up


class Learner:
    """A loss, the parameters that it reaches, and one optimiser for all of them."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        loss: ELBO,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler | None = None,
        clip_norm: float = math.inf,
        check_every: int | None = None,
        modules: Iterable[Module] = (),
        processes: ProcessGroup | None = None,
    ) -> None:
        """Keep what `fit` was given; parameters and optimiser come with the first step."""
        self.model, self.guide, self.loss = model, guide, loss
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler
        self.clip_norm, self.check_every = clip_norm, check_every
        self.modules = _modules([model, guide, loss, *modules])
        self.team = DistributedStep(processes or ProcessGroup())
        self.parameters: dict[str, Tensor] = {}  # unconstrained, in order of first sight
        self.parts = ParameterOwners(guide)
        self.num_initial = 0  # how many of them the optimiser was made with
        self.optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self.health = torch.zeros((), dtype=torch.float64)  # finite as long as all is well
        self.counts: RowCounts | None = RowCounts()  # looks at steps until it is taken away
        self.steps = 0
        self.guide_steps = 0  # those of the guide alone, not among the others

    def step(self, batch: Batch, epoch: int, part: Part | None = None) -> Tensor:
        """Take one step; return the loss before it: a float64 scalar in nats, on its device.

        :param part: whose parameters take it alone; None for all together
        :raises NonFiniteError: before the optimiser has changed anything
        :raises ValueError: there are no parameters, or none of the part
        """
        before = torch_state()
        self.team.begin(batch, f"step {self.steps + 1} and {self.guide_steps} of the guide alone")
        try:
            if not self.team.is_alone:
                self._prepare(batch)
            with self.counts or nullcontext():
                loss = self._differentiate(batch, part)
        except (ValueError, torch.linalg.LinAlgError) as error:  # what validation makes of a NaN
            site = self._first_site(batch, before)
            if site is None and not non_finite_data(batch):
                raise
            raise self._error(self._places(batch, site), epoch, part) from error
        if part is not None:
            self._hold_others(part, batch)
        if not self.team.is_alone:
            loss = self.team.combine(loss, self.parameters, self._buffers())
        optimizer = self.optimizer or self._start_optimizer()
        norm = clip_grad_norm_(self.parameters.values(), self.clip_norm).double()
        self.health = self.health.to(norm.device) + loss.to(norm.device) + norm
        every = 1 if norm.device.type == "cpu" else ACCELERATOR_CHECKS_EVERY
        if (self.steps + self.guide_steps) % (self.check_every or every) == 0:
            self.check(batch, epoch, before, part)
        optimizer.step()
        self._zero_gradients()  # what comes after, an SVI perhaps, would add to them
        self.steps += part != "guide"
        self.guide_steps += part == "guide"
        return loss

    def check(
        self,
        batch: Batch,
        epoch: int,
        before: list[Tensor] | None = None,
        part: Part | None = None,
    ) -> None:
        """Raise if any loss or gradient so far was not finite; waits for the device.

        :raises NonFiniteError: naming step, epoch and the place where the NaN or infinity arises
        """
        if not math.isfinite(self.health.item()):
            site = self._first_site(batch, before or torch_state())
            # Sums over the processes are what is not finite, so that all of them come here.
            heard = self.team.processes.gather(self._places(batch, site), "a NaN")
            names = [""] if self.team.is_alone else [f"process {n}: " for n in range(len(heard))]
            places = [
                name + each for name, found in zip(names, heard, strict=True) for each in found
            ]
            raise self._error(places, epoch, part)

    def evaluate(self, loss: ELBO, batch: Batch) -> tuple[float, int]:
        """Return a process's part of the loss of a batch in nats, and the rows of all processes."""
        self.team.begin(batch, "a batch of validation")
        if self.team.has_no_rows:
            return 0.0, self.team.rows
        with self.team.share():
            value = loss.loss(self.model, self.guide, *batch)
        return value if self.team.is_alone else self.team.weight * value, self.team.rows

    def end_pass(self) -> None:
        """Take all buffers from the first process: a norm's change unseen, as statistics do."""
        if not self.team.is_alone:
            self.team.processes.barrier_at("the end of an epoch")
            self.team.processes.copy_first(list(self._buffers().values()))

    def end_epoch(self, value: float) -> None:
        """Step the learning-rate schedule; ``value`` is for one that waits for a plateau."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(value)
        elif self.scheduler is not None:
            self.scheduler.step()

    @property
    def learning_rate(self) -> float:
        """The rate of the optimiser's first group."""
        assert self.optimizer is not None
        return float(self.optimizer.param_groups[0]["lr"])

    def weights(self) -> Weights:
        """Return a copy of all parameters and buffers."""
        live = {"parameters": self.parameters, "buffers": self._buffers()}
        return {
            kind: {name: tensor.detach().clone() for name, tensor in tensors.items()}
            for kind, tensors in live.items()
        }

    def set_weights(self, weights: Weights) -> None:
        """Copy parameters and buffers in place."""
        _copy(self.parameters, weights["parameters"])
        _copy(self._buffers(), weights["buffers"])

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on, random states aside."""
        return {
            "weights": self.weights(),
            "num_initial": self.num_initial,
            "steps": self.steps,
            "guide_steps": self.guide_steps,
            "parts": self.parts.state(),
            "optimizer": checkpoint.state_of(self.optimizer),
            "optimizer options": optimizer_options(self.optimizer) if self.optimizer else {},
            "scheduler": checkpoint.state_of(self.scheduler),
        }

    def set_state(self, path: Path, state: dict[str, Any], batches: Minibatches) -> None:
        """Go back to a state, after a look whether it fits; batches serve to create parameters.

        :raises CheckpointError: the state is another program's; nothing has changed
        """
        saved: Weights = state["weights"]
        self._create_parameters(batches, saved["parameters"].keys())
        checkpoint.check_tensors(path, "parameters", saved["parameters"], self.parameters)
        checkpoint.check_tensors(path, "buffers", saved["buffers"], self._buffers())
        self.parameters = {name: self.parameters[name] for name in saved["parameters"]}
        optimizer = self._start_optimizer(state["num_initial"])
        for kind, owner in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            checkpoint.set_state_of(owner, path, kind, state[kind])
        check_optimizer_options(path, state.get("optimizer options"), optimizer)
        self.set_weights(saved)
        self.steps, self.guide_steps = state["steps"], state.get("guide_steps", 0)
        self.parts.set_state(state.get("parts"))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hold all modules in eval mode, without gradients."""
        modes = {part: part.training for module in self.modules for part in module.modules()}
        try:
            for module in self.modules:
                module.eval()
            with torch.no_grad():
                yield
        finally:
            for part, training in modes.items():
                part.training = training

    def _prepare(self, batch: Batch) -> None:
        """Note what the loss may change; first of all, agree with the other processes on it."""
        if self.team.is_new:
            buffers = self.weights()["buffers"]
            with checkpoint.forked_rng():
                if not self.parameters:
                    self._differentiate(batch)
                first = self.team.processes.is_first
                plates = row_plates(self.model, self.guide, batch) if first else frozenset()
            self._zero_gradients()
            _copy(self._buffers(), buffers)
            self.team.sync_initial(self.parameters, self._buffers(), plates)
        self.team.watch(self.parameters, self._buffers())

    def _differentiate(self, batch: Batch, part: Part | None = None) -> Tensor:
        """Return the loss as a float64 scalar; leave its gradient in the parameters.

        Those known to be in the other part may be left without.
        """
        self._zero_gradients()
        if self.team.has_no_rows:
            some = next(iter(self.parameters.values()), torch.empty(()))
            return torch.zeros((), dtype=torch.float64, device=some.device)
        differentiable = getattr(self.loss, "differentiable_loss", None)
        run = self.loss.loss_and_grads if differentiable is None else differentiable
        with self.team.share(), poutine.trace(param_only=True) as captured:
            value = run(self.model, self.guide, *batch)
        self._collect(captured.trace)
        loss = torch.as_tensor(sum(value) if isinstance(value, tuple) else value)
        if differentiable is not None and loss.requires_grad:
            self._zero_gradients()  # of parameters that are new to this run, too
            loss.backward(inputs=self._learning(part))
        return loss.detach().double()

    def _learning(self, part: Part | None) -> list[Tensor] | None:
        """Return what needs a gradient; None for everything."""
        if part is None:
            return None
        others = self.parts.others(self.parameters, part)
        return [p for name, p in self.parameters.items() if name not in others]

    def _hold_others(self, part: Part, batch: Batch) -> None:
        """Take the gradients from the other part: torch's optimisers pass over what has none."""
        if self.parts.num_sorted < len(self.parameters):
            buffers = {name: buffer.clone() for name, buffer in self._buffers().items()}
            self.parts.sort(self.parameters, batch)
            _copy(self._buffers(), buffers)
        for parameter in self.parts.others(self.parameters, part).values():
            parameter.grad = None

    def _collect(self, trace: poutine.Trace) -> None:
        """Take in the parameters that were not seen before, under their first name."""
        seen = {id(parameter) for parameter in self.parameters.values()}
        for name, site in trace.nodes.items():
            parameter = unconstrained(site["value"])
            if id(parameter) not in seen:
                seen.add(id(parameter))
                self.parameters[name] = parameter
                if self.optimizer is not None:
                    _add(self.optimizer, parameter)

    def _start_optimizer(self, num_initial: int | None = None) -> Optimizer:
        """Make optimiser and schedule, with the first parameters and then those seen later."""
        parameters = list(self.parameters.values())
        if not parameters:
            raise ValueError(
                "Model and guide have no parameters to train. Register them with pyro.param or "
                "pyro.module, or use a PyroModule or an autoguide."
            )
        self.num_initial = len(parameters) if num_initial is None else num_initial
        optimizer = self.make_optimizer(parameters[: self.num_initial])
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}. "
                "Pass e.g. functools.partial(torch.optim.Adam, lr=1e-3)."
            )
        self.optimizer = optimizer
        for parameter in parameters[self.num_initial :]:
            _add(optimizer, parameter)
        self.scheduler = self.make_scheduler(optimizer) if self.make_scheduler else None
        return optimizer

    def _zero_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _buffers(self) -> dict[str, Tensor]:
        # Asked for anew each time: a module may put another tensor in a buffer's place.
        return {
            f"{number}.{name}": buffer
            for number, module in enumerate(self.modules)
            for name, buffer in module.named_buffers()
        }

    def _create_parameters(self, batches: Minibatches, names: Iterable[str]) -> None:
        """Run the loss until all named parameters exist; leave nothing else behind.

        Autoguides and `pyro.param` create theirs in the first call, some perhaps in a later one.
        """
        missing = set(names)
        buffers = self.weights()["buffers"]
        with checkpoint.forked_rng(generators=batches.generators):
            for batch in batches:
                self._differentiate(batch)
                missing -= self.parameters.keys()
                if not missing:
                    break
        self._zero_gradients()
        _copy(self._buffers(), buffers)

    def _first_site(self, batch: Batch, state: list[Tensor]) -> str | None:
        """Run a step's loss again and return where its first NaN or infinity arises, if at all."""
        watch, buffers = FirstNonFiniteSite(), self.weights()["buffers"]
        with checkpoint.forked_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_torch_state(state)
            # It has failed before; the sites up to there are known.
            with suppress(Exception), pyro.validation_enabled(False), watch:
                self._differentiate(batch)
        _copy(self._buffers(), buffers)
        return watch.first

    def _places(self, batch: Batch, site: str | None) -> list[str]:
        """Say where the NaN arises; gradients are those that the search has left."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        places = [*non_finite_data(batch), *non_finite("parameter", self.parameters)]
        return places + ([site] if site else non_finite("the gradient of parameter", gradients))

    def _error(self, places: Sequence[str], epoch: int, part: Part | None) -> NonFiniteError:
        self._zero_gradients()
        alone = f"step {self.guide_steps + 1} of the guide alone, before "
        place = f"{alone if part == 'guide' else ''}step {self.steps + 1}, epoch {epoch}"
        return NonFiniteError(message_of(places, place))


def _modules(owners: Iterable[Any]) -> list[Module]:
    """Return the modules among callables, under partials and bound methods, each once."""
    modules: dict[int, Module] = {}
    for owner in owners:
        while isinstance(owner, partial):
            owner = owner.func
        if inspect.ismethod(owner):
            owner = owner.__self__
        if isinstance(owner, Module):
            modules[id(owner)] = owner
    return list(modules.values())


@torch.no_grad()
def _copy(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in saved.items():
        live[name].copy_(tensor)


def _add(optimizer: Optimizer, parameter: Tensor) -> None:
    # A group of its own would start at the first learning rate, and no schedule would know it.
    optimizer.param_groups[-1]["params"].append(parameter)
