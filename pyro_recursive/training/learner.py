"""One step of training: the loss, its parameters and their one optimiser."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pyro import poutine, validation_enabled
from pyro.infer import ELBO, TraceTailAdaptive_ELBO
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_recursive.evaluation.parallel import ProcessGroup
from pyro_recursive.losses.base import LogWeightELBO
from pyro_recursive.tracing.graphs.calls import Call
from pyro_recursive.tracing.isolation import (
    RandomState,
    eval_mode,
    random_state,
    set_random_state,
)
from pyro_recursive.tracing.program import FAILURES
from pyro_recursive.tracing.user_warnings import warn_user
from pyro_recursive.training import checkpoint
from pyro_recursive.training.compiled.compiled_step import CompiledStep
from pyro_recursive.training.compiled.engines import EngineName
from pyro_recursive.training.compiled.flat import SPEED_OPTIONS, FlatGroup, Owners, advance
from pyro_recursive.training.compiled.losses import ForgottenGradients, traced_loss
from pyro_recursive.training.compiled.steps import CompiledSteps, Training
from pyro_recursive.training.data import Batch, Minibatches, Table
from pyro_recursive.training.distributed import DistributedStep
from pyro_recursive.training.interrupts import Interrupts
from pyro_recursive.training.nan_search import FirstNonFiniteSite, NonFiniteError, non_finite
from pyro_recursive.training.parameters import IterateSum, Owner, TrainedParameters
from pyro_recursive.training.plate_sizes import BatchTakenForData, check_autoguides, check_shares

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]

ACCELERATOR_CHECKS_EVERY = 100  # steps; each check waits for the device
VALIDATION_SEED = 0  # the same draws in each validation, so that differences are the guide's


class Learner:
    """A loss, the parameters that it reaches, and one optimiser for all of them."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        loss: ELBO,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler | None,
        clip_norm: float,
        check_every: int | None,
        modules: Iterable[Module],
        processes: ProcessGroup,
        engine: EngineName | None = None,
        compile_cache: str | os.PathLike | None = None,
        shows_progress: bool = False,
        is_summed: bool = False,
    ) -> None:
        """Store the arguments of `fit`; the first step finds parameters and makes the optimiser."""
        self.model, self.guide, self.loss = model, guide, loss
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler
        self.clip_norm, self.check_every = clip_norm, check_every
        self.parameters = TrainedParameters([model, guide, loss, *modules])
        self.group = DistributedStep(processes)
        self.num_initial = 0  # how many parameters the optimiser was made with
        self.optimizer: Any = None  # made in the first step
        self.initial_states: dict[Tensor, dict[str, Any]] = {}  # of the optimiser: of most, none
        self.scheduler: LRScheduler | None = None
        self.health = torch.zeros((), dtype=torch.float64)  # finite if all losses, gradients are
        self.has_value = not isinstance(loss, TraceTailAdaptive_ELBO)  # whose value is inf
        self.sizes: BatchTakenForData | None = BatchTakenForData()  # of the first step alone
        self.has_validated = False
        self.interrupts = Interrupts()
        self.compiled: CompiledSteps | None = None
        self.flat = set[FlatGroup]()  # of compiled steps
        if engine is not None and not self.has_value:
            warn_user(f"Training steps run eagerly: {type(loss).__name__} has no value.")
        elif engine is not None:
            training = self._training(is_summed)
            self.compiled = CompiledSteps(training, engine, False, compile_cache, shows_progress)
        self.steps = 0
        self.guide_steps = 0  # those of the guide alone, not among the others
        self.iterates: IterateSum | None = None  # the parameters after steps, where they are summed

    def step(self, batch: Batch, epoch: int, owner: Owner | None = None) -> Tensor:
        """Take one step of the owner's parameters, None for all; return the loss before it in nats.

        A NonFiniteError comes before this step's update; earlier ones may have been unchecked.
        """
        self.interrupts.check()
        before = random_state()  # that of torch alone, as it is read in each step
        self.group.begin(batch, f"step {self.steps + 1} and {self.guide_steps} of the guide alone")
        try:
            if not self.group.is_alone:
                self._prepare(batch)
            with self.sizes or nullcontext():
                loss = self._differentiate(batch, owner)
            if self.sizes is not None:  # the first step
                check_autoguides(self.model, self.guide, batch)
        except FAILURES as error:  # Pyro's validation finds a NaN
            places = self._find_non_finite(batch, before)
            if not places:
                raise
            raise self._error(places, epoch, owner) from error
        if owner is not None:
            if self.parameters.num_sorted < len(self.parameters.by_name):
                self._find_owners(batch)
            for parameter in self.parameters.others(owner):
                parameter.grad = None  # torch's optimisers skip parameters without a gradient
        if not self.group.is_alone:
            loss = self.group.combine(loss, self.parameters.by_name, self.parameters.buffers)
        optimizer = self.optimizer or self._start_optimizer()
        norm = clip_grad_norm_(self.parameters.by_name.values(), self.clip_norm).double()
        self.health = self.health.to(norm.device) + norm
        if self.has_value:
            self.health += loss.to(norm.device)
        every = 1 if norm.device.type == "cpu" else ACCELERATOR_CHECKS_EVERY
        if (self.steps + self.guide_steps) % (self.check_every or every) == 0:
            self.check(batch, epoch, before, owner)
        optimizer.step()
        self.parameters.zero_gradients()  # a later step of SVI would add to them
        self.steps += owner != "guide"
        self.guide_steps += owner == "guide"
        if self.iterates is not None and owner != "guide":
            self.iterates.add(self.parameters.by_name)
        return loss

    def take(
        self, piece: Batch | Table, count: int, epoch: int, coming: int, most: int
    ) -> Iterator[Tensor]:
        """Take ``count`` steps; yield their losses in nats, ``[steps]``, in blocks.

        Of one batch, or of those of a table. ``coming`` is how many such steps are known to come,
        these among them, ``most`` how many steps a block has at most.
        """
        done = 0
        while done < count:
            self.interrupts.check()
            batch = piece.batch(done) if isinstance(piece, Table) else piece
            assert self.compiled is not None
            table = (piece.columns, piece.index[done:]) if isinstance(piece, Table) else ()
            with batch.rows:
                call = Call(tuple(batch), {}, *table)
                self._present = batch, epoch
                found = self.compiled.find(call, coming - done)
                if isinstance(found, CompiledStep):
                    self.flat.update(found.groups)
                    losses = found.take_many(min(count - done, most)).clone()
                    first = self._note_block(found.step.health[0], losses)
                    if first is not None:
                        advance(found.groups, first - len(losses))
                        number = done + min(first, len(losses) - 1)
                        bad = piece.batch(number) if isinstance(piece, Table) else piece
                        self.check(bad, epoch)
                    self._add_sums(found, len(losses))
                else:
                    losses = found.reshape(1)
            done += len(losses)
            yield losses

    def _note_block(self, health: Tensor, losses: Tensor) -> int | None:
        """Count the steps of a block; return the first that is not finite, where that is checked.

        Compiled steps change nothing from that one on, and their losses are NaN or infinite. If
        only an earlier step, of another graph, was not finite, returns the number of steps.
        """
        self.steps += len(losses)
        before = self.health.to(health.device)  # also that of eager steps and other graphs
        self.health = torch.where(before.isfinite(), health.squeeze(0), before)
        every = self.check_every or (1 if health.device.type == "cpu" else ACCELERATOR_CHECKS_EVERY)
        if self.steps % every >= len(losses) or math.isfinite(self.health.item()):
            return None
        bad = (~losses.isfinite()).nonzero()
        first = int(bad[0]) if len(bad) else len(losses)  # it was in another graph
        self.steps -= len(losses) - first
        return first

    def _add_sums(self, step: CompiledStep, count: int) -> None:
        """Add what steps have summed; the parameters that they do not train were constant."""
        sums: dict[int, Tensor] = {}
        for group in step.groups:
            sums |= group.take_sums()
        if self.iterates is not None:
            values = self.parameters.by_name.items()
            found = {name: sums.get(id(p), p.detach() * count) for name, p in values}
            self.iterates.add(found, count)

    def end_compiled(self) -> None:
        """Let parameters no longer be views of buffers of compiled steps."""
        for group in self.flat:
            group.release()

    def begin_stage(self, average: Mapping[str, Tensor], factor: float) -> None:
        """Multiply the learning rate; go on from an average of the parameters if there is one."""
        if average:
            self.parameters.load({"parameter": dict(average), "buffer": {}})
            self.optimizer.state.clear()
            self.optimizer.state.update(
                {p: deepcopy(state) for p, state in self.initial_states.items()}
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _training(self, is_summed: bool) -> Training:
        """Return what compiled steps train, in one process."""
        if not self.group.is_alone:
            raise ValueError("compile=True trains in one process. Leave it out, or start one.")
        return Training(
            traced_loss(self.model, self.guide, self.loss),
            lambda call: self.step(*self._present),
            Owners(lambda: self.optimizer),
            clip_norm=self.clip_norm,
            is_guarded=True,
            is_summed=is_summed,
        )

    def check(
        self,
        batch: Batch,
        epoch: int,
        before: RandomState | None = None,
        owner: Owner | None = None,
    ) -> None:
        """Raise NonFiniteError if any loss or gradient so far was not finite; waits for the device.

        ``before`` is the random state before the step, None if it is not known; the other arguments
        are those of the step.
        """
        if not math.isfinite(self.health.item()):
            places = self._find_non_finite(batch, before or random_state())
            # The sum over all processes is not finite, so that all of them come here.
            gathered = self.group.processes.gather(places, "a NaN")
            if not self.group.is_alone:
                places = [f"process {n}: {each}" for n, own in enumerate(gathered) for each in own]
            if not places and before is not None:
                places = ["only the sum overflows"]
            elif not places:
                remedy = "; compile=False names the site" * (self.compiled is not None)
                places = [f"it did not recur with other random numbers{remedy}"]
            raise self._error(places, epoch, owner)

    def validate(self, loss: ELBO, held_out: Minibatches) -> tuple[float, float]:
        """Return the mean loss in nats and the mean rows of held-out batches."""
        group, found = self.group, []
        with self.evaluating(held_out):
            for batch in held_out:
                self.interrupts.check()
                group.begin(batch, "a batch of validation")
                if not self.has_validated:
                    check_autoguides(self.model, self.guide, batch)
                    self.has_validated = True
                with batch.rows:
                    own = 0.0 if group.has_no_rows else loss.loss(self.model, self.guide, *batch)
                found.append((group.weight * own, group.rows))
        value, rows = torch.as_tensor(found, dtype=torch.float64).mean(0).tolist()
        return sum(group.processes.gather(value, "the end of validation")), rows

    @contextmanager
    def evaluating(self, held_out: Minibatches) -> Iterator[None]:
        """Hold modules in eval mode, without gradients, with the same random draws each time."""
        seed = VALIDATION_SEED + self.group.processes.rank
        randomness = checkpoint.forked_rng(seed, held_out.generators)
        with eval_mode(*self.parameters.modules), torch.no_grad(), randomness:
            yield

    def begin_pass(self) -> None:
        """Let an optimiser that has modes, a schedule-free one, train its weights."""
        _set_mode(self.optimizer, "train")

    def end_pass(self) -> None:
        """Take all buffers from the first process: batch norms may change theirs unnoticed."""
        if not self.group.is_alone:
            self.group.processes.barrier_at("the end of an epoch")
            self.group.processes.copy_first(list(self.parameters.buffers.values()))

    def show_weights(self) -> None:
        """Let an optimiser that has modes put its averaged weights into the parameters."""
        _set_mode(self.optimizer, "eval")

    def end_epoch(self, value: float | None) -> None:
        """Step the learning-rate schedule; one of plateaus with ``value``, if there is one."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if value is not None:
                self.scheduler.step(value)
        elif self.scheduler is not None:
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on, random states aside."""
        return {
            "weights": self.parameters.copied(),
            "num_initial": self.num_initial,
            "steps": self.steps,
            "guide_steps": self.guide_steps,
            "of_guide": sorted(self.parameters.of_guide),
            "num_sorted": self.parameters.num_sorted,
            "optimiser": self._optimiser_settings(),
            "states": [each and each.state_dict() for each in (self.optimizer, self.scheduler)],
        }

    def set_state(self, path: Path, state: dict[str, Any], batches: Minibatches) -> None:
        """Load a state if it fits; runs of the loss on the batches create missing parameters.

        A CheckpointError comes before any parameter has changed.
        """
        saved, parameters = state["weights"], self.parameters
        missing = set(saved["parameter"])
        with parameters.restoring(batches.generators):
            for batch in batches:
                self._differentiate(batch)
                missing -= parameters.by_name.keys()
                if not missing:
                    break
        parameters.zero_gradients()
        checkpoint.check_same(path, *map(checkpoint.outline, (saved, parameters.weights)))
        parameters.by_name = {name: parameters.by_name[name] for name in saved["parameter"]}
        self._start_optimizer(state["num_initial"])
        checkpoint.check_same(path, state["optimiser"], self._optimiser_settings())
        for each, own in zip((self.optimizer, self.scheduler), state["states"], strict=True):
            if each is not None:
                each.load_state_dict(own)
        parameters.load(saved)
        parameters.of_guide, parameters.num_sorted = set(state["of_guide"]), state["num_sorted"]
        self.steps, self.guide_steps = state["steps"], state["guide_steps"]

    def _optimiser_settings(self) -> dict[str, Any]:
        """Return the classes of optimiser and schedule, and what the optimiser was made with."""
        options = self.optimizer.defaults.items()
        return {
            "optimizer": type(self.optimizer).__name__,
            "scheduler": self.scheduler and type(self.scheduler).__name__,
            **{k: checkpoint.plain(v) for k, v in options if k not in SPEED_OPTIONS},
        }

    def _prepare(self, batch: Batch) -> None:
        """Start from the first process's parameters; record what the loss may change."""
        parameters = self.parameters
        if self.group.is_new:
            with parameters.restoring():
                if not parameters.by_name:
                    self._differentiate(batch)
                if self.group.processes.is_first:
                    check_shares(self.model, self.guide, batch)
            parameters.zero_gradients()
            self.group.sync_initial(parameters.by_name, parameters.buffers)
        self.group.watch(parameters.by_name, parameters.buffers)

    def _differentiate(self, batch: Batch, owner: Owner | None = None) -> Tensor:
        """Return the loss as a float64 scalar, with its gradient in the parameters.

        Parameters that are known to be another owner's may have none.
        """
        parameters = self.parameters
        parameters.zero_gradients()
        if self.group.has_no_rows:
            some = next(iter(parameters.by_name.values()), torch.empty(()))
            return torch.zeros((), dtype=torch.float64, device=some.device)
        # Pyro's own may have another gradient than its `loss_and_grads`, which SVI takes.
        is_own = isinstance(self.loss, LogWeightELBO)
        run = self.loss.differentiable_loss if is_own else self.loss.loss_and_grads
        with batch.rows, ForgottenGradients(), poutine.trace(param_only=True) as captured:
            value: Any = run(self.model, self.guide, *batch)
        new = parameters.add(captured.trace)
        if self.optimizer is not None:
            _add(self.optimizer, new)
        value = sum(value) if isinstance(value, tuple) else value
        loss = torch.as_tensor(value, dtype=None if is_own else torch.float64)
        if is_own and loss.requires_grad:
            others = set(map(id, parameters.others(owner)))
            moving = [p for p in parameters.by_name.values() if id(p) not in others]
            loss.backward(inputs=moving if others else None)
        return loss.detach().double()

    def _find_owners(self, batch: Batch) -> None:
        """Find the guide's parameters: those that Pyro sees while it runs.

        Parameters of model runs that a guide hides from Pyro are not counted.
        """
        tracing = poutine.trace(param_only=True)
        with self.parameters.restoring(), torch.no_grad(), batch.rows, tracing as captured:
            self.guide(*batch)
        self.parameters.sort(captured.trace)

    def _start_optimizer(self, num_initial: int | None = None) -> Optimizer:
        """Make optimiser and schedule, with the first parameters and then those seen later."""
        parameters = list(self.parameters.by_name.values())
        if not parameters:
            raise ValueError("Model and guide have no parameters to train.")
        self.num_initial = len(parameters) if num_initial is None else num_initial
        self.optimizer = optimizer = self.make_optimizer(parameters[: self.num_initial])
        if not isinstance(optimizer, Optimizer):
            kind = type(optimizer).__name__
            remedy = "Pass e.g. partial(torch.optim.Adam, lr=1e-3)."
            raise TypeError(f"optimizer must return a torch optimiser, got {kind}. {remedy}")
        _add(optimizer, parameters[self.num_initial :])
        self.initial_states = {p: deepcopy(state) for p, state in optimizer.state.items()}
        self.begin_pass()
        self.scheduler = self.make_scheduler(optimizer) if self.make_scheduler else None
        return optimizer

    def _find_non_finite(self, batch: Batch, state: RandomState) -> list[str]:
        """Repeat a step's loss; return the data, parameters, site or gradients with a NaN."""
        search = FirstNonFiniteSite()
        with self.parameters.restoring(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_random_state(state)
            # The run may raise as it did before; the sites up to there are known.
            with suppress(Exception), validation_enabled(False), search:
                self._differentiate(batch)
        parameters = self.parameters.by_name
        gradients = {name: p.grad for name, p in parameters.items()}
        found = non_finite("data tensor", dict(enumerate(batch)))
        found += non_finite("parameter", parameters)
        return found + (
            [search.first] if search.first else non_finite("the gradient of parameter", gradients)
        )

    def _error(self, places: list[str], epoch: int, owner: Owner | None) -> NonFiniteError:
        self.parameters.zero_gradients()
        alone = f"step {self.guide_steps + 1} of the guide alone, before " * (owner == "guide")
        return NonFiniteError(
            f"The loss or its gradient is not finite in {alone}step {self.steps + 1}, epoch "
            f"{epoch}: {'; '.join(places)}. Check the data and scales near 0, lower the learning "
            "rate, or set clip_norm; check_every=1 finds the first such step."
        )


def _set_mode(optimizer: Any, mode: str) -> None:
    switch = getattr(optimizer, mode, None)  # torch's own optimisers have no modes
    if callable(switch):
        switch()


def _add(optimizer: Optimizer, parameters: list[Tensor]) -> None:
    # A group of their own would start at the first learning rate, and no schedule would change it.
    optimizer.param_groups[-1]["params"] += parameters
