"""One step of training: the loss, its parameters and their one optimiser."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pyro import poutine, validation_enabled
from pyro.infer import ELBO
from torch import Generator, Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.tracing.isolation import random_state, set_random_state
from pyro_recursive.training import checkpoint
from pyro_recursive.training.data import Batch, Minibatches
from pyro_recursive.training.distributed import DistributedStep
from pyro_recursive.training.nan_search import (
    FirstNonFiniteSite,
    NonFiniteError,
    non_finite,
    non_finite_data,
)
from pyro_recursive.training.plate_sizes import BatchTakenForData, check_shares

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
Owner = Literal["guide", "model"]
Weights = dict[str, dict[str, Tensor]]  # "parameters" (unconstrained) and "buffers", by name

ACCELERATOR_CHECKS_EVERY = 100  # steps; each check waits for the device
VALIDATION_SEED = 0  # the same draws in each validation, so that differences are the guide's


class ParameterOwners:
    """Which parameters are the guide's: those that Pyro sees while it runs.

    All others are the model's; shared ones are the guide's. Runs of the model that a guide hides
    from Pyro, as this package's guides do, do not count.
    """

    def __init__(self, guide: Callable) -> None:
        self.guide = guide
        self.of_guide: set[str] = set()
        self.num_sorted = 0  # of the learner's list of parameters

    def sort(self, parameters: Mapping[str, Tensor], batch: Batch) -> None:
        """Find the owners of all parameters by a run of the guide.

        Raises:
            ValueError: all parameters are the guide's, or all the model's.
        """
        with torch.no_grad(), poutine.trace(param_only=True) as captured:
            self.guide(*batch)
        seen = {id(_unconstrained(site["value"])) for site in captured.trace.nodes.values()}
        self.of_guide |= {name for name, tensor in parameters.items() if id(tensor) in seen}
        self.num_sorted = len(parameters)
        if not self.of_guide or len(self.of_guide) == len(parameters):
            owner, other = ("model", "guide") if self.of_guide else ("guide", "model")
            raise ValueError(
                f"In aggressive training the {owner} has no parameters of its own: all are the "
                f"{other}'s ({', '.join(parameters)})."
            )

    def others(self, parameters: Mapping[str, Tensor], owner: Owner) -> dict[str, Tensor]:
        """Return the sorted parameters that are not the owner's."""
        names = list(parameters)[: self.num_sorted]
        is_other = owner == "model"
        return {name: parameters[name] for name in names if (name in self.of_guide) == is_other}

    def state(self) -> dict[str, Any]:
        """Return what was found so far."""
        return {"of_guide": sorted(self.of_guide), "num_sorted": self.num_sorted}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Set what `state` returned."""
        self.of_guide, self.num_sorted = set(state["of_guide"]), state["num_sorted"]


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
        """Store the arguments of `fit`; the first step finds parameters and makes the optimiser."""
        self.model, self.guide, self.loss = model, guide, loss
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler
        self.clip_norm, self.check_every = clip_norm, check_every
        self.modules = _modules([model, guide, loss, *modules])
        self.group = DistributedStep(processes or ProcessGroup())
        self.parameters: dict[str, Tensor] = {}  # unconstrained, in order of appearance
        self.owners = ParameterOwners(guide)
        self.num_initial = 0  # how many of them the optimiser was made with
        self.optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self.health = torch.zeros((), dtype=torch.float64)  # finite if all losses, gradients are
        self.sizes: BatchTakenForData | None = BatchTakenForData()  # of the first step alone
        self.steps = 0
        self.guide_steps = 0  # those of the guide alone, not among the others

    def step(self, batch: Batch, epoch: int, owner: Owner | None = None) -> Tensor:
        """Take one step; return the loss before it: a float64 scalar in nats, on its device.

        Args:
            batch: arguments of model and guide.
            epoch: for messages.
            owner: whose parameters move; None for all.

        Raises:
            NonFiniteError: before the optimiser has changed anything.
            ValueError: there are no parameters, or none of the owner.
        """
        before = random_state()
        self.group.begin(batch, f"step {self.steps + 1} and {self.guide_steps} of the guide alone")
        try:
            if not self.group.is_alone:
                self._prepare(batch)
            with self.sizes or nullcontext():
                loss = self._differentiate(batch, owner)
        except (ValueError, torch.linalg.LinAlgError) as error:  # Pyro's validation finds a NaN
            site = self._first_site(batch, before)
            if site is None and not non_finite_data(batch):
                raise
            raise self._error(self._places(batch, site), epoch, owner) from error
        if owner is not None:
            self._hold_others(owner, batch)
        if not self.group.is_alone:
            loss = self.group.combine(loss, self.parameters, self._buffers())
        optimizer = self.optimizer or self._start_optimizer()
        norm = clip_grad_norm_(self.parameters.values(), self.clip_norm).double()
        self.health = self.health.to(norm.device) + loss.to(norm.device) + norm
        every = 1 if norm.device.type == "cpu" else ACCELERATOR_CHECKS_EVERY
        if (self.steps + self.guide_steps) % (self.check_every or every) == 0:
            self.check(batch, epoch, before, owner)
        optimizer.step()
        self._zero_gradients()  # a later step of SVI would add to them
        self.steps += owner != "guide"
        self.guide_steps += owner == "guide"
        return loss

    def check(
        self,
        batch: Batch,
        epoch: int,
        before: list[Tensor] | None = None,
        owner: Owner | None = None,
    ) -> None:
        """Raise if any loss or gradient so far was not finite; waits for the device.

        Raises:
            NonFiniteError: names step, epoch and the place where the NaN or infinity arises.
        """
        if not math.isfinite(self.health.item()):
            places = self._places(batch, self._first_site(batch, before or random_state()))
            # The sums over the processes are not finite, so that all processes are here.
            gathered = self.group.processes.gather(places, "a NaN")
            if not self.group.is_alone:
                places = [f"process {n}: {each}" for n, own in enumerate(gathered) for each in own]
            raise self._error(places, epoch, owner)

    def validate(self, loss: ELBO, held_out: Minibatches) -> tuple[float, float]:
        """Return the mean loss in nats and the mean rows of held-out batches."""
        with self.evaluating(held_out):
            pairs = [self._evaluate(loss, batch) for batch in held_out]
        value, rows = torch.as_tensor(pairs, dtype=torch.float64).mean(0).tolist()
        return sum(self.group.processes.gather(value, "the end of validation")), rows

    def _evaluate(self, loss: ELBO, batch: Batch) -> tuple[float, int]:
        """Return a process's part of a batch's loss in nats, and the rows of all processes."""
        self.group.begin(batch, "a batch of validation")
        if self.group.has_no_rows:
            return 0.0, self.group.rows
        value = loss.loss(self.model, self.guide, *batch)
        return value if self.group.is_alone else self.group.weight * value, self.group.rows

    @contextmanager
    def evaluating(self, held_out: Minibatches) -> Iterator[None]:
        """Hold modules in eval mode, without gradients, with the same random draws each time."""
        modes = {part: part.training for module in self.modules for part in module.modules()}
        seed = VALIDATION_SEED + self.group.processes.rank
        try:
            for module in self.modules:
                module.eval()
            with torch.no_grad(), checkpoint.forked_rng(seed, held_out.generators):
                yield
        finally:
            for part, training in modes.items():
                part.training = training

    def end_pass(self) -> None:
        """Take all buffers from the first process: batch norms may change theirs unnoticed."""
        if not self.group.is_alone:
            self.group.processes.barrier_at("the end of an epoch")
            self.group.processes.copy_first(list(self._buffers().values()))

    def end_epoch(self, value: float) -> None:
        """Step the learning-rate schedule, with ``value`` if it reduces on a plateau."""
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
        return {"parameters": _copy(self.parameters), "buffers": _copy(self._buffers())}

    def set_weights(self, weights: Weights) -> None:
        """Copy parameters and buffers in place."""
        _load(self.parameters, weights["parameters"])
        _load(self._buffers(), weights["buffers"])

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on, random states aside."""
        return {
            "weights": self.weights(),
            "num_initial": self.num_initial,
            "steps": self.steps,
            "guide_steps": self.guide_steps,
            "parts": self.owners.state(),
            "optimizer": checkpoint.state_of(self.optimizer),
            "optimizer options": (
                checkpoint.optimizer_options(self.optimizer) if self.optimizer else {}
            ),
            "scheduler": checkpoint.state_of(self.scheduler),
        }

    def set_state(self, path: Path, state: dict[str, Any], batches: Minibatches) -> None:
        """Load a state if it fits; runs of the loss on the batches create missing parameters.

        Raises:
            CheckpointError: the state is another program's; nothing has changed.
        """
        saved: Weights = state["weights"]
        self._create_parameters(batches, saved["parameters"].keys())
        live = {"parameters": self.parameters, "buffers": self._buffers()}
        for kind, tensors in live.items():
            outlines = (checkpoint.outline(each, kind[:-1]) for each in (saved[kind], tensors))
            checkpoint.check_same(path, *outlines)
        self.parameters = {name: self.parameters[name] for name in saved["parameters"]}
        optimizer = self._start_optimizer(state["num_initial"])
        checkpoint.load_state_of(optimizer, path, "optimizer", state["optimizer"])
        checkpoint.load_state_of(self.scheduler, path, "scheduler", state["scheduler"])
        options = checkpoint.optimizer_options(optimizer)
        checkpoint.check_settings(path, state.get("optimizer options"), options)
        self.set_weights(saved)
        self.steps, self.guide_steps = state["steps"], state.get("guide_steps", 0)
        if "parts" in state:
            self.owners.set_state(state["parts"])

    def _create_parameters(self, batches: Minibatches, names: Iterable[str]) -> None:
        """Run the loss until all named parameters exist; change nothing else."""
        missing = set(names)
        with self._restoring(batches.generators):
            for batch in batches:
                self._differentiate(batch)
                missing -= self.parameters.keys()
                if not missing:
                    break
        self._zero_gradients()

    @contextmanager
    def _restoring(self, generators: Iterable[Generator] = ()) -> Iterator[None]:
        """Restore random states and buffers after the block."""
        buffers = _copy(self._buffers())
        with checkpoint.forked_rng(generators=generators):
            yield
        _load(self._buffers(), buffers)

    def _prepare(self, batch: Batch) -> None:
        """Start from the first process's parameters; record what the loss may change."""
        if self.group.is_new:
            with self._restoring():
                if not self.parameters:
                    self._differentiate(batch)
                if self.group.processes.is_first:
                    check_shares(self.model, self.guide, batch)
            self._zero_gradients()
            self.group.sync_initial(self.parameters, self._buffers())
        self.group.watch(self.parameters, self._buffers())

    def _differentiate(self, batch: Batch, owner: Owner | None = None) -> Tensor:
        """Return the loss as a float64 scalar, with its gradient in the parameters.

        Parameters that are known to be another owner's may have none.
        """
        self._zero_gradients()
        if self.group.has_no_rows:
            some = next(iter(self.parameters.values()), torch.empty(()))
            return torch.zeros((), dtype=torch.float64, device=some.device)
        differentiable = getattr(self.loss, "differentiable_loss", None)
        run = self.loss.loss_and_grads if differentiable is None else differentiable
        with poutine.trace(param_only=True) as captured:
            value = run(self.model, self.guide, *batch)
        self._collect(captured.trace)
        loss = torch.as_tensor(sum(value) if isinstance(value, tuple) else value)
        if differentiable is not None and loss.requires_grad:
            self._zero_gradients()  # those of parameters that are new in this run too
            loss.backward(inputs=self._moving(owner))
        return loss.detach().double()

    def _moving(self, owner: Owner | None) -> list[Tensor] | None:
        """Return the parameters that need a gradient; None for all."""
        if owner is None:
            return None
        others = self.owners.others(self.parameters, owner)
        return [p for name, p in self.parameters.items() if name not in others]

    def _hold_others(self, owner: Owner, batch: Batch) -> None:
        """Delete the other owner's gradients: torch's optimisers skip parameters without one."""
        if self.owners.num_sorted < len(self.parameters):
            with self._restoring():
                self.owners.sort(self.parameters, batch)
        for parameter in self.owners.others(self.parameters, owner).values():
            parameter.grad = None

    def _collect(self, trace: poutine.Trace) -> None:
        """Add the parameters that are new, under their first name."""
        seen = {id(parameter) for parameter in self.parameters.values()}
        for name, site in trace.nodes.items():
            parameter = _unconstrained(site["value"])
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
                "pyro.module."
            )
        self.num_initial = len(parameters) if num_initial is None else num_initial
        optimizer = self.make_optimizer(parameters[: self.num_initial])
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}."
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
        # Collected anew each time: a module may replace the tensor of a buffer.
        return {
            f"{number}.{name}": buffer
            for number, module in enumerate(self.modules)
            for name, buffer in module.named_buffers()
        }

    def _first_site(self, batch: Batch, state: list[Tensor]) -> str | None:
        """Repeat a step's loss; return where its first NaN or infinity arises, None if nowhere."""
        search = FirstNonFiniteSite()
        with self._restoring(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_random_state(state)
            # The run may raise as it did before; the sites up to there are known.
            with suppress(Exception), validation_enabled(False), search:
                self._differentiate(batch)
        return search.first

    def _places(self, batch: Batch, site: str | None) -> list[str]:
        """Return where the NaN arises; the gradients are those of `_first_site`."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        places = [*non_finite_data(batch), *non_finite("parameter", self.parameters)]
        return places + ([site] if site else non_finite("the gradient of parameter", gradients))

    def _error(self, places: list[str], epoch: int, owner: Owner | None) -> NonFiniteError:
        self._zero_gradients()
        alone = f"step {self.guide_steps + 1} of the guide alone, before "
        step = f"{alone if owner == 'guide' else ''}step {self.steps + 1}, epoch {epoch}"
        return NonFiniteError.at(places, step)


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


def _unconstrained(value: Any) -> Tensor:
    """Return the leaf tensor of a parameter's value, itself under Pyro's module_local_params."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _load(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in saved.items():
        live[name].copy_(tensor)


def _add(optimizer: Optimizer, parameter: Tensor) -> None:
    # A group of its own would start at the first learning rate, and no schedule would change it.
    optimizer.param_groups[-1]["params"].append(parameter)
