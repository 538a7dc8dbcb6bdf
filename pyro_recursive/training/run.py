"""A run of `fit`: its epochs or blocks of steps, and what is recorded, kept and resumed."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pyro import validation_enabled
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from tqdm import tqdm

from pyro_recursive.losses.recursive_mixture import RecursiveMixture_ELBO, growing_mixture_of
from pyro_recursive.tracing.handlers import KLWarmup
from pyro_recursive.training import checkpoint as checkpoints
from pyro_recursive.training.aggressive import Phase
from pyro_recursive.training.compiled.step_graph import MAX_BLOCK
from pyro_recursive.training.data import Batch, Minibatches, Passes, Table, rows_of
from pyro_recursive.training.divergence import divergence_of, gaussians_of
from pyro_recursive.training.history import History
from pyro_recursive.training.learner import Learner
from pyro_recursive.training.parameters import IterateSum, Weights
from pyro_recursive.training.stopping import BLOCK, StopRule

OnStep = Callable[[int, Tensor], Any]
OnEpoch = Callable[[int, History], Any]
EXPECTED = 2000  # steps that a stop rule needs, for the choice of what to compile


@dataclass(frozen=True)
class Length:
    """How long to train: ``epochs`` or ``steps``, at most these with a ``tolerance`` of a rule."""

    epochs: int | None
    steps: int | None
    tolerance: float | None = None
    average: bool = False

    @property
    def records(self) -> int:
        """The number of epochs, or of blocks of steps."""
        return self.epochs or -(-(self.steps or 0) // BLOCK)

    @property
    def name(self) -> str:
        """What must not change when a run is resumed."""
        kind = "epochs" if self.epochs else "steps" if self.tolerance is None else "auto"
        if not self.average:
            return kind
        return "auto, averaged" if kind == "auto" else f"{self.records} {kind}, averaged"


class Run:
    """A run in progress; all of it but the data is in its checkpoint."""

    def __init__(
        self,
        learner: Learner,
        batches: Minibatches,
        length: Length,
        phase: Phase | None,
        path: Path | None,
        settings: dict[str, Any],
        on_step: OnStep | None,
        validate_args: bool,
    ) -> None:
        self.learner, self.batches, self.phase, self.path = learner, batches, phase, path
        self.length = length
        self.passes = Passes(batches) if length.epochs is None else None
        self.rule = None if length.tolerance is None else StopRule(length.tolerance)
        self.average = IterateSum() if length.average and self.rule is None else None
        self.processes = learner.group.processes
        self.on_step = on_step if self.processes.is_first else None
        self.validates = True  # the first epoch, which sees all data
        self.validate_args = validate_args
        self.generators = [*batches.generators, *(phase.generators if phase is not None else [])]
        self.history = History()
        self.best: Weights | None = None  # parameters and buffers of the best epoch
        self.begun: dict[str, float] | None = None  # what is done of an epoch that is resumed
        self.checkpoint_seconds, self.last_checkpoint = math.inf, time.monotonic()
        options = checkpoints.options_of(learner.loss)
        settings = {  # what must not change when a run is resumed
            **settings,
            "number of processes": self.processes.count,
            "number of data generators": len(self.generators),
            "rows of data": batches.rows,
            "batch_size": batches.size,
            "shuffle": batches.order is not None,
            "length": length.name,
            "loss": type(learner.loss).__qualname__,
            **{f"loss.{name}": value for name, value in options.items()},
            "aggressive": None if phase is None else phase.options,
        }
        self.settings = {name: checkpoints.plain(value) for name, value in settings.items()}

    @property
    def num_epochs(self) -> int:
        """The number of epochs done, or of blocks of steps."""
        return len(self.history.epoch)

    @property
    def steps_left(self) -> int:
        """The steps left, where they are counted: those of a rule, if it does not end earlier."""
        if self.rule is None:
            return (self.length.steps or 0) - self.learner.steps
        return 0 if self.rule.is_done else (self.length.steps or 0) - self.rule.steps

    @property
    def is_unfinished(self) -> bool:
        """Whether epochs or steps are left."""
        if self.length.epochs is not None:
            return self.num_epochs < self.length.epochs
        return self.steps_left > 0

    def epoch(
        self, weight: float, held_out: Minibatches | None, validation_loss: ELBO, bar: tqdm
    ) -> None:
        """Train for one epoch, validate, and record both."""
        begun = self.begun or dict.fromkeys(("batches", "loss", "rows", "seconds"), 0)
        start, history, phase = time.perf_counter() - begun["seconds"], self.history, self.phase
        if phase is not None and not phase.options.goes_on(history.mutual_information):
            phase = None
        is_judged = weight == 1 and phase is None and not _is_growing(self.learner)
        self.learner.iterates = self._sum_of_iterates(is_judged)
        loss, rows, count = self._train(weight, phase, bar, begun, start)
        validation = information = None
        if held_out is not None:
            validation, history.validation_rows = self.learner.validate(validation_loss, held_out)
        if phase is not None:
            information = self.processes.mean(phase.measure(), "mutual information")
        seconds = time.perf_counter() - start
        history.seconds.append(self.processes.from_first(seconds, f"epoch {self.num_epochs}"))
        history.epoch.append(self.num_epochs + 1)
        history.loss.append(loss)
        history.validation.append(validation)
        history.rows.append(rows)
        history.learning_rate.append(float(self.learner.optimizer.param_groups[0]["lr"]))
        history.steps.append(self.learner.steps)
        history.aggressive.append(phase is not None)
        history.guide_steps.append(self.learner.guide_steps)
        history.mutual_information.append(information)
        excess = self._judge(loss, count) if is_judged else None
        shown = {"loss": loss, "validation": validation, "mutual_information": information}
        shown["excess"] = excess
        bar.set_postfix({name: f"{v:.2f}" for name, v in shown.items() if v is not None})

    def _sum_of_iterates(self, is_judged: bool) -> IterateSum | None:
        """Return where the parameters of the next epoch are summed, None for nowhere."""
        if self.rule is None:
            return self.average if self.num_epochs >= self.length.records // 2 else None
        is_summed = self.length.average or gaussians_of(self.learner.guide) is not None
        return IterateSum() if is_judged and is_summed else None

    def _judge(self, loss: float, count: int) -> float | None:
        """Give the rule a block of steps; begin a stage where one has ended. Return the excess."""
        learner, rule = self.learner, self.rule
        if rule is None:
            return None
        divergence, mean = None, dict[str, Tensor]()
        if learner.iterates is not None:
            divergence = divergence_of(learner.guide, learner.parameters)
            if divergence is not None or self.length.average:
                mean = learner.iterates.mean()
        if rule.add(count, loss, mean, divergence):
            learner.begin_stage(rule.average, 1.0 if rule.is_done else 0.5)
        return rule.excess

    def _train(
        self,
        weight: float,
        phase: Phase | None,
        bar: tqdm,
        begun: dict[str, float],
        start: float,
    ) -> tuple[float, float, int]:
        """Return the mean loss in nats and the mean rows of an epoch, and how many steps it had."""
        learner, epoch = self.learner, self.num_epochs + 1
        count, rows = int(begun["batches"]), begun["rows"]
        # On the device, which is not waited for.
        total = torch.tensor(begun["loss"], dtype=torch.float64)
        order = [generator.get_state() for generator in self.batches.generators]
        # One graph serves all weights.
        is_weighted = weight < 1 or (learner.compiled is not None and self.settings["kl_warmup"])
        warmup: AbstractContextManager = KLWarmup(weight) if is_weighted else nullcontext()
        learner.begin_pass()
        with warmup, validation_enabled(is_validation_enabled() and self.validates):
            for losses, batch in self._steps(phase, epoch, count):
                sizes, learner.sizes = learner.sizes, None
                if sizes and self.batches.rows is not None and learner.group.is_alone:
                    sizes.warn(learner.model, batch, self.batches.rows, stacklevel=4)
                total, count = total.to(losses) + losses.sum(), count + len(losses)
                rows += learner.group.rows * len(losses)
                bar.update(len(losses))
                if self.on_step is not None:
                    for number, loss in enumerate(losses, learner.steps - len(losses) + 1):
                        self.on_step(number, loss)
                is_due = time.monotonic() - self.last_checkpoint >= self.checkpoint_seconds
                is_within = self.passes is None and count < (self.batches.count or 0)
                if is_due and is_within and phase is None:
                    learner.check(batch, epoch)
                    seconds = time.perf_counter() - start
                    done = {"batches": count, "loss": total.item(), "rows": rows}
                    self.write({**done, "seconds": seconds}, order)
            learner.check(batch, epoch)
            learner.end_pass()
            learner.show_weights()
        self.validates, self.begun = self.validate_args, None
        return total.item() / count, rows / count, count

    def _pieces(self, in_tables: bool, first: int) -> Iterator[tuple[Batch | Table, int]]:
        """Yield the batches of an epoch, or tables of them, and how many steps each is for."""
        if self.passes is not None:
            yield from self.passes.take(min(BLOCK, self.steps_left), in_tables)
            return
        self.batches.set_epoch(self.num_epochs + 1)
        source = self.batches.pieces if in_tables else self.batches.starting_at
        for piece in source(first):
            yield piece, len(piece.index) if isinstance(piece, Table) else 1

    def _steps(self, phase: Phase | None, epoch: int, first: int) -> Iterator[tuple[Tensor, Batch]]:
        """Take the steps of an epoch from a batch on; yield losses ``[steps]`` and the batch."""
        learner = self.learner
        is_compiled = learner.compiled is not None and phase is None
        step = learner.step if phase is None else phase.stepper()
        most = MAX_BLOCK if self.on_step is None else 1  # it may change what the next step uses
        for piece, count in self._pieces(is_compiled, first):
            batch = piece.batch(-1) if isinstance(piece, Table) else piece
            if not is_compiled:
                for _ in range(count):
                    yield step(batch, epoch).reshape(1), batch
                continue
            for losses in learner.take(piece, count, epoch, self._coming(piece), most):
                learner.group.rows = rows_of(batch)
                yield losses, batch

    def _coming(self, piece: Batch | Table) -> int:
        """Return how many steps on batches of this size are known to come."""
        alike = self.batches.count or 1  # batches of a pass
        if self.length.epochs is not None:
            passes = self.length.epochs - self.num_epochs
            alike = len(piece.index) if isinstance(piece, Table) else alike
        else:
            left = self.steps_left if self.rule is None else min(self.steps_left, EXPECTED)
            passes = -(-left // alike)
        is_last = not isinstance(piece, Table) and rows_of(piece) != self.batches.size
        return passes * (1 if is_last else alike)

    def end_epoch(self, has_validation: bool, keep_best: bool) -> None:
        """Step the schedule, keep the best weights, write the checkpoint."""
        judged = self.history.validation if has_validation else self.history.loss
        self.learner.end_epoch(judged[-1])
        if keep_best and self.history.best_epoch == self.num_epochs:
            self.best = self.learner.parameters.copied()
        self.write()

    def write(self, begun: dict[str, float] | None = None, order: Sequence[Tensor] = ()) -> None:
        """Write the checkpoint; within an epoch, with the states that its order is drawn from."""
        if self.path is not None:
            own = checkpoints.random_states(self.generators)
            own["generators"][: len(order)] = order
            passes = None if self.passes is None else self.passes.state()
            state = {
                "settings": self.settings,
                "learner": self.learner.state(),
                "history": asdict(self.history),
                "best": self.best,
                "begun": begun,
                "rule": None if self.rule is None else self.rule.state(),
                "average": None if self.average is None else vars(self.average),
                "passes": self.processes.gather(passes, "places in the data"),
                "random": self.processes.gather(own, "random states"),
            }
            if self.processes.is_first:
                checkpoints.save(self.path, state)
            self.processes.barrier_at("a checkpoint")
            self.last_checkpoint = time.monotonic()

    def report(self, on_epoch: OnEpoch | None) -> None:
        """Call a user's function, whose random draws are not those of the run."""
        if on_epoch is not None and self.processes.is_first:
            with checkpoints.forked_rng(generators=self.generators):
                on_epoch(self.num_epochs, self.history)

    def interrupt(self, error: KeyboardInterrupt) -> None:
        """Leave a consistent state after an interrupt, and end the other processes."""
        self.processes.send_error(error)
        self.history.interrupted = True
        self.learner.parameters.zero_gradients()
        self.learner.show_weights()

    def finish(self) -> None:
        """Record why training has stopped; leave the best parameters, or their average."""
        self.learner.end_compiled()
        history, load = self.history, self.learner.parameters.load
        if history.interrupted:
            history.stopped = "interrupted"
        elif self.rule is not None:
            history.stopped = self.rule.reason(self.length.steps or 0)
            if not self.rule.is_done:
                load({"parameter": self.rule.at_the_cap(), "buffer": {}})
        elif self.is_unfinished:
            history.stopped_early, history.stopped = True, "patience"
        elif self.average is not None:
            load({"parameter": self.average.mean(), "buffer": {}})
        if self.best is not None:
            load(self.best)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        A CheckpointError comes before anything has changed.
        """
        path, first = self.path, self.processes.is_first
        state = checkpoints.load(path) if first and path is not None and path.exists() else None
        state = self.processes.from_first(state, "a checkpoint to resume from")
        if path is None or state is None:
            return
        if self.settings["seed"] is None:  # the file has the random states
            self.settings["seed"] = state["settings"]["seed"]
        # Files of earlier versions do not say these.
        new = ("transform", "contents of data", "contents of validation")
        saved = {name: self.settings[name] for name in new} | {"length": "epochs"}
        checkpoints.check_same(path, saved | state["settings"], self.settings)
        self.learner.set_state(path, state["learner"], self.batches)
        self.history, self.best = History(**state["history"]), state["best"]
        self.begun = state.get("begun")
        like = self.learner.parameters.by_name
        if self.rule is not None:
            self.rule.set_state(state["rule"], like)
        if self.average is not None:
            self.average.set_state(state["average"], like)
        rank = self.processes.rank
        if self.passes is not None:
            in_tables = self.learner.compiled is not None and self.phase is None
            self.passes.set_state(state["passes"][rank], in_tables)
        checkpoints.set_random_states(state["random"][rank], self.generators)


def _is_growing(learner: Learner) -> bool:
    """Whether a loss trains a guide's components one by one, so that no rule judges them yet."""
    grows = isinstance(learner.loss, RecursiveMixture_ELBO)
    return grows and growing_mixture_of(learner.guide).stage.kind != "joint"
